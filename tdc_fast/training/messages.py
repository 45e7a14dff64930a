"""What a run says about itself: its plan, a line per phase, what to do next, and warnings about its options."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from tdc_fast.data.dataset import Dataset
from tdc_fast.distributed import world
from tdc_fast.nn.macs import measure_macs
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import outline_unet
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.limits import comma_numbers
from tdc_fast.runs.unet_flags import attention_sizes
from tdc_fast.training import cost

FEW_CALIBRATION_IMAGES = 16


def warn_of_small_batches(config: TrainConfig, num_groups: int) -> None:
    """Warn where a batch of stage 2 gives an expert less than one image.

    Args:
        config: the options of the run.
        num_groups: N, the number of experts.
    """
    batch = config.stage2_batch or config.batch_size
    images = [share * batch for share in cost.stage2_shares(config, num_groups)]
    starved = [expert for expert, count in enumerate(images) if count < 1]
    if starved:
        flag = "stage2_batch" if config.stage2_batch else "batch_size"
        names = "every expert" if len(starved) == num_groups else "expert " + ", ".join(map(str, starved))
        warnings.warn(
            f"--{flag} {batch} over {num_groups} experts gives {names} less than one image per step "
            f"({min(images):.3g}): most steps train only some experts, on one image each. Set --batch_size or "
            f"--stage2_batch to several images per expert, such as {16 * num_groups}",
            stacklevel=2,
        )


def warn_of_idle_steps(config: TrainConfig) -> None:
    """Warn where stage 1 goes on after its learning rate has fallen to 0."""
    steps, end = cost.stage1_steps(config) or 0, config.lr_anneal_steps
    if not config.base and 0 < end < steps:
        warnings.warn(
            f"the learning rate is 0 from step {end} on (--lr_anneal_steps), and stage 1 has {steps} steps "
            f"(--stage1_steps): the last {steps - end} train nothing",
            stacklevel=2,
        )


def warn_of_few_calibration_images(config: TrainConfig) -> None:
    """Warn where pruning is decided by a handful of images."""
    measured = config.calibration_batches * config.batch_size
    if measured < FEW_CALIBRATION_IMAGES:
        warnings.warn(
            f"pruning is decided on {measured} images (--calibration_batches {config.calibration_batches} times "
            f"--batch_size {config.batch_size}); raise either for a measure that does not depend on which images they "
            "are",
            stacklevel=2,
        )


def _describe_attention(config: TrainConfig) -> str:
    """Where the UNet has attention, and which of --attention_resolutions no level has."""
    levels, found = attention_sizes(config)
    where = f"at {_listed(found)} pixels and in" if found else "only in"
    asked = comma_numbers("attention_resolutions", config.attention_resolutions, int)
    lacking = [size for size in asked if size not in levels]
    text = f"{where} the middle block ({levels[-1]} pixels)"
    if not lacking:
        return text
    return f"{text}; no level has {_listed(lacking)} of --attention_resolutions, levels have {_listed(levels)} pixels"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def describe_plan(run: RunDirectory, dataset: Dataset) -> str:
    """What the run is going to do: data, model, steps of each phase, and files, as lines of text."""
    config, size = run.config, run.config.image_size
    model = outline_unet(config, run.in_channels)
    x = torch.zeros(1, run.in_channels, size, size, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    macs = measure_macs(model, x, t, **({"y": t} if config.class_cond else {}))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held_out = f"; {config.heldout:.0%} of the set is held out" if config.heldout else ""
    lines = [
        f"run directory: {run.path}",
        f"data:    {len(dataset)} {_describe_source(run)}, {size}x{size}x{run.in_channels}{held_out}",
        f"model:   {_short(parameters)} parameters, {_short(macs)} MACs per image",
    ]
    lines.append(f"         attention {_describe_attention(config)}")
    steps = cost.stage1_steps(config)
    shared = "" if world().alone else f", of all {world().size} processes together"
    stage1 = f"{'no limit of' if steps is None else steps} steps of {config.batch_size} images{shared}"
    if not config.groups:
        lines.append(f"train:   {stage1}")
    else:
        lines.append(f"stage 1: {f'taken from {config.base}' if config.base else stage1}")
        count = "as many groups as the elbow says" if config.groups < 0 else f"{config.groups} groups"
        how = f"boundaries {config.boundaries}" if config.boundaries else config.grouping
        budgets = f"budgets {config.budgets}" if config.budgets else f"k = {config.k}"
        search = _search_options(run)
        if search["budget_in"] == "latency":
            table = search["latency_table"]
            budgets += f" of the base's time ({f'measured in {table}' if table else 'estimated from MACs and bytes'})"
        lines.append(f"experts: {count} ({how}), {budgets}, agent {search['agent']}, rounds: {search['rounds']}")
        if config.shared_layers:
            lines.append(f"         neighbouring groups share {config.shared_layers}")
        steps2 = config.stage2_steps or f"as many as --total_share {config.total_share} allows:"
        lines.append(f"stage 2: {steps2} steps of {config.stage2_batch or config.batch_size} images over all experts")
    saved = f"a checkpoint every {config.save_interval} steps, a row of progress.csv every {config.log_interval}"
    return "\n".join([*lines, f"files:   {saved}"])


def _search_options(run: RunDirectory) -> dict[str, Any]:
    """What the widths are, or will be, searched with: `tdc_fast.prune` may have taken other options than the run's."""
    phases = (run.read("macs.json") or {}).get("phases", {})
    done = phases.get("pruning", {})
    if "agent" in done:
        return {"budget_in": "macs", "latency_table": "", **done}
    names = ("budget_in", "latency_table", "agent", "rounds")
    return {name: getattr(run.config, name) for name in names}


def _describe_source(run: RunDirectory) -> str:
    config = run.config
    if run.latents is None:
        return f"images of {config.data_dir or 'the given dataset'}"
    space = run.latents.space
    return f"latents ({space.autoencoder}) of {config.latents or 'the given dataset'}"


def describe_groups(groups: TimestepGroups) -> str:
    """The groups, in one line."""
    return f"groups: {groups.num_groups} ({groups.strategy}), boundaries {', '.join(map(str, groups.boundaries))}"


def describe_widths(run: RunDirectory, plan: WidthPlan | None) -> str:
    """Budget and MACs of every expert as shares of the base's, and its time where estimated, in one line."""
    if plan is None:
        return "widths: every expert keeps the whole base"
    base_macs = (run.read("macs.json") or {})["per_sample"]["forward"]["base"]
    shares = ", ".join(f"{macs / base_macs:.1%}" for macs in plan.macs)
    budgets = ", ".join(f"{budget / base_macs:.1%}" for budget in plan.budgets)
    if not plan.latency:
        return f"widths: {shares} of the base's MACs (budgets {budgets})"
    times = ", ".join(f"{ns / 1e6:.4g}" for ns in plan.latency)
    allowed = ", ".join(f"{ns / 1e6:.4g}" for ns in plan.latency_budgets)
    in_macs, in_time = f" (budgets {budgets})" if budgets else "", f" (budgets {allowed})" if allowed else ""
    return f"widths: {shares} of the base's MACs{in_macs}; {times} ms a batch, estimated{in_time}"


def describe_cost(run: RunDirectory) -> str:
    """What each phase cost, and all together against the baseline, in one line."""
    costs = run.read("macs.json") or {}
    parts = [f"{name} {_short(phase['macs'])}" for name, phase in costs.get("phases", {}).items() if phase.get("macs")]
    total = f"total {_short(costs.get('total', 0))} MACs"
    share = costs.get("total_over_baseline")
    return f"cost:   {', '.join([*parts, total])}" + (f", {share:.3f} of the baseline's" if share else "")


def describe_next(run: RunDirectory) -> str:
    """The pictures of a run and the commands that use it, as lines of text."""
    pictures = [run.path / f"{name}.png" for name in ("similarity", "search", "widths", "agents")]
    drawn = [path for path in (*pictures, *sorted((run.path / "samples").glob("*.png"))) if path.is_file()]
    lines = [f"pictures: {', '.join(map(str, drawn))}"] if drawn else []
    if run.latents is not None:
        return "\n".join([*lines, "next:", f"    python -m tdc_fast.sample --run {run.path} --vae DIR"])
    lines += [
        "next:",
        f"    python -m tdc_fast.sample --run {run.path}",
        f"    python -m tdc_fast.nll --run {run.path}",
    ]
    data = run.config.data_dir
    return "\n".join([*lines, *([f"    python -m tdc_fast.evaluate {run.path} {data}"] if data else [])])


def _short(number: float) -> str:
    """A large number with its unit, such as "3.2 M"."""
    units = ("", " k", " M", " G", " T", " P", " E")
    power = min(int(math.log10(max(abs(number), 1))) // 3, len(units) - 1)
    return f"{number / 1000**power:.4g}{units[power]}"

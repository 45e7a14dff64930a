"""The study "images": the main table on your own images, trained for as many minutes as you give it.

    python -m bench.paper main --study images --data_dir DIR --device cuda --minutes 60 --out RESULTS

Each kind of run is timed in a short warm-up, which decides how many steps all models train. The folder of the results
then holds the runs, the samples of every model (runs/seed0/*/samples), the table (main-images.md) and report.html. A
second call goes on where the first was stopped.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

from bench.paper.recipes import Recipe, Study, contestant, images_study, stage1
from bench.paper.run import Outcome, protocol, refuse_what_time_forbids, run_rows
from bench.paper.sizing import Sizing, decide, least_steps, warm_up
from bench.paper.summary import summarise, write_table
from bench.paper.tables import TABLES, Table, variant, with_merged
from tdc_fast.atomic import write_json
from tdc_fast.command_line import check_writable, parse_flags
from tdc_fast.data.image_sources import OnCorrupt
from tdc_fast.errors import invalid
from tdc_fast.experiments.assemble import Subject, compare_runs, describe_environment
from tdc_fast.experiments.folder import begun_with
from tdc_fast.experiments.measure import MeasuringProtocol, load_reference
from tdc_fast.report import write_report
from tdc_fast.runs.build import named_device, split_data
from tdc_fast.runs.limits import PathText, Within, check_limits, comma_numbers
from tdc_fast.runs.options import TimeOptions
from tdc_fast.text_files import read_record

TABLE = TABLES["main"]
CANDIDATE = "tdc"
SEED_NOTE = (
    "The intervals on this page cover the noise of measuring, not that of training: run the same command with another "
    "--seed and --out to see what another training seed changes."
)


@dataclass(frozen=True, kw_only=True)
class ImagesOptions(TimeOptions):
    """TDC and all its controls on your own images."""

    data_dir: PathText = ""
    """Folder of images (searched recursively), an .npz or .npy array, or the name of a built-in set: digits, photos."""
    on_corrupt: OnCorrupt = "error"
    """What to do with an unreadable image: refuse it by name before anything is trained, or leave it out (skip)."""
    minutes: Annotated[float, Within(0, 10**6)] = 60.0
    """Minutes for everything: warm-up, training of all models, measuring. They decide how many steps all train."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. On a GPU models train and are measured in bf16, elsewhere in fp32."""
    out: PathText = "runs/images"
    """Folder for the runs, the samples, the table and report.html; the same command with it continues."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Training seed."""
    image_size: Annotated[int, Within(1, 2**14)] = 32
    """Height and width in pixels to which the images are brought."""
    num_channels: Annotated[int, Within(1, 2**13)] = 64
    """Channels of the UNet's first level."""
    channel_mult: str = ""
    """Comma list, one multiple of --num_channels per level; empty chooses by image size as improved-diffusion does."""
    num_res_blocks: Annotated[int, Within(1, 64)] = 2
    """Residual blocks per level."""
    attention_resolutions: str = "16,8"
    """Comma list of the resolutions (pixels) whose levels have attention."""
    batch_size: Annotated[int, Within(2, 2**20)] = 128
    """Images per step, of stage 2 over all experts together; the small batch of the controls is the share of one."""
    groups: Annotated[int, Within(2, 2**12)] = 4
    """Groups of timesteps of the TDC models, each with an expert."""
    variants: str = ""
    """Comma list of further TDC models, each with one option of stage 2: shared, shared-pairs, shared-convolutions,
    shared-level0, lr-high-snr, lr-low-snr, ema-high-snr, ema-low-snr, slope, distillation, distillation-weak;
    pruned at 0.8 C, or with whole- before the name whole at C."""
    merged: str = ""
    """Comma list of scales: further rows, with the experts of each TDC model merged into one dense model; 1 is their
    average, others are task arithmetic. Nothing is trained for them."""
    samples: Annotated[int, Within(2, 10**7)] = 5000
    """Images per draw of a model."""
    draws: Annotated[int, Within(1, 10**4)] = 3
    """Independent draws of each model; their spread is the noise of the Fréchet distance."""
    sampling_steps: Annotated[int, Within(1, 10**6)] = 50
    """DDIM steps."""
    loss_points: Annotated[int, Within(1, 10**6)] = 25
    """Timesteps in each quarter at which the held-out loss is measured."""


def images_main(table: str, arguments: Sequence[str]) -> None:
    """Parse the flags of the study and run it.

    Args:
        table: the table that is asked for.
        arguments: all others, without --study.

    Raises:
        ValueError: the study does not have that table, or an option is refused.
    """
    values = parse_flags(
        {"images": ImagesOptions},
        arguments,
        defaults={},
        prog="python -m bench.paper main --study images",
        description="The main table on your own images: uniform baselines, small batches, N = 1, TDC whole and pruned.",
    )
    if table != TABLE.name:
        raise invalid("table", table, f"{TABLE.name}, the table of the study images")
    run_images(ImagesOptions(**values))


def run_images(options: ImagesOptions, *, in_process: bool = False) -> Path:
    """Decide the number of steps, train and measure all models, and write table and report.

    Args:
        options: what to train on, for how long, and where.
        in_process: start no worker process (for tests).

    Returns:
        The path of report.html.

    Raises:
        ValueError: an option is refused, the minutes are too few, or the folder holds another study.
        KeyboardInterrupt: stopped by Ctrl-C after saving.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        print(f"[{minutes}:{seconds:02d}] {text}", flush=True)

    check_limits(ImagesOptions, vars(options))
    if not options.minutes:
        raise invalid("minutes", options.minutes, "a number above 0")
    check_writable(Path(options.out))
    out, processes = Path(options.out), 0 if in_process else 1
    study, table = _study(options, _SHORTEST), _table(options)
    how = dataclasses.replace(
        protocol(study, options.samples, options.draws),
        sampling_steps=options.sampling_steps,
        points_per_group=options.loss_points,
    )
    least = least_steps(study, _training_images(study, table, options))
    sizing = _sizing(options, study, table, how, least, processes, say)
    study = _study(options, sizing.baseline_steps)
    for line in _decided(study, table, sizing, options):
        say(line)
    runs = out / "runs"
    outcomes = run_rows(study, table.rows, [options.seed], runs, how, processes, say)
    page = _write(study, table, outcomes, runs, how, options, time.monotonic() - began)
    say(f"report: {page.resolve()}")
    return page


_SHORTEST = 4  # steps of a study that is only checked


def _table(options: ImagesOptions) -> Table:
    """The main table with the variants that are asked for, each once, and what is merged of their experts."""
    names = dict.fromkeys(name for part in options.variants.split(",") if (name := part.strip()))
    table = dataclasses.replace(TABLE, rows=(*TABLE.rows, *map(variant, names)))
    return with_merged(table, comma_numbers("merged", options.merged, float))


def _study(options: ImagesOptions, steps: int) -> Study:
    """The study with C in steps.

    Raises:
        ValueError: an option is not possible.
    """
    device = named_device(options.device)
    if options.batch_size % options.groups:
        remedy = f"a multiple of --groups {options.groups}, as the experts share a batch"
        raise invalid("batch_size", options.batch_size, remedy)
    names = ("on_corrupt", "image_size", "num_channels", "channel_mult", "num_res_blocks", "attention_resolutions")
    study = images_study(
        options.data_dir,
        options.batch_size,
        steps,
        options.groups,
        **{name: getattr(options, name) for name in names},
        device=str(device),
        precision="bf16" if device.type == "cuda" else "fp32",
    )
    study = dataclasses.replace(study, sampling_steps=options.sampling_steps, loss_points=options.loss_points)
    return dataclasses.replace(study.in_time(options), name=study.name)  # the folder is of these options alone


def _training_images(study: Study, table: Table, options: ImagesOptions) -> int:
    """The number of training images, once everything that can be checked without a run is.

    Raises:
        ValueError: the images are missing or cannot be shown, or the network is not possible.
    """
    pairs = [contestant(study, recipe, options.seed, Path(options.out)) for recipe in table.rows]
    images, _ = split_data(pairs[0][0].config)
    if images.channels not in (1, 3):
        raise invalid("data_dir", options.data_dir, f"images with 1 or 3 channels, not {images.channels}")
    return len(images)


def _recorded(options: ImagesOptions) -> dict[str, Any]:
    """The options that decide the numbers."""
    recorded = {name: value for name, value in dataclasses.asdict(options).items() if name != "out"}
    return {**recorded, "device": named_device(options.device).type}


def _sizing(
    options: ImagesOptions,
    study: Study,
    table: Table,
    how: MeasuringProtocol,
    least: int,
    processes: int,
    say: Callable[[str], None],
) -> Sizing:
    """What an earlier call decided, or what this one decides after a warm-up."""
    out, recorded = Path(options.out), _recorded(options)
    record, decision, warm = out / "study.json", out / "sizing.json", out / "warmup"
    if begun_with(record, recorded, "study", ImagesOptions, leftovers=(decision.name, warm.name)):
        try:
            return Sizing(**read_record(decision)["decided"])
        except (KeyError, TypeError) as error:
            remedy = "the steps that the study in this folder decided on; begin anew with another --out"
            raise invalid("out", str(decision), remedy) from error
    if study.tells_time:
        refuse_what_time_forbids(study, table.rows, out)
    shutil.rmtree(warm, ignore_errors=True)  # of a call that was stopped in it
    say(f"warm-up: a few steps of every kind of run, to divide {options.minutes:g} minutes")
    try:
        paces = warm_up(study, table.rows, options.seed, warm, how, processes, say)
        sizing = decide(study, table.rows, paces, options.minutes, least)
    finally:
        shutil.rmtree(warm, ignore_errors=True)
    for key, pace in {"stage 1": paces.stage1, **paces.rows}.items():
        say(f"{key}: {1000 * pace.step:.1f} ms per step, {pace.fixed:.1f} s per run besides")
    say(f"measuring: about {paces.measuring:.0f} s per model")
    write_json(decision, {"decided": dataclasses.asdict(sizing), "measured": dataclasses.asdict(paces)})
    write_json(record, recorded)  # last: with it the study has begun
    return sizing


def _decided(study: Study, table: Table, sizing: Sizing, options: ImagesOptions) -> list[str]:
    """What was decided, in lines."""
    first = stage1(study, table.rows[0], options.seed, Path(options.out))
    steps = ", ".join(f"{recipe.label}: {sizing.steps[recipe.key]}" for recipe in table.rows if not recipe.merging)
    return [
        f"decided: C is {sizing.baseline_steps} steps of {study.settings['batch_size']} images; all {len(table.rows)} "
        f"models and their measuring take about {sizing.seconds / 60:.1f} of {options.minutes:g} minutes",
        f"decided: steps after the shared stage 1 of {first.config.stage1_steps}, at most: {steps}",
    ]


def _write(
    study: Study,
    table: Table,
    outcomes: dict[str, list[Outcome]],
    runs: Path,
    how: MeasuringProtocol,
    options: ImagesOptions,
    seconds: float,
) -> Path:
    """Write table and report; returns the path of the report."""
    out, reference = Path(options.out), load_reference(runs / f"reference-{how.samples}.pt")
    result = summarise(table, study, outcomes, [options.seed], how, reference, describe_environment(), cpu_minutes=None)
    result |= {
        "sizing": read_record(out / "sizing.json"),
        "date": date.today().isoformat(),
        "command": _command(options),
    }
    print(write_table(result, out))
    pairs = [contestant(study, recipe, options.seed, runs / f"seed{options.seed}") for recipe in table.rows]
    models = [
        dataclasses.replace(model, description=describe(recipe, study))
        for recipe, (_, model) in zip(table.rows, pairs, strict=True)
    ]
    subject = Subject(
        title=f"Divide-and-conquer training on {Path(options.data_dir).name}",
        subtitle=(
            f"One uniform denoiser against experts for {options.groups} groups of timesteps, whole and pruned, with "
            "controls for batch size, for the experts' recipe and for compute; same data, same shared first stage, "
            "training compute measured in multiply-accumulates."
        ),
        images="images",
        settings=dict(study.settings),
        options=_recorded(options),
        pruned=CANDIDATE,
        seed_note=SEED_NOTE,
    )
    measured = {key: ours[0].measured for key, ours in outcomes.items()}
    comparison = compare_runs(subject, pairs[0][0], models, measured, reference, how, {"last call": seconds})
    baselines = tuple(recipe.key for recipe in table.rows if not _is_tdc(recipe))
    return write_report(comparison, out, CANDIDATE, baselines)


def _is_tdc(recipe: Recipe) -> bool:
    return recipe.experts is not None and recipe.experts.get("groups") != 1


def describe(recipe: Recipe, study: Study) -> str:
    """How a model of the main table is trained after stage 1 and what it is there for, for the report."""
    small, factor = study.small_batch, study.small_factor
    if recipe.merging is not None:
        arithmetic = f"by task arithmetic, scale {recipe.merging.scale:g}"
        how = "averaged" if recipe.merging.method == "average" else arithmetic
        return f"The experts of {recipe.run} as one dense model, {how}: the same training, without routing or pruning."
    end = f"ends at {recipe.cost:g} C"
    if recipe.experts is None and not recipe.small_batch:
        return f"One denoiser for all timesteps; the learning rate falls to 0 after stage 1, and training {end}."
    if recipe.experts is None:
        return (
            f"The same with {factor} times the steps on {small} images each, as many as an expert gets in a step: "
            f"small batches alone help. Training {end}."
        )
    pruned = recipe.mean_budget or recipe.experts.get("k") != 1.0
    if not _is_tdc(recipe):
        return (
            f"One expert for all timesteps, {'pruned to the mean of the budgets, ' if pruned else ''}trained as the "
            f"experts are, on {small} images per step: the recipe without groups. Training {end}."
        )
    of_time = " of the base's time" if study.experts.get("budget_in") == "latency" else ""
    how = f"pruned to their budgets (k = {study.experts['k']}{of_time})" if pruned else "whole"
    ranges = {name: f"{first:g} to {last:g}" for name, (first, last) in recipe.by_group.items()}
    changed = {name: value for name, value in {**recipe.experts, **ranges}.items() if name != "k"}
    also = "".join(f", --{name} {value}" for name, value in changed.items())
    return f"{study.experts['groups']} experts, {how}, each fine-tuned on its own timesteps{also}. Training {end}."


def _command(options: ImagesOptions) -> str:
    """The command that makes the table again, without the folder."""
    changed = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(ImagesOptions)
        if field.name != "out" and getattr(options, field.name) != field.default
    }
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in changed.items())
    return f"python -m bench.paper {TABLE.name} --study images {flags}"

"""Trained denoisers to sample from or evaluate: from a run directory, or from one file of weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tdc_fast.data.latent_space import LatentSpace
from tdc_fast.data.latents import LatentFacts
from tdc_fast.diffusion import Diffusion
from tdc_fast.errors import invalid
from tdc_fast.nn.inference import ForInference, for_inference
from tdc_fast.nn.one_expert import as_one_expert
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.averages import UNTRAINED, initial_share
from tdc_fast.runs.build import (
    Data,
    build_diffusion,
    build_unet,
    refuse_what_cannot_fit,
    split_data,
    split_digest,
)
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.loading import Run, load_run
from tdc_fast.runs.options import DiffusionOptions, ModelOptions
from tdc_fast.runs.precision import DtypeName, dtype_word, named_dtype
from tdc_fast.runs.weights import load_weights, read_description
from tdc_fast.text_files import read_record

Which = Literal["auto", "experts", "base"]
FACTS = tuple(field.name for section in (ModelOptions, DiffusionOptions) for field in fields(section))
"""The flags that describe a file of weights."""
FREE_AT_SAMPLING = frozenset({"timestep_respacing", "dropout", "use_checkpoint", "in_channels"})
"""Those of them that may differ from training."""


@dataclass(frozen=True)
class TrainedDenoiser:
    """A trained model and what is needed to sample from it.

    It is read onto the CPU, in fp32; `on` moves it to a device and chooses the precision::

        denoiser = from_run("runs/cifar").on("cuda", "bfloat16")
        images, labels = draw_samples(denoiser, 64, device="cuda")

    Attributes:
        model: called as model(x, t) with original timesteps.
        diffusion: its process, respaced if asked for.
        image_size: H = W of the images.
        channels: channels of the images.
        num_classes: rows of the label embedding; 0 if the model is not class conditional.
        classes: the classes that it was trained on, as far as that is recorded, else all of them.
        name: for messages.
        config: the options that it was trained with.
        run: the run that it came from, if any.
        class_counts: how many of its training images have each of `classes`; () where that is not recorded.
        latents: the latent space that it draws from, whose samples an autoencoder has to decode; None where it draws
            images.
    """

    model: nn.Module
    diffusion: Diffusion
    image_size: int
    channels: int
    num_classes: int
    classes: tuple[int, ...]
    name: str
    config: TrainConfig
    run: Run | None = None
    class_counts: tuple[int, ...] = ()
    latents: LatentSpace | None = None

    @property
    def null_class(self) -> int | None:
        """The label for no class that it was trained with; None if it was trained without --label_dropout."""
        return self.config.null_class

    @property
    def groups(self) -> TimestepGroups | None:
        """The groups of timesteps of its run, or of the packed model; None without."""
        if self.run is not None:
            return self.run.groups
        return getattr(self.model, "groups", None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.image_size, self.image_size)

    @property
    def dtype(self) -> str:
        """What the model computes in: "float32", "bfloat16" or "float16"."""
        return dtype_word(self.model.dtype) if isinstance(self.model, ForInference) else "float32"

    def on(self, device: torch.device | str, dtype: DtypeName = "auto") -> TrainedDenoiser:
        """The denoiser on a device, in a precision; its model moves there, and its weights are cast once.

        On a GPU a dense model in 16 bits runs on the routed kernels (`tdc_fast.nn.inference.for_inference`). Outputs
        and the arithmetic of the process stay in fp32.

        Args:
            device: the device.
            dtype: "float32", "bfloat16" or "float16"; "auto" is that of training on a GPU, and float32 on the CPU.

        Raises:
            ValueError: the device does not compute in that dtype.
        """
        device = torch.device(device)
        chosen = named_dtype(dtype, device, self.config.mixed_precision)
        return replace(self, model=for_inference(self.model.to(device), chosen))

    def batch_invariant(self) -> TrainedDenoiser:
        """The same denoiser, on the routed kernels also where it is a single one; see `as_one_expert`."""
        if isinstance(self.model, ForInference):
            raise invalid("denoiser", f"one that computes in {self.dtype}", "batch_invariant() first, then on(...)")
        if isinstance(self.model, RoutedModel):
            return self
        return replace(self, model=as_one_expert(self.model, self.diffusion.original_num_timesteps))


def split_of(denoiser: TrainedDenoiser) -> tuple[Data, Data | None]:
    """The images or latents that a denoiser was trained on, and those that were held out from it, if any.

    Raises:
        ValueError: they are missing, or were changed since, so that others are held out now.
    """
    config = denoiser.config
    trained_on, heldout = split_data(config)
    recorded = None if denoiser.run is None else denoiser.run.directory.split
    if heldout is not None and recorded not in (None, split_digest(config, trained_on)):
        remedy = f"the images as {denoiser.name} was trained on them; they changed, and now others are held out"
        raise invalid("data_dir", config.latents or config.data_dir, remedy)
    return trained_on, heldout


def refuse_latents(denoiser: TrainedDenoiser, what: str) -> None:
    """Refuse a denoiser of latents for what needs one of images.

    Args:
        denoiser: the denoiser.
        what: what is refused, and what to do instead, for the error.

    Raises:
        ValueError: it draws latents.
    """
    if denoiser.latents is not None:
        raise invalid("model", denoiser.name, f"one of images: {what}")


def stored_facts(*, run: str = "", model_path: str = "") -> dict[str, Any]:
    """The flags in `FACTS` that a run or the description beside a file of weights records.

    Args:
        run: a run directory; or
        model_path: a file of weights. One of improved-diffusion has no description: the result is empty.

    Raises:
        ValueError: it is no run, or the file holds the experts of a run.
    """
    if run:
        path = Path(run) / "config.json"
        if not path.is_file():
            raise invalid("run", run, "a run directory: one with a config.json")
        values, channels = read_record(path), read_record(path.with_name("run.json")).get("in_channels", 0)
    else:
        description = read_description(Path(model_path)) or {}
        if description.get("stage") == "experts":
            raise invalid("model_path", model_path, "a single denoiser; sample a run's experts with --run RUN")
        values, channels = description.get("config", {}), description.get("in_channels", 0)
    facts = {name: values[name] for name in FACTS if name in values}
    return {**facts, "in_channels": channels} if facts else {}


def refuse_mismatch(source: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse flags that contradict what a model was trained with.

    Args:
        source: the model, for errors.
        stored: the flags that it was trained with.
        wanted: the flags that are given.

    Raises:
        ValueError: naming the first flag that differs.
    """
    for name, value in stored.items():
        if name not in FREE_AT_SAMPLING and wanted[name] != value:
            raise invalid(name, wanted[name], f"{value!r}, with which {source} was trained")


def from_run(path: str | Path, which: Which = "auto", timestep_respacing: str = "") -> TrainedDenoiser:
    """The averaged (EMA) weights of a run.

    Args:
        path: the run directory.
        which: "experts", "base", or "auto" for the experts if there are any, else the base.
        timestep_respacing: replaces that of the run, unless empty.

    Raises:
        ValueError: the run or the model does not exist.
    """
    run = load_run(path)
    config: TrainConfig = run.config
    has_experts = bool(config.groups and run.steps("experts"))
    use_experts = which == "experts" or (which == "auto" and has_experts)
    _warn_of_untrained_averages(run, "experts" if use_experts else "base")
    model = run.experts() if use_experts else run.base()
    return TrainedDenoiser(
        model=model.eval(),
        diffusion=build_diffusion(config, timestep_respacing),
        image_size=config.image_size,
        channels=run.in_channels,
        num_classes=config.label_rows if config.class_cond else 0,
        classes=_classes(config, run.directory.classes, str(run.path / "run.json")),
        name=f"{path} ({'experts' if use_experts else 'base'})",
        config=config,
        run=run,
        class_counts=tuple(run.directory.class_counts or ()),
        latents=None if run.directory.latents is None else run.directory.latents.space,
    )


def placed(denoiser: TrainedDenoiser, device: torch.device, dtype: DtypeName = "auto") -> TrainedDenoiser:
    """`denoiser.on(device, dtype)`; prints how the model computes, unless that is in fp32 and as it was read.

    Raises:
        ValueError: the device does not compute in that dtype.
    """
    there = denoiser.on(device, dtype)
    if isinstance(there.model, ForInference):
        kernels = ", on the routed kernels" if there.model.on_routed_kernels else ""
        print(f"model:   {there.name} in {there.dtype}{kernels}", flush=True)
    return there


def _warn_of_untrained_averages(run: Run, stage: str) -> None:
    config, steps = run.config, run.steps(stage)
    if not steps or config.ema_ramp or (stage == "base" and config.base):
        return
    share = initial_share(config.ema_rates[0], steps[-1])
    if share > UNTRAINED:
        warnings.warn(
            f"{share:.0%} of the averaged weights of {run.path} at step {steps[-1]} are still what stage {stage} began "
            f"with: --ema_rate {config.ema_rates[0]} is for longer runs; train with --ema_ramp True",
            stacklevel=3,
        )


def from_checkpoint(path: str | Path, facts: Mapping[str, Any]) -> TrainedDenoiser:
    """The weights in a file, in the UNet and with the diffusion process that flags describe.

    Args:
        path: the file.
        facts: the flags in `FACTS`.

    Raises:
        ValueError: the file is missing or damaged, or does not fit the flags.
    """
    channels = facts["in_channels"] or 3  # as all of improved-diffusion's
    config = TrainConfig.from_dict({**{name: facts[name] for name in FACTS}, "in_channels": channels})
    refuse_what_cannot_fit(config, channels, torch.device("cpu"))
    model = build_unet(config, channels)
    description = load_weights(Path(path), config, model, "model_path") or {}
    facts_of_latents = LatentFacts.from_dict(description.get("latents"), "model_path", str(path))
    trained = description.get("config", {})
    if trained.get("use_fp16") is True or trained.get("precision") == "bf16":
        config = config.replace(precision="bf16")
    if trained.get("label_dropout"):
        config = config.replace(label_dropout=trained["label_dropout"])
    if trained.get("background"):
        config = config.replace(background=trained["background"])
    return TrainedDenoiser(
        model=model.eval(),
        diffusion=build_diffusion(config),
        image_size=config.image_size,
        channels=channels,
        num_classes=config.label_rows if config.class_cond else 0,
        classes=_classes(config, description.get("classes"), str(path)),
        name=str(path),
        config=config,
        class_counts=_counts(description, str(path)),
        latents=None if facts_of_latents is None else facts_of_latents.space,
    )


def _classes(config: TrainConfig, recorded: Any, source: str) -> tuple[int, ...]:
    """The classes to sample.

    Raises:
        ValueError: the record is damaged.
    """
    if not config.class_cond:
        return ()
    rows = range(config.label_rows if config.null_class is None else config.null_class)
    if recorded is None:
        return tuple(rows)
    if not isinstance(recorded, list) or not recorded or not all(type(c) is int and c in rows for c in recorded):
        raise invalid("classes", recorded, f"classes of the model, which has {len(rows)}, in the record of {source}")
    return tuple(recorded)


def _counts(description: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """How many training images have each class, from the description beside a file of weights.

    Raises:
        ValueError: the record is damaged.
    """
    counts, classes = description.get("class_counts"), description.get("classes") or []
    if counts is None:
        return ()
    if not isinstance(counts, list) or not all(type(n) is int and n > 0 for n in counts) or len(counts) != len(classes):
        raise invalid("class_counts", counts, f"a number above 0 for each class, in the record of {source}")
    return tuple(counts)

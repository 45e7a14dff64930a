"""Convert weights between this library, guided-diffusion and diffusers: `python -m tdc_fast.convert --model_path ...`.

A file of ours or of improved-diffusion becomes a folder of diffusers (`UNet2DModel`); such a folder, or with
`--guided True` a file of guided-diffusion, becomes a file of ours. Where the networks differ, what differs is refused
by name and nothing is written.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("convert"))

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from tdc_fast.atomic import atomic_file
from tdc_fast.command_line import check_writable, parse_denoiser_flags, run_command
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid
from tdc_fast.models.guided import from_guided_diffusion, num_heads_of
from tdc_fast.models.iddpm import UNet
from tdc_fast.runs.build import build_unet
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.denoisers import FACTS, from_checkpoint, from_run
from tdc_fast.runs.limits import PathText, Within
from tdc_fast.runs.unet_flags import flags_of
from tdc_fast.runs.weights import check_finite, load_verified
from tdc_fast.text_files import read_record

__all__ = ["ConvertOptions", "main"]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to convert, and where to."""

    run: PathText = ""
    """Run directory, whose base is written as a folder for diffusers."""
    model_path: PathText = ""
    """Instead of --run: a folder of diffusers (UNet2DModel), or a file of weights."""
    out: PathText = ""
    """The file (.pt) or, for diffusers, the folder to write; it must not exist."""
    guided: bool = False
    """The file is from guided-diffusion; also give the flags that it was trained with."""
    num_head_channels: Annotated[int, Within(-1, 2**13)] = -1
    """With --guided True: channels per attention head, instead of --num_heads; -1 uses --num_heads."""
    use_new_attention_order: bool = False
    """With --guided True: the model's order of q, k and v."""
    resblock_updown: bool = False
    """With --guided True: residual blocks that resample; True is not supported."""


def _convert(arguments: list[str]) -> None:
    options = parse_denoiser_flags(
        "conversion",
        ConvertOptions,
        arguments,
        prog="python -m tdc_fast.convert",
        description="Convert weights between this library, guided-diffusion and diffusers.",
    )
    source, out = Path(options["model_path"]), Path(options["out"])
    if not options["out"] or out.exists():
        raise invalid("out", options["out"], "a new file or folder")
    check_writable(out.parent)
    if not options["guided"]:
        for name in ("num_head_channels", "use_new_attention_order", "resblock_updown"):
            if options[name] not in (-1, False):
                raise invalid(name, options[name], "only together with --guided True")
    if options["model_path"] and source.is_dir():
        if options["guided"]:
            raise invalid("guided", True, "False: --model_path is a folder of diffusers, no file of guided-diffusion")
        _write_state(out, _from_folder(source))
    elif options["guided"]:
        _write_state(out, _from_guided(source, options))
    else:
        _write_folder(out, options)
    print(f"written to {out}")


def _from_folder(folder: Path) -> UNet:
    """The network in a folder of diffusers."""
    from tdc_fast.diffusers_models.unets import diffusers, from_diffusers

    config = folder / "config.json"
    name = read_record(config).get("_class_name") if config.is_file() else None
    if name != "UNet2DModel":
        raise invalid("model_path", str(folder), f"a folder with a UNet2DModel of diffusers; this has {name}")
    try:
        model = diffusers.UNet2DModel.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise invalid("model_path", str(folder), f"a whole UNet2DModel of diffusers ({error})") from error
    check_finite("model_path", folder, model.state_dict())
    return from_diffusers(model)


def _from_guided(path: Path, options: Mapping[str, Any]) -> UNet:
    """The network in a file of guided-diffusion, whose flags are given."""
    if options["resblock_updown"]:
        raise invalid("resblock_updown", True, "False: our UNet has no residual blocks that resample")
    state = load_verified(path, "model_path")
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise invalid("model_path", str(path), "a state dict: names of parameters and their tensors")
    check_finite("model_path", path, state)
    facts, size = dict(options), options["num_head_channels"]
    if size != -1:
        facts["num_heads"], facts["num_heads_upsample"] = num_heads_of(state, size), -1
    if facts["num_heads_upsample"] not in (-1, facts["num_heads"]):
        raise invalid("num_heads_upsample", facts["num_heads_upsample"], "-1, the same number of heads everywhere")
    order = options["use_new_attention_order"]
    converted = from_guided_diffusion(state, num_heads=facts["num_heads"], use_new_attention_order=order)
    channels = facts["in_channels"] or 3
    unet = build_unet(
        TrainConfig.from_dict({name: facts[name] for name in FACTS} | {"in_channels": channels}), channels
    )
    try:
        unet.load_state_dict(converted)
    except RuntimeError as error:
        said = str(error).splitlines()[1].strip()
        raise invalid("model_path", str(path), f"a file that fits the flags; {said}") from error
    return unet


def _write_state(out: Path, unet: UNet) -> None:
    """Write a state dict, and say with which flags it is used."""
    state = unet.state_dict()
    flags = {"image_size": unet.image_size, **flags_of(state, unet.image_size)}
    flags |= {"num_heads": unet.architecture["num_heads"], "rescale_timesteps": False}
    with atomic_file(out) as file:
        torch.save(state, file)
    words = (f"--{name} {value}" if value != "" else f"--{name} ''" for name, value in flags.items())
    print(f"its flags: {' '.join(words)}")


def _write_folder(out: Path, options: Mapping[str, Any]) -> None:
    """Write the base of a run, or the weights in a file, as a folder of diffusers."""
    from tdc_fast.diffusers_models.unets import to_diffusers

    denoiser = from_run(options["run"], "base") if options["run"] else from_checkpoint(options["model_path"], options)
    to_diffusers(denoiser.model).save_pretrained(out)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, convert, print; returns the exit status (2 for a refusal, 130 after Ctrl-C)."""
    return run_command(_convert, argv, stopped=STOPPED["convert"])

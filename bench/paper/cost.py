"""`python -m bench.paper.cost`: what training at the paper's scale would cost, from measured MACs.

The MACs of a sample are counted by torch's FlopCounterMode on the denoiser, without weights (meta device); steps and
shares come from the configuration. Hours assume a number of GPUs, their peak and the share of it that training reaches,
which are printed with them. Nothing here was run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tdc_fast.pruning.budget import budget_law
from tdc_fast.runs.build import build_diffusion, build_unet
from tdc_fast.runs.config import TrainConfig
from tdc_fast.training import cost

CONFIGS = Path(__file__).parent / "configs"


def training_macs(config: TrainConfig, channels: int = 3) -> tuple[int, int]:
    """MACs of one sample through a configuration's denoiser: forward, and forward plus backward."""
    with torch.device("meta"):
        model = build_unet(config, channels)
    shape = (channels, config.image_size, config.image_size)
    classes = config.num_classes if config.class_cond else None
    macs = cost.training_macs(model, build_diffusion(config), shape, None, classes)
    return macs.forward[0], macs.training[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of costs; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper.cost", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, default=sorted(CONFIGS.glob("*.yaml")))
    parser.add_argument("--gpu", default="H200", help="name of the GPU, for the heading")
    parser.add_argument("--peak", type=float, default=989e12, help="its dense bf16 FLOP/s (H200: 989e12)")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--reached", type=float, default=0.35, help="assumed share of the peak")
    options = parser.parse_args(argv)
    if min(options.gpus, options.peak, options.reached) <= 0:
        parser.error("--gpus, --peak and --reached are above 0")
    try:
        configs = [(path.stem, TrainConfig.from_file(path)) for path in options.configs]
    except ValueError as error:
        parser.error(str(error))
    for name, config in configs:
        if config.groups < 1 or not config.baseline_steps:
            parser.error(f"{name}: its cost follows from --groups N and --baseline_steps, which it lacks")
    rate = options.peak / 2 * options.gpus * options.reached  # MACs per second
    print(
        f"Assumed: {options.gpus} x {options.gpu}, {options.peak:.3g} FLOP/s each, {options.reached:.0%} reached. "
        "Not run.\n\n| configuration | GMACs per image, forward | training C | TDC | hours for C | hours for TDC "
        "| mean sampling cost |\n|---|---|---|---|---|---|---|"
    )
    for name, config in configs:
        forward, training = training_macs(config)
        whole = config.baseline_steps * config.batch_size * training
        share = sum(budget_law(config.groups, config.k)) / config.groups
        hours = whole / rate / 3600
        print(
            f"| {name} | {forward / 1e9:.3f} | {whole / 1e18:.3f} exa-MACs | {config.total_share:.2f} C "
            f"| {hours:.1f} | {hours * config.total_share:.1f} | {share:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Use a checkpoint of improved-diffusion: sample from it, then split it into experts.

    python examples/convert_improved_diffusion.py [FOLDER [CHECKPOINT]]

Nothing needs converting: the UNet has improved-diffusion's keys and shapes, and a plain `.pt` is a finished stage 1.
The file holds no configuration, so the flags must be those it was trained with; wrong ones are refused by name.
Without CHECKPOINT, the example makes a small random one.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tdc_fast import sample
from tdc_fast.data.dataset import ImageDataset
from tdc_fast.models.iddpm import create_unet
from tdc_fast.train import TrainConfig, train
from tdc_fast.training import load_run

MODEL = {"image_size": 8, "num_channels": 16, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4"}
DIFFUSION = {"diffusion_steps": 100, "noise_schedule": "cosine"}


def write_stand_in(path: Path) -> Path:
    """A state dict as improved-diffusion saves it: names of parameters and their tensors, nothing else."""
    torch.manual_seed(0)
    torch.save(create_unet(**MODEL).state_dict(), path)
    return path


def main(folder: Path, checkpoint: Path) -> None:
    """Sample from the checkpoint, then train two experts from it and write the first as a checkpoint again."""
    state = torch.load(checkpoint, weights_only=True)
    print(f"{checkpoint.name}: {len(state)} tensors, the first {next(iter(state))}")

    flags = [part for name, value in {**MODEL, **DIFFUSION}.items() for part in (f"--{name}", str(value))]
    status = sample.main(["--model_path", str(checkpoint), "--num_samples", "4", "--use_ddim", "True",
                          "--timestep_respacing", "ddim5", "--out", str(folder / "samples"), *flags])  # fmt: skip
    if status:
        sys.exit(status)  # the command has printed why

    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)  # your training images
    config = TrainConfig(**MODEL, **DIFFUSION, base=str(checkpoint), run_dir=str(folder / "run"), groups=2, k=0.6,
                         batch_size=8, stage2_steps=10, calibration_batches=2, tensorboard=False)  # fmt: skip
    run = load_run(train(config, ImageDataset.from_array(images)).path)
    base_macs, expert_macs = max(run.widths.macs), run.widths.macs
    print("share of the base's MACs that each expert keeps:", [round(macs / base_macs, 2) for macs in expert_macs])

    whole = run.experts().expert(0).state_dict()  # group 0, the hardest, keeps the whole base
    torch.save(whole, folder / "expert_0.pt")
    print("expert 0 is again a file for improved-diffusion:", whole.keys() == state.keys())


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    target.mkdir(parents=True, exist_ok=True)
    main(target, Path(sys.argv[2]) if len(sys.argv) > 2 else write_stand_in(target / "ema_0.9999_000010.pt"))

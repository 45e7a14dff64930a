"""Train base and experts from Python, on images of your own, and read the run directory.

    python examples/train_from_python.py [RUN_DIR]

An interrupted run continues with the same options and `resume=RUN_DIR` in place of `run_dir`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tdc_fast.data.dataset import ImageDataset
from tdc_fast.train import TrainConfig, train
from tdc_fast.training import load_run


def discs(count: int, size: int = 8) -> np.ndarray:
    """Grey images of one disc each, uint8 (count, size, size, 1)."""
    rng = np.random.default_rng(0)
    centre, radius = rng.uniform(2, size - 3, (count, 2, 1, 1)), rng.uniform(1, 3, (count, 1, 1))
    rows, columns = np.mgrid[:size, :size]
    distance = np.hypot(rows - centre[:, 0], columns - centre[:, 1])
    return (255 * (distance < radius)).astype(np.uint8)[..., None]


def main(run_dir: str) -> None:
    """Train three experts on discs and print what the run directory contains."""
    config = TrainConfig(
        run_dir=run_dir,
        image_size=8,
        num_channels=8,
        channel_mult="1,2",
        num_res_blocks=1,
        attention_resolutions="",
        diffusion_steps=200,
        noise_schedule="cosine",
        batch_size=16,
        lr=1e-3,
        groups=3,  # three experts; groups=0 is plain training
        k=0.6,  # budgets: the hardest group keeps the whole base, the easiest about this share
        stage1_steps=60,
        stage2_steps=40,
        log_interval=20,
        progress="never",
    )
    train(config, ImageDataset.from_array(discs(256)))  # or TrainConfig(data_dir="images/") and no dataset

    run = load_run(run_dir)
    print("steps of the checkpoints:", {"base": run.steps("base"), "experts": run.steps("experts")})
    print("boundaries of the groups:", list(run.groups.boundaries))
    print("MACs of each expert:", list(run.widths.macs))
    model = run.experts()  # a RoutedModel with averaged weights, ready to sample from
    print("parameters of each expert:", [sum(p.numel() for p in model.expert(i).parameters()) for i in range(3)])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(tempfile.mkdtemp()) / "run"))

"""What a run says about itself: warnings about its options, before hours of training."""

from __future__ import annotations

import warnings

from tdc_fast.runs.config import TrainConfig
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

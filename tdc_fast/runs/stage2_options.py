"""Checks of the options of stage 2 that differ from group to group."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tdc_fast.errors import invalid
from tdc_fast.runs.limits import comma_numbers
from tdc_fast.runs.options import TdcOptions


def check_stage2_options(config: TdcOptions, ema_rates: Sequence[str]) -> None:
    """Check the windows of stage 2, and the factors per group on its learning rate and on its averages.

    Args:
        config: the options.
        ema_rates: the rates of the averages, as written on the command line.

    Raises:
        ValueError: naming the first option that is impossible.
    """
    if 0 < config.stage2_slope_windows < 8:
        raise invalid("stage2_slope_windows", config.stage2_slope_windows, "0 for none, or at least 8 windows")
    if config.stage2_slope_windows and config.overlap:
        remedy = "none with --overlap, where a timestep's loss is not one group's"
        raise invalid("stage2_slope_windows", config.stage2_slope_windows, remedy)
    for name, most in (("stage2_lr_factors", 1.0), ("stage2_ema_factors", math.inf)):
        factors = comma_numbers(name, getattr(config, name), float)
        if factors and (len(factors) != config.groups or not all(0 < factor <= most for factor in factors)):
            limit = "above 0" if most == math.inf else "above 0 and at most 1"
            raise invalid(name, getattr(config, name), f"{config.groups} factors {limit}, one per group")
    shortest = min(comma_numbers("stage2_ema_factors", config.stage2_ema_factors, float), default=1.0)
    for rate in ema_rates:
        if shortest < 1 - float(rate):
            remedy = f"factors of at least {1 - float(rate):g}: there --ema_rate {rate} averages over one step"
            raise invalid("stage2_ema_factors", config.stage2_ema_factors, remedy)

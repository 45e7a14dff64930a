"""The main job: train baselines and experts on digits, compare them, write a report. `tdc_fast.demo` starts it."""

from __future__ import annotations

from tdc_fast.experiments.demo import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]

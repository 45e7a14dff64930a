"""Experiments that train, measure and compare models; `run_demo` is what `make demo` runs."""

from __future__ import annotations

from tdc_fast.experiments.demo import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]

"""Serving: an engine whose requests are all at different steps, one routed forward per step."""

from tdc_fast.serving.engine import Engine
from tdc_fast.serving.failures import (
    Cancelled,
    Diverged,
    EngineClosed,
    Expired,
    OutOfMemory,
    Overloaded,
    RequestFailed,
    StepFailed,
)
from tdc_fast.serving.generation import Generation
from tdc_fast.serving.policy import Policy
from tdc_fast.serving.request import Preview, Request, Result
from tdc_fast.serving.statistics import Statistics

__all__ = [
    "Cancelled",
    "Diverged",
    "Engine",
    "EngineClosed",
    "Expired",
    "Generation",
    "OutOfMemory",
    "Overloaded",
    "Policy",
    "Preview",
    "Request",
    "RequestFailed",
    "Result",
    "Statistics",
    "StepFailed",
]

"""How many examples a generated test tries: `pytest --fuzz-factor N` multiplies all of them by N."""

from __future__ import annotations

import re

from hypothesis import HealthCheck, settings

factor = 1
"""What tests/conftest.py got from the command line."""


def examples(count: int) -> settings:
    """Settings of a test that tries `count` examples, the same ones in every run; with a factor N, N times as many,
    others in every run."""
    return settings(
        max_examples=count * factor,
        derandomize=factor == 1,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    )


def is_ours(error: BaseException) -> bool:
    """Whether an error is one that `tdc_fast.errors.invalid` made: it names an argument, its value and a remedy."""
    return re.search(r"\S: got .*; expected ", str(error), re.DOTALL) is not None

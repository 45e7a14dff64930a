"""A GPU that hangs or is broken is noticed, here with one that is made up."""

from __future__ import annotations

import threading
from unittest.mock import patch

import pytest
import torch

from tests.gpu.watching import watched_gpu


def test_a_gpu_that_does_not_answer_is_noticed() -> None:
    noticed, errors = threading.Event(), []
    with (
        patch.object(torch.cuda, "synchronize", lambda: noticed.wait(30)),
        watched_gpu(0.01, noticed.set, errors.append),
    ):
        pass
    assert noticed.is_set() and not errors


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_that_is_broken_is_noticed_whether_or_not_the_test_failed(fails: bool) -> None:
    errors: list[RuntimeError] = []

    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def test() -> None:
        with watched_gpu(60, lambda: pytest.fail("nothing hangs"), errors.append):
            assert not fails

    with patch.object(torch.cuda, "synchronize", synchronize):
        if fails:
            pytest.raises(AssertionError, test)
        else:
            test()
    assert [str(error) for error in errors] == ["an illegal memory access was encountered"]


def test_nothing_is_said_of_a_gpu_that_answers() -> None:
    said: list[object] = []
    with patch.object(torch.cuda, "synchronize", lambda: None):
        with watched_gpu(0.05, lambda: said.append("hangs"), said.append):
            pass
        threading.Event().wait(0.1)
    assert not said

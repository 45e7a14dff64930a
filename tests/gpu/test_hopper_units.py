"""What the Hopper kernels rest on, each unit alone: boxes of TMA, operands of wgmma, a pipeline, a cluster.

The first to run on a new card: a fault in a unit is one in every kernel, and here it is told by name. The emulator runs
the same kernels and checks (tests/emulator/test_sm90_units.py, test_cluster.py), which is their dry run.
"""

from __future__ import annotations

import pytest
import torch

from tdc_fast.ops import cuda_nvrtc, native
from tests.emulator.encodings import BOXES, ENCODINGS, WIDTHS, loaded, numbers, product, stored, stored_by_rows
from tests.emulator.sm90 import exchanged, expected_exchange, passed_on, pipeline
from tests.gpu.units import OnGpu
from tests.tolerance import assert_same

pytestmark = pytest.mark.gpu
HANGS_AFTER = 20.0  # seconds


@pytest.fixture(scope="module")
def gpu() -> OnGpu:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the units are those of compute capability 9.0")
    if native.module is None or (reason := cuda_nvrtc.unavailable(90)) is not None:
        pytest.skip(reason if native.module else native.why_missing)
    return OnGpu()


@pytest.mark.parametrize("case", BOXES)
def test_a_box_is_loaded(case: str, gpu: OnGpu) -> None:
    assert_same(*loaded(case, gpu))


@pytest.mark.parametrize("case", BOXES)
def test_a_box_is_stored(case: str, gpu: OnGpu) -> None:
    assert_same(*stored(case, gpu))


def test_a_row_is_stored_from_any_multiple_of_128_bytes(gpu: OnGpu) -> None:
    assert_same(*stored_by_rows(gpu))


@pytest.mark.parametrize("case", ENCODINGS)
def test_an_encoding_gives_the_product(case: str, gpu: OnGpu) -> None:
    assert_same(*product(*ENCODINGS[case], machine=gpu))


@pytest.mark.parametrize("case", WIDTHS)
def test_a_width_of_the_product_is_right(case: str, gpu: OnGpu) -> None:
    columns, a, b, mode = WIDTHS[case]
    assert_same(*product(a, b, mode, columns, gpu))


def test_a_pipeline_gives_the_product(gpu: OnGpu) -> None:
    """A ring of stages, registers that change hands, and stores by TMA."""
    a, b = numbers(64, 5 * 64, seed=1), numbers(64, 5 * 64, seed=2)
    exact = a.double() @ b.double().T
    assert_same(pipeline(a, b, machine=gpu), torch.stack([exact, 2 * exact]).to(torch.bfloat16))


def test_blocks_of_a_cluster_reach_each_others_shared_memory(gpu: OnGpu) -> None:
    values, out = exchanged(machine=gpu)
    assert_same(out, expected_exchange(values))


def test_blocks_of_a_cluster_wait_for_each_other_at_mbarriers(gpu: OnGpu) -> None:
    assert_same(*passed_on(machine=gpu))

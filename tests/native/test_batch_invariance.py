"""A sample's results have the same bits whatever else is in its batch, on every instruction set.

That holds for y, dx, and the gradients of sample_bias, scale and shift. Gradients of weights are sums over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tests.cases import ConvCase, NormCase, Routing, conv_cases, norm_cases

PER_SAMPLE = ("x", "x2", "sample_bias", "residual", "scale", "shift")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
BOUNDED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Operator = Callable[[dict[str, Tensor], RoutingPlan], Tensor]


@contextmanager
def running_on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def conv_of(case: ConvCase) -> Operator:
    def operator(t: dict[str, Tensor], plan: RoutingPlan) -> Tensor:
        extras = {name: t.get(name) for name in ("sample_bias", "residual", "x2")}
        return routed_conv2d(t["x"], t["weight"], t.get("bias"), plan, **case.settings(), **extras, backend="cpu")

    return operator


def norm_of(case: NormCase) -> Operator:
    def operator(t: dict[str, Tensor], plan: RoutingPlan) -> Tensor:
        extras = {name: t.get(name) for name in ("scale", "shift", "x2")}
        return routed_group_norm(t["x"], t["weight"], t["bias"], plan, **case.settings(), **extras, backend="cpu")

    return operator


def results(operator: Operator, routing: Routing, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients that belong to a sample."""
    y = operator(tensors, routing.plan())
    names = [name for name in tensors if name in PER_SAMPLE]
    return {"y": y, **dict(zip(names, torch.autograd.grad(y, [tensors[n] for n in names], dy), strict=True))}


def check(operator: Operator, routing: Routing, tensors: dict[str, Tensor], keep: list[int], threads: int) -> None:
    """The samples at the sorted positions `keep` give the same bits alone as in the whole batch."""
    ordered = replace(routing, groups=tuple(sorted(routing.groups)))
    y = operator(tensors, ordered.plan())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    whole = results(operator, ordered, tensors, dy)
    # A copy: these samples at other addresses.
    kept = {n: t.detach()[keep].requires_grad_() if n in PER_SAMPLE else t for n, t in tensors.items()}
    with running_on(threads):
        alone = results(operator, replace(ordered, groups=tuple(ordered.groups[i] for i in keep)), kept, dy[keep])
    for name, value in alone.items():
        assert torch.equal(value, whole[name][keep]), name


def kept_samples(data: st.DataObject, batch: int) -> list[int]:
    return sorted(data.draw(st.sets(st.integers(0, batch - 1), min_size=1, max_size=batch), label="keep"))


@BOUNDED
@given(
    case=(conv_cases() | conv_cases(fused=True)).filter(lambda case: case.routing.batch), dtype=DTYPES, data=st.data()
)
def test_a_convolution_of_a_sample_does_not_depend_on_its_batch(
    case: ConvCase, dtype: torch.dtype, data: st.DataObject
) -> None:
    check(conv_of(case), case.routing, case.tensors(dtype), kept_samples(data, case.routing.batch), 2)


@BOUNDED
@given(
    case=(norm_cases() | norm_cases(fused=True)).filter(lambda case: case.routing.batch), dtype=DTYPES, data=st.data()
)
def test_a_group_norm_of_a_sample_does_not_depend_on_its_batch(
    case: NormCase, dtype: torch.dtype, data: st.DataObject
) -> None:
    check(norm_of(case), case.routing, case.tensors(dtype), kept_samples(data, case.routing.batch), 2)


@BOUNDED
@given(
    tokens=st.sampled_from([None, 1, 2, 3, 5, 16, 49, 130]),
    channels=st.tuples(*[st.sampled_from([1, 3, 16, 40, 72, 130])] * 2),
    dtype=DTYPES,
    data=st.data(),
)
def test_a_linear_layer_of_a_sample_does_not_depend_on_its_batch(
    tokens: int | None, channels: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    groups = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=24), label="groups")
    shape = () if tokens is None else (tokens,)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(len(groups), *shape, channels[0], generator=generator),
        "weight": torch.randn(3, channels[1], channels[0], generator=generator),
        "bias": torch.randn(3, channels[1], generator=generator),
        "residual": torch.randn(len(groups), *shape, channels[1], generator=generator),
    }
    tensors = {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}

    def operator(t: dict[str, Tensor], plan: RoutingPlan) -> Tensor:
        return routed_linear(t["x"], t["weight"], t["bias"], plan, residual=t["residual"], backend="cpu")

    check(operator, Routing(tuple(groups), 3, 3, None), tensors, kept_samples(data, len(groups)), 2)


# The batch changes how these are cut into tasks: samples, rows of an image, ranges of panels, waves of packed weights.
LARGE = {
    "many small images": ((30, 0, 9), 32, 40, (8, 8), (1, 1)),
    "tiny images": ((21, 5, 2), 24, 33, (2, 2), (1, 1)),
    "4x4": ((13, 1, 26), 20, 16, (4, 4), (1, 1)),
    "rows of large images": ((1, 5, 2), 9, 20, (37, 19), (1, 1)),
    "rows of two row tiles": ((2, 7, 1), 70, 40, (12, 16), (1, 1)),
    "stride 2": ((11, 2, 3), 18, 35, (17, 16), (2, 2)),
    "more weights than one wave packs": ((5, 1, 2), 448, 448, (3, 3), (1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LARGE)
def test_cutting_a_large_batch_into_tasks_does_not_change_a_sample(name: str, dtype: torch.dtype) -> None:
    sizes, in_channels, out_channels, size, stride = LARGE[name]
    groups = tuple(group for group, count in enumerate(sizes) for _ in range(count))
    routing = Routing(groups, 3, 3, None)
    case = ConvCase(
        routing, in_channels, out_channels, size, (3, 3), stride, (1, 1), None, None,
        ("bias", "sample_bias", "residual"), "channels_last", 0,
    )  # fmt: skip
    tensors = case.tensors(dtype)
    for keep in ([0], [len(groups) - 1], list(range(1, len(groups), 3))):
        check(conv_of(case), routing, tensors, keep, 3)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(40, 30), (5, 5)])
def test_blocks_of_rows_do_not_change_a_group_norm(size: tuple[int, int], threads: int) -> None:
    routing = Routing((0, 0, 0, 1, 1), 2, 2, None)
    case = NormCase(routing, 96, 8, size, (96, 36), ("scale", "shift"), "silu", "channels_last", 0)
    for keep in ([0], [4], [1, 2, 3]):
        check(norm_of(case), routing, case.tensors(torch.float32), keep, threads)

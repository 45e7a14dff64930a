"""The native group norm against fp64 torch: forward and backward, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdc_fast import _native
from tests.cases import NormCase, Routing, norm_cases
from tests.tolerance import assert_as_accurate_as_torch

GRADS = ("x", "weight", "bias", "scale", "shift")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def poisoned(like: Tensor) -> Tensor:
    """Memory full of NaN, so that an unwritten element fails the test."""
    return torch.full_like(like, float("nan"))


class Native:
    """One problem in the native calling convention; x is (B, C, H, W) in channels_last memory."""

    def __init__(self, case: NormCase, tensors: dict[str, Tensor], threads: int = 1, eps: float = 1e-5) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.tensors["x"] = self.tensors["x"].contiguous(memory_format=torch.channels_last)
        x, routing = self.tensors["x"], case.routing
        bounds = [0, *(stop for *_, stop in routing.segments())]
        self.offsets = torch.tensor(bounds, dtype=torch.int32)
        self.index = torch.tensor([expert for _, expert, *_ in routing.segments()], dtype=torch.int32)
        self.widths = None if case.widths is None else torch.tensor(case.widths, dtype=torch.int32)
        self.mean = torch.full((routing.batch, case.num_groups), float("nan"))
        self.rstd = poisoned(self.mean)
        self.routing = {"offsets": address(self.offsets), "weight_index": address(self.index)}
        self.routing |= {"widths": address(self.widths), "threads": threads}
        self.geometry = {
            "dtype": int(x.dtype == torch.bfloat16),
            **{"batch": routing.batch, "height": x.shape[2], "width": x.shape[3], "channels": case.channels},
            **{"num_norm_groups": case.num_groups, "eps": eps, "silu": case.activation == "silu"},
            **{"num_groups": routing.num_groups, "num_experts": routing.num_experts},
        }

    def _shared(self) -> dict[str, int]:
        inputs = {name: address(self.tensors.get(name)) for name in GRADS}
        return inputs | {"mean": address(self.mean), "rstd": address(self.rstd)} | self.routing

    def forward(self) -> Tensor:
        y = poisoned(self.tensors["x"])
        _native.GroupNorm(**self.geometry).forward(y=address(y), **self._shared())
        return y

    def backward(self, dy: Tensor, wanted: tuple[str, ...] = GRADS) -> dict[str, Tensor]:
        dy = dy.contiguous(memory_format=torch.channels_last)
        grads = {name: poisoned(self.tensors[name]) for name in wanted if name in self.tensors}
        _native.GroupNorm(**self.geometry).backward(
            dy=address(dy), **{f"d{name}": address(grads.get(name)) for name in GRADS}, **self._shared()
        )
        return grads


def upstream_grad(case: NormCase, x: Tensor) -> Tensor:
    """dy for a case: NaN in dead channels, which must not be read."""
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(case.seed + 1)).to(torch.bfloat16).to(x.dtype)
    for group, _, start, stop in case.routing.segments():
        if case.widths is not None:
            dy[start:stop, case.widths[group] :] = float("nan")
    return dy


def plain_with_grads(case: NormCase, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients from torch, zeros in dead channels."""
    y = case.plain(tensors)
    grads = torch.autograd.grad(y, list(tensors.values()), dy.nan_to_num(), allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors.values(), grads, strict=True)]
    return {"y": y.detach(), **dict(zip(tensors, filled, strict=True))}


def assert_matches_torch(case: NormCase, dtype: torch.dtype, threads: int = 1) -> None:
    tensors = case.tensors(dtype)
    dy = upstream_grad(case, tensors["x"].detach())
    exact = plain_with_grads(case, case.tensors(torch.float64), dy.double())
    torchs = plain_with_grads(case, tensors, dy)
    native = Native(case, tensors, threads)
    ours = {"y": native.forward(), **native.backward(dy)}
    for name, value in ours.items():
        assert_as_accurate_as_torch(value, torchs[name], exact[name], name)


def has_gradient(case: NormCase) -> bool:
    """Any two values normalise to +1 and -1, so the exact dx is almost zero and the computed one is rounding error."""
    return case.channels // case.num_groups * case.size[0] * case.size[1] > 2


@DTYPES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=norm_cases().filter(has_gradient))
def test_forward_and_gradients_are_as_accurate_as_torchs(case: NormCase, dtype: torch.dtype) -> None:
    assert_matches_torch(case, dtype)


def large_case(**changes: object) -> NormCase:
    """Several blocks of rows per sample, channels that are not a multiple of the vector length, a shared expert."""
    routing = Routing(groups=(0, 0, 2, 3, 3), num_groups=4, num_experts=3, weight_index=(2, 1, 0, 2))
    case = NormCase(
        routing=routing,
        channels=60,
        num_groups=6,
        size=(33, 31),
        widths=(60, 10, 0, 30),
        extras=("scale", "shift"),
        activation="silu",
        layout="channels_last",
        seed=11,
    )
    return replace(case, **changes)  # type: ignore[arg-type]


@DTYPES
@pytest.mark.parametrize("activation", [None, "silu"])
def test_images_of_many_blocks_are_as_accurate_as_torchs(activation: str | None, dtype: torch.dtype) -> None:
    assert_matches_torch(large_case(activation=activation), dtype)


@pytest.mark.parametrize("per_group", [1, 2, 3, 5, 8, 13, 32, 64])
def test_any_number_of_channels_per_group(per_group: int) -> None:
    assert_matches_torch(large_case(channels=3 * per_group, num_groups=3, size=(3, 2), widths=None), torch.float32)


@DTYPES
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    case = large_case()
    tensors = case.tensors(dtype)
    dy = upstream_grad(case, tensors["x"].detach())

    def run(threads: int) -> list[Tensor]:
        native = Native(case, tensors, threads)
        y = native.forward()
        return [y, native.mean, native.rstd, *native.backward(dy).values()]

    expected = run(1)
    for threads in (2, 3, 4, 7):  # some split whole samples over the threads, some blocks of rows
        for one, many in zip(expected, run(threads), strict=True):
            torch.testing.assert_close(many, one, rtol=0, atol=0)


@pytest.mark.parametrize("centre", [0.0, 30.0, -1000.0])
def test_statistics_of_large_images_keep_fp32_accuracy(centre: float) -> None:
    case = large_case(
        routing=Routing((0,), 1, 1, None), channels=8, num_groups=2, size=(256, 256), widths=None, activation=None
    )
    tensors = case.tensors(torch.float32)
    tensors["x"] = (tensors["x"].detach() + centre).requires_grad_()
    double = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    native = Native(case, tensors)
    y = native.forward()
    assert_as_accurate_as_torch(y, case.plain(tensors), case.plain(double), "y")
    groups = double["x"].detach().reshape(1, 2, -1)
    torch.testing.assert_close(native.mean.double(), groups.mean(-1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(native.rstd.double(), (groups.var(-1, unbiased=False) + 1e-5).rsqrt(), rtol=3e-7, atol=0)


def test_dead_channels_are_exact_zeros() -> None:
    case = large_case()
    tensors = case.tensors(torch.float32)
    native = Native(case, tensors)
    y, grads = native.forward(), native.backward(upstream_grad(case, tensors["x"].detach()))
    assert case.widths is not None
    for group, _, start, stop in case.routing.segments():
        live = case.widths[group]
        for tensor in (y, grads["x"], grads["scale"], grads["shift"]):
            assert torch.count_nonzero(tensor[start:stop, live:]) == 0
        assert torch.count_nonzero(native.mean[start:stop, live // 10 :]) == 0
        assert torch.count_nonzero(native.rstd[start:stop, live // 10 :]) == 0
    assert torch.count_nonzero(grads["weight"][1]) == 0  # no sample uses expert 1
    assert torch.count_nonzero(grads["weight"][0]) == 0  # expert 0 serves width 0 only


@pytest.mark.parametrize("name", GRADS)
def test_each_gradient_can_be_asked_for_alone(name: str) -> None:
    case = large_case(size=(4, 3))
    tensors = case.tensors(torch.float32)
    dy = upstream_grad(case, tensors["x"].detach())
    native = Native(case, tensors)
    native.forward()
    assert torch.equal(native.backward(dy, (name,))[name], native.backward(dy)[name])


def test_expert_gradients_of_many_wide_samples_sum_over_windows() -> None:
    """Shares of dweight are kept for 2**20 floats' worth of samples at a time: 5 samples of 2**17 channels."""
    routing = Routing((0,) * 5, 1, 1, None)
    case = large_case(routing=routing, channels=2**17, num_groups=2**16, size=(1, 1), widths=None, extras=())
    assert_matches_torch(case, torch.float32, threads=2)


@settings(deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100)
        | st.sampled_from([-0.0, 88.0, -87.3, -88.4, -88.9, 104.0, -104.0]),
        min_size=1,
        max_size=40,
    )
)
def test_silu_is_accurate_over_the_whole_range(values: list[float]) -> None:
    z = torch.tensor(values)
    y = silu(z)
    exact = torch.nn.functional.silu(z.double())
    # Below z = -88.37 the exponential is taken as infinite; the error there is less than 4e-37.
    torch.testing.assert_close(y.double(), exact, rtol=5e-7, atol=4e-37)


def test_silu_passes_nan_and_infinity() -> None:
    y = silu(torch.tensor([float("nan"), float("inf"), 1.0]))
    assert torch.isnan(y[0]) and y[1] == float("inf") and abs(y[2] - 0.7310586) < 1e-6


def silu(z: Tensor) -> Tensor:
    """The kernel's SiLU of z, which enters as `shift` beside a weight and a bias of zero."""
    count = len(z)
    case = NormCase(Routing((0,), 1, 1, None), count, 1, (2, 1), None, ("scale", "shift"), "silu", "channels_last", 0)
    zeros = torch.zeros(1, count)
    tensors = {"x": torch.randn(1, count, 2, 1), "weight": zeros, "bias": zeros, "scale": zeros, "shift": z[None]}
    return Native(case, tensors).forward()[0, :, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (60, 15, 0, 30)}, "widths: got 15"),
        ({"widths": (60, 10, 0, 70)}, "widths: got 70"),
        ({"num_groups": 7}, "num_norm_groups: got 7"),
        ({"routing": Routing((0,), 1, 1, (1,)), "widths": None}, "weight_index: got 1"),
    ],
)
def test_an_impossible_problem_is_refused(change: dict[str, object], message: str) -> None:
    case = large_case(**change)
    native = Native(case, case.tensors(torch.float32))
    with pytest.raises(ValueError, match=message):
        native.forward()

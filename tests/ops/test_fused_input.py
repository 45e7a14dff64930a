"""Two inputs are one channel axis, and upsampling is nearest: as torch.cat and F.interpolate before the operator."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tdc_fast import RoutingPlan, explain, routed_conv2d, routed_group_norm
from tdc_fast.ops import backends, native, reads_two_inputs, reference
from tests.cases import ConvCase, NormCase, Routing, conv_cases, norm_cases
from tests.ops import test_conv2d as conv
from tests.ops import test_group_norm as norm
from tests.tolerance import assert_as_accurate_as_torch

Case = ConvCase | NormCase


def gradients(case: Case, y: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and the gradient of every tensor."""
    return conv.gradients(y, tensors, case) if isinstance(case, ConvCase) else norm.gradients(y, tensors)


def run(case: Case, tensors: dict[str, Tensor], backend: str | None = None) -> dict[str, Tensor]:
    module: Any = conv if isinstance(case, ConvCase) else norm
    return gradients(case, module.routed(case, tensors, backend=backend), tensors)


def plain(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradients(case, case.plain(tensors), tensors)


# Widths on both sides of the seam and on it; a seam inside a vector, a panel and a norm group.
SEAMS: dict[str, Case] = {
    "conv": conv.random_case(in_channels=20, x2_channels=7, in_widths=(20, 5, 13)),
    "conv, upsampled": conv.random_case(in_channels=20, x2_channels=7, in_widths=(20, 5, 16), upsample=2),
    "1x1": conv.random_case(in_channels=40, x2_channels=24, in_widths=None, filter=(1, 1), padding=(0, 0)),
    "norm": norm.some_case(x2_channels=5),
    "norm, no widths": norm.some_case(x2_channels=1, widths=None),
}
by_seam = pytest.mark.parametrize("case", SEAMS.values(), ids=SEAMS.keys())


def check_reference(case: Case) -> None:
    ours = run(case, case.tensors(torch.float64), "reference")
    expected = plain(case, case.tensors(torch.float64))
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@given(case=conv_cases(fused=True))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_reference_convolves_what_torch_joins_and_upsamples(case: ConvCase) -> None:
    check_reference(case)


@given(case=norm_cases(fused=True))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_reference_normalises_what_torch_joins(case: NormCase) -> None:
    check_reference(case)


def check_accuracy(case: Case, backend: str, dtype: torch.dtype, terms: int) -> None:
    ours, torchs = run(case, case.tensors(dtype), backend), plain(case, case.tensors(dtype))
    exact = run(case, case.tensors(torch.float64), "reference")
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], exact[name], f"{name} of {case}", terms)


@conv.served
def test_every_backend_convolves_as_accurately_as_torch(
    backend: str, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    @given(case=conv_cases(fused=True))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(case: ConvCase) -> None:
        taps, pixels = case.filter[0] * case.filter[1], case.out_size[0] * case.out_size[1]
        terms = case.upsample**2 * taps * max(case.in_channels, case.out_channels)
        check_accuracy(case, backend, dtype, max(terms, case.routing.batch * pixels, 64))

    check()


@norm.served
def test_every_backend_normalises_as_accurately_as_torch(
    backend: str, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    @given(case=norm_cases(fused=True))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(case: NormCase) -> None:
        check_accuracy(case, backend, dtype, max(64, 4 * case.routing.batch * case.size[0] * case.size[1]))

    check()


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("filter_", [(1, 1), (3, 3), (5, 3)])
@conv.served
def test_upsampling_is_exact_at_every_border(
    backend: str, dtype: torch.dtype, filter_: tuple[int, int], stride: tuple[int, int]
) -> None:
    for padding in ((0, 0), (1, 2), (3, 1)):
        case = conv.random_case(filter=filter_, stride=stride, padding=padding, upsample=2, size=(3, 2))
        if min(case.out_size) > 0:
            check_accuracy(case, backend, dtype, 512)


@by_seam
def test_the_gradient_is_right_by_finite_differences_in_both_modes(case: Case) -> None:
    small = replace(case, size=(2, 2), routing=Routing((0, 1, 2), 3, 3, None))
    tensors = {name: t.detach().nan_to_num().requires_grad_() for name, t in small.tensors(torch.float64).items()}
    module: Any = conv if isinstance(case, ConvCase) else norm

    def function(*values: Tensor) -> Tensor:
        return module.routed(small, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), check_forward_ad=True, fast_mode=True)


@by_seam
@conv.served
def test_channels_past_the_width_are_exact_zeros_on_both_sides_of_the_seam(
    case: Case, backend: str, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    widths = case.in_widths if isinstance(case, ConvCase) else case.widths
    if widths is None:
        return
    results = run(case, case.tensors(dtype), backend)
    dx = torch.cat([results["dx"], results["dx2"]], dim=1)
    for group, _, start, stop in case.routing.segments():
        dead = dx[start:stop, widths[group] :]
        assert torch.equal(dead, torch.zeros_like(dead))
    assert not any(result.isnan().any() for result in results.values())


@by_seam
def test_one_gradient_alone_is_what_it_is_among_all(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        everything = run(case, case.tensors(dtype))
        for name in ("x", "x2", "weight"):
            tensors = {key: t.detach().requires_grad_(key == name) for key, t in case.tensors(dtype).items()}
            module: Any = conv if isinstance(case, ConvCase) else norm
            y = module.routed(case, tensors)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(y.dtype)
            y.backward(dy)
            assert torch.equal(tensors[name].grad, everything[f"d{name}"]), name


class TestABackendWithoutTheFusion:
    """It gets the problem that is left once the tensors are made."""

    @pytest.fixture(autouse=True)
    def plain_backend(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """A backend of the reference's functions that has one input and no upsampling; the problems that it got."""
        seen: list[Any] = []

        def function(name: str) -> Any:
            def call(problem: Any, *args: Any) -> Any:
                seen.append(problem)
                return getattr(reference, name)(problem, *args)

            return call

        names = ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "group_norm", "group_norm_backward")
        functions = {name: function(name) for name in names}
        backend = SimpleNamespace(name="plain", supports=lambda problem: None, **functions)
        monkeypatch.setattr(backends, "_backends", [*backends._backends, backend])
        backends.forget()
        yield seen
        monkeypatch.undo()
        backends.forget()

    @by_seam
    def test_the_result_is_that_of_the_reference(self, case: Case, plain_backend: list[Any]) -> None:
        for dtype in (torch.float64, torch.bfloat16):
            ours, expected = (run(case, case.tensors(dtype), name) for name in ("plain", "reference"))
            for name in ours:
                tolerance = 1e-12 if dtype == torch.float64 else 3e-2  # the sum over 2 x 2 pixels is rounded twice
                torch.testing.assert_close(ours[name], expected[name], rtol=tolerance, atol=tolerance)
                assert ours[name].stride() == expected[name].stride()
        assert plain_backend and not any(problem.fused for problem in plain_backend)

    def test_explain_says_which_tensors_are_made_first(self) -> None:
        case = conv.random_case(x2_channels=4, upsample=2)
        t = case.tensors(torch.float32)
        arguments = (t["x"], t["weight"], None, case.routing.plan())
        said = explain(routed_conv2d, *arguments, **case.settings(), x2=t["x2"], backend="plain")
        assert said.backend == "plain" and said.reasons["plain"] is None
        assert said.copies == {"plain": "torch.cat of x and x2 and nearest upsampling"}
        assert "plain: supported, after torch.cat of x and x2 and nearest upsampling" in str(said)
        alone = explain(routed_conv2d, torch.cat([t["x"], t["x2"]], 1), *arguments[1:], **case.settings())
        assert alone.copies == {"plain": "nearest upsampling"}

    def test_a_model_can_ask_whether_two_inputs_would_be_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for backend, expected in (("reference", True), ("plain", False)):
            monkeypatch.setenv("TDC_FAST_BACKEND", backend)
            assert reads_two_inputs(torch.device("cpu"), torch.float64) is expected

    def test_one_that_copies_is_taken_after_those_that_do_not(self) -> None:
        case = norm.some_case(x2_channels=4)
        t = case.tensors(torch.float32)
        said = explain(
            routed_group_norm, t["x"], t["weight"], t["bias"], case.routing.plan(), **case.settings(), x2=t["x2"]
        )
        order = list(said.reasons)
        assert order.index("plain") < order.index("reference")
        if native.module is not None:
            assert said.backend == "cpu" and order.index("cpu") < order.index("plain")


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_cpu_reads_two_inputs_to_the_bits_of_their_concatenation(dtype: torch.dtype) -> None:
    case = conv.random_case(in_channels=40, x2_channels=17, in_widths=(40, 11, 29), size=(9, 9))
    t = case.tensors(dtype)
    joined = {**t, "x": torch.cat([t["x"], t["x2"]], dim=1).detach().requires_grad_()}
    del joined["x2"]
    two, one = run(case, t, "cpu"), run(replace(case, x2_channels=0), joined, "cpu")
    for name in ("y", "dweight", "dbias"):
        assert torch.equal(two[name], one[name]), name


def test_the_same_channels_split_elsewhere_are_another_problem() -> None:
    """dgrad sees neither x nor x2, only where the seam is."""
    for x2_channels in (3, 8, 1):
        case = conv.random_case(x2_channels=x2_channels)
        results = run(case, case.tensors(torch.float32))
        assert results["dx2"].shape[1] == x2_channels and results["dx"].shape[1] == case.in_channels - x2_channels


def test_the_second_input_and_the_upsampling_are_checked() -> None:
    plan = RoutingPlan.from_groups(torch.zeros(2, dtype=torch.int64), 1)
    x, weight = torch.zeros(2, 3, 4, 4), torch.zeros(1, 5, 7, 3, 3)
    for x2, expected in (
        (torch.zeros(2, 4, 4, 5), r"^x2: got \(2, 4, 4, 5\); expected shape \(2, C, 4, 4\)"),
        (torch.zeros(1, 4, 4, 4), r"^x2: got \(1, 4, 4, 4\)"),
        (torch.zeros(2, 4, 4), r"^x2: got \(2, 4, 4\)"),
        (torch.zeros(2, 0, 4, 4), r"^x2: got \(2, 0, 4, 4\)"),
        (torch.zeros(2, 4, 4, 4, dtype=torch.float64), r"^x2: got torch.float64"),
        (torch.zeros(2, 2, 4, 4), r"^weight: got .*5 channels of x and x2"),
        ("skip", r"^x2: got 'skip'; expected a torch tensor or None"),
    ):
        with pytest.raises(ValueError, match=expected):
            routed_conv2d(x, weight, None, plan, padding=1, x2=x2)
    for upsample in (0, 3, 2.0, True, (2, 2)):
        with pytest.raises(ValueError, match="^upsample: got .*; expected an integer from 1 to 2"):
            routed_conv2d(torch.zeros(2, 7, 4, 4), weight, None, plan, upsample=upsample)
    ones = torch.ones(1, 7)
    with pytest.raises(ValueError, match=r"^x2: got \(2, 4, 4, 5\)"):
        routed_group_norm(x, ones, ones, plan, num_groups=1, x2=torch.zeros(2, 4, 4, 5))
    with pytest.raises(ValueError, match="^num_groups: got 3; expected a divisor of the 7 channels of x and x2"):
        routed_group_norm(x, ones, ones, plan, num_groups=3, x2=torch.zeros(2, 4, 4, 4))

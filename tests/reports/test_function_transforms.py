"""Forward-mode differentiation gives the right values; transforms of torch.func work or are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from tdc_fast import RoutingPlan, TimestepGroups, pack_experts, routed_conv2d, routed_group_norm, routed_linear
from tests.nn.test_packing import GROUPS, batch, unet
from tests.reports.test_routed_forward import Net, samples

PLAN = RoutingPlan.from_groups(torch.tensor([1, 0, 2, 0, 2]), 3)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor, sample_bias: Tensor, residual: Tensor) -> Tensor:
    widths = {"in_widths": torch.tensor([4, 2, 0]).int(), "out_widths": torch.tensor([6, 4, 3]).int()}
    return routed_conv2d(x, weight, bias, PLAN, padding=1, sample_bias=sample_bias, residual=residual, **widths)


def norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    widths = torch.tensor([4, 2, 0]).int()
    settings: dict[str, Any] = {"num_groups": 2, "widths": widths, "activation": "silu"}
    return routed_group_norm(x, weight, bias, PLAN, scale=scale, shift=shift, **settings)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return routed_linear(x, weight, bias, PLAN)


def sort(x: Tensor) -> Tensor:
    return PLAN.unsort(PLAN.sort(x) * torch.arange(1.0, 6.0, dtype=x.dtype)[:, None, None, None])


SHAPES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "conv": (conv, [(5, 4, 3, 3), (3, 6, 4, 3, 3), (3, 6), (5, 6), (5, 6, 3, 3)]),
    "norm": (norm, [(5, 4, 3, 2), (3, 4), (3, 4), (5, 4), (5, 4)]),
    "linear": (linear, [(5, 2, 4), (3, 6, 4), (3, 6)]),
    "sort": (sort, [(5, 4, 3, 2)]),
}


def arguments(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    return [normal(*shape, dtype=dtype, seed=seed + index) for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", SHAPES)
def test_forward_mode_gives_the_numerical_derivative_in_every_argument(name: str) -> None:
    function, shapes = SHAPES[name]
    values = [value.requires_grad_() for value in arguments(shapes)]
    assert torch.autograd.gradcheck(function, values, check_forward_ad=True, check_batched_forward_grad=False)
    for moving in range(len(values)):  # one argument alone

        def alone(value: Tensor, moving: int = moving) -> Tensor:
            return function(*(value if index == moving else v.detach() for index, v in enumerate(values)))

        assert torch.autograd.gradcheck(alone, [values[moving]], check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_jvp_of_every_backend_is_that_of_fp64(name: str, dtype: torch.dtype) -> None:
    function, shapes = SHAPES[name]
    values, steps = arguments(shapes, dtype), arguments(shapes, dtype, seed=10)
    _, expected = torch.func.jvp(function, tuple(v.double() for v in values), tuple(v.double() for v in steps))
    _, found = torch.func.jvp(function, tuple(values), tuple(steps))
    assert found.dtype == dtype and bool(expected.abs().sum() > 0)
    rounding = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.2}
    torch.testing.assert_close(found.double(), expected, **rounding)


@pytest.mark.parametrize("name", SHAPES)
def test_a_tangent_can_be_differentiated_once(name: str) -> None:
    function, shapes = SHAPES[name]
    values, steps = arguments(shapes), arguments(shapes, seed=10)

    def along(*primals: Tensor) -> Tensor:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, s) for v, s in zip(primals, steps, strict=True)]
            tangent = forward_ad.unpack_dual(function(*duals)).tangent
            assert tangent is not None
            return tangent

    assert torch.autograd.gradcheck(along, [value.requires_grad_() for value in values], fast_mode=True)


def test_a_packed_models_jvp_is_that_of_its_experts() -> None:
    torch.manual_seed(0)
    groups = TimestepGroups.uniform(100, 4)
    base = Net()
    routed = pack_experts(base, groups)
    x, t = samples(0)
    step = normal(*x.shape, dtype=torch.float32)
    y, along = torch.func.jvp(lambda image: routed(image, t), (x,), (step,))
    expected_y, expected = torch.func.jvp(lambda image: base(image, t), (x,), (step,))
    torch.testing.assert_close((y, along), (expected_y, expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_vmap_and_jacfwd_give_the_values_of_a_loop(name: str) -> None:
    function, shapes = SHAPES[name]
    values = arguments(shapes)
    many = torch.stack([values[0], values[0] + 1, values[0] * 2])
    found = torch.func.vmap(lambda x: function(x, *values[1:]))(many)
    torch.testing.assert_close(found, torch.stack([function(x, *values[1:]) for x in many]))
    jacobian = torch.func.jacfwd(lambda x: function(x, *values[1:]))(values[0])
    expected = torch.autograd.functional.jacobian(lambda x: function(x, *values[1:]), values[0])
    torch.testing.assert_close(jacobian, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_reverse_transforms_are_refused_by_name(name: str) -> None:
    function, shapes = SHAPES[name]
    values = arguments(shapes)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="torch.func.grad and torch.func.vjp do not work"):
            transform(lambda *v: function(*v).sum())(*values)
    with pytest.raises(RuntimeError, match="torch.func.grad and torch.func.vjp do not work"):
        torch.func.vjp(function, *values)


@pytest.mark.parametrize("name", ["conv", "norm", "linear"])
def test_forward_mode_through_a_backward_is_refused(name: str) -> None:
    function, shapes = SHAPES[name]
    values = [value.requires_grad_() for value in arguments(shapes)]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values[0], torch.ones_like(values[0]))
        y = function(dual, *values[1:])
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(y.square().sum(), values[1])


@pytest.mark.parametrize("name", ["conv", "norm", "linear"])
def test_several_gradients_at_once_are_refused_by_name(name: str) -> None:
    function, shapes = SHAPES[name]
    values = [value.requires_grad_() for value in arguments(shapes)]
    y = function(*values)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(y, values, torch.stack([y, y]), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.functional.jacobian(lambda x: function(x, *values[1:]), values[0], vectorize=True)


def test_timesteps_under_vmap_are_refused_by_name() -> None:
    routed = pack_experts(Net(), TimestepGroups.uniform(12, 3))
    x, _ = samples(0, 4)
    with pytest.raises(ValueError, match="^t: got 'a batch of torch.vmap'"):
        torch.func.vmap(lambda image, t: routed(image[None], t[None]))(x, torch.arange(4))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """A UNet with classes, alone and as three experts of one model."""
    dense = unet()
    return {"dense": dense, "packed": pack_experts(dense, GROUPS)}


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_unets_tangent_is_that_of_differences(kind: str, models: dict[str, nn.Module]) -> None:
    model, (x, t, y) = models[kind], batch(3)
    step = normal(*x.shape, dtype=torch.float32, seed=5)
    _, along = torch.func.jvp(lambda x: model(x, t, y=y), (x,), (step,))
    exact = copy.deepcopy(models["dense"]).double()
    with torch.no_grad():
        ends = [exact(x.double() + sign * 1e-3 * step.double(), t, y=y) for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) / 2e-3).float()
    assert (along - slope).norm() <= 1e-2 * slope.norm()


class Labelled(Net):
    """With a table of labels, whose values are checked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.label_emb = nn.Sequential(self.blocks[0]), nn.Embedding(3, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.blocks(self.start(x) + self.label_emb(y)[:, :, None, None]) * (1 + 0.01 * t[:, None, None, None])


def test_linearize_of_a_packed_model_is_its_jvp() -> None:
    torch.manual_seed(0)
    model = pack_experts([Labelled() for _ in range(4)], TimestepGroups.uniform(100, 4))
    x, t = samples(0, 3)
    step, y = normal(*x.shape, dtype=torch.float32), torch.tensor([2, 0, 1])
    expected = torch.func.jvp(lambda x: model(x, t, y=y), (x,), (step,))
    out, linear = torch.func.linearize(lambda x: model(x, t, y=y), x)
    torch.testing.assert_close((out, linear(step)), expected)


def test_labels_of_a_unet_are_not_read_where_it_is_linearized(models: dict[str, nn.Module]) -> None:
    """(That linearize folds the constants of a whole UNet takes half a minute.)"""
    x, t, y = batch(3)
    check = models["dense"]._check_inputs
    assert torch.equal(torch.func.linearize(lambda x: check(x, t, y) or x * 2, x)[0], x * 2)
    with pytest.raises(ValueError, match="^y: got 5"):
        check(x, t, y + 5 - y)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_unet_is_mapped_over_whole_batches(kind: str, models: dict[str, nn.Module]) -> None:
    model, (x, t, y) = models[kind], batch(3)
    many = torch.stack([x, x * 2])
    with torch.no_grad():
        found = torch.func.vmap(lambda x: model(x, t, y=y))(many)
        torch.testing.assert_close(found, torch.stack([model(x, t, y=y) for x in many]), rtol=1e-4, atol=1e-4)


def test_a_dense_unet_is_mapped_over_its_samples_and_a_packed_one_refuses_by_name(models: dict[str, nn.Module]) -> None:
    x, t, y = batch(3)

    def alone(model: nn.Module) -> Tensor:
        return torch.func.vmap(lambda x, t, y: model(x[None], t[None], y=y[None])[0])(x, t, y)

    with torch.no_grad():
        torch.testing.assert_close(alone(models["dense"]), models["dense"](x, t, y=y), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="^t: got 'a batch of torch.vmap'"):
            alone(models["packed"])


def test_a_dense_unet_has_a_hessian(models: dict[str, nn.Module]) -> None:
    x, t, y = batch(2)

    def loss(scale: Tensor) -> Tensor:
        return models["dense"](x * scale, t, y=y).square().mean()

    found = torch.func.hessian(loss)(torch.tensor(1.0))
    scale = torch.tensor(1.0, requires_grad=True)
    (first,) = torch.autograd.grad(loss(scale), scale, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(first, scale)[0], rtol=1e-3, atol=1e-4)

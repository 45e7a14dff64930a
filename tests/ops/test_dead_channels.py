"""Which gradients are known to be zero in dead channels, and that what a layer of another library leaves there is not
used."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from tdc_fast import RoutingPlan, pack_experts, routed_conv2d, routed_group_norm
from tdc_fast.nn.leaf import LiveAxis
from tdc_fast.nn.routed import RoutedConv2d, RoutedGroupNorm
from tdc_fast.ops import conv2d_operators
from tdc_fast.ops.dead_channels import note_widths, noted_widths
from tests.nn.test_packing import GROUPS, PRUNED, batch, shuffled_plan, unet

WIDTHS, CHANNELS = (4, 8, 6), 8  # norm groups of two channels


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every dgrad was told about the dead channels of its dy."""
    found: list[bool] = []
    place = [argument.name for argument in conv2d_operators.dgrad.overload._schema.arguments].index("dead_zeros")
    call = conv2d_operators.dgrad.call

    def listening(*args: Any) -> Any:
        found.append(args[place])
        return call(*args)

    monkeypatch.setattr(conv2d_operators.dgrad, "call", listening)
    return found


def widths(*numbers: int, noted: bool = True) -> Tensor:
    made = torch.tensor(numbers, dtype=torch.int32)
    if noted:
        note_widths(made, numbers)
    return made


class Layers:
    """A convolution, whose result something uses, and a plan."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).requires_grad_()

        self.plan = RoutingPlan.from_groups(torch.tensor([0, 1, 1, 2]), 3)
        self.x, self.weight = random(4, CHANNELS, 3, 3), random(3, CHANNELS, CHANNELS, 3, 3)
        self.affine = random(3, CHANNELS), random(3, CHANNELS)

    def conv(self, x: Tensor, out: Tensor | None, in_: Tensor | None = None, **extras: Any) -> Tensor:
        return routed_conv2d(x, self.weight, None, self.plan, padding=1, out_widths=out, in_widths=in_, **extras)

    def norm(self, x: Tensor, live: Tensor | None, plan: RoutingPlan | None = None) -> Tensor:
        return routed_group_norm(x, *self.affine, plan or self.plan, num_groups=4, widths=live, activation="silu")


OURS: dict[str, Callable[[Layers], Tensor]] = {
    "a norm": lambda s: s.norm(s.conv(s.x, widths(*WIDTHS)), widths(*WIDTHS)),
    "a convolution": lambda s: s.conv(s.conv(s.x, widths(*WIDTHS)), None, widths(*WIDTHS)),
}
UNKNOWN: dict[str, Callable[[Layers], Tensor]] = {
    "a sum of channels": lambda s: s.conv(s.x, widths(*WIDTHS)),
    "a layer of torch": lambda s: s.norm(nn.functional.silu(s.conv(s.x, widths(*WIDTHS))), widths(*WIDTHS)),
    "a norm with other widths": lambda s: s.norm(s.conv(s.x, widths(4, 4, 4)), widths(*WIDTHS)),
    "a norm without widths": lambda s: s.norm(s.conv(s.x, widths(*WIDTHS)), None),
    "a norm whose widths are not known": lambda s: s.norm(s.conv(s.x, widths(*WIDTHS)), widths(*WIDTHS, noted=False)),
    "a norm with another plan": lambda s: s.norm(
        s.conv(s.x, widths(*WIDTHS)), widths(*WIDTHS), RoutingPlan.from_groups(torch.tensor([0, 0, 1, 2]), 3)
    ),
    "two layers, one of torch": lambda s: (lambda y: s.norm(y, widths(*WIDTHS)) + y)(s.conv(s.x, widths(*WIDTHS))),
}


@pytest.mark.parametrize("user", OURS)
def test_what_our_operators_wrote_is_known(user: str, told: list[bool]) -> None:
    OURS[user](Layers()).sum().backward()
    assert told[-1] is True


@pytest.mark.parametrize("user", UNKNOWN)
def test_what_others_wrote_is_not(user: str, told: list[bool]) -> None:
    UNKNOWN[user](Layers()).sum().backward()
    assert told[-1] is False


def test_one_width_tensor_needs_no_note(told: list[bool]) -> None:
    layers, same = Layers(), widths(*WIDTHS, noted=False)
    layers.norm(layers.conv(layers.x, same), same).sum().backward()
    assert told == [True]


@pytest.mark.parametrize("what", ["gradient", "widths"])
def test_a_note_ends_where_anybody_writes(what: str, told: list[bool]) -> None:
    layers, live = Layers(), widths(*WIDTHS)
    if what == "widths":
        live.clamp_(max=6)
    y = layers.conv(layers.x, live)
    y.register_hook(lambda dy: dy.add_(1) if what == "gradient" else None)
    layers.norm(y, widths(*WIDTHS)).sum().backward()
    assert told == [False]


def test_gradients_are_the_same_with_and_without_the_note(told: list[bool]) -> None:
    grads = []
    for noted in (True, False):
        s = Layers()
        residual = torch.zeros(4, CHANNELS, 3, 3, requires_grad=True)
        y = s.norm(s.conv(s.x, widths(*WIDTHS), residual=residual), widths(*WIDTHS, noted=noted))
        grads.append(torch.autograd.grad((y * torch.arange(3.0)).sum(), [s.x, s.weight, residual]))
    assert told == [True, False]
    assert all(map(torch.equal, *grads))
    assert not grads[0][2][0, WIDTHS[0] :].any()


def test_leaves_of_a_model_tell_their_widths_on_any_device(told: list[bool]) -> None:
    axis = LiveAxis(WIDTHS, 1)
    conv = RoutedConv2d(3, CHANNELS, CHANNELS, 3, padding=1)
    norm = RoutedGroupNorm(3, 4, CHANNELS)
    conv.set_live(axis, None)
    norm.set_live(axis, None)
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 2]), 3)
    for _ in range(2):
        x = torch.randn(3, CHANNELS, 3, 3, requires_grad=True)
        norm(conv(x, plan), plan).sum().backward()
        nn.ModuleList([conv, norm])._apply(torch.clone)  # as a move to another device makes new tensors
    assert told == [True, True]
    conv.out_widths = torch.tensor(CHANNELS).repeat(3).int()  # others, of which nobody has told
    norm(conv(x, plan), plan).sum().backward()
    assert told[-1] is False


def copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("twin", [copied, pickled])
@pytest.mark.parametrize("written", [False, True])
def test_copies_of_a_model_tell_their_widths(
    twin: Callable[[nn.Module], nn.Module], written: bool, told: list[bool]
) -> None:
    axis = LiveAxis(WIDTHS, 1)
    layers = nn.ModuleList([RoutedConv2d(3, CHANNELS, CHANNELS, 3, padding=1), RoutedGroupNorm(3, 4, CHANNELS)])
    for layer in layers:
        layer.set_live(axis, None)
    if written:
        layers[0].out_widths.fill_(CHANNELS)
    conv, norm = twin(layers)
    plan = RoutingPlan.from_groups(torch.tensor([0, 1, 2]), 3)
    norm(conv(torch.randn(3, CHANNELS, 3, 3, requires_grad=True), plan), plan).sum().backward()
    assert told == [not written]


def test_a_model_can_be_copied_without_its_values() -> None:
    layer = RoutedConv2d(3, CHANNELS, CHANNELS, 3, padding=1)
    layer.set_live(LiveAxis(WIDTHS, 1), None)
    with FakeCopyMode(FakeTensorMode()):
        assert noted_widths(copy.deepcopy(layer).out_widths) is None
    assert noted_widths(copy.deepcopy(layer.to("meta")).out_widths) is None


def test_a_copy_of_a_width_tensor_is_not_told_of(told: list[bool]) -> None:
    """It has the note, but its versions may come to the same number with other contents."""
    layers, live = Layers(), torch.tensor(WIDTHS, dtype=torch.int32)
    live.add_(0), live.add_(0)
    note_widths(live, WIDTHS)
    other = copy.deepcopy(live)
    for _ in range(5):
        assert other._version <= 5 and noted_widths(other) is None
        other.clamp_(max=6)
    layers.norm(layers.conv(layers.x, other), live).sum().backward()
    assert told == [False]


def test_residual_blocks_of_a_pruned_model_need_no_mask(told: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """What their first convolution returns goes to their second norm alone."""
    listening, pruned = conv2d_operators.dgrad.call, []

    def noting(dy: Tensor, weight: Tensor, *args: Any) -> Any:
        pruned.append(weight.shape[-1] == 3 and args[4] is not None)  # out_widths
        return listening(dy, weight, *args)

    monkeypatch.setattr(conv2d_operators.dgrad, "call", noting)
    model = pack_experts(unet(), GROUPS, shuffled_plan(unet(), PRUNED))
    x, t, y = batch()
    model(x, t, y=y).square().sum().backward()
    assert sum(pruned) > 2 and all(known for known, of_block in zip(told, pruned, strict=True) if of_block)

"""A routed leaf computes each sample with its own expert's dense layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tdc_fast.nn import layers
from tdc_fast.nn.leaf import LiveAxis
from tdc_fast.nn.routed import (
    RoutedConv2d,
    RoutedEmbedding,
    RoutedGroupNorm,
    RoutedLinear,
)
from tdc_fast.nn.twins import routed_twin
from tdc_fast.ops.layout import is_channel_innermost
from tdc_fast.routing import RoutingPlan

GROUPS = torch.tensor([2, 0, 2, 1, 0, 2])


@pytest.fixture
def plan() -> RoutingPlan:
    return RoutingPlan.from_groups(GROUPS, 4)  # group 3 has no sample


DENSE = {
    "convolution": (lambda: layers.Conv2d(3, 5, 3, stride=2, padding=1), (3, 6, 6)),
    "convolution without bias": (lambda: nn.Conv2d(3, 5, (1, 3), padding=(0, 1), bias=False), (3, 4, 4)),
    "linear": (lambda: layers.Linear(3, 5), (3,)),
    "linear over tokens": (lambda: nn.Linear(3, 5), (7, 3)),
    "linear over a grid": (lambda: nn.Linear(3, 5), (2, 4, 3)),
    "1x1 conv1d": (lambda: nn.Conv1d(3, 5, 1), (3, 7)),
    "1x1 conv1d over tokens": (lambda: layers.TokenConv1d(3, 5), (7, 3)),
    "group norm of images": (lambda: layers.GroupNorm(2, 4), (4, 3, 3)),
    "group norm of sequences": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 8), (8,)),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_leaf_equals_its_experts(name, plan):
    make, shape = DENSE[name]
    experts = [make() for _ in range(4)]
    for expert in experts:
        for parameter in expert.parameters():
            nn.init.normal_(parameter)
    leaf = routed_twin(name, experts[0], 4, None, None)
    for index, expert in enumerate(experts):
        leaf.load_expert(index, expert.state_dict())
    x = torch.randn(6, *shape)
    expected = torch.stack([experts[int(g)](x[i : i + 1])[0] for i, g in enumerate(GROUPS)])
    torch.testing.assert_close(plan.unsort(leaf(plan.sort(x), plan)), expected, rtol=1e-5, atol=1e-5)
    for index, expert in enumerate(experts):
        back = leaf.dense(index)
        assert type(back) is type(expert)
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in expert.state_dict().items())


@pytest.mark.parametrize("dense", [layers.Conv2d(4, 4, 1), layers.TokenConv1d(4, 4), layers.GroupNorm(2, 4)])
def test_a_leaf_takes_what_its_dense_twin_fuses(dense, plan):
    leaf = routed_twin("leaf", dense, 4, None, None)
    for index in range(4):
        leaf.load_expert(index, dense.state_dict())
    tokens = isinstance(dense, layers.TokenConv1d)
    x, residual = (torch.randn(6, 9, 4) if tokens else torch.randn(6, 4, 3, 3) for _ in range(2))
    if isinstance(dense, layers.GroupNorm):
        fused = {"scale": torch.randn(6, 4), "shift": torch.randn(6, 4), "activation": "silu"}
    elif tokens:
        fused = {"residual": residual}
    else:
        fused = {"residual": residual, "sample_bias": torch.randn(6, 4)}
    torch.testing.assert_close(leaf(x, plan, **fused), dense(x, **fused), rtol=1e-5, atol=1e-5)


def test_a_table_per_expert_is_read_by_group_and_never_across(plan):
    table = RoutedEmbedding(4, 5, 2)
    y = torch.tensor([4, 0, 1, 2, 3, 4])
    expected = torch.stack([table.weight[g, i] for g, i in zip(GROUPS, y, strict=True)])
    assert torch.equal(plan.unsort(table(plan.sort(y), plan)), expected)
    with pytest.raises(ValueError, match="index: got 5"):
        table(y + 1, plan)
    shared = torch.arange(4)
    assert torch.equal(table(shared[None], plan), table(shared.expand(6, 4), plan))
    with pytest.raises(ValueError, match=r"index: got \(4,\); expected ids of each of the 6 samples"):
        table(shared, plan)


def test_copies_are_interleaved_so_that_the_live_part_is_a_prefix(plan):
    axis = LiveAxis((3, 1, 0, 2), copies=2)
    assert axis.widths().tolist() == [6, 2, 0, 4]
    assert axis.positions(3).tolist() == [0, 2, 1, 3]
    assert LiveAxis((3, 3)).widths() is None  # nothing is dead once the axis is as long as that
    dense = layers.Linear(4, 6)
    leaf = routed_twin("emb", dense, 4, axis, None)
    state = {"weight": torch.randn(2, 4), "bias": torch.randn(2)}  # expert 1: one channel in two copies
    for index, live in enumerate(axis.counts):
        leaf.load_expert(index, {"weight": torch.zeros(2 * live, 4), "bias": torch.zeros(2 * live)})
    leaf.load_expert(1, state)
    x = torch.randn(6, 4)
    first, second = leaf.chunks(plan.sort(x), 2, plan)
    sample = int((GROUPS == 1).nonzero())
    torch.testing.assert_close(plan.unsort(first)[sample, 0], (x[sample] @ state["weight"].T + state["bias"])[0])
    torch.testing.assert_close(plan.unsort(second)[sample, 0], (x[sample] @ state["weight"].T + state["bias"])[1])
    assert all(torch.equal(value, leaf.expert_state(1)[key]) for key, value in state.items())


def test_standalone_layers_start_like_torchs():
    conv, linear, norm = RoutedConv2d(3, 4, 8, 3), RoutedLinear(3, 4, 8), RoutedGroupNorm(3, 2, 8)
    assert conv.weight.shape == (3, 8, 4, 3, 3) and linear.weight.shape == (3, 8, 4) and norm.weight.shape == (3, 8)
    assert 0.9 / 6 < conv.weight.abs().max() <= 1 / 6 and 0.7 / 2 < linear.weight.abs().max() <= 1 / 2
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()


def test_a_leaf_outside_a_forward_asks_for_a_plan():
    with pytest.raises(ValueError, match="plan: got None"):
        RoutedLinear(2, 3, 3)(torch.randn(4, 3))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(4), nn.Embedding(4, 4)])
def test_channels_are_pruned_only_where_a_kernel_has_widths(layer):
    with pytest.raises(ValueError, match="module 'leaf': got .*; expected a layer whose channels can be pruned"):
        routed_twin("leaf", layer, 2, LiveAxis((4, 2)), None)


def test_a_convolution_keeps_its_weight_channel_innermost_wherever_it_goes(plan, tmp_path):
    """So that GPU kernels read it in place: weight, gradient and optimizer state, moved, copied, saved and loaded."""
    leaf = routed_twin("convolution", layers.Conv2d(3, 5, 3, padding=1), 4, None, None)
    nn.init.normal_(leaf.weight)
    assert is_channel_innermost(leaf.weight) and not leaf.weight.is_contiguous()
    assert is_channel_innermost(leaf.double().weight) and is_channel_innermost(copy.deepcopy(leaf).weight)
    leaf.float()
    torch.save(leaf.state_dict(), tmp_path / "state.pt")
    leaf.load_state_dict({name: value.contiguous() for name, value in leaf.state_dict().items()})
    assert is_channel_innermost(leaf.weight)
    assert is_channel_innermost(torch.load(tmp_path / "state.pt", weights_only=True)["weight"])
    optimizer = torch.optim.Adam(leaf.parameters())
    leaf(plan.sort(torch.randn(6, 3, 6, 6)), plan).sum().backward()
    optimizer.step()
    assert is_channel_innermost(leaf.weight.grad)
    assert is_channel_innermost(optimizer.state[leaf.weight]["exp_avg"])
    assert leaf.expert_state(1)["weight"].is_contiguous()


def test_an_expert_leaves_in_the_dtype_that_the_leaf_has_now():
    leaf = routed_twin("linear", nn.Linear(3, 5), 2, None, None).to(torch.bfloat16)
    assert leaf.dense(0).weight.dtype == torch.bfloat16

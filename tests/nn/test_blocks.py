"""Inner channels are found by the structure of a block, whoever wrote it, and pruned as our own are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.nn.blocks import block_of, narrow
from tdc_fast.nn.macs import measure_macs
from tdc_fast.nn.units import units_of, with_widths
from tdc_fast.nn.width_plan import ExpertUnit, base_hash
from tests.models.test_iddpm import randomise

GROUPS = TimestepGroups.uniform(100, 3)
T = torch.tensor([99, 10, 40, 0, 70])


class Res(nn.Module):
    """A residual block with the names that diffusers has, written by someone else."""

    def __init__(self, channels: int, inner: int, how: str) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, channels), nn.Conv2d(channels, inner, 3, padding=1)
        self.time_emb_proj = nn.Linear(8, inner * (2 if how == "scale_shift" else 1))
        self.norm2, self.conv2 = nn.GroupNorm(4, inner), nn.Conv2d(inner, channels, 3, padding=1)
        self.time_embedding_norm, self.conv_shortcut, self.output_scale_factor = (
            how,
            nn.Conv2d(channels, channels, 1),
            2.0,
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        e = self.time_emb_proj(emb)[:, :, None, None]
        if self.time_embedding_norm == "default":
            h = self.norm2(h + e)
        else:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        return (self.conv_shortcut(x) + self.conv2(F.silu(h))) / self.output_scale_factor


class Heads(nn.Module):
    """Attention with a layer for each of q, k and v."""

    def __init__(self, channels: int, inner: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k = nn.Linear(channels, inner, bias=False), nn.Linear(context, inner, bias=False)
        self.to_v, self.to_out = nn.Linear(context, inner), nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            layer(of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, of in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A linear layer with a gate."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class Mlp(nn.Module):
    """Two linear layers, the first gated."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(channels, inner), nn.Dropout(0.0), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Net(nn.Module):
    """Residual blocks of both kinds, self- and cross-attention, and a gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.first, self.second = Res(8, 16, "default"), Res(8, 16, "scale_shift")
        self.own, self.cross, self.mlp = Heads(8, 12, 3, 8), Heads(8, 16, 2, 5), Mlp(8, 24)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = self.time(t.to(x.dtype)[:, None] / 100)
        h = self.second(self.first(x, emb), emb)
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.own(tokens)
        tokens = tokens + self.cross(tokens, context)
        return (tokens + self.mlp(tokens)).transpose(1, 2).reshape(x.shape)


WIDTHS = [
    {},
    {"first": 8, "second": 4, "own": 8, "cross": 8, "mlp": 8},
    {"first": 0, "second": 0, "own": 0, "cross": 0, "mlp": 0},
]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 8, 4, 4, generator=generator), torch.randn(5, 3, 5, generator=generator)


def shuffled(model: nn.Module, widths: list[dict[str, int]], groups: TimestepGroups = GROUPS) -> WidthPlan:
    """Random orders; units that are not named stay whole."""
    generator = torch.Generator().manual_seed(1)
    experts = tuple(
        {
            unit.name: ExpertUnit(
                tuple(torch.randperm(unit.num_atoms, generator=generator).tolist()), named.get(unit.name, unit.channels)
            )
            for unit in units_of(model)
        }
        for named in widths
    )
    return WidthPlan(base_hash=base_hash(model), boundaries=groups.boundaries, experts=experts)


def without_dead_channels(model: nn.Module, plan: WidthPlan, expert: int) -> nn.Module:
    """The whole model, where nothing reads what the expert does not keep: the reference of pruning."""
    masked = copy.deepcopy(model)
    for unit in units_of(model):
        entry = plan.experts[expert][unit.name]
        closing: Any = masked.get_submodule(next(part.module for part in unit.slices if part.dim == "in"))
        for atom in entry.order[entry.width // unit.atom :]:
            closing.weight.data[:, atom * unit.atom : (atom + 1) * unit.atom] = 0
        if not entry.width:
            closing.bias.data.zero_()
    return masked


def test_units_are_what_each_block_has_inside() -> None:
    units = {unit.name: unit for unit in units_of(Net())}
    found = {name: (unit.kind, unit.channels, unit.atom, unit.step) for name, unit in units.items()}
    assert found == {
        "first": ("resblock", 16, 4, 8),
        "second": ("resblock", 16, 4, 8),
        "own": ("attention", 12, 4, 4),
        "cross": ("attention", 16, 8, 8),
        "mlp": ("feed_forward", 24, 1, 8),
    }
    assert {(part.module, part.dim, part.copies) for part in units["second"].slices} == {
        ("second.conv1", "out", 1),
        ("second.norm2", "out", 1),
        ("second.conv2", "in", 1),
        ("second.time_emb_proj", "out", 2),
    }


def test_a_block_in_two_places_is_no_unit() -> None:
    """Its layers would need one width in both."""
    model = Net()
    model.again, model.mlp.copy = model.first, nn.Sequential(model.mlp.net[2])  # type: ignore[assignment]
    assert {unit.name for unit in units_of(model)} == {"second", "own", "cross"}


def test_a_block_without_inner_channels_takes_its_input_by_name() -> None:
    model, (x, _) = Net(), inputs()
    narrow(model, {"first": 0, "mlp": 0})
    emb = torch.zeros(5, 8)
    torch.testing.assert_close(model.first(x=x, emb=emb), model.first(x, emb))
    assert torch.equal(model.mlp(x=x), torch.zeros_like(x))


def test_a_pruned_expert_is_the_base_without_its_dead_channels_packed_and_alone() -> None:
    model = randomise(Net(), 0).double()
    widths = [WIDTHS[0], {**WIDTHS[1], "second": 8}, WIDTHS[2]]
    plan = shuffled(model, widths)
    routed = pack_experts(model, GROUPS, plan)
    (x, context), ids = inputs(), GROUPS.group_of(T)
    x, context = x.double(), context.double()
    out = routed(x, T, context)
    out.square().sum().backward()
    for index in range(3):
        mine, expert = ids == index, routed.expert(index)
        expected = without_dead_channels(model, plan, index)(x[mine], T[mine], context[mine])
        torch.testing.assert_close(out[mine], expected)
        torch.testing.assert_close(expert(x[mine], T[mine], context[mine]), expected)
        assert type(expert) is Net
    small = routed.expert(1)
    assert small.mlp.net[0].proj.weight.shape == (16, 8) and small.second.time_emb_proj.weight.shape == (16, 8)
    assert small.own.heads == 2 and small.first.norm2.num_groups == 2
    assert all(parameter.grad.isfinite().all() for parameter in routed.parameters())


def test_a_unit_that_no_expert_has_is_only_its_skip_path() -> None:
    model = randomise(Net(), 0)
    plan = shuffled(model, [{"first": 0, "own": 0, "mlp": 0}] * 3)
    routed, (x, context) = pack_experts(model, GROUPS, plan), inputs()
    assert not any(name.startswith(("first.conv1", "own.", "mlp.")) for name, _ in routed.model.named_parameters())
    expected = without_dead_channels(model, plan, 0)(x, T, context)
    torch.testing.assert_close(routed(x, T, context), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routed.expert(2)(x, T, context), expected, rtol=1e-5, atol=1e-5)


def test_a_narrower_copy_costs_less_and_can_be_narrowed_again() -> None:
    model, (x, context) = Net(), inputs()
    half = with_widths(model, {"first": 8, "own": 8, "mlp": 16})
    assert measure_macs(half, x, T, context=context) < measure_macs(model, x, T, context=context)
    assert {unit.name: unit.channels for unit in units_of(half)}["mlp"] == 16
    quarter = with_widths(half, {"mlp": 8, "own": 4})
    assert quarter.own.heads == 1 and quarter.mlp.net[2].weight.shape == (8, 8)
    assert model.own.heads == 3  # the original stays whole
    with pytest.raises(ValueError, match=r"widths\['first'\]: got 6"):
        narrow(Net(), {"first": 6})


def broken(name: str, value: Any) -> nn.Module:
    block = (
        Heads(8, 12, 3, 8) if name == "heads" or name.startswith(("to_", "add_", "norm_")) else Res(8, 16, "default")
    )
    setattr(block, name, value)
    return block


@pytest.mark.parametrize(
    "block",
    [
        broken("heads", 5),
        broken("to_k", nn.Linear(8, 4)),
        broken("norm_q", nn.LayerNorm(12)),
        broken("add_k_proj", nn.Linear(8, 12)),
        broken("to_qkv", nn.Linear(8, 36)),
        broken("conv2", nn.Conv2d(16, 8, 3, groups=2)),
        broken("time_embedding_norm", "ada_group"),
        nn.Linear(3, 3),
    ],
    ids=str,
)
def test_what_has_another_structure_is_no_block(block: nn.Module) -> None:
    assert block_of(block) is None


def test_a_model_without_blocks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="base: got 'Linear'; expected an nn.Module with pruning_units"):
        WidthPlan.uniform(nn.Linear(3, 3), [0, 100])

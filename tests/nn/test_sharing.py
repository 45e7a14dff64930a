"""Groups that share the weights of layers compute as separate experts with equal weights there, and learn together."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tdc_fast.models.iddpm import UNet
from tdc_fast.nn import one_input
from tdc_fast.nn.macs import measure_macs
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.nn.sharing import in_common_orders, shared_rows
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan
from tests.models.test_iddpm import randomise
from tests.nn.test_packing import CLOSE, GROUPS, PRUNED, batch, shuffled_plan, unet
from tests.operators import Recorded

HOW = {
    "everything": "*",
    "all but norms and embeddings": "convolutions,attention",
    "by level and in pairs": "level1:2,middle,norms:1",
}


class Blocks(nn.Module):
    """Layers a.conv, a.norm and b.conv."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "norm": nn.GroupNorm(1, 2)})
        self.b = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "silu": nn.SiLU()})

    def layer_sets(self) -> dict[str, list[str]]:
        return {"norms": ["a.norm"], "convolutions": ["a.conv", "b.conv"]}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", {}),
        ("norms", {"a.norm": (0, 0, 0, 0, 0)}),
        ("a.*:2", {"a.conv": (0, 0, 1, 1, 2), "a.norm": (0, 0, 1, 1, 2)}),
        ("convolutions, b.*:1", {"a.conv": (0, 0, 0, 0, 0)}),
        (["convolutions", "*.conv:4"], {"a.conv": (0, 0, 0, 0, 1), "b.conv": (0, 0, 0, 0, 1)}),
        ("norms:9", {"a.norm": (0, 0, 0, 0, 0)}),
    ],
)
def test_terms_name_layers_and_how_many_neighbours_share(text: str | list[str], rows: dict[str, tuple[int, ...]]):
    assert shared_rows(Blocks(), text, 5) == rows


@pytest.mark.parametrize(
    "term", ["heads", "norms:0", "norms:two", "norms:", "norms:-1", "c.*", "norms:²", "norms," * 1000]
)
def test_terms_that_name_nothing_are_refused(term: str):
    with pytest.raises(ValueError, match="shared_layers: got"):
        shared_rows(Blocks(), f"norms,{term}", 5)


def test_the_sets_of_the_unet_are_its_kinds_of_layers_and_its_levels():
    model = unet()
    sets = model.layer_sets()
    every = sorted(name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith("weight"))
    kinds = [sets[kind] for kind in ("convolutions", "attention", "norms", "embeddings")]
    assert sorted(sum(kinds, [])) == every
    assert {"time_embed.0", "label_emb", "middle_block.0.emb_layers.1"} <= set(sets["embeddings"])
    assert set(sets["attention"]) >= {"middle_block.1.qkv", "middle_block.1.proj_out"}
    inside = [name for name in every if name.partition(".")[0] in ("input_blocks", "middle_block", "output_blocks")]
    assert sorted([*sets["level0"], *sets["level1"], *sets["middle"]]) == inside
    assert "input_blocks.2.0.op" in sets["level0"] and "output_blocks.1.2.conv" in sets["level1"]
    assert all(name.startswith("middle_block") for name in sets["middle"])


def nested_plan(model: UNet, widths: Sequence[dict[str, int]]) -> WidthPlan:
    """Kept atoms of a narrower group are kept by every wider one, in another order."""
    plan = shuffled_plan(model, list(widths))
    experts = []
    for index, expert in enumerate(plan.experts):
        entries = {}
        for unit in model.pruning_units():
            entry, common = expert[unit.name], plan.experts[0][unit.name].order
            kept = entry.width // unit.atom
            entries[unit.name] = ExpertUnit((*reversed(common[:kept]), *common[kept:]), entry.width)
        experts.append(entries if index else dict(expert))
    return WidthPlan(base_hash=plan.base_hash, boundaries=plan.boundaries, experts=tuple(experts))


@pytest.fixture(params=HOW.values(), ids=HOW)
def how(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_outputs_and_gradients_are_those_of_experts_with_equal_weights(how: str, pruned: bool):
    """The reference is the model in which no group shares: its gradients, added up where weights are equal."""
    model = unet(use_scale_shift_norm=True)
    plan = nested_plan(model, PRUNED) if pruned else None
    shared = randomise(pack_experts(model, GROUPS, plan, shared_layers=how), seed=5)
    apart = pack_experts(model, GROUPS, plan)
    for group in range(3):
        apart.load_expert_state(group, shared.expert_state(group))
    x, t, y = batch()
    out, expected = shared(x, t, y=y), apart(x, t, y=y)
    torch.testing.assert_close(out, expected, **CLOSE)
    alone = shared.expert(1)(x[2:3], t[2:3], y=y[2:3])  # on some CPUs torch's group norm is right to 2e-5 only
    torch.testing.assert_close(alone, expected[2:3], rtol=1e-4, atol=1e-4)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    twins = apart.routed_leaves()
    for name, leaf in shared.routed_leaves().items():
        for key, parameter in leaf.named_parameters():
            grad = twins[name].get_parameter(key).grad
            rows = torch.tensor(leaf.rows or range(3))
            added = torch.zeros_like(parameter).index_add_(0, rows, grad)
            torch.testing.assert_close(parameter.grad, added, rtol=1e-4, atol=1e-3)
    assert measure_macs(shared, x, t, y=y) == measure_macs(apart, x, t, y=y)


def test_a_plan_is_made_once_for_every_way_of_sharing():
    x, t, y = batch()
    routed = pack_experts(unet(), GROUPS, shared_layers="convolutions,level1:2")
    assert set(routed.shared.values()) == {(0, 0, 0), (0, 0, 1)}
    with Recorded() as called:
        routed(x, t, y=y)
    assert called["routing_plan"] == 3
    with Recorded() as called:
        pack_experts(unet(), GROUPS)(x, t, y=y)
    assert called["routing_plan"] == 1


def test_a_pruned_layer_keeps_its_groups_apart_and_others_make_them_one():
    """Fuller tiles need fewer groups; widths need them all."""
    model = unet()
    routed = pack_experts(model, GROUPS, nested_plan(model, PRUNED), shared_layers="convolutions")
    leaves, seen = routed.routed_leaves(), {}
    for name in ("input_blocks.0.0", "input_blocks.1.0.in_layers.2"):
        leaf = leaves[name]
        leaf.register_forward_pre_hook(lambda leaf, args, name=name: seen.update({name: leaf.current_plan(None)}))
    x, t, y = batch()
    routed(x, t, y=y)
    assert [plan.num_groups for plan in seen.values()] == [1, 3]
    assert seen["input_blocks.1.0.in_layers.2"].weight_index.tolist() == [0, 0, 0]


def test_a_group_without_a_unit_is_its_skip_path_and_leaves_the_others_their_bias():
    model = unet()
    widths = [{}, {"output_blocks.0.0": 0}, {"output_blocks.0.0": 0}]
    routed = randomise(pack_experts(model, GROUPS, nested_plan(model, widths), shared_layers="*"), seed=1)
    closing = routed.routed_leaves()["output_blocks.0.0.out_layers.3"]
    assert closing.rows == (0, 1, 1) and closing.closing_gate.tolist() == [[True], [False]]
    assert not any(name.startswith("output_blocks.0.0.out_layers") for name in routed.expert_state(2))
    x, t, y = batch()
    expected = [routed.expert(g)(x[i, None], t[i, None], y=y[i, None])[0] for i, g in enumerate(GROUPS.group_of(t))]
    torch.testing.assert_close(routed(x, t, y=y), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_orders_that_do_not_nest_are_refused_and_others_become_one():
    model = unet()
    sharing = {name: (0, 0, 1) for name in model.layer_sets()["convolutions"]}
    plan = nested_plan(model, PRUNED)
    common = in_common_orders(plan, model.pruning_units(), sharing)
    for unit in model.pruning_units():
        entries = [expert[unit.name] for expert in common.experts]
        assert entries[0].order == entries[1].order or unit.kind == "attention"
        for before, after in zip(plan.experts, common.experts, strict=True):
            kept = before[unit.name].width // unit.atom
            assert set(before[unit.name].order[:kept]) == set(after[unit.name].order[:kept])
        assert entries[2] == plan.experts[2][unit.name]
    narrow = [{"input_blocks.1.0": 8}, {"input_blocks.1.0": 16}, {}]
    with pytest.raises(ValueError, match=r"experts\[1\]\['input_blocks\.1\.0'\]\.order"):
        pack_experts(model, GROUPS, shuffled_plan(model, narrow), shared_layers="convolutions:2")
    pack_experts(model, GROUPS, shuffled_plan(model, narrow), shared_layers="embeddings,*.emb_layers.*:1")


def test_a_state_dict_is_smaller_and_of_one_sharing_alone(how: str):
    model = unet()
    routed, apart = pack_experts(model, GROUPS, shared_layers=how), pack_experts(model, GROUPS)
    assert count(routed) < count(apart) and apart.shared == {}
    assert set(routed.state_dict()) == {*apart.state_dict(), "weight_rows"}
    twin = pack_experts(unet(seed=4), GROUPS, shared_layers=how)
    twin.load_state_dict(routed.state_dict())
    x, t, y = batch()
    assert torch.equal(twin(x, t, y=y), routed(x, t, y=y))
    for other in (apart, pack_experts(model, GROUPS, shared_layers="embeddings")):
        with pytest.raises(RuntimeError):
            other.load_state_dict(routed.state_dict())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sharing_that_only_moves_the_seam_is_told_apart():
    """(0, 0, 1, 1, 2) and (0, 0, 0, 1, 2) have tensors of one shape."""
    model = pack_experts(unet(), GROUPS, shared_layers="norms:2")
    state = {**model.state_dict(), "weight_rows": model.state_dict()["weight_rows"].clone()}
    state["weight_rows"][state["weight_rows"].eq(torch.tensor([0, 0, 1])).all(1)] = torch.tensor([0, 1, 1]).int()
    with pytest.raises(RuntimeError, match="weight_rows: got"):
        model.load_state_dict(state)


def test_experts_that_are_to_share_must_be_equal_there():
    experts = [unet(seed) for seed in range(3)]
    with pytest.raises(ValueError, match="shared_layers: got 'input_blocks.0.0'"):
        pack_experts(experts, GROUPS, shared_layers="input_blocks.0.0")
    for expert in experts[1:]:
        expert.input_blocks[0].load_state_dict(experts[0].input_blocks[0].state_dict())
    routed = pack_experts(experts, GROUPS, shared_layers="input_blocks.0.0")
    x, t, y = batch()
    expected = [experts[g](x[i, None], t[i, None], y=y[i, None])[0] for i, g in enumerate(GROUPS.group_of(t))]
    torch.testing.assert_close(routed(x, t, y=y), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_the_layers_of_the_embedding_run_in_one_launch_where_all_share_alike(
    pruned: bool, monkeypatch: pytest.MonkeyPatch
):
    model = unet(use_scale_shift_norm=True)
    plan = nested_plan(model, PRUNED) if pruned else None
    alike = randomise(pack_experts(model, GROUPS, plan, shared_layers="embeddings:2"), seed=1)
    mixed = randomise(pack_experts(model, GROUPS, plan, shared_layers="embeddings,level1:2"), seed=1)
    expected = [results(routed) for routed in (alike, mixed)]
    monkeypatch.setattr(one_input, "launches_cost", lambda device: True)
    found = [results(routed) for routed in (alike, mixed)]
    for (ours, calls), (right, calls_before) in zip(found, expected, strict=True):
        for one, other in zip(ours, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert calls < calls_before if ours is found[0][0] else calls == calls_before


def results(routed: RoutedModel) -> tuple[list[Tensor], int]:
    x, t, y = batch()
    with Recorded() as called:
        out = routed(x, t, y=y)
    parameters = [p for leaf in routed.routed_leaves().values() for p in leaf.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), parameters)], called["routed_linear"]


def test_a_copy_in_bf16_on_its_own_and_with_checkpoints_still_shares():
    routed = randomise(pack_experts(unet(use_checkpoint=True), GROUPS, shared_layers="convolutions:2"), seed=1)
    copied = copy.deepcopy(routed)
    x, t, y = batch()
    results = []
    for model in (routed, copied):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x, t, y=y)
        out.float().square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert copied.routed_leaves()["out.2"].weight.grad.shape[0] == 2

"""A packed model computes every sample with its group's expert; an expert leaves it as an ordinary, smaller module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast.diffusion import create_diffusion, ddpm_step, sample
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan, base_hash
from tdc_fast.routing import TimestepGroups
from tdc_fast.serving import Engine
from tests.models.test_iddpm import SMALL, randomise

GROUPS = TimestepGroups([0, 100, 400, 1000])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def unet(seed: int = 0, **settings) -> UNet:
    return randomise(UNet(**{**SMALL, "num_classes": 5, **settings}), seed)


def batch(count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(count, 2, 8, 8, generator=generator)
    t = torch.tensor([999, 0, 150, 400, 99, 100, 399])[:count]
    return x, t, torch.randint(0, 5, (count,), generator=generator)


def shuffled_plan(model: UNet, widths: list[dict[str, int]]) -> WidthPlan:
    """Orders that differ from expert to expert; units that are not named stay whole."""
    experts = []
    for seed, named in enumerate(widths):
        generator = torch.Generator().manual_seed(seed)
        experts.append(
            {
                unit.name: ExpertUnit(
                    tuple(torch.randperm(unit.num_atoms, generator=generator).tolist()),
                    named.get(unit.name, unit.channels),
                )
                for unit in model.pruning_units()
            }
        )
    return WidthPlan(base_hash=base_hash(model), boundaries=GROUPS.boundaries, experts=tuple(experts))


PRUNED = [
    {},
    {"input_blocks.1.0": 8, "middle_block.0": 16, "middle_block.1": 32, "output_blocks.0.0": 0, "output_blocks.1.1": 0},
    {"input_blocks.1.0": 24, "middle_block.1": 16, "output_blocks.0.0": 32, "output_blocks.2.0": 8},
]


@pytest.mark.parametrize("scale_shift", [False, True])
def test_identical_copies_are_the_dense_model(scale_shift):
    model = unet(use_scale_shift_norm=scale_shift)
    x, t, y = batch()
    torch.testing.assert_close(pack_experts(model, GROUPS)(x, t, y=y), model(x, t, y=y), **CLOSE)


def test_every_sample_gets_its_own_expert_forward_and_backward():
    experts = [unet(seed) for seed in range(3)]
    routed = pack_experts(experts, GROUPS)
    x, t, y = batch()
    x_routed, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = routed(x_routed, t, y=y)
    ids = GROUPS.group_of(t)
    expected = torch.stack([experts[g](x_dense[i, None], t[i, None], y=y[i, None])[0] for i, g in enumerate(ids)])
    torch.testing.assert_close(out, expected, **CLOSE)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_routed.grad, x_dense.grad, rtol=1e-4, atol=1e-4)
    for index, expert in enumerate(experts):
        for name, parameter in expert.named_parameters():
            leaf, _, key = name.rpartition(".")
            grad = routed.model.get_submodule(leaf).get_parameter(key).grad[index]
            torch.testing.assert_close(grad.reshape(parameter.shape), parameter.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_pruned_expert_is_the_base_without_its_dead_channels(scale_shift):
    """The reference is the base itself: what reads a dead channel is zeroed, a unit of width 0 is its skip path."""
    model = unet(use_scale_shift_norm=scale_shift)
    plan = shuffled_plan(model, PRUNED)
    routed = pack_experts(model, GROUPS, plan)
    x, t, y = batch()
    out, ids = routed(x, t, y=y), GROUPS.group_of(t)
    for index in range(3):
        masked = copy.deepcopy(model)
        for unit in model.pruning_units():
            entry = plan.experts[index][unit.name]
            closing = masked.get_submodule(next(part.module for part in unit.slices if part.dim == "in"))
            dead = [a for a in range(unit.num_atoms) if a not in entry.order[: entry.width // unit.atom]]
            for atom in dead:
                closing.weight.data[:, atom * unit.atom : (atom + 1) * unit.atom] = 0
            if not entry.width:
                closing.bias.data.zero_()
        mine = ids == index
        expected = masked(x[mine], t[mine], y=y[mine])
        torch.testing.assert_close(out[mine], expected, **CLOSE)
        expert = routed.expert(index)
        torch.testing.assert_close(expert(x[mine], t[mine], y=y[mine]), expected, **CLOSE)


def test_a_pruned_expert_leaves_as_a_smaller_module_that_can_be_saved():
    model = unet(use_scale_shift_norm=True)
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))
    whole, small = routed.expert(0), routed.expert(1)
    assert type(small) is UNet
    assert small.get_submodule("input_blocks.1.0.in_layers.2").weight.shape == (8, 32, 3, 3)
    assert small.get_submodule("input_blocks.1.0.emb_layers.1").weight.shape == (16, 128)
    assert small.get_submodule("input_blocks.1.0.out_layers.0").num_groups == 8
    assert small.get_submodule("middle_block.1.qkv").weight.shape == (96, 64, 1)
    assert not any(name.startswith("output_blocks.0.0.in_layers") for name in small.state_dict())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    twin = UNet.from_recipe(small.recipe())
    twin.load_state_dict(small.state_dict())
    x, t, y = batch()
    assert torch.equal(twin(x, t, y=y), small(x, t, y=y))
    small.get_submodule("out.2").bias.data.add_(1)
    assert not torch.equal(routed.expert(1).get_submodule("out.2").bias, small.get_submodule("out.2").bias)


def test_weights_are_as_small_as_the_widest_expert():
    model = unet()
    everywhere = [{"input_blocks.1.0": 16, "middle_block.1": 32, "output_blocks.0.0": 0}] * 3
    routed = pack_experts(model, GROUPS, shuffled_plan(model, everywhere))
    leaves = routed.routed_leaves()
    assert leaves["input_blocks.1.0.in_layers.2"].weight.shape == (3, 16, 32, 3, 3)
    assert leaves["middle_block.1.proj_out"].weight.shape == (3, 64, 32)
    assert "output_blocks.0.0.out_layers.3" not in leaves and "output_blocks.0.0.skip_connection" in leaves
    x, t, y = batch()
    ids = GROUPS.group_of(t)
    expected = torch.stack([routed.expert(g)(x[i, None], t[i, None], y=y[i, None])[0] for i, g in enumerate(ids)])
    torch.testing.assert_close(routed(x, t, y=y), expected, **CLOSE)


def test_macs_follow_the_widths():
    model = unet(use_scale_shift_norm=True)
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))
    x, t, y = batch()

    def macs(module: nn.Module, *args: Tensor) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(args[0], args[1], y=args[2])
        return counter.get_total_flops() // 2

    ids = GROUPS.group_of(t)
    dense = sum(macs(routed.expert(g), x[i, None], t[i, None], y[i, None]) for i, g in enumerate(ids))
    assert macs(routed, x, t, y) == dense


def test_dead_channels_stay_zero_through_training():
    model = unet(use_scale_shift_norm=True)
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))
    x, t, y = batch()
    optimizer = torch.optim.AdamW(routed.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        routed(x, t, y=y).square().mean().backward()
        optimizer.step()
    before = {name: parameter.clone() for name, parameter in routed.named_parameters()}
    skipped = routed.model.get_submodule("output_blocks.0.0.out_layers.3")
    for index in range(3):
        routed.load_expert_state(index, routed.expert_state(index))  # zeroes what is dead
    for name, parameter in routed.named_parameters():
        if not name.startswith("model.output_blocks.0.0"):
            assert torch.equal(parameter, before[name]), name
    assert not skipped.weight[1].any() and skipped.bias.grad[1].eq(0).all()


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_two_forwards_before_the_backward_do_not_mix(use_checkpoint):
    routed = pack_experts([unet(seed, use_checkpoint=use_checkpoint) for seed in range(3)], GROUPS)
    x, t, y = batch()
    other = t.flip(0)

    def gradients(run):
        routed.zero_grad()
        run()
        return [parameter.grad.clone() for parameter in routed.parameters()]

    def together():
        first, second = routed(x, t, y=y), routed(x, other, y=y)
        (first.square().sum() + second.square().sum()).backward()

    def one_by_one():
        routed(x, t, y=y).square().sum().backward()
        routed(x, other, y=y).square().sum().backward()

    for a, b in zip(gradients(together), gradients(one_by_one), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_forward_compiles_into_one_graph(use_checkpoint):
    small = {"channel_mult": (1,), "attention_resolutions": (), "use_checkpoint": use_checkpoint}
    routed = pack_experts([unet(seed, **small) for seed in range(3)], GROUPS)
    x, t, y = batch()
    expected = routed(x, t, y=y)
    expected.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in routed.parameters()]
    routed.zero_grad()
    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
    out = compiled(x, t, y=y)
    torch.testing.assert_close(out, expected, **CLOSE)
    out.square().sum().backward()
    for parameter, grad in zip(routed.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-3)


def test_autocast_is_as_close_as_the_dense_models():
    model = unet(use_scale_shift_norm=True)
    routed = pack_experts(model, GROUPS)
    x, t, y = batch()
    exact = model(x, t, y=y)
    with torch.autocast("cpu", torch.bfloat16):
        dense, mixed = model(x, t, y=y), routed(x, t, y=y)
    assert mixed.dtype == dense.dtype
    assert (mixed - exact).norm() <= 2 * (dense - exact).norm()


def test_copies_and_state_dicts_are_ordinary():
    model = unet()
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))
    twin = copy.deepcopy(routed)
    for parameter in twin.parameters():
        parameter.data.mul_(1.5)
    x, t, y = batch()
    before = routed(x, t, y=y)
    assert not torch.equal(twin(x, t, y=y), before)
    twin.load_state_dict(routed.state_dict())
    assert torch.equal(twin(x, t, y=y), before) and twin.routing is not routed.routing


def test_a_state_dict_of_other_experts_is_refused_by_name():
    model = unet()
    plan = shuffled_plan(model, PRUNED)
    routed = pack_experts(model, GROUPS, plan)
    narrower = [PRUNED[0], PRUNED[1], {**PRUNED[2], "input_blocks.1.0": 16}]
    with pytest.raises(RuntimeError, match="unit_widths"):
        routed.load_state_dict(pack_experts(model, GROUPS, shuffled_plan(model, narrower)).state_dict())
    moved = TimestepGroups([0, 100, 500, 1000])
    with pytest.raises(RuntimeError, match="group_boundaries"):
        pack_experts(model, moved).load_state_dict(pack_experts(model, GROUPS).state_dict())


def test_an_experts_weights_can_be_written_back():
    model = unet(use_scale_shift_norm=True)
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))
    tuned = {name: value + 0.01 * torch.randn_like(value) for name, value in routed.expert_state(1).items()}
    others = routed.expert_state(2)
    routed.load_expert_state(1, tuned)
    assert all(torch.equal(value, tuned[name]) for name, value in routed.expert(1).state_dict().items())
    assert all(torch.equal(value, others[name]) for name, value in routed.expert_state(2).items())
    with pytest.raises(ValueError, match="out.2.bias"):
        routed.load_expert_state(1, {name: value for name, value in tuned.items() if name != "out.2.bias"})
    with pytest.raises(ValueError, match="out.2.bias"):
        routed.load_expert_state(1, {**tuned, "out.2.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="index: got 3"):
        routed.expert(3)


class Foreign(nn.Module):
    """A denoiser of plain torch layers, called as plain modules."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(1000, 8)
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.body = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.mix = nn.Conv1d(8, 8, 1)
        self.norm = nn.GroupNorm(4, 8)
        self.head = nn.Linear(8, 2)
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        h = self.body(self.stem(x) + self.emb(t)[:, :, None, None])
        h = self.norm(self.mix(h.flatten(2)))
        return {"eps": self.gain * self.head(h.transpose(1, 2)).transpose(1, 2).reshape(x.shape)}


def test_any_module_of_supported_layers_can_be_packed():
    experts = [randomise(Foreign(), seed) for seed in range(3)]
    routed = pack_experts(experts, GROUPS)
    x, t, _ = batch()
    out = routed(x, t)["eps"]
    for i, g in enumerate(GROUPS.group_of(t)):
        torch.testing.assert_close(out[i], experts[g](x[i, None], t[i, None])["eps"][0], **CLOSE)
    back = routed.expert(1)
    assert type(back) is Foreign and torch.equal(back(x, t)["eps"], experts[1](x, t)["eps"])


class WithPositions(nn.Module):
    """Adds an embedding of positions, and one of labels, to tokens."""

    def __init__(self, row: bool) -> None:
        super().__init__()
        self.pos, self.label, self.row = nn.Embedding(8, 4), nn.Embedding(8, 4), row

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return x + self.pos(positions[None] if self.row else positions) + self.label(y)[:, None]


def test_positions_that_all_samples_share_are_not_taken_for_an_id_per_sample():
    experts = [randomise(WithPositions(row=True), seed) for seed in range(3)]
    x, t, y = torch.randn(8, 8, 4), torch.arange(8) * GROUPS.num_timesteps // 8, torch.arange(8)
    out = pack_experts(experts, GROUPS)(x, t, y)  # labels from 0 to 7 are labels
    for i, g in enumerate(GROUPS.group_of(t)):
        torch.testing.assert_close(out[i], experts[g](x[i, None], t[i, None], y[i, None])[0], **CLOSE)
    for expert in experts:
        expert.row = False
    routed = pack_experts(experts, GROUPS)
    with pytest.raises(
        ValueError, match=r"pos.*: index: got 'the numbers from 0 to 7'; expected .*arange\(n\)\[None\]"
    ):
        routed(x, t, y)
    same = t[:1].expand(8)  # one expert: nothing to mistake
    torch.testing.assert_close(routed(x, same, y), experts[0](x, same, y), **CLOSE)


def test_what_cannot_be_packed_is_named():
    tied = Foreign()
    tied.norm.weight = tied.body[0].weight
    with pytest.raises(ValueError, match="norm.weight: got 'shared with body.0.weight'"):
        pack_experts(tied, GROUPS)
    with pytest.raises(ValueError, match="base_or_experts: got '2 experts'"):
        pack_experts([Foreign(), Foreign()], GROUPS)
    with pytest.raises(ValueError, match="base_or_experts: got None; expected a module"):
        pack_experts(None, GROUPS)
    with pytest.raises(ValueError, match="groups: got 3; expected TimestepGroups"):
        pack_experts(unet(), 3)
    with pytest.raises(ValueError, match="widths: got 3; expected a WidthPlan"):
        pack_experts(unet(), GROUPS, 3)
    with pytest.raises(ValueError, match=r"experts\[2\]"):
        pack_experts([unet(), unet(), unet(num_classes=6)], GROUPS)
    with pytest.raises(ValueError, match="base_or_experts: got 'Foreign'"):
        pack_experts(Foreign(), GROUPS, shuffled_plan(unet(), PRUNED))


def test_a_width_plan_of_another_base_or_grouping_is_refused_by_name():
    model = unet()
    plan = shuffled_plan(model, PRUNED)
    with pytest.raises(ValueError, match="base_hash"):
        pack_experts(unet(seed=1), GROUPS, plan)
    with pytest.raises(ValueError, match="boundaries"):
        pack_experts(model, TimestepGroups.uniform(1000, 3), plan)


def test_torchs_default_device_does_not_decide_where_experts_are_packed():
    model = unet()
    plan = shuffled_plan(model, PRUNED)
    expected = pack_experts(model, GROUPS, plan)
    with torch.device("meta"):
        packed = pack_experts(model, GROUPS, plan)
        states = [packed.expert_state(index) for index in range(3)]
        packed.load_expert_state(1, states[1])
        with pytest.raises(ValueError, match=r"^base: got '[\w.]+ on the meta device'; expected a model whose weights"):
            pack_experts(UNet(**SMALL), GROUPS, plan)
    for name, value in expected.state_dict().items():
        assert torch.equal(packed.state_dict()[name], value), name
    for index, state in enumerate(states):
        own = expected.expert_state(index)
        assert own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


def test_a_sample_may_be_sent_to_another_expert_than_its_timesteps():
    model = pack_experts([unet(seed) for seed in range(3)], GROUPS)
    x, t, y = batch()
    ids = torch.tensor([2, 0, 1, 1, 2, 0, 0])
    out = model(x, t, y=y, expert_ids=ids)
    for i in range(3):
        mine = ids == i
        torch.testing.assert_close(out[mine], model.expert(i)(x[mine], t[mine], y=y[mine]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="expert_ids"):
        model(x, t, y=y, expert_ids=ids[:3])


def test_bad_timesteps_are_named():
    routed = pack_experts(unet(), GROUPS)
    x, t, y = batch()
    for bad, named in [
        (t + 0.5, "t: got 999.5"),
        (t[:3], "t: got"),
        (t + 1, "t: got 1000"),
        (None, "t: got None; expected a number, or a torch tensor"),
    ]:
        with pytest.raises(ValueError, match=named):
            routed(x, bad, y=y)


def test_packing_keeps_mode_dtype_and_frozen_parameters():
    model = unet().double().eval()
    model.out[2].bias.requires_grad_(False)
    routed = pack_experts(model, GROUPS)
    assert isinstance(routed, RoutedModel) and not routed.training and not routed.model.out[2].training
    assert routed.model.out[2].weight.dtype == torch.float64
    assert not routed.model.out[2].bias.requires_grad and routed.model.out[2].weight.requires_grad
    assert not routed.expert(0).training


@pytest.mark.parametrize("steps", [20, 200])
def test_a_process_of_other_timesteps_than_the_groups_divide_is_refused(steps):
    model, diffusion = pack_experts(UNet(**SMALL), TimestepGroups.uniform(100, 4)), create_diffusion(steps)
    x, t = torch.zeros(2, SMALL["in_channels"], 8, 8), torch.zeros(2, dtype=torch.int64)
    message = f"model: got 'one whose groups divide 100 timesteps'; expected groups of the process's {steps} timesteps"
    for use in (
        lambda: diffusion.training_losses(model, x, t),
        lambda: sample(diffusion, model, x.shape, steps=2),
        lambda: ddpm_step(diffusion, model, x, t),
        lambda: Engine(model, diffusion, x.shape[1:]),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_inputs_that_are_no_dense_images_are_refused_by_name():
    model, t = pack_experts(UNet(**SMALL), TimestepGroups.uniform(100, 4)), torch.zeros(2, dtype=torch.int64)
    x = torch.zeros(2, SMALL["in_channels"], 8, 8)
    nested = torch.nested.nested_tensor([x[0], x[1]])
    for wrong, message in ((nested, "a nested tensor"), (x.to_sparse(), "sparse"), (x.cfloat(), "complex64")):
        with pytest.raises(ValueError, match=f"^x: got .*{message}"):
            model(wrong, t)

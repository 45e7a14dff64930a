"""Importance is the first-order change of the group's own loss, per atom; magnitude is the weights' norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdc_fast.diffusion import create_diffusion
from tdc_fast.graphs import use_capture
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.macs import MacCounter
from tdc_fast.pruning.importance import TaylorImportance, balanced, magnitude_importance, taylor_importance
from tests.graphs.tape import TapeCapture
from tests.pruning.tiny import RecordedDiffusion, TinyNet, tiny_batches, tiny_net


def atom_parameters(net: TinyNet, layer: int, atom: int) -> list[Tensor]:
    """Views of everything that belongs to one neuron (or `net.atom` neurons)."""
    rows = slice(atom * net.atom, (atom + 1) * net.atom)
    up, down = net.layers[layer].up, net.layers[layer].down
    return [up.weight[rows], up.bias[rows], down.weight[:, rows]]


@pytest.mark.parametrize("atom", [1, 2])
def test_taylor_importance_is_the_slope_of_the_loss_as_an_atom_shrinks(atom: int) -> None:
    net, batches = tiny_net(atom=atom), tiny_batches(3)
    diffusion = RecordedDiffusion()
    found = taylor_importance(net, net.pruning_units(), batches, diffusion, (10, 60))
    steps = 1e-5
    for layer, unit in enumerate(net.pruning_units()):
        for index in range(unit.num_atoms):
            expected = 0.0
            for x0, t in zip(batches, diffusion.timesteps[:3], strict=True):
                ends = []
                for factor in (1 + steps, (1 - steps) / (1 + steps)):
                    with torch.no_grad():
                        for values in atom_parameters(net, layer, index):
                            values.mul_(factor)
                        ends.append(float(diffusion.loss(net, x0, t).mean()))
                with torch.no_grad():
                    for values in atom_parameters(net, layer, index):
                        values.div_(1 - steps)
                expected += abs((ends[0] - ends[1]) / (2 * steps))
            assert found[unit.name][index] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_importance_from_graphs_is_that_without_them_for_every_group() -> None:
    net, batches, tape = tiny_net(), tiny_batches(3), TapeCapture()
    groups = [(0, 20), (20, 60), (60, 100)]
    plain = [taylor_importance(net, net.pruning_units(), batches, RecordedDiffusion(), group) for group in groups]
    with use_capture(tape):
        taylor = TaylorImportance(net, net.pruning_units(), RecordedDiffusion())
        for group, expected in zip(groups, plain, strict=True):
            found = taylor.of(batches, group)
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert [one.replays for one in tape.tapes] == [7]
        with MacCounter() as counted:
            taylor.of(batches, (0, 20))
        assert tape.replays == 9  # all but the first, which tells what a replay takes
    with MacCounter() as counter:
        taylor_importance(net, net.pruning_units(), batches, RecordedDiffusion(), (0, 20))
    assert counted.macs == counter.macs > 0


def test_changes_cancel_within_an_atom_and_not_between_batches() -> None:
    net = tiny_net(channels=(2,), atom=2)
    up = net.layers[0].up

    def loss(model: nn.Module, x0: Tensor, t: Tensor) -> Tensor:
        return x0.mean() * (up.bias[0] / up.bias[0].detach() - up.bias[1] / up.bias[1].detach() * 0.75) + 0 * t

    ones = torch.ones(4, 3, dtype=torch.float64)
    found = taylor_importance(net, net.pruning_units(), [ones, -ones], RecordedDiffusion(loss), (0, 100))
    assert found["layers.0"] == pytest.approx([0.25 + 0.25])


def test_only_the_groups_own_timesteps_are_seen_and_they_cover_it_evenly() -> None:
    net, diffusion = tiny_net(), RecordedDiffusion()
    taylor_importance(net, net.pruning_units(), tiny_batches(2, size=10), diffusion, (40, 60))
    for t in diffusion.timesteps:
        assert sorted(((t - 40) // 2).tolist()) == list(range(10))
    one_step = RecordedDiffusion()
    taylor_importance(net, net.pruning_units(), tiny_batches(1), one_step, (99, 100))
    assert one_step.timesteps[0].tolist() == [99] * 8


def test_importance_differs_between_groups_as_their_losses_do() -> None:
    net = tiny_net()

    def loss(model: nn.Module, x0: Tensor, t: Tensor) -> Tensor:
        layer = model.layers[0] if bool((t < 50).all()) else model.layers[1]
        return layer(x0).square().mean(1)

    low = taylor_importance(net, net.pruning_units(), tiny_batches(), RecordedDiffusion(loss), (0, 50))
    high = taylor_importance(net, net.pruning_units(), tiny_batches(), RecordedDiffusion(loss), (50, 100))
    assert low["layers.0"].min() > 0 and not low["layers.1"].any()
    assert high["layers.1"].min() > 0 and not high["layers.0"].any()


def test_every_slice_of_a_unet_counts_copies_and_heads_included() -> None:
    torch.manual_seed(0)
    unet = create_unet(
        image_size=8, num_channels=8, num_res_blocks=1, num_heads=2, channel_mult="1,2", in_channels=1,
        attention_resolutions="4", class_cond=True, num_classes=3,
    )  # fmt: skip
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    units = {unit.name: unit for unit in unet.pruning_units()}
    diffusion = create_diffusion(noise_schedule="cosine")
    x0, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    found = taylor_importance(unet, list(units.values()), [(x0, {"y": labels})], diffusion, (100, 200), seed=3)

    from tdc_fast.diffusion.calibration import draw_timesteps

    t, noise = draw_timesteps(x0, (100, 200), torch.Generator().manual_seed(3))
    diffusion.training_losses(unet, x0, t, noise=noise, model_kwargs={"y": labels})["loss"].mean().backward()

    def change(tensor: Tensor) -> Tensor:
        return tensor.detach().double() * tensor.grad.double()

    block = unet.get_submodule("middle_block.0")
    conv_in, emb, norm, conv_out = block.in_layers[2], block.emb_layers[1], block.out_layers[0], block.out_layers[3]
    for atom in range(16):  # one channel per normalisation group here; emb holds scales, then shifts
        expected = sum(
            [
                change(conv_in.weight)[atom].sum() + change(conv_in.bias)[atom],
                change(emb.weight)[[atom, atom + 16]].sum() + change(emb.bias)[[atom, atom + 16]].sum(),
                change(norm.weight)[atom] + change(norm.bias)[atom],
                change(conv_out.weight)[:, atom].sum(),
            ]
        )
        assert found["middle_block.0"][atom] == pytest.approx(abs(float(expected)), rel=1e-4, abs=1e-7)

    attention = unet.get_submodule("middle_block.1")
    for head in range(2):  # 8 channels per head: 24 rows of qkv, 8 columns of the projection
        rows, columns = slice(24 * head, 24 * head + 24), slice(8 * head, 8 * head + 8)
        expected = change(attention.qkv.weight)[rows].sum() + change(attention.qkv.bias)[rows].sum()
        expected = expected + change(attention.proj_out.weight)[:, columns].sum()
        assert found["middle_block.1"][head] == pytest.approx(abs(float(expected)), rel=1e-4, abs=1e-7)
    assert {name: len(scores) for name, scores in found.items()} == {n: u.num_atoms for n, u in units.items()}


def test_the_model_is_left_as_it_was() -> None:
    net = tiny_net().train()
    net.layers[0].eval()
    net.layers[1].up.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():  # importance turns gradients on for itself
        found = taylor_importance(net, net.pruning_units(), tiny_batches(), RecordedDiffusion(), (0, 100))
    assert all(scores.min() > 0 for scores in found.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert (net.training, net.layers[0].training, net.layers[1].training) == (True, False, True)
    assert not net.layers[1].up.weight.requires_grad and net.layers[1].up.bias.requires_grad


def test_dropout_is_off_while_measuring() -> None:
    net = tiny_net().train()
    modes = []

    def loss(model: nn.Module, x0: Tensor, t: Tensor) -> Tensor:
        modes.append(any(module.training for module in model.modules()))
        return model(x0, t).square().mean(1)

    taylor_importance(net, net.pruning_units(), tiny_batches(1), RecordedDiffusion(loss), (0, 100))
    assert modes == [False]


def test_the_seed_decides_the_draws() -> None:
    net, batches = tiny_net(), tiny_batches()
    runs = []
    for seed in (0, 0, 1):
        diffusion = RecordedDiffusion()
        taylor_importance(net, net.pruning_units(), batches, diffusion, (0, 100), seed=seed)
        runs.append(torch.cat(diffusion.timesteps).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_magnitude_is_the_euclidean_norm_of_an_atoms_parameters() -> None:
    net = tiny_net(atom=2)
    found = magnitude_importance(net, net.pruning_units())
    for layer, unit in enumerate(net.pruning_units()):
        for atom in range(unit.num_atoms):
            values = torch.cat([part.detach().flatten() for part in atom_parameters(net, layer, atom)])
            assert found[unit.name][atom] == pytest.approx(float(values.norm()))


def test_balancing_keeps_contrasts_within_a_unit_and_sets_its_sum() -> None:
    scaled = balanced({"a": np.array([1.0, 3.0]), "b": np.zeros(2)}, {"a": 8.0, "b": 5.0})
    assert scaled["a"].tolist() == [2.0, 6.0] and scaled["b"].tolist() == [0.0, 0.0]


def test_a_model_that_has_diverged_is_refused() -> None:
    net = tiny_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1e300)
    with pytest.raises(FloatingPointError, match="on timesteps 40 to 59 is infinite or NaN: the base has diverged"):
        taylor_importance(net, net.pruning_units(), tiny_batches(2), RecordedDiffusion(), (40, 60))


def test_an_empty_interval_is_refused() -> None:
    net = tiny_net()
    with pytest.raises(ValueError, match="group"):
        taylor_importance(net, net.pruning_units(), tiny_batches(), RecordedDiffusion(), (5, 5))

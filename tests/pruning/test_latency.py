"""Budgets in time: the widths that pay are taken, whatever MACs say; rooflines."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc_fast.diffusion import Diffusion
from tdc_fast.kernels.tile_shapes import Device, choose_tile
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.ops import cuda_launch, native
from tdc_fast.ops.backends import ENVIRONMENT
from tdc_fast.pruning import PruningSettings, plan_pruning, project, prune
from tdc_fast.pruning.budget import budget_of
from tdc_fast.pruning.costs import UnitCosts
from tdc_fast.pruning.latency import LatencyTable, Layer, Roofline, Setting, hopper, roofline, unit_latencies
from tdc_fast.pruning.latency.costs import all_layers, stepped
from tdc_fast.pruning.latency.layers import layers_of
from tdc_fast.pruning.latency.problems import backends_of
from tdc_fast.pruning.latency.timing import layer_nanoseconds, median_error, rank_correlation
from tdc_fast.pruning.memory import read_trials, searches_of
from tdc_fast.routing import TimestepGroups
from tests.emulator.harness import EmulatorLauncher
from tests.pruning.tiny import RecordedDiffusion, task_of, tiny_batches, tiny_net

SETTING = Setting("a test's device", "float32", 32, 4)
H200 = Device(90, 132, 232448, "NVIDIA H200")


class Kernels:
    """A device whose layers of 8 or 16 live channels are cheap, and whose every other width costs more than all."""

    def nanoseconds(self, layer: Layer) -> int:
        live, full = min((layer.live_in, layer.in_channels), (layer.live_out, layer.out_channels), key=_share)
        pixels = layer.height * layer.width
        return 100 + pixels * (live if live in (0, 8, 16) or live == full else full + 3)


def _share(side: tuple[int, int]) -> float:
    return side[0] / side[1]


def table_of(base: UNet, x: Tensor) -> LatencyTable:
    return LatencyTable(SETTING, {layer: Kernels().nanoseconds(layer) for layer in all_layers(base, x, {})})


def test_a_plan_in_time_meets_its_budgets_with_widths_that_pay_and_tells_both_costs(
    unet: UNet, diffusion: Diffusion, images: list[Tensor]
) -> None:
    groups, model = TimestepGroups.uniform(1000, 3), table_of(unet, images[0])
    settings = PruningSettings(k=0.75, budget_in="latency", latency=model, importance="magnitude")
    found = plan_pruning(unet, groups, diffusion, images, settings)
    plan = WidthPlan.from_json(json.loads(json.dumps(found.plan.to_json())))
    assert plan == found.plan and plan.budgets == () and len(plan.macs) == 3
    costs = unit_latencies(unet, images[0], {}, model)
    assert found.base_latency == costs.full()
    assert plan.latency_budgets == tuple(budget_of(share, costs.full()) for share in found.fractions)
    by_macs = prune(unet, groups, diffusion, images, k=0.75, importance="magnitude")
    for group in (1, 2):
        widths = plan.expert_widths(group)
        assert plan.latency[group] == costs.total(widths) <= plan.latency_budgets[group]
        assert all(widths[unit.name] in costs.paying(unit) for unit in unet.pruning_units())
        in_macs = by_macs.expert_widths(group)  # the share of the MACs alone would take more time than this
        assert any(in_macs[unit.name] not in costs.paying(unit) for unit in unet.pruning_units())
        assert costs.total(in_macs) > plan.latency_budgets[group]
    assert "ns" in str(plan).splitlines()[1]


def test_an_exact_solve_in_time_agrees_with_trying_every_width_and_spares_those_that_do_not_pay() -> None:
    net = tiny_net()
    units, rng = net.pruning_units(), np.random.default_rng(0)
    for seed in range(20):
        tables = {unit.name: {w: int(rng.integers(0, 100)) for w in unit.widths()} for unit in units}
        costs = UnitCosts(7, tables, "ns")
        budget = int(rng.integers(costs.least(), costs.full() + 40))
        task = task_of(units, costs, budget, seed)
        kept = {name: np.r_[0.0, np.cumsum(np.sort(scores)[::-1])] for name, scores in task.importance.items()}

        def value(widths: dict[str, int], kept: dict[str, np.ndarray] = kept) -> float:
            return sum(float(kept[name][width]) for name, width in widths.items())

        names = [unit.name for unit in units]
        every = [dict(zip(names, w, strict=True)) for w in itertools.product(*(unit.widths() for unit in units))]
        pay = {unit.name: costs.paying(unit) for unit in units}
        worth = [widths for widths in every if all(widths[name] in pay[name] for name in names)]
        affordable = [widths for widths in worth if costs.total(widths) <= budget]
        inside = [widths for widths in affordable if costs.total(widths) >= 0.99 * budget]
        best = max(inside or affordable, key=value)
        solution = task.most_important()
        assert value(solution.widths) == pytest.approx(value(best)) and solution.cost <= budget
        # A width that does not pay is never missed: another choice keeps at least as much in no more time.
        for widths in every:
            if costs.total(widths) <= budget:
                assert any(costs.total(w) <= costs.total(widths) and value(w) >= value(widths) for w in worth)


def test_widths_that_do_not_pay_are_those_that_a_wider_one_costs_no_more_than() -> None:
    (unit,) = tiny_net(channels=(4,)).pruning_units()
    table = {0: 0, 1: 5, 2: 9, 3: 12, 4: 9}
    assert UnitCosts(0, {unit.name: table}, "ns").paying(unit) == (0, 1, 4)
    assert UnitCosts(0, {unit.name: table}).paying(unit) == (0, 1, 2, 3, 4)  # in MACs all of them
    costs = UnitCosts(3, {unit.name: table}, "ns")
    assert project([unit], costs, 12, 0.5, {unit.name: 3}).widths == {unit.name: 4}
    assert project([unit], costs, 11, 0.9, {unit.name: 3}).widths == {unit.name: 1}


@pytest.mark.parametrize("agent", ["greedy", "evolution", "random"])
def test_agents_search_within_the_time_and_their_trials_tell_it(agent: str, tmp_path: Path) -> None:
    net, groups = tiny_net(channels=(4, 6)), TimestepGroups.uniform(100, 1)
    model = LatencyTable(SETTING, {layer: _bumpy(layer) for layer in all_layers(net, tiny_batches()[0], {})})
    found = plan_pruning(
        net, groups, RecordedDiffusion(), tiny_batches(), k=(0.7,), agent=agent, rounds=2, candidates=3,
        budget_in="latency", latency=model, importance="magnitude", memory_file=tmp_path / "memory.jsonl",
        tolerance=0.9,
    )  # fmt: skip
    costs = unit_latencies(net, tiny_batches()[0], {}, model)
    trials = read_trials(tmp_path / "memory.jsonl")
    assert list(found.trials[0]) == trials and len(trials) == 6
    assert list(searches_of(tmp_path)) == [f"{agent}, in time"]
    for trial in trials:
        assert trial.latency == trial.cost == costs.total(trial.widths) <= found.plan.latency_budgets[0]
    assert found.plan.latency == (costs.total(found.plan.expert_widths(0)),)
    assert found.calibration_macs >= sum(trial.spent for trial in trials) > 0
    with pytest.raises(ValueError, match="budget_in|budgets|costs_hash"):
        slower = LatencyTable(SETTING, {layer: 2 * ns for layer, ns in model.rows.items()})
        plan_pruning(
            net, groups, RecordedDiffusion(), tiny_batches(), k=(0.7,), agent=agent, rounds=2, candidates=3,
            budget_in="latency", latency=slower, importance="magnitude", memory_file=tmp_path / "memory.jsonl",
        )  # fmt: skip


def _bumpy(layer: Layer) -> int:
    live = min(layer.live_in, layer.live_out)
    return 10 + live * layer.height + (9 if live % 2 else 0)


def test_with_budgets_in_macs_a_model_of_time_changes_nothing_but_what_the_plan_tells(
    unet: UNet, diffusion: Diffusion, images: list[Tensor]
) -> None:
    groups, model = TimestepGroups.uniform(1000, 2), table_of(unet, images[0])
    plain = prune(unet, groups, diffusion, images, k=0.6, importance="magnitude").to_json()
    told = prune(unet, groups, diffusion, images, k=0.6, importance="magnitude", latency=model).to_json()
    costs = unit_latencies(unet, images[0], {}, model)
    widths = {name: unit["width"] for name, unit in plain["experts"][1].items()}
    assert "latency" not in plain and "latency_budgets" not in told
    assert told.pop("latency") == [costs.full(), costs.total(widths)]
    assert told == plain


def test_widths_step_in_what_is_asked_for_wherever_a_units_channels_allow(
    unet: UNet, diffusion: Diffusion, images: list[Tensor]
) -> None:
    groups = TimestepGroups.uniform(1000, 2)
    for step in (16, lambda layer: 16 if layer.live_out < layer.out_channels else 64):
        plan = prune(unet, groups, diffusion, images, k=0.4, width_step=step, importance="magnitude")
        for unit in unet.pruning_units():
            width = plan.expert_widths(1)[unit.name]
            coarse = math.gcd(unit.channels, 16) if unit.kind == "resblock" else unit.step
            assert width % coarse == 0
        plan.check(unet.pruning_units())
    with pytest.raises(ValueError, match="width_step: got 0; expected at least 1"):
        prune(unet, groups, diffusion, images, k=0.4, width_step=0)


def test_the_smallest_budget_in_time_is_that_of_the_widths_in_steps(
    unet: UNet, diffusion: Diffusion, images: list[Tensor]
) -> None:
    """A width between the steps may be the cheapest of all, but is not to be had."""
    model, groups = table_of(unet, images[0]), TimestepGroups.uniform(1000, 2)

    def time(layer: Layer) -> int:
        return 1 if layer.kind == "conv2d" and 8 in (layer.live_in, layer.live_out) else model.rows[layer]

    cheap = LatencyTable(SETTING, {layer: time(layer) for layer in model.rows})
    coarse = stepped(unet, unet.pruning_units(), images[0], {}, 16)
    costs = unit_latencies(unet, images[0], {}, cheap)
    least, full = costs.at_widths_of(coarse).least(), costs.full()
    assert costs.least() < least < full
    settings = {"importance": "magnitude", "budget_in": "latency", "latency": cheap, "width_step": 16}
    share = (costs.least() + least) / 2 / full
    with pytest.raises(ValueError, match=rf"k: got .* the smallest reachable budget is {least}"):
        prune(unet, groups, diffusion, images, k=(1.0, share), **settings)
    plan = prune(unet, groups, diffusion, images, k=(1.0, 1.01 * least / full), **settings)
    assert least <= plan.latency[1] <= plan.latency_budgets[1]


def test_budgets_in_time_need_a_model_of_it_and_say_what_they_lack(unet: UNet, images: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="latency: got None; expected a model of the time"):
        PruningSettings(k=0.5, budget_in="latency")
    with pytest.raises(ValueError, match="budget_in: got 'seconds'"):
        PruningSettings(k=0.5, budget_in="seconds")
    table = table_of(unet, images[0])
    known = [layer for layer in table.rows if layer.kind != "group_norm"]
    partial = LatencyTable(SETTING, {layer: table.rows[layer] for layer in known}, source="times.json")
    with pytest.raises(ValueError, match=r"times.json: got 'no row for group_norm .* 8x8'; .*tdc_fast.latency"):
        unit_latencies(unet, images[0], {}, partial)


@pytest.mark.parametrize("ns", [-5, 2.5, math.nan, math.inf, True, "7", 10**30])
def test_a_model_of_time_that_gives_no_number_of_nanoseconds_is_refused(
    ns: Any, unet: UNet, images: list[Tensor]
) -> None:
    table = LatencyTable(SETTING, dict.fromkeys(all_layers(unet, images[0], {}), ns))
    with pytest.raises(ValueError, match="latency: got .*; expected for .* a whole number of nanoseconds from 0 to 10"):
        unit_latencies(unet, images[0], {}, table)


def test_times_are_added_as_pythons_integers_and_not_all_of_them_are_zero(unet: UNet, images: list[Tensor]) -> None:
    layers = all_layers(unet, images[0], {})
    costs = unit_latencies(unet, images[0], {}, LatencyTable(SETTING, dict.fromkeys(layers, np.int64(3))))
    json.dumps([costs.fixed, costs.tables])
    with pytest.raises(ValueError, match="latency: got '0 ns for every layer'"):
        unit_latencies(unet, images[0], {}, LatencyTable(SETTING, dict.fromkeys(layers, 0)))


def test_a_plans_time_is_that_of_its_layers_with_the_channels_that_each_pruned_network_has(
    unet: UNet, images: list[Tensor]
) -> None:
    """Found by running the pruned network itself: full shapes of the base, live channels of the expert."""
    layers = all_layers(unet, images[0], {})
    table = LatencyTable(SETTING, {layer: 1 + 7919 * place % 997 for place, layer in enumerate(layers)})
    costs, units, rng = unit_latencies(unet, images[0], {}, table), unet.pruning_units(), np.random.default_rng(0)
    full = layers_of(unet.with_widths({}).to("meta"), images[0])
    for trial in range(6):
        widths = {unit.name: int(rng.choice(unit.widths()[min(trial, 1) :])) for unit in units}  # at first also 0
        pruned = layers_of(unet.with_widths(widths).to("meta"), images[0])
        total = 0
        for path, calls in full.items():
            owner = next((unit for unit in units if path in {part.module for part in unit.slices}), None)
            for place, layer in enumerate(calls):
                if path in pruned:
                    live = pruned[path][place]
                    layer = dataclasses.replace(layer, live_in=live.in_channels, live_out=live.out_channels)
                elif owner:  # a unit of width 0 has none of its layers
                    for dim in (part.dim for part in owner.slices if part.module == path):
                        layer = layer.narrowed(dim, 0)
                total += table.rows[layer]
        for unit in units:
            if unit.kind == "attention":
                tokens = full[next(part.module for part in unit.slices if part.scale == 3)][0].height
                live = (3 * widths[unit.name], widths[unit.name])
                heads = unit.num_atoms
                shape = (3 * unit.channels, unit.channels, tokens, 1)
                total += table.rows[Layer("attention", *shape, *live, num_groups=heads)]
        assert total == costs.total(widths)


def test_a_roofline_of_a_gpu_rises_in_the_steps_of_the_tiles_that_its_kernels_run_on() -> None:
    model = Roofline(Setting("NVIDIA H200", "bfloat16", 128, 8), H200)
    conv = Layer("conv2d", 256, 256, 32, 32, 256, 256, (3, 3), (1, 1), (1, 1))
    tile = choose_tile("forward", model._problem(conv), H200)
    assert model.step(conv.narrowed("out", 248)) == tile.block_channels
    assert model.step(conv.narrowed("in", 248)) == tile.block_k
    for dim, step in (("out", tile.block_channels), ("in", tile.block_k)):
        times = [model.nanoseconds(conv.narrowed(dim, width)) for width in range(8, 257, 8)]
        assert times == sorted(times)
        pairs = zip(range(8, 256, 8), itertools.pairwise(times), strict=True)
        rises = [width for width, (now, then) in pairs if then > 1.03 * now]
        assert rises and all(width % step == 0 for width in rises)
    assert model.nanoseconds(conv.narrowed("out", 0)) < 0.5 * model.nanoseconds(conv)


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
def test_a_roofline_takes_the_steps_of_the_backend_that_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "device_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200.name)
    model = Roofline.on(torch.device("cuda"), torch.bfloat16, 128, 8)
    portable = dataclasses.replace(model, is_hopper=None)
    conv = Layer("conv2d", 256, 256, 32, 32, 256, 256, (3, 3), (1, 1), (1, 1))
    thin, tall, image = (dataclasses.replace(conv, out_channels=out, live_out=out) for out in (192, 64, 6))
    narrow = dataclasses.replace(conv, height=8, width=8)
    odd = dataclasses.replace(conv, filter=(5, 5), padding=(2, 2))
    half = dataclasses.replace(conv, stride=(2, 2))
    with cuda_launch.use_launcher(EmulatorLauncher(facts=(H200.arch, H200.multiprocessors, H200.shared_limit))):
        monkeypatch.setenv(ENVIRONMENT, "triton")
        for layer in (conv.narrowed("out", 248), conv.narrowed("in", 248)):
            assert model.step(layer) == portable.step(layer) and model.nanoseconds(layer) == portable.nanoseconds(layer)
        for backend in ("cuda", "hopper"):
            monkeypatch.setenv(ENVIRONMENT, backend)
            assert backends_of([conv, image], model.setting, torch.device("cuda")) == {"conv2d": (backend,)}
        for layer, step in ((conv, 32), (thin, 48), (half, 32), (tall, 16)):
            assert model.step(layer.narrowed("out", 50)) == step and model.step(layer.narrowed("in", 248)) == 16
        small = dataclasses.replace(model, setting=dataclasses.replace(model.setting, batch=8))
        assert small.step(narrow.narrowed("out", 100)) == 64  # tiles of 64 columns
        for layer in (odd, image):
            narrowed = layer.narrowed("in", 100)
            assert model.step(narrowed) == portable.step(narrowed)
            assert model.nanoseconds(narrowed) == portable.nanoseconds(narrowed)

        def share(layer: Layer, live_in: int, live_out: int) -> float:
            narrowed = dataclasses.replace(layer, live_in=live_in, live_out=live_out)
            return round(model._gpu_seconds(narrowed, H200) / model._gpu_seconds(layer, H200), 9)

        for layer in (conv, half):
            assert share(layer, 256, 33) == share(layer, 256, 64) == 0.25 and share(layer, 256, 65) == 96 / 256
            assert share(layer, 256, 97) == 0.5 and share(layer, 65, 256) == 80 / 256
            assert share(layer, 128, 128) == 0.25 and share(layer, 192, 192) == 0.5625 and share(layer, 256, 0) == 0
        assert share(thin, 256, 97) == 0.75 and share(thin, 256, 96) == 0.5
        # Products of fewer than 64 columns wait for shared memory.
        assert share(tall, 256, 32) == 0.75 and share(tall, 256, 33) == share(tall, 256, 48) == 0.875
        assert share(tall, 256, 49) == 1


UPSAMPLED = Layer("conv2d", 256, 256, 16, 16, 256, 256, (3, 3), (1, 1), (1, 1), upsample=2)


@pytest.mark.parametrize(("taps", "met"), [(1, 1), (3, 2), (5, 3)])
def test_a_roofline_of_a_cpu_counts_a_pixel_of_an_upsampled_image_once(taps: int, met: int) -> None:
    layer = dataclasses.replace(UPSAMPLED, filter=(taps, taps), padding=(taps // 2, taps // 2))
    assert Roofline(SETTING)._cpu_macs(layer) == SETTING.batch * 32 * 32 * met**2 * 256 * 256


def test_a_roofline_of_a_gpu_counts_merged_taps_of_an_upsampled_image_and_their_launch() -> None:
    model = Roofline(Setting("NVIDIA H200", "bfloat16", 128, 8), H200)
    plain = dataclasses.replace(UPSAMPLED, height=32, width=32, upsample=1)
    assert model._gpu_seconds(UPSAMPLED, H200) == pytest.approx(4 / 9 * model._gpu_seconds(plain, H200))
    small, weights = 128 * 16 * 16 * 256, 8 * 256 * 256
    assert model._bytes(plain) == 2 * (2 * 4 * small + 9 * weights)
    assert model._bytes(UPSAMPLED) == 2 * (5 * small + (9 + 16 + 16) * weights)
    strided = dataclasses.replace(UPSAMPLED, stride=(2, 2))  # no kernel upsamples for it: torch does
    assert model._gpu_seconds(strided, H200) == model._gpu_seconds(dataclasses.replace(plain, stride=(2, 2)), H200)
    tiny = dataclasses.replace(UPSAMPLED, height=1, width=1, in_channels=8, out_channels=8, live_in=8, live_out=8)
    assert 9600 < model.nanoseconds(tiny) < 11000  # two empty launches of 4.8 us


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
def test_clocks_of_the_hopper_form_with_strides_and_upsampled_images() -> None:
    """In tiles of 256 pixels and 128 channels, whose step of 64 channels takes 1024 clocks, on 132 multiprocessors."""
    model = Roofline(Setting("NVIDIA H200", "bfloat16", 128, 8), H200)
    strided = dataclasses.replace(UPSAMPLED, height=32, width=32, stride=(2, 2), upsample=1)
    tiles, steps = 128 * 2, 256 // 64
    assert hopper.clocks(model._problem(strided), H200, 256, 256) == math.ceil(tiles / 132) * 9 * steps * 1024
    upsampled = model._problem(UPSAMPLED)
    assert hopper.clocks(upsampled, H200, 256, 256) == math.ceil(4 * tiles / 132) * 4 * steps * 1024
    assert hopper.clocks(upsampled, H200, 128, 192) == 0.5 * 0.75 * hopper.clocks(upsampled, H200, 256, 256)
    assert hopper.column_step(upsampled, H200) == 32


def test_a_roofline_of_a_cpu_rises_in_whole_panels_and_with_fewer_threads() -> None:
    model = Roofline(SETTING, None, threads=2, panel=16)
    conv = Layer("conv2d", 64, 64, 16, 16, 64, 64, (3, 3), (1, 1), (1, 1))
    assert model.nanoseconds(conv.narrowed("out", 40)) == model.nanoseconds(conv.narrowed("out", 48))
    assert model.nanoseconds(conv.narrowed("out", 48)) < model.nanoseconds(conv.narrowed("out", 49))
    assert model.step(conv.narrowed("out", 63)) == 16 and model.step(conv.narrowed("in", 63)) == 1
    assert 1.8 < dataclasses.replace(model, threads=1).nanoseconds(conv) / model.nanoseconds(conv) <= 2
    assert Roofline.on(torch.device("cpu"), torch.float32, 4, 2).panel in (8, 16, 32)


def test_layers_of_every_kind_are_measured(unet: UNet, images: list[Tensor]) -> None:
    layers = {layer.kind: layer for layer in all_layers(unet, images[0], {}) if layer.live_out < layer.out_channels}
    assert set(layers) == {"conv2d", "linear", "group_norm", "attention"}
    for layer in layers.values():
        assert layer_nanoseconds(layer, Setting("here", "float32", 4, 2), torch.device("cpu"), 0.0) > 0


def test_quality_is_spearmans_rank_correlation_and_an_error_without_the_common_factor() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # scipy's
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
    assert median_error([1, 2, 4], [3, 6, 12]) == 0
    assert median_error([1, 2, 5], [1, 2, 4]) == 0 and median_error([1, 1.5, 3], [1, 1, 1]) == pytest.approx(1 / 3)

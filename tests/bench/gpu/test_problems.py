"""What the GPU bench times: layers, cases and peers that compute the same."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bench.gpu import conv, peers
from bench.gpu.layers import UNETS, ConvLayer, design_layers, unet_layers
from bench.gpu.rows import BenchRun
from bench.gpu.timing import Machine
from tdc_fast.ops import cuda_launch, native
from tests.emulator.harness import EmulatorLauncher


def test_the_unets_layers_are_those_of_the_published_models() -> None:
    """GMACs of all convolutions per image, which the models' published totals include."""
    for name, gmacs in (("CIFAR-10", 8.13), ("ImageNet64", 39.34)):
        convs, norms = unet_layers(name, UNETS[name], batch=64)
        assert sum(layer.uses * layer.flops() for layer in convs) / 64 / 2e9 == pytest.approx(gmacs, abs=0.01)
        assert len(set(convs)) == len(convs) and len(set(norms)) == len(norms)
        assert {(layer.filter, layer.stride) for layer in convs} == {(3, 1), (3, 2), (1, 1)}
    assert design_layers()[0].flops() == 2 * 128 * 32 * 32 * 9 * 128 * 128


def test_every_combination_is_a_case_once_and_the_goals_come_first() -> None:
    design, models = design_layers(), unet_layers("CIFAR-10", UNETS["CIFAR-10"], 64)[0]
    cases = list(conv.cases(design, models))
    assert len(set(cases)) == len(cases) == (len(design) + len(models)) * (7 * 3 + 2 * 3) * 3
    first = cases[: len(design) * 9 + len(models) * 4]
    assert all(case.num_groups == 8 and not case.uneven for case in first)
    goals = first[len(design) * 9 : len(design) * 9 + len(models) * 2]
    assert {(case.layer, case.width) for case in goals} == {*itertools.product(models, (1.0, 0.5))}
    assert {case.direction for case in goals} == {"forward"}


@pytest.mark.parametrize("direction", conv.DIRECTIONS)
def test_groups_of_mixed_widths_are_compared_with_a_loop_of_smaller_experts(direction: str) -> None:
    layer = ConvLayer("a", 9, 32, 64, 5, 5)
    run = BenchRun(Machine("cpu"), "reference", torch.float32, 0.0, 5.0, tiny=True)
    problem = conv.Problem(run, conv.Case(layer, 4, True, 0.625, direction, mixed=True))
    assert problem.live == [(32, 64), (24, 48), (16, 32), (8, 16)]
    sizes = peers.group_sizes(9, 4, uneven=True)
    assert problem.flops() == sum(size * 2 * 25 * 9 * i * o for size, (i, o) in zip(sizes, problem.live, strict=True))
    result = problem.ours("reference", problem.widths())()
    result = result if direction == "forward" else result[0]
    assert problem.error(result) < 1e-5
    wrong = result.clone()
    wrong[-1, -1] = 1  # of a dead channel
    assert problem.error(wrong) > 1e-3


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("num_groups", [1, 4, 8, 16])
def test_groups_share_out_the_batch(num_groups: int, uneven: bool) -> None:
    sizes = peers.group_sizes(64, num_groups, uneven=uneven)
    assert len(sizes) == num_groups and sum(sizes) == 64
    assert sizes[0] == (32 if uneven and num_groups > 1 else 64 // num_groups)


@pytest.mark.parametrize("layer", [ConvLayer("a", 5, 8, 16, 6, 6), ConvLayer("b", 5, 8, 8, 6, 6, 3, 2)], ids=str)
def test_im2col_and_a_grouped_product_are_the_same_convolution(layer: ConvLayer) -> None:
    run = BenchRun(Machine("cpu"), "reference", torch.bfloat16, 0.0, 5.0, tiny=True)
    problem = conv.Problem(run, conv.Case(layer, 3, True, 1.0, "forward"))
    rows = peers.grouped_matmul(problem.x, problem.weight, problem.sizes, layer.stride)()
    problem.bias.zero_()
    expected = torch.cat([call() for call in problem.segments()])
    actual = rows.view(layer.batch, *layer.out_size, layer.out_channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
@pytest.mark.parametrize("direction", ["forward", "dgrad", "wgrad"])
def test_the_hopper_form_is_timed_beside_the_other_where_it_serves(direction: str) -> None:
    """Where it does not, the backend `hopper` runs what `cuda` runs."""
    run = BenchRun(Machine("cpu"), "cuda", torch.bfloat16, 0.0, 5.0, tiny=True)
    served, small = ConvLayer("a", 2, 64, 64, 8, 8), ConvLayer("b", 2, 64, 64, 7, 7)
    with cuda_launch.use_launcher(EmulatorLauncher(facts=(90, 132, 232448))):
        for layer, others in ((served, ["hopper"]), (small, [])):
            problem = conv.Problem(run, conv.Case(layer, 2, False, 1.0, direction))
            assert conv.explained(problem, "cuda") == ("cuda", others)


def test_a_sum_counts_every_use_of_every_layer_less_a_launch() -> None:
    one, two = ConvLayer("a", 4, 8, 8, 6, 6, uses=3), ConvLayer("b", 4, 8, 16, 6, 6, uses=2)
    labels = {"section": "conv", "num_groups": 8, "uneven": False, "width": 1.0, "wrong": False}

    def row(layer: ConvLayer, direction: str, ours: float, **other: object) -> dict:
        return labels | {
            "shape": layer.shape, "direction": direction, "ms": {"ours, graph": ours, "dense, graph": 2 * ours}, **other
        }  # fmt: skip

    rows = [
        row(one, "forward", 0.5), row(two, "forward", 0.25), row(one, "dgrad", 0.5), row(two, "dgrad", 1.0, wrong=True),
        row(one, "forward", 9.0, width=0.5), row(one, "forward", 9.0, num_groups=4),
        row(one, "forward", 9.0, uneven=True),
    ]  # fmt: skip
    in_both = [replace(one, source="b", uses=1), two]
    found = {(row["source"], row["direction"]): row["ms"] for row in conv.sums(rows, {"a": [one], "b": in_both}, 0.125)}
    assert found == {
        ("a", "forward"): {"ours, graph": 3 * 0.375, "dense, graph": 3 * 0.875},
        ("a", "dgrad"): {"ours, graph": 3 * 0.375, "dense, graph": 3 * 0.875},
        ("b", "forward"): {"ours, graph": 0.375 + 2 * 0.125, "dense, graph": 0.875 + 2 * 0.375},
    }, "no sum where a layer is wrong or absent"

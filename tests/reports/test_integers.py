"""Integers are taken in every form that users have them in: tensors of any integer dtype, numpy arrays, sequences.

A count is an integer of Python or numpy, wherever it is given; a truth value and a whole float are none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tdc_fast import RoutingPlan, TimestepGroups, pack_experts, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.data.dataset import load_dataset
from tdc_fast.diffusion import UniformSampler, create_diffusion
from tdc_fast.diffusion.trajectory import Trajectory
from tdc_fast.grouping.probes import Probes
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.routed import RoutedConv2d, RoutedGroupNorm, RoutedLinear
from tdc_fast.pruning.budget import budget_law
from tdc_fast.serving import Engine, Request
from tests.reports.test_routed_forward import Net, samples

GROUPS, WEIGHTS = [2, 0, 1, 0], [1, 0, 1]
FORMS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "numpy int32": lambda values: np.array(values, dtype=np.int32),
    "read-only numpy": lambda values: np.frombuffer(np.array(values).tobytes(), dtype=np.int64),
    "numpy integers": lambda values: [np.int16(value) for value in values],
    "int64": torch.tensor,
    "int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "uint8": lambda values: torch.tensor(values, dtype=torch.uint8),
    "strided": lambda values: torch.tensor(values).repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("form", FORMS)
def test_groups_and_weight_index_take_every_form(form: str) -> None:
    make = FORMS[form]
    expected = RoutingPlan.from_groups(torch.tensor(GROUPS), 3, torch.tensor(WEIGHTS, dtype=torch.int32))
    x, weight = torch.randn(4, 5), torch.randn(2, 6, 5)
    for plan in (
        RoutingPlan.from_groups(make(GROUPS), 3, make(WEIGHTS)),
        RoutingPlan.from_groups(make(GROUPS), 3).with_weight_index(make(WEIGHTS)),
    ):
        assert plan.weight_index.dtype == torch.int32 and plan.weight_index.tolist() == WEIGHTS
        assert plan.groups.tolist() == sorted(GROUPS) and torch.equal(plan.order, expected.order)
        assert torch.equal(routed_linear(x, weight, None, plan), routed_linear(x, weight, None, expected))


@pytest.mark.parametrize("form", FORMS)
def test_expert_ids_take_every_form(form: str) -> None:
    routed = pack_experts([Net() for _ in range(4)], TimestepGroups.uniform(100, 4))
    (x, t), ids = samples(0, 4), [3, 0, 1, 0]
    torch.testing.assert_close(routed(x, t, expert_ids=FORMS[form](ids)), routed(x, t, expert_ids=torch.tensor(ids)))


@pytest.mark.parametrize(
    "value",
    [
        [0.5, 1.0, 2.0],
        [True, False, True],
        [True, 0, 1],
        np.zeros(3),
        3,
        None,
        "abc",
        [[1], [2, 3]],
        torch.zeros(3),
        [None] * 3,
    ],
)
def test_anything_else_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^groups: got .*; expected"):
        RoutingPlan.from_groups(value, 3)
    if value is not None:
        with pytest.raises(ValueError, match=r"^weight_index: got .*; expected"):
            RoutingPlan.from_groups(GROUPS, 3, value)


def test_an_index_that_int32_cannot_hold_does_not_wrap_round() -> None:
    plan = RoutingPlan.from_groups([0, 0], 1, [2**32])
    with pytest.raises(ValueError, match="^weight_index: got"):
        routed_linear(torch.zeros(2, 5), torch.zeros(2, 6, 5), None, plan)


PROCESS, ONE_GROUP = create_diffusion(diffusion_steps=20), RoutingPlan.from_groups([0], 1)
IMAGE, FILTERS, AFFINE = torch.ones(1, 4, 3, 3), torch.ones(1, 4, 4, 1, 1), torch.ones(1, 4)


def engine(**settings: Any) -> Engine:
    return Engine(lambda x, t: torch.zeros_like(x), PROCESS, (1, 4, 4), **settings)


def submit(**fields: Any) -> None:
    with engine() as own:
        own.submit(Request(**{"steps": 2, **fields})).result()


def unet(**settings: Any) -> UNet:
    sizes = {"image_size": 4, "in_channels": 1, "model_channels": 8, "out_channels": 1, "num_res_blocks": 1}
    return UNet(**{**sizes, "attention_resolutions": (), "channel_mult": (1,), "num_heads": 1, **settings})


COUNTS: list[tuple[str, int, Callable[[Any], object]]] = [
    ("num_groups", 2, lambda n: RoutingPlan.from_groups([0, 0], n)),
    ("num_groups", 2, lambda n: TimestepGroups.uniform(10, n)),
    ("num_timesteps", 9, lambda n: TimestepGroups.uniform(n, 2)),
    ("num_groups", 2, lambda n: TimestepGroups.snr(PROCESS, n)),
    ("boundaries", 7, lambda n: TimestepGroups([0, n])),
    ("num_groups", 2, lambda n: routed_group_norm(IMAGE, AFFINE, AFFINE, ONE_GROUP, num_groups=n)),
    ("upsample", 2, lambda n: routed_conv2d(IMAGE, FILTERS, None, ONE_GROUP, upsample=n)),
    ("stride", 2, lambda n: routed_conv2d(IMAGE, FILTERS, None, ONE_GROUP, stride=n)),
    ("padding", 2, lambda n: routed_conv2d(IMAGE, FILTERS, None, ONE_GROUP, padding=(0, n))),
    ("num_experts", 2, lambda n: RoutedLinear(n, 3, 4)),
    ("num_groups", 2, lambda n: RoutedGroupNorm(1, n, 4)),
    ("kernel_size", 3, lambda n: RoutedConv2d(1, 4, 4, n)),
    ("index", 1, lambda n: pack_experts(Net(), TimestepGroups.uniform(10, 2)).expert(n)),
    ("image_size", 4, lambda n: unet(image_size=n)),
    ("channel_mult", 1, lambda n: unet(channel_mult=(n,))),
    ("num_timesteps", 10, lambda n: UniformSampler(n)),
    ("batch_size", 3, lambda n: UniformSampler(10).sample(n)),
    ("steps", 5, lambda n: Trajectory.plan(PROCESS, "ddim", n)),
    ("num_timesteps", 20, lambda n: create_diffusion(diffusion_steps=n)),
    ("timestep_respacing", 5, lambda n: create_diffusion(diffusion_steps=20, timestep_respacing=[n])),
    ("num_probes", 5, lambda n: Probes.evenly(20, n)),
    ("num_groups", 2, lambda n: budget_law(n, 0.5)),
    ("image_size", 8, lambda n: load_dataset("digits", image_size=n)),
    ("max_batch", 2, lambda n: engine(max_batch=n)),
    ("max_queue", 2, lambda n: engine(max_queue=n)),
    ("sizes", 2, lambda n: engine(sizes=(n,))),
    ("num_images", 2, lambda n: submit(num_images=n)),
    ("seed", 2, lambda n: submit(seed=n)),
    ("steps", 2, lambda n: submit(steps=n)),
]


@pytest.mark.parametrize(("argument", "count", "call"), COUNTS, ids=[argument for argument, _, _ in COUNTS])
def test_a_count_is_an_integer_of_python_or_numpy(argument: str, count: int, call: Callable[[Any], object]) -> None:
    for good in (count, np.int64(count), np.uint8(count)):
        call(good)
    for bad in (True, float(count), np.float32(count), str(count)):
        with pytest.raises(ValueError, match=f"^{argument}: got .*; expected "):
            call(bad)


def test_an_expert_is_the_same_for_an_index_of_numpy() -> None:
    routed = pack_experts([Net() for _ in range(2)], TimestepGroups.uniform(10, 2))
    for name, value in routed.expert(1).state_dict().items():
        assert torch.equal(routed.expert(np.int64(1)).state_dict()[name], value)


def test_widths_of_int64_are_refused_with_what_to_write() -> None:
    for name, call in {
        "in_widths": lambda **w: routed_linear(torch.ones(1, 4), torch.ones(1, 4, 4), None, ONE_GROUP, **w),
        "out_widths": lambda **w: routed_conv2d(IMAGE, FILTERS, None, ONE_GROUP, **w),
        "widths": lambda **w: routed_group_norm(IMAGE, AFFINE, AFFINE, ONE_GROUP, num_groups=2, **w),
    }.items():
        remedy = f"once, before the calls, {name} = {name}.to(torch.int32)"
        with pytest.raises(ValueError, match=f"^{name}: got 'torch.int64 of shape .*: {re.escape(remedy)}$"):
            call(**{name: torch.tensor([4])})


def test_an_empty_batch_may_be_a_list() -> None:
    assert RoutingPlan.from_groups([], 2).offsets.tolist() == [0, 0, 0]

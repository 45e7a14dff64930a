"""A width plan is a strict JSON file: what does not fit is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan, base_hash
from tests.pruning.tiny import TinyNet


@pytest.fixture(scope="module")
def base() -> UNet:
    return UNet(4, 1, 8, 1, 1, (), channel_mult=(1,), num_heads=2)


@pytest.fixture
def plan(base) -> WidthPlan:
    return WidthPlan.uniform(base, (0, 300, 1000), (1.0, 0.5))


def test_saving_and_loading_gives_the_same_plan(plan, tmp_path):
    path = tmp_path / "widths.json"
    plan.save(path)
    assert WidthPlan.load(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["widths.json"]


def test_a_uniform_plan_keeps_a_fraction_of_every_unit(plan, base):
    assert plan.expert_widths(0) == {unit.name: unit.channels for unit in base.pruning_units()}
    assert plan.expert_widths(1) == {unit.name: unit.channels // 2 for unit in base.pruning_units()}
    assert plan.max_width("middle_block.1") == 8


def test_a_fraction_is_the_decimal_number_that_is_meant():
    plan = WidthPlan.uniform(TinyNet(channels=(100, 6)), (0, 1000), 0.29)  # 100 * 0.29 is 28.999999999999996
    assert list(plan.expert_widths(0).values()) == [29, 1]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("version",), 2, "version: got 2"),
        (("version",), True, "version: got True"),
        (("base_hash",), "abc", "base_hash: got 'abc'"),
        (("boundaries",), [0, 5, 5], "boundaries: got"),
        (("boundaries",), [0, 5.0, 9], "boundaries: got"),
        (("experts",), {}, "experts: got"),
        (("experts", 1), [], r"experts\[1\]: got"),
        (("experts", 1, "middle_block.0"), {"width": 8}, r"experts\[1\]\['middle_block.0'\]: order"),
        (("experts", 1, "middle_block.0", "width"), "8", r"\['middle_block.0'\].width: got '8'"),
        (("experts", 1, "middle_block.0", "order"), [0.5], r"\['middle_block.0'\].order: got"),
        (("macs",), [1.0], "macs: got"),
        (("extra",), 1, "extra: got 1"),
    ],
)
def test_a_damaged_file_is_refused_by_name(plan, tmp_path, path, value, named):
    data = plan.to_json()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "widths.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"widths.json.*{named}"):
        WidthPlan.load(file)


def test_a_missing_field_and_a_truncated_file_are_refused_by_name(plan, tmp_path):
    data = plan.to_json()
    del data["budgets"]
    with pytest.raises(ValueError, match="budgets"):
        WidthPlan.from_json(data)
    file = tmp_path / "widths.json"
    file.write_text(json.dumps(plan.to_json())[:-20])
    with pytest.raises(ValueError, match="widths.json"):
        WidthPlan.load(file)


def changed(plan: WidthPlan, name: str, unit: ExpertUnit | None) -> WidthPlan:
    expert = {key: value for key, value in plan.experts[1].items() if key != name}
    if unit is not None:
        expert[name] = unit
    return WidthPlan(base_hash=plan.base_hash, boundaries=plan.boundaries, experts=(plan.experts[0], expert))


def test_a_plan_that_fits_another_model_is_refused_by_name(plan, base):
    units, right = base.pruning_units(), {"base": base_hash(base), "boundaries": (0, 300, 1000)}
    plan.check(units, **right)
    with pytest.raises(ValueError, match="base_hash"):
        plan.check(units, base="0" * 64)
    with pytest.raises(ValueError, match="boundaries"):
        plan.check(units, boundaries=(0, 500, 1000))
    order = tuple(range(8))
    for bad, named in [
        (changed(plan, "elsewhere", ExpertUnit(order, 8)), "elsewhere"),
        (changed(plan, "middle_block.0", None), r"experts\[1\]\['middle_block.0'\]"),
        (changed(plan, "middle_block.0", ExpertUnit(order[:-1], 8)), r"\['middle_block.0'\].order"),
        (changed(plan, "middle_block.0", ExpertUnit((0, *order[:-1]), 8)), r"\['middle_block.0'\].order"),
        (changed(plan, "middle_block.0", ExpertUnit(order, 9)), r"\['middle_block.0'\].width: got 9"),
        (changed(plan, "middle_block.1", ExpertUnit((1, 0), 2)), r"\['middle_block.1'\].width: got 2"),
    ]:
        with pytest.raises(ValueError, match=named):
            bad.check(units, **right)


def test_the_base_hash_follows_the_weights_not_their_memory_format(base):
    conv = nn.Conv2d(3, 4, 3)
    before = base_hash(conv)
    assert base_hash(conv.to(memory_format=torch.channels_last)) == before
    assert base_hash(conv.double()) != before
    other = nn.Conv2d(3, 4, 3)
    assert base_hash(other) != before

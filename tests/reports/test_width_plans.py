"""A width plan refuses the same, whether it is made in Python or loaded from a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.directory import RunDirectory
from tests.generated import examples

HASH = "0123456789abcdef" * 4
GOOD = {
    "version": 1,
    "base_hash": HASH,
    "boundaries": [0, 10, 30],
    "experts": [{"u": {"order": [1, 0], "width": 2}}, {"u": {"order": [0, 1], "width": 0}}],
    "macs": [100, 92.5],
    "budgets": [],
}


def made(data: dict) -> WidthPlan:
    """The plan that the same values make in Python."""
    experts = [
        {name: ExpertUnit(**unit) if isinstance(unit, dict) and set(unit) == {"order", "width"} else unit
         for name, unit in expert.items()} if isinstance(expert, dict) else expert
        for expert in data["experts"]
    ] if isinstance(data["experts"], list) else data["experts"]  # fmt: skip
    return WidthPlan(**{**data, "experts": experts})


NONE_OF_THEM = [None, True, "x", float("nan"), {}, [[1]]]
BAD = (
    [("version", value) for value in [2, "1", 1.0, *NONE_OF_THEM]]
    + [("base_hash", value) for value in [5, "", "abc", HASH.upper(), HASH + "0", ["a"] * 64, *NONE_OF_THEM]]
    + [("boundaries", value) for value in [[0], [1, 5, 9], [0, 5, 5], [0, 5.0, 9], [0, True, 9], [0, "5", 9]]]
    + [("boundaries", value) for value in [[0, float("nan"), 9], [0, 1, 10**20], 7, *NONE_OF_THEM]]
    + [("experts", value) for value in [[], [{}], [1, 2], ["", ""], [[], []], 5, *NONE_OF_THEM]]
    + [
        ("macs", value)
        for value in [[1.0], [1, "2"], [1, True], [1, float("nan")], [1, float("inf")], [1, -1], [1, 10**400], 5]
    ]
    + [("budgets", value) for value in [[1.0], [1, None], [[1], [2]], "ab", None, True]]
    + [("width", value) for value in [1.5, "2", -1, [2], *NONE_OF_THEM]]
    + [("order", value) for value in [5, [0.5, 1], [True, 0], ["a"], [None], "01", None, [float("nan")]]]
)


@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{field}={value!r}"[:40] for field, value in BAD])
def test_what_is_no_plan_is_refused_by_name_in_python_and_in_a_file(tmp_path, field, value):
    data = json.loads(json.dumps(GOOD))
    (data["experts"][1]["u"] if field in ("width", "order") else data)[field] = value
    (tmp_path / "widths.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"widths\.json.*{field}"):
        WidthPlan.load(tmp_path / "widths.json")
    with pytest.raises(ValueError, match=field):
        made(data)


def test_keys_that_are_no_names_are_refused():
    unit = ExpertUnit((0,), 1)
    with pytest.raises(ValueError, match="experts"):
        WidthPlan(base_hash=HASH, boundaries=(0, 5), experts=({3: unit},))
    with pytest.raises(ValueError, match="experts"):
        WidthPlan(base_hash=HASH, boundaries=(0, 5), experts=({"u": (0, 1)},))


def test_numpy_numbers_are_numbers(tmp_path):
    plan = WidthPlan(
        base_hash=HASH,
        boundaries=np.array([0, 10, 30]),
        experts=[{"u": ExpertUnit(np.array([1, 0]), np.int64(2))}, {"u": ExpertUnit([0, np.int32(1)], np.uint8(0))}],
        macs=np.array([100, 92.5]),
        budgets=(np.int64(100), np.float32(95)),
    )
    assert plan.boundaries == (0, 10, 30) and type(plan.experts[0]["u"].width) is int
    plan.save(tmp_path / "widths.json")
    assert WidthPlan.load(tmp_path / "widths.json") == plan


def test_a_plan_is_a_copy_of_what_it_was_made_of():
    expert = {"u": ExpertUnit((0, 1), 2)}
    plan = WidthPlan(base_hash=HASH, boundaries=[0, 5], experts=[expert])
    expert.clear()
    assert plan.max_width("u") == 2


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | st.sampled_from(["", "u", HASH]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["u", "order", "width"]), inner),
    max_leaves=6,
)


@examples(300)
@given(st.sampled_from(sorted(GOOD)), values)
def test_python_and_files_agree_on_what_is_a_plan(field, value):
    data = {**json.loads(json.dumps(GOOD)), field: value}
    try:
        loaded = WidthPlan.from_json(json.loads(json.dumps(data)))
    except ValueError:
        with pytest.raises(ValueError, match=r": got|: expected|boundaries"):
            made(data)
    else:
        assert made(data) == loaded


@pytest.mark.parametrize("fraction", ["half", None, True, float("nan"), [0.5], [0.5, "x"], [0.5, 2], -0.1])
def test_a_fraction_that_is_none_is_refused_by_name(fraction):
    base = UNet(4, 1, 8, 1, 1, (), channel_mult=(1,), num_heads=2)
    with pytest.raises(ValueError, match="^fraction: got"):
        WidthPlan.uniform(base, (0, 10, 30), fraction)
    assert len(WidthPlan.uniform(base, [0, 10, 30], np.array([0.5, 1])).experts) == 2


def test_printing_a_plan_is_a_short_table():
    base = UNet(4, 1, 8, 1, 1, (), channel_mult=(1,), num_heads=2)
    plan = WidthPlan.uniform(base, (0, 10, 30), (1.0, 0.5))
    table = str(plan).splitlines()
    assert len(table) == 4 and max(map(len, table)) < 80
    assert "0 to 9" in table[2] and "10 to 29" in table[3]
    whole, half = (sum(plan.expert_widths(group).values()) for group in range(2))
    assert str(whole) in table[2].split() and str(half) in table[3].split()
    assert len(repr(plan)) < 120


def test_a_run_directory_says_what_it_is(tmp_path):
    run = RunDirectory(tmp_path, TrainConfig(image_size=8), {"in_channels": 3, "identity": ""})
    assert repr(run) == f"<RunDirectory {tmp_path}: no groups, 8 pixels, 3 channels>"

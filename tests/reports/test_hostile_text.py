"""JSON and YAML from anyone: as deep, as large and as repetitive as it can be, it is refused by name and in no time.

Whoever walked through all of it would never come back, so that no test has to measure the time.
"""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast import train
from tdc_fast.errors import invalid
from tdc_fast.grouping.similarity import TaskSimilarity
from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning.agents.llm import read_answer
from tdc_fast.pruning.memory import Memory, read_trials
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.checkpoint import find_problem
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.weights import read_description
from tdc_fast.training.telemetry import _json_lines
from tests.generated import examples

DEEP = ("[" * 200_000, '{"a":' * 100_000, '{"version": ' + "[" * 50_000)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


def checkpoint_problem(path):
    marker = path.with_name("state000005.json")
    path.rename(marker)
    problem = find_problem(path.parent, 5, {})
    assert problem is not None
    raise ValueError(problem)


DOORS = {
    "groups.json": TimestepGroups.load,
    "widths.json": WidthPlan.load,
    "similarity.json": TaskSimilarity.load,
    "options.json": TrainConfig.from_file,
    "options.yaml": TrainConfig.from_file,
    "memory.jsonl": lambda path: Memory(path),
    "trials.jsonl": read_trials,
    "model000005.json": lambda path: read_description(path.with_suffix(".pt")),
    "state.json": checkpoint_problem,
    "losses.jsonl": lambda path: _json_lines(path, 5),
}


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("text", DEEP, ids=["lists", "objects", "a field"])
def test_deep_text_is_refused_with_the_name_of_its_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(f"{text}\n{text}\n")
    with pytest.raises(ValueError, match=path.stem if name != "state.json" else "state000005") as refused:
        DOORS[name](path)
    assert len(str(refused.value)) < 1000


def test_a_deep_answer_of_a_language_model_is_refused():
    with pytest.raises(ValueError, match="not JSON"):
        read_answer(None, DEEP[0], 1)


@pytest.mark.parametrize("name", [name for name in DOORS if "jsonl" not in name and name != "state.json"])
def test_a_pipe_is_not_read(tmp_path, name):
    os.mkfifo(tmp_path / name)
    if name == "model000005.json":  # as where there is no description
        assert read_description(tmp_path / "model000005.pt") is None
        return
    with pytest.raises(ValueError, match=name):
        DOORS[name](tmp_path / name)


@pytest.mark.parametrize("key", ["", "lr", "ema_rate", "channel_mult", "class_cond", "noise_schedule"])
def test_a_yaml_bomb_is_refused_in_no_time(tmp_path, key):
    path = tmp_path / "bomb.yaml"
    path.write_text(f"{BOMB}\n{key}: *l\n" if key else BOMB)
    assert path.stat().st_size < 500
    with pytest.raises(ValueError, match=r"bomb\.yaml.*aliases"):
        TrainConfig.from_file(path)


def test_a_command_refuses_a_yaml_bomb(tmp_path, capsys):
    (tmp_path / "bomb.yaml").write_text(BOMB)
    assert train.main(["--config", str(tmp_path / "bomb.yaml")]) == 2
    assert "bomb.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]\n",
        "- " * 5000 + "x",
        "[" * 20_000,
        "{a: " * 20_000,
        "a: !!python/object:os.system x\n",
        "lr: 1.0\nlr: 2.0\n",
    ],
)
def test_yaml_that_is_no_list_of_flags_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"x\.yaml"):
        TrainConfig.from_file(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_channels: 010", "it has 010, which YAML reads as 8"),
        ("stage2_shares: [1, -010]", "it has -010, which YAML reads as -8"),
        ("data_dir: 0777", "it has 0777, which YAML reads as 511"),
        ("lr: 1:30", "it has 1:30, which YAML reads as 90"),
        ("k: 1:30.5", "it has 1:30.5, which YAML reads as 90.5"),
    ],
)
def test_a_number_that_yaml_reads_in_another_base_is_refused(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.yaml.*{said}: write the number in decimal"):
        TrainConfig.from_file(tmp_path / "x.yaml")


def test_decimal_and_marked_numbers_and_quoted_text_are_read(tmp_path):
    text = "num_channels: 10\nbatch_size: 0x10\nimage_size: 0b1000\ndata_dir: '010'\ndropout: 0.5\nlr: 1e-3"
    (tmp_path / "x.yaml").write_text(text)
    config = TrainConfig.from_file(tmp_path / "x.yaml")
    assert (config.num_channels, config.batch_size, config.image_size, config.data_dir) == (10, 16, 8, "010")


def test_a_few_aliases_are_no_bomb(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: &rate 3e-4\nstage2_lr: *rate\n")
    config = TrainConfig.from_file(tmp_path / "x.yaml")
    assert config.lr == config.stage2_lr == 3e-4


def test_a_yaml_file_of_a_megabyte_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("# comment\n" * 100_000)
    with pytest.raises(ValueError, match="larger than"):
        TrainConfig.from_file(tmp_path / "x.yaml")


def shared(levels: int) -> list:
    value: list = ["x"]
    for _ in range(levels):
        value = [value] * 9
    return value


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda: shared(12),
        lambda: deep(100_000),
        lambda: {"a": shared(12)},
        lambda: "x" * 10**8,
        lambda: 10**10_000,
        lambda: list(range(10**7)),
        lambda: (deep(5000),),
    ],
    ids=["shared", "deep", "in a dict", "long text", "long integer", "long list", "in a tuple"],
)
def test_an_error_shows_the_beginning_of_any_value(make):
    message = str(invalid("name", make(), "less"))
    assert message.startswith("name: got ") and message.endswith("; expected less") and len(message) < 200


def test_an_error_with_a_long_name_is_short():
    with pytest.raises(ValueError) as refused:
        TrainConfig.from_dict({"n" * 10**6: 3})
    assert len(str(refused.value)) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.tuples(inner)
        | st.tuples(inner, inner)
        | st.frozensets(st.integers(), max_size=3)
    ),
)


@examples(100)
@given(json_values)
def test_a_short_value_is_shown_as_its_repr(value):
    shown = " ".join(repr(value).split())
    wanted = shown if len(shown) <= 160 else shown[:157] + "..."
    if "frozenset" not in shown:  # shown as {1, 2}
        assert str(invalid("name", value, "less")) == f"name: got {wanted}; expected less"


damage = st.recursive(
    st.sampled_from([None, True, -1, 0, 10**30, 1.5, "", "x", float("nan")]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["version", "a"]), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    [
        "version",
        "strategy",
        "boundaries",
        "base_hash",
        "experts",
        "macs",
        "budgets",
        "edges",
        "cosines",
        "step",
        "event",
    ]
)


@examples(200)
@given(name=st.sampled_from(sorted(DOORS)), value=damage | st.dictionaries(fields, damage, max_size=6))
def test_any_json_is_refused_with_the_name_of_its_file_or_read(tmp_path_factory, name, value):
    path = tmp_path_factory.mktemp("json") / name
    path.write_text((json.dumps(value) + "\n") * 2)
    try:
        DOORS[name](path)
    except ValueError as refused:
        assert len(str(refused)) < 2000

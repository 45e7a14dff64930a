"""Tables of times: which row a width takes, what they are stored as, and those that cannot be used are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tdc_fast.ops import native
from tdc_fast.ops.backends import ENVIRONMENT
from tdc_fast.pruning.latency import LatencyTable, Layer, Setting
from tdc_fast.pruning.latency.problems import backends_of
from tdc_fast.pruning.latency.setting import instruction_set

SETTING = Setting("a test's device", "float32", 32, 4)

CONV = Layer("conv2d", 64, 128, 8, 8, 64, 128, (3, 3), (1, 1), (1, 1))


def test_a_width_that_was_not_measured_takes_as_long_as_the_next_wider_one() -> None:
    rows = {CONV: 50, CONV.narrowed("out", 96): 70, CONV.narrowed("out", 64): 30, CONV.narrowed("in", 32): 20}
    table = LatencyTable(SETTING, rows)
    of = {live: table.nanoseconds(CONV.narrowed("out", live)) for live in (128, 120, 96, 90, 64, 8, 0)}
    assert of == {128: 50, 120: 50, 96: 70, 90: 70, 64: 30, 8: 30, 0: 30}
    assert table.nanoseconds(CONV.narrowed("in", 8)) == 20 and table.nanoseconds(CONV.narrowed("in", 40)) == 50
    with pytest.raises(ValueError, match="no row for conv2d 64-128 16x8 3x3"):
        table.nanoseconds(dataclasses.replace(CONV, height=16))
    without_full = LatencyTable(SETTING, {CONV.narrowed("out", 64): 30})
    with pytest.raises(ValueError, match=r"no row for conv2d 64-128 \(72 live\)"):
        without_full.nanoseconds(CONV.narrowed("out", 72))


def test_a_table_is_the_same_after_it_was_stored_and_is_of_one_setting(tmp_path: Path) -> None:
    table = LatencyTable(SETTING, {CONV: 50, CONV.narrowed("out", 0): 3}, {"date": "today"})
    table.save(tmp_path / "times.json")
    read = LatencyTable.load(tmp_path / "times.json")
    assert (read.setting, read.rows, read.facts) == (table.setting, table.rows, table.facts)
    read.check(SETTING)
    for name, value in {"device": "NVIDIA H200", "dtype": "bfloat16", "batch": 64, "num_groups": 8}.items():
        with pytest.raises(ValueError, match=f"times.json: {name}: got .*{value!r}, as in this run"):
            read.check(dataclasses.replace(SETTING, **{name: value}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("batch"), "table: got"),
        (lambda data: data.update(version=2), "version: got 2"),
        (lambda data: data.update(dtype="int8"), "dtype: got 'int8'"),
        (lambda data: data.update(num_groups=0), "num_groups: got 0"),
        (lambda data: data.update(rows=[]), "rows: got"),
        (lambda data: data["rows"].append(data["rows"][0]), r"rows\[1\]: got 'conv2d 64-128 8x8 3x3'; expected every"),
        (lambda data: data["rows"][0].update(ns=0), r"rows\[0\]: ns: got 0; expected an integer of at least 1"),
        (lambda data: data["rows"][0].update(ns=2.5), r"rows\[0\]: ns: got 2.5"),
        (
            lambda data: data["rows"][0].update(ns=10**19),
            r"rows\[0\]: ns: got 10{19}; expected an integer of at least 1 and at most",
        ),
        (lambda data: data["rows"][0].update(kind="dense"), r"rows\[0\]: kind: got 'dense'"),
        (lambda data: data["rows"][0].update(filter=3), r"rows\[0\]: filter: got 3; expected a pair"),
        (lambda data: data["rows"][0].update(live_out=129), r"rows\[0\]: got .*expected at most as many live"),
        (lambda data: data["rows"][0].pop("stride"), r"rows\[0\]: got \['stride'\]"),
        (lambda data: data["rows"][0].update(in_channels=10**30), r"rows\[0\]: in_channels: got 10{30}; expected an"),
        (lambda data: data["rows"][0].update(filter=[11, 3]), r"rows\[0\]: got .*expected a filter that fits in its"),
        (lambda data: data["rows"][0].update(kind="group_norm"), r"rows\[0\]: got .*as many channels on both sides"),
        (lambda data: data["rows"][0].update(upsample=3), r"rows\[0\]: got .*or upsampled to twice"),
        (lambda data: data.update(backends=["cpu"]), r"backends: got \['cpu'\]; expected a list of names for any of"),
        (lambda data: data.update(backends={"conv2d": "cpu"}), "backends: got {'conv2d': 'cpu'}"),
        (lambda data: data.update(instruction_set=512), "instruction_set: got 512; expected the name"),
        (lambda data: data.update(backends={"dense": ["cpu"]}), "backends: got {'dense'"),
    ],
)
def test_a_damaged_table_is_refused_by_file_and_field(change, said: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    LatencyTable(SETTING, {CONV: 50}).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"times.json is not a valid latency table: {said}"):
        LatencyTable.load(path)


def test_a_file_that_is_no_table_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text("{")
    for name in ("times.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} is not a valid latency table"):
            LatencyTable.load(tmp_path / name)


NORM = Layer("group_norm", 64, 64, 8, 8, 64, 64, num_groups=32)
LINEAR = Layer("linear", 64, 32, 1, 1, 64, 32)
ATTENTION = Layer("attention", 96, 32, 16, 1, 96, 32, num_groups=2)


def test_a_table_is_of_the_backends_that_it_was_measured_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    cpu, layers = torch.device("cpu"), (CONV, NORM, LINEAR, ATTENTION)
    usual = backends_of(layers, SETTING, cpu)
    assert usual.keys() == {"conv2d", "group_norm", "linear"} and usual == backends_of(
        [layer.narrowed("in", 8) for layer in layers], SETTING, cpu
    )
    monkeypatch.setenv(ENVIRONMENT, "reference")
    plain = backends_of(layers, SETTING, cpu)
    assert plain == {"conv2d": ("reference",), "group_norm": ("reference",), "linear": ("reference",)}
    LatencyTable(SETTING, dict.fromkeys(layers, 9), backends=plain).save(tmp_path / "times.json")
    read = LatencyTable.load(tmp_path / "times.json")
    assert read.backends == plain
    read.check(SETTING, cpu)
    older = dataclasses.replace(read, backends={})
    older.save(tmp_path / "older.json")
    assert "backends" not in json.loads((tmp_path / "older.json").read_text())
    monkeypatch.setenv(ENVIRONMENT, "triton")  # which serves nothing in host memory
    with pytest.raises(ValueError, match=r"times.json: backend of conv2d: got 'reference'; expected none that can, as"):
        read.check(SETTING, cpu)
    monkeypatch.delenv(ENVIRONMENT)
    LatencyTable.load(tmp_path / "older.json").check(SETTING, cpu)
    if usual != plain:
        with pytest.raises(ValueError, match=r"got 'reference'; expected cpu, as in this run; python -m tdc_fast.lat"):
            read.check(SETTING, cpu)
        forced = dataclasses.replace(read, backends=usual)
        monkeypatch.setenv(ENVIRONMENT, "reference")
        with pytest.raises(ValueError, match="got 'cpu'; expected reference, as in this run with TDC_FAST_BACKEND=ref"):
            forced.check(SETTING, cpu)


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
def test_a_table_is_of_the_instruction_set_that_it_was_measured_with(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    mine = instruction_set(cpu)
    other = next(name for name in ("portable", "avx2") if name != mine)
    for name in (mine, other, ""):
        LatencyTable(SETTING, {CONV: 9}, instruction_set=name).save(tmp_path / "times.json")
        read = LatencyTable.load(tmp_path / "times.json")
        assert read.instruction_set == name
        if name != other:
            read.check(SETTING, cpu)
            continue
        with pytest.raises(ValueError, match=f"times.json: instruction_set: got '{other}'; expected {mine}, as in"):
            read.check(SETTING, cpu)

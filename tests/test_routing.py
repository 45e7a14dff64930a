"""Timestep groups: contiguous, complete, non-empty; equal in t or in decibels; strict files."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast import TimestepGroups


def cosine_alpha_bar(num_timesteps: int = 1000) -> np.ndarray:
    def level(u: np.ndarray) -> np.ndarray:
        return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

    steps = np.arange(num_timesteps)
    betas = np.minimum(1 - level((steps + 1) / num_timesteps) / level(steps / num_timesteps), 0.999)
    return np.cumprod(1 - betas)


counts = st.integers(1, 300).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t)))


@given(counts)
def test_uniform_groups_cover_every_timestep_and_differ_by_at_most_one(count: tuple[int, int]) -> None:
    num_timesteps, num_groups = count
    groups = TimestepGroups.uniform(num_timesteps, num_groups)
    assert (groups.num_timesteps, groups.num_groups, len(groups)) == (num_timesteps, num_groups, num_groups)
    assert sum(groups.sizes) == num_timesteps and max(groups.sizes) - min(groups.sizes) <= 1
    expected = [g for g, (start, stop) in enumerate(groups) for _ in range(start, stop)]
    assert groups.group_of(torch.arange(num_timesteps)).tolist() == expected


@given(counts, st.floats(0.1, 30))
def test_snr_groups_are_never_empty(count: tuple[int, int], clip: float) -> None:
    num_timesteps, num_groups = count
    alpha_bar = np.linspace(0.9999, 0.0001, num_timesteps)
    groups = TimestepGroups.snr(alpha_bar, num_groups, clip_db=(-clip, clip))
    assert groups.num_timesteps == num_timesteps and len(groups.sizes) == num_groups and min(groups.sizes) >= 1


def test_snr_groups_have_equal_width_in_decibels() -> None:
    alpha_bar = cosine_alpha_bar()
    snr_db = 10 * np.log10(alpha_bar / (1 - alpha_bar))
    groups = TimestepGroups.snr(alpha_bar, 8)
    assert [round(float(snr_db[b]), 0) for b in groups.boundaries[1:-1]] == [15, 10, 5, 0, -5, -10, -15]
    for b, edge in zip(groups.boundaries[1:-1], range(15, -20, -5), strict=True):
        assert snr_db[b] <= edge < snr_db[b - 1], "a boundary is the first timestep at or below its decibels"


@pytest.mark.parametrize(
    ("clip_db", "sizes"),
    [(None, (161, 782, 55, 2)), ((-56.146, 44.0), (65, 641, 276, 18)), ((-20.0, 20.0), (188, 308, 307, 197))],
)
def test_clipping_the_range_keeps_the_last_groups_from_starving(
    clip_db: tuple[float, float] | None, sizes: tuple[int, ...]
) -> None:
    assert TimestepGroups.snr(cosine_alpha_bar(), 4, clip_db=clip_db).sizes == sizes


def test_by_default_the_range_is_clipped_to_20_decibels() -> None:
    alpha_bar = cosine_alpha_bar()
    assert TimestepGroups.snr(alpha_bar, 4) == TimestepGroups.snr(alpha_bar, 4, clip_db=(-20.0, 20.0))


def test_a_schedule_may_be_an_object_an_array_or_a_tensor() -> None:
    alpha_bar = cosine_alpha_bar()
    expected = TimestepGroups.snr(alpha_bar, 5)
    assert TimestepGroups.snr(SimpleNamespace(alphas_cumprod=alpha_bar), 5) == expected
    assert TimestepGroups.snr(torch.from_numpy(alpha_bar), 5) == expected
    assert TimestepGroups.snr(alpha_bar.tolist(), 5) == expected


def test_a_schedule_that_ends_in_pure_noise_is_clipped_not_refused() -> None:
    alpha_bar = np.linspace(1.0, 0.0, 100)
    assert TimestepGroups.snr(alpha_bar, 4).num_groups == 4
    with pytest.raises(ValueError, match="clip_db"):
        TimestepGroups.snr(alpha_bar, 4, clip_db=None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_group_of_keeps_shape_and_device_for_any_integer_dtype(dtype: torch.dtype) -> None:
    t = torch.tensor([[0, 9, 10], [39, 30, 11]], dtype=dtype)
    ids = TimestepGroups.uniform(40, 4).group_of(t)
    assert ids.tolist() == [[0, 0, 1], [3, 3, 1]] and ids.dtype == torch.int64
    assert TimestepGroups.uniform(40, 4).group_of(t[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("num_timesteps", lambda: TimestepGroups.uniform(0, 1)),
        ("num_groups", lambda: TimestepGroups.uniform(10, 0)),
        ("num_groups", lambda: TimestepGroups.uniform(10, 11)),
        ("num_timesteps", lambda: TimestepGroups.uniform("10", 2)),
        ("num_groups", lambda: TimestepGroups.uniform(10, 2.0)),
        ("clip_db", lambda: TimestepGroups.snr(cosine_alpha_bar(), 2, clip_db=20)),
        ("boundaries", lambda: TimestepGroups(10)),
        ("t", lambda: TimestepGroups.uniform(10, 2).group_of([1])),
        ("groups file", lambda: TimestepGroups.load("no/such/groups.json")),
        ("boundaries", lambda: TimestepGroups([0])),
        ("boundaries", lambda: TimestepGroups([1, 5])),
        ("boundaries", lambda: TimestepGroups([0, 5, 5])),
        ("boundaries", lambda: TimestepGroups([0, 2.5, 5])),
        ("boundaries", lambda: TimestepGroups([0, True, 5])),
        ("schedule", lambda: TimestepGroups.snr(np.array([0.1, 0.9]), 2)),
        ("schedule", lambda: TimestepGroups.snr(np.array([1.1, 0.9]), 2)),
        ("schedule", lambda: TimestepGroups.snr(np.array([0.5, np.nan]), 2)),
        ("schedule", lambda: TimestepGroups.snr(np.zeros((2, 2)), 2)),
        ("clip_db", lambda: TimestepGroups.snr(cosine_alpha_bar(), 2, clip_db=(3, 3))),
        ("clip_db", lambda: TimestepGroups.snr(cosine_alpha_bar(), 2, clip_db=(100, 200))),
        ("t", lambda: TimestepGroups.uniform(10, 2).group_of(torch.tensor([1, 10]))),
        ("t", lambda: TimestepGroups.uniform(10, 2).group_of(torch.tensor([-1]))),
        ("t", lambda: TimestepGroups.uniform(10, 2).group_of(torch.tensor([0.5]))),
    ],
)
def test_bad_arguments_are_named(argument: str, make) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        make()


def test_groups_come_back_from_their_file(tmp_path: Path) -> None:
    groups = TimestepGroups.snr(cosine_alpha_bar(), 4)
    groups.save(tmp_path / "groups.json")
    loaded = TimestepGroups.load(tmp_path / "groups.json")
    assert loaded == groups and loaded.strategy == "snr" and os.listdir(tmp_path) == ["groups.json"]


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"version": True},
        {"boundaries": [0, 3, 2]},
        {"boundaries": "0,3"},
        {"boundaries": [0, "3"]},
        {"strategy": 3},
        {"extra": 1},
    ],
)
def test_a_damaged_file_is_refused(damage: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_text(json.dumps(TimestepGroups.uniform(10, 2).to_json() | damage))
    with pytest.raises(ValueError, match=r"groups\.json"):
        TimestepGroups.load(path)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', "{", "\udcff"])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"groups\.json"):
        TimestepGroups.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "groups.json"
    TimestepGroups.uniform(10, 2).save(path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="groups.json cannot be written .No space left on device"):
        TimestepGroups.uniform(10, 5).save(path)
    assert TimestepGroups.load(path).num_groups == 2 and os.listdir(tmp_path) == ["groups.json"]


def test_groups_are_values() -> None:
    groups = TimestepGroups.uniform(10, 2)
    groups.group_of(torch.tensor([3]))
    assert groups == TimestepGroups([0, 5, 10]) != TimestepGroups.uniform(10, 5)
    assert hash(groups) == hash(TimestepGroups([0, 5, 10]))
    assert pickle.loads(pickle.dumps(groups)) == copy.deepcopy(groups) == groups
    assert eval(repr(groups)) == groups

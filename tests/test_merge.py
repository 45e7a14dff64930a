"""The command that merges files of weights: what it writes, where that loads, and what it refuses.

The experts of a run are merged in tests/experiments/test_demo.py, where there is one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_fast import merge, sample
from tdc_fast.runs.build import build_unet
from tdc_fast.runs.checkpoint import save_file
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.denoisers import from_checkpoint, stored_facts
from tdc_fast.runs.weights import find_base_file, load_verified, load_weights
from tests.models.test_iddpm import randomise

CONFIG = TrainConfig(
    data_dir="digits", image_size=8, num_channels=4, channel_mult="1,2", num_res_blocks=1, num_heads=1,
    attention_resolutions="", diffusion_steps=20, noise_schedule="cosine", class_cond=True, num_classes=10,
)  # fmt: skip


def _save(path: Path, config: TrainConfig, seed: int, **changes: torch.Tensor) -> None:
    """A file of weights with its description, as a run writes them."""
    state = {**randomise(build_unet(config, 1), seed).state_dict(), **changes}
    described = {"stage": "base", "in_channels": 1, "classes": [1, 7], "class_counts": [5, 3]}
    save_file(path, state, {"step": 9, **described, "config": config.to_dict()})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("base", "a", "b")):
        _save(folder / f"{name}.pt", CONFIG, seed)
    _save(folder / "wider.pt", CONFIG.replace(num_channels=8), 0)
    _save(folder / "nan.pt", CONFIG, 0, **{"out.2.bias": torch.tensor([torch.nan])})
    torch.save(randomise(build_unet(CONFIG.replace(num_channels=8), 1)).state_dict(), folder / "undescribed.pt")
    torch.save(load_verified(folder / "a.pt"), folder / "bare.pt")
    (folder / "experts.pt").write_bytes((folder / "a.pt").read_bytes())
    (folder / "experts.json").write_text(json.dumps({"stage": "experts"}))
    return folder


def test_files_are_merged_by_the_formulas(files, tmp_path):
    a, b, base = (str(files / f"{name}.pt") for name in ("a", "b", "base"))
    ours, theirs, origin = (load_verified(Path(path)) for path in (a, b, base))
    assert merge.main([a, b, "--weights", "1,3", "--out", str(tmp_path / "new" / "average.pt")]) == 0
    flags = ["--method", "task_arithmetic", "--scale=0.5", "--weights", "1,2"]
    assert merge.main([a, str(files / "bare.pt"), "--base", base, *flags, "--out", str(tmp_path / "task.pt")]) == 0
    average, task = load_verified(tmp_path / "new" / "average.pt"), load_verified(tmp_path / "task.pt")
    assert average.keys() == task.keys() == origin.keys()
    for name, start in origin.items():
        torch.testing.assert_close(average[name], (ours[name] + 3 * theirs[name]) / 4, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(task[name], start + 1.5 * (ours[name] - start), rtol=1e-5, atol=1e-6)


def test_what_is_merged_is_used_without_flags_and_as_a_base(files, tmp_path):
    merged = tmp_path / "merged.pt"
    assert merge.main([str(files / "a.pt"), str(files / "b.pt"), "--out", str(merged)]) == 0
    assert sample.main(["--model_path", str(merged), "--num_samples", "3", "--steps", "2", "--out", str(tmp_path)]) == 0
    archive = np.load(tmp_path / "samples_3x8x8x1.npz")
    assert archive["arr_0"].shape == (3, 8, 8, 1) and set(archive["arr_1"]) <= {1, 7}
    denoiser = from_checkpoint(merged, stored_facts(model_path=str(merged)))
    assert denoiser.classes == (1, 7) and denoiser.class_counts == (5, 3)
    network = build_unet(denoiser.config, 1)  # as a run with --base FILE reads it
    load_weights(find_base_file(merged), denoiser.config, network)
    own = denoiser.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
    described = json.loads(merged.with_suffix(".json").read_text())["merged"]
    assert described["method"] == "average" and described["of"] == [str(files / "a.pt"), str(files / "b.pt")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pt", "b.pt"], "out: got ''; expected a new file"),
        (["a.pt", "b.pt", "--out", "new.txt"], "out: .*ends in .pt"),
        (["a.pt", "b.pt", "--out", "base.pt"], "out: .*a new file"),
        (["a.pt", "--run", "somewhere", "--out", "new.pt"], "run: got 'somewhere'; expected none together with a.pt"),
        (["a.pt", "b.pt", "--weights", "1,2,3", "--out", "new.pt"], "weights: .*each of the 2 experts"),
        (["a.pt", "b.pt", "--weights", "1,x", "--out", "new.pt"], "weights: "),
        (["a.pt", "b.pt", "--scale", "2", "--out", "new.pt"], "scale: .*task_arithmetic"),
        (["a.pt", "b.pt", "--missing", "zero", "--out", "new.pt"], "missing: "),
        (["a.pt", "b.pt", "--method", "task_arithmetic", "--out", "new.pt"], "base: .*--base FILE"),
        (["a.pt", "experts.pt", "--out", "new.pt"], "model_path: .*single denoiser"),
        (["a.pt", "wider.pt", "--out", "new.pt"], "num_channels: got 4; expected 8, with which wider.pt"),
        (["a.pt", "undescribed.pt", "--out", "new.pt"], "undescribed.pt does not fit .*--num_channels 8"),
        (["a.pt", "nan.pt", "--out", "new.pt"], "finite weights; out.2.bias holds infinities or NaN"),
        (["a.pt", "nowhere.pt", "--out", "new.pt"], "nowhere.pt"),
        (["a.pt", "b.pt", "--base", "nowhere.pt", "--out", "new.pt"], "nowhere.pt"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(files, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    assert merge.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(files.iterdir()) == before

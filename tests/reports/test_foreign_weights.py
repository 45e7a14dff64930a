"""Weights from elsewhere: names of wrappers are left out, other projects are named, no advice is to run a pickle."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_fast import sample
from tdc_fast.data.dataset import load_dataset
from tdc_fast.runs.build import build_unet
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.weights import load_tensors, load_weights

CONFIG = TrainConfig(image_size=8, num_channels=8, num_res_blocks=1, channel_mult="1,2", num_heads=1)


class Attack:
    """Pickles into a call."""

    def __reduce__(self):
        return (os.system, ("true",))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_unet(CONFIG, 3).state_dict()


def compiled_inside(name: str) -> str:
    first, rest = name.split(".", 1)
    return f"{first}._orig_mod.{rest}"


@pytest.mark.parametrize(
    ("wrap", "shown"),
    [
        (lambda name: f"module.{name}", "'module.'"),
        (lambda name: f"_orig_mod.{name}", "'_orig_mod.'"),
        (lambda name: f"module._orig_mod.{name}", "'_orig_mod.', 'module.'"),
        (lambda name: f"_orig_mod.module.{name}", "'_orig_mod.', 'module.'"),
        (lambda name: f"module.module.{name}", "'module.'"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "'_fsdp_wrapped_module.'"),
        (compiled_inside, "'_orig_mod.'"),
    ],
)
def test_names_that_wrappers_add_are_left_out_with_a_note(tmp_path, state, capsys, wrap, shown):
    path = tmp_path / "model.pt"
    torch.save({wrap(name): value for name, value in state.items()}, path)
    model = build_unet(CONFIG, 3)
    load_weights(path, CONFIG, model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert f"note: {path} was saved from a wrapped model; {shown} is left out" in capsys.readouterr().err


def test_plain_names_are_loaded_without_a_note(tmp_path, state, capsys):
    torch.save(state, tmp_path / "model.pt")
    load_weights(tmp_path / "model.pt", CONFIG, build_unet(CONFIG, 3))
    assert capsys.readouterr().err == ""


def test_a_wrapped_model_of_other_flags_is_refused_with_the_flags_that_fit(tmp_path, state):
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "model.pt")
    config = CONFIG.replace(num_channels=16)
    with pytest.raises(ValueError, match="set --num_channels 8"):
        load_weights(tmp_path / "model.pt", config, build_unet(config, 3))


@pytest.mark.parametrize(
    ("changed", "project"),
    [
        (lambda name: name.replace(".conv.weight", ".in_layers.0.weight"), "a UNet of guided-diffusion"),
        (lambda name: None if name.startswith("output_blocks.") else name, "a classifier of guided-diffusion"),
        (lambda name: {"out.0.weight": "conv_in.weight"}.get(name, f"down_blocks.{name}"), "a UNet of diffusers"),
    ],
)
def test_the_network_of_another_project_is_named(tmp_path, state, changed, project):
    names = {changed(name): value for name, value in state.items() if changed(name)}
    torch.save(names, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"model.pt does not fit: it is {project}"):
        load_weights(tmp_path / "model.pt", CONFIG, build_unet(CONFIG, 3))


def foreign(kind: str, path: Path) -> None:
    content = {"a": Attack() if kind == "attack" else argparse.Namespace(lr=1)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "cut":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:-300])
    else:
        torch.save(content, path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("namespace", "it needs argparse.Namespace, and reading that could run code"),
        ("attack", "it needs posix.system, and reading that could run code"),
        ("pickle", "it is damaged, or a pickle that torch.save did not write"),
        ("text", "it is damaged, or a pickle that torch.save did not write"),
        ("cut", "it does not load"),
    ],
)
def test_no_error_about_a_foreign_file_advises_to_run_its_code(tmp_path, kind, why, capsys):
    path = tmp_path / "model.pt"
    foreign(kind, path)
    with pytest.raises(ValueError) as caught:
        load_tensors(path)
    assert why in str(caught.value) and str(path) in str(caught.value)
    assert sample.main(["--model_path", str(path), "--image_size", "8", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err + str(caught.value)
    assert not any(advice in said for advice in ("weights_only", "trust", "safe_globals", "file an issue", "\x1b"))


def test_no_error_about_an_array_advises_to_allow_pickles(tmp_path):
    for name, save in (("a.npy", np.save), ("a.npz", np.savez)):
        save(tmp_path / name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match="it holds pickled objects") as caught:
            load_dataset(str(tmp_path / name))
        assert "allow_pickle" not in str(caught.value)

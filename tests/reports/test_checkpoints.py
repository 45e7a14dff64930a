"""Checkpoints that diverged, were damaged or do not fit: never written, never loaded, always named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast import sample
from tdc_fast.runs.checkpoint import first_non_finite, save_checkpoint, state_file
from tdc_fast.runs.weights import load_tensors
from tdc_fast.train import main, train
from tdc_fast.training import load_run
from tests.generated import examples, is_ours
from tests.training.small_run import TWO_STAGES, flags, small_config

NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def trained(folder):
    """A finished plain run with checkpoints of steps 4 and 8."""
    return train(small_config(folder, "trained", lr_anneal_steps=8)).path


@pytest.fixture(scope="module")
def trained_experts(folder):
    return train(small_config(folder, "experts", **{**TWO_STAGES, "stage1_steps": 2, "stage2_steps": 4, "k": 1.0})).path


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def rewrite(path: Path, change) -> None:
    """Change the content of a checkpoint's file and give it valid checksums, as a hostile or broken program would."""
    content = change(load_tensors(path))
    torch.save(content, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    own = path.with_suffix(".json")
    step = path.stem[-6:]
    for description, key in ((own, None), (path.with_name(f"state{step}.json"), path.name)):
        values = json.loads(description.read_text())
        if description == own:
            values["sha256"] = digest
        if key:
            values["files"][key] = digest
        description.write_text(json.dumps(values))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def first(state):
    return next(iter(state))


BROKEN_WEIGHTS = {
    "a list": lambda state: list(state.values()),
    "a missing tensor": lambda state: {name: value for name, value in state.items() if name != first(state)},
    "an extra tensor": lambda state: {**state, "extra": torch.zeros(1)},
    "a renamed tensor": lambda state: {("other" if name == first(state) else name): v for name, v in state.items()},
    "a shape that broadcasts": lambda state: {**state, "out.2.bias": torch.zeros(1)[:1].reshape(1, 1)},
    "a sparse tensor": lambda state: {**state, first(state): state[first(state)].to_sparse()},
    "a meta tensor": lambda state: {**state, first(state): state[first(state)].to("meta")},
    "a nested tensor": lambda state: {**state, first(state): torch.nested.nested_tensor([state[first(state)]])},
    "another dtype": lambda state: {**state, first(state): state[first(state)].double()},
    "NaN": lambda state: {**state, "out.2.bias": state["out.2.bias"] * NAN},
    "infinity": lambda state: {**state, "out.2.bias": state["out.2.bias"] + float("inf")},
    "a number": lambda state: {**state, first(state): 1.0},
}


@pytest.mark.parametrize("change", BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_by_name_at_every_door(run, folder, tmp_path, capsys, change):
    """Every change at two of the doors in turn, so that every door meets four or five of them."""
    average, weights = run / "ema_0.9_000008.pt", run / "model000008.pt"
    rewrite(average, change)
    rewrite(weights, change)
    before = contents(run)
    doors = [
        (sample.main, ["--run", str(run), "--num_samples", "1"], average),
        (sample.main, ["--model_path", str(average), "--num_samples", "1", "--out", str(tmp_path / "out")], average),
        (main, ["--resume", str(run)], weights),
        (
            main,
            flags(small_config(folder, f"split{tmp_path.name}", base=str(average), **{**TWO_STAGES, "k": 1.0})),
            average,
        ),
        (
            main,
            flags(small_config(folder, f"on{tmp_path.name}", lr_anneal_steps=12, resume_checkpoint=str(weights))),
            weights,
        ),
    ]
    turn = list(BROKEN_WEIGHTS.values()).index(change)
    for command, argv, file in (doors[turn % 5], doors[(turn + 2) % 5]):
        assert command(argv) == 2, argv
        said = capsys.readouterr().err
        assert said.startswith("error: ") and str(file) in said and "Traceback" not in said, said
    after = contents(run)
    assert {name: after[name] for name in before} == before


def test_experts_whose_averages_are_not_finite_are_not_sampled(trained_experts, tmp_path, capsys):
    run = Path(shutil.copytree(trained_experts, tmp_path / "run"))
    path = run / "experts" / "ema_0.9_000004.pt"
    rewrite(path, lambda state: {**state, first(state): state[first(state)] * NAN})
    assert sample.main(["--run", str(run), "--num_samples", "1"]) == 2
    assert str(path) in capsys.readouterr().err


def moments(change):
    def changed(content):
        return {**content, "state": {**content["state"], 0: change(content["state"][0])}}

    return changed


BROKEN_COMPANIONS = {
    "opt: a list": ("opt000008.pt", lambda content: [content]),
    "opt: no state": ("opt000008.pt", lambda content: {"param_groups": content["param_groups"]}),
    "opt: a missing parameter": (
        "opt000008.pt",
        lambda c: {**c, "state": {key: value for key, value in c["state"].items() if key != 0}},
    ),
    "opt: a parameter too many": ("opt000008.pt", lambda c: {**c, "state": {**c["state"], 999: c["state"][0]}}),
    "opt: a missing moment": ("opt000008.pt", moments(lambda m: {"step": m["step"], "exp_avg": m["exp_avg"]})),
    "opt: NaN": ("opt000008.pt", moments(lambda m: {**m, "exp_avg": m["exp_avg"] * NAN})),
    "opt: negative squares": ("opt000008.pt", moments(lambda m: {**m, "exp_avg_sq": m["exp_avg_sq"] - 1})),
    "opt: a shape that broadcasts": ("opt000008.pt", moments(lambda m: {**m, "exp_avg": m["exp_avg"].reshape(-1)[:1]})),
    "opt: another dtype": ("opt000008.pt", moments(lambda m: {**m, "exp_avg": m["exp_avg"].double()})),
    "opt: steps that are no number": ("opt000008.pt", moments(lambda m: {**m, "step": "many"})),
    "ema: a list": ("ema_0.99_000008.pt", lambda state: list(state)),
    "ema: NaN": ("ema_0.99_000008.pt", BROKEN_WEIGHTS["NaN"]),
    "ema: a shape that broadcasts": ("ema_0.99_000008.pt", BROKEN_WEIGHTS["a shape that broadcasts"]),
    "ema: missing": ("ema_0.99_000008.pt", BROKEN_WEIGHTS["a missing tensor"]),
    "ema: extra": ("ema_0.99_000008.pt", BROKEN_WEIGHTS["an extra tensor"]),
    "state: a list": ("state000008.pt", lambda state: [state]),
    "state: without random numbers": ("state000008.pt", lambda s: {k: v for k, v in s.items() if k != "random"}),
    "state: bad random numbers": ("state000008.pt", lambda s: {**s, "random": {**s["random"], "numpy": [1]}}),
    **{
        f"state: bad {name} of the random numbers": (
            "state000008.pt",
            lambda s, name=name, value=value: {**s, "random": {**s["random"], name: value}},
        )
        for name, value in {
            "torch": torch.zeros(3, dtype=torch.uint8),
            "cuda": [1],
            "numpy": ["MT19937", [1, 2], 0, 0, 0.0],
            "python": [3, [1, 2], None],
        }.items()
    },
    "state: no time": ("state000008.pt", lambda state: {**state, "wall_seconds": "long"}),
    "state: a sampler of other settings": ("state000008.pt", lambda state: {**state, "sampler": {"history": 1}}),
    "state: a place outside the data": (
        "state000008.pt",
        lambda state: {**state, "data": {**state["data"], "index": 10**6}},
    ),
    "state: of another step": ("state000008.pt", lambda state: {**state, "step": 4}),
    "state: means that broadcast": (
        "state000008.pt",
        lambda s: {**s, "means": {**s["means"], "counts": torch.ones(1)}},
    ),
    "state: a list of means": ("state000008.pt", lambda state: {**state, "means": []}),
}


@pytest.mark.parametrize(("name", "change"), BROKEN_COMPANIONS.values(), ids=BROKEN_COMPANIONS)
def test_companions_that_do_not_fit_the_model_are_refused_by_name(run, capsys, name, change):
    rewrite(run / name, change)
    before = contents(run)
    assert main(["--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(run / name) in said
    assert f"--resume {run} --resume_step 4" in said
    assert contents(run) == before


LEAVES = {
    "zeros of one size": lambda leaf: torch.zeros(3),
    "NaN": lambda leaf: leaf * NAN if torch.is_tensor(leaf) else NAN,
    "one dimension more": lambda leaf: leaf[None] if torch.is_tensor(leaf) else [leaf],
    "integers": lambda leaf: leaf.long() if torch.is_tensor(leaf) else 2**70,
    "complex numbers": lambda leaf: leaf.to(torch.complex64) if torch.is_tensor(leaf) else 1j,
    "a sparse tensor": lambda leaf: torch.eye(3).to_sparse(),
    "a meta tensor": lambda leaf: torch.empty(leaf.shape if torch.is_tensor(leaf) else (), device="meta"),
    "strides of zero": lambda leaf: torch.zeros(1).expand(leaf.shape if torch.is_tensor(leaf) else (2,)),
    "text": lambda leaf: "x" * 5,
    "nothing": lambda leaf: None,
    "a negative number": lambda leaf: -1,
    "a list": lambda leaf: [leaf],
    "a mapping": lambda leaf: {"a": leaf, 3: leaf},
    "a deep list": lambda leaf: [[[[[[[[leaf]]]]]]]],
}


def with_one_part_changed(value, draw, change):
    """A copy in which one part is changed, left out, renamed or doubled; parts of parts as well."""
    if isinstance(value, (dict, list, tuple)) and value and draw(st.integers(0, 9)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        parts = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        how = draw(st.sampled_from(["change", "change", "change", "leave out", "rename", "double"]))
        if how == "change":
            parts[key] = with_one_part_changed(parts[key], draw, change)
        elif how == "double":
            parts["another" if isinstance(key, str) else 10**6] = parts[key]
        else:
            part = parts.pop(key)
            if how == "rename":
                parts[draw(st.sampled_from(["x", "7", ""]))] = part
        return parts if isinstance(value, dict) else type(value)(parts.values())
    return change(value)


@examples(40)
@given(data=st.data())
def test_weights_with_any_part_changed_are_refused_with_the_name_of_the_file_or_read(trained, tmp_path_factory, data):
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("changed") / "run"))
    name, average = data.draw(st.sampled_from([("model", False), ("ema_0.9_", "0.9"), ("ema_0.99_", "0.99")]))
    path = run / f"{name}000008.pt"
    change = LEAVES[data.draw(st.sampled_from(sorted(LEAVES)))]
    rewrite(path, lambda content: with_one_part_changed(content, data.draw, change))
    try:
        found = load_run(run).base(ema=average).state_dict()
    except ValueError as refused:
        assert str(path) in str(refused)
    else:
        torch.testing.assert_close(found, load_tensors(path))


@examples(5)
@given(data=st.data())
def test_companions_with_any_part_changed_are_refused_with_the_name_of_a_file_or_the_run_goes_on(
    trained, tmp_path_factory, capsys, data
):
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("changed") / "run"))
    path = run / data.draw(st.sampled_from(["model000008.pt", "opt000008.pt", "state000008.pt"]))
    change = LEAVES[data.draw(st.sampled_from(sorted(LEAVES)))]
    rewrite(path, lambda content: with_one_part_changed(content, data.draw, change))
    before = contents(run)
    code = main(["--resume", str(run)])
    said = capsys.readouterr().err
    assert code == 0 or (code == 2 and said.startswith("error: ") and str(path) in said), said
    assert code == 0 or contents(run) == before


described = st.recursive(
    st.sampled_from([None, True, -1, 0, 3, 10**30, 1.5, NAN, float("inf"), "", "x", "..", "a/b", "\0", "x" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "step"]), inner, max_size=2),
    max_leaves=4,
)


@examples(25)
@given(data=st.data())
def test_a_run_with_any_description_changed_is_read_or_refused_with_the_name_of_a_file_or_option(
    trained_experts, tmp_path_factory, data
):
    run = Path(shutil.copytree(trained_experts, tmp_path_factory.mktemp("changed") / "run"))
    path = data.draw(st.sampled_from(sorted(run.rglob("*.json"))))
    values = with_one_part_changed(json.loads(path.read_text()), data.draw, lambda leaf: data.draw(described))
    path.write_text(json.dumps(values))
    before = contents(run)
    try:
        opened = load_run(run)
        for read in (lambda: opened.experts(), lambda: opened.macs, lambda: opened.diffusion, lambda: opened.base()):
            read()
    except ValueError as refused:
        assert str(run) in str(refused) or is_ours(refused), refused
    assert contents(run) == before


def test_a_flipped_byte_is_found_in_a_file_of_ours_with_and_without_its_description(run, capsys, tmp_path):
    path = run / "ema_0.9_000008.pt"
    content = bytearray(path.read_bytes())
    values = load_tensors(path)["out.0.weight"].numpy().tobytes()
    content[content.index(values)] ^= 1  # one bit of one weight
    path.write_bytes(content)
    assert sample.main(["--model_path", str(path), "--num_samples", "1", "--out", str(tmp_path / "out")]) == 2
    assert f"{path}'; expected the file its .json describes" in capsys.readouterr().err
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"ema_0.9_000008.pt'; expected a whole file; the CRC-32 of its record"):
        load_run(run).base()


def test_samples_that_are_no_numbers_are_refused(run, tmp_path, capsys):
    for name in ("ema_0.9_000008.pt", "model000008.pt"):
        rewrite(run / name, lambda state: {name: value * 1e30 for name, value in state.items()})
    out = tmp_path / "out"
    weights = str(run / "ema_0.9_000008.pt")
    assert sample.main(["--model_path", weights, "--num_samples", "1", "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the samples hold infinities or NaN")
    assert not out.exists()


def test_a_pipe_is_no_file_of_weights(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.pt")
    assert sample.main(["--model_path", str(tmp_path / "pipe.pt"), "--num_samples", "1"]) == 2
    assert "pipe.pt'; expected an existing file" in capsys.readouterr().err


def test_no_checkpoint_with_a_non_finite_tensor_is_ever_written(tmp_path):
    good = {"w": torch.ones(3), "steps": torch.arange(3)}
    assert first_non_finite({"a": [good]}) is None
    for place in ("model000001.pt", "opt000001.pt", state_file(1)):
        files = {"model000001.pt": good, "opt000001.pt": {"state": {0: good}}, state_file(1): {"step": 1}}
        files[place] = {"state": {0: {"exp_avg": torch.tensor([1.0, NAN])}}}
        with pytest.raises(FloatingPointError, match=rf"{place} would hold infinities or NaN, in state\.0\.exp_avg"):
            save_checkpoint(tmp_path, 1, files, {})
        assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_commits_nothing_and_says_how_to_go_on(folder, capsys):
    config = small_config(folder, "diverged", lr_anneal_steps=30, lr=1e30, save_interval=2, log_interval=10)
    assert main(flags(config)) == 2
    said = capsys.readouterr().err
    path = Path(config.run_dir)
    assert not list(path.glob("*.pt"))
    assert "there is no checkpoint before it" in said
    assert f"python -m tdc_fast.train --resume {path} --override lr=" in said
    assert sample.main(["--run", str(path)]) == 2
    assert "expected a run with weights of its base" in capsys.readouterr().err

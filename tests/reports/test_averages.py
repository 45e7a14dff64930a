"""Averages: new runs forget their start; older ones and improved-diffusion's flags keep what they say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.denoisers import from_run
from tdc_fast.runs.weights import load_tensors
from tdc_fast.train import main, parse_command_line, train
from tdc_fast.training import load_run
from tests.training.small_run import flags, small_config

OPEN = {"ema_rate": "", "lr_anneal_steps": 4}
"""A short run whose averages nothing is said about."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def ramped(folder):
    """A run of improved-diffusion's flags alone, without --ema_rate, started on the command line."""
    config = small_config(folder, "ramped", **OPEN)
    assert not {"--ema_rate", "--ema_ramp"} & set(flags(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no untrained averages
        assert main(flags(config)) == 0
    return Path(config.run_dir)


def recorded(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def test_a_run_without_improved_diffusions_flag_forgets_its_start_and_records_that(ramped):
    assert (recorded(ramped)["ema_rate"], recorded(ramped)["ema_ramp"]) == ("0.9999", True)
    name = "out.2.weight"  # zero at the start, so that the average is a sum of the four weights
    states = [load_tensors(ramped / f"{kind}_000004.pt".replace("model_", "model")) for kind in ("model", "ema_0.9999")]
    weights, average = (state[name] for state in states)
    assert average.norm() > 0.3 * weights.norm()
    assert json.loads((ramped / "ema_0.9999_000004.json").read_text())["config"]["ema_ramp"] is True


@pytest.mark.parametrize(
    ("argv", "ramp"),
    [
        ([], None),
        (["--ema_rate", "0.9999"], None),
        (["--ema_rate", "0.9999", "--ema_ramp", "true"], True),
        (["--ema_ramp", "False"], False),
    ],
)
def test_the_flag_stays_open_until_a_run_decides(argv, ramp):
    assert parse_command_line(argv).ema_ramp is ramp


def test_improved_diffusions_flag_means_its_plain_average_with_a_warning(folder):
    config = small_config(folder, "untrained", lr_anneal_steps=4, ema_rate="0.9999")
    with pytest.warns(UserWarning, match="still 100% the weights that it starts from; set --ema_ramp True"):
        train(config)
    assert recorded(Path(config.run_dir))["ema_ramp"] is False
    with pytest.warns(UserWarning, match="^100% of the averaged weights.*stage base began with.*--ema_ramp True"):
        from_run(config.run_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for changes in ({"ema_ramp": True}, {"lr_anneal_steps": 8, "ema_rate": "0.9"}):
            trained = train(config.replace(**changes, run_dir=str(folder / "_".join(changes))))
            from_run(trained.path)


@pytest.fixture(params=["False", "absent"])
def old(folder, request, tmp_path) -> tuple[Path, TrainConfig]:
    """A run from before the ramp was the default, and the options in Python that it was started with."""
    config = small_config(folder, tmp_path.name, ema_rate="0.9999", ema_ramp=False, lr_anneal_steps=4)
    with pytest.warns(UserWarning, match="ema_ramp"):
        train(config)
    values = recorded(Path(config.run_dir))
    assert values["ema_ramp"] is False
    if request.param == "absent":
        del values["ema_ramp"]
        (Path(config.run_dir) / "config.json").write_text(json.dumps(values))
    return Path(config.run_dir), config.replace(ema_rate="", ema_ramp=None)


@pytest.mark.filterwarnings("ignore:after the")
def test_an_older_run_keeps_its_plain_average_when_it_goes_on(old):
    run, config = old
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for path in run.glob("*000004.*"):
        path.unlink()
    train(config.replace(resume="latest"))
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    for name in ("ema_0.9999_000004.pt", "model000004.pt", "config.json", "run.json"):
        assert after[name] == before[name], name
    assert main([*flags(config), "--resume"]) == main(["--resume", str(run)]) == 0
    assert load_run(run).config.ema_ramp is False


def test_the_identity_of_older_runs_is_what_it_was():
    old = TrainConfig(data_dir="digits", ema_rate="0.9999", ema_ramp=False)
    assert old.identity == "9f61d18d300c4ad2818a0e4282f6283692708ec185a697122f12cba36b54488a"


@pytest.mark.filterwarnings("ignore:after the")
def test_averages_that_are_continued_go_on_as_they_were_made(folder, ramped, tmp_path):
    def continued(source: Path, name: str, **changes) -> bool:
        weights = source / "model000004.pt"
        config = small_config(folder, name, **{**OPEN, "lr_anneal_steps": 5}, resume_checkpoint=str(weights), **changes)
        return recorded(train(config).path)["ema_ramp"]

    assert continued(ramped, "of_ours") is True
    for name in ("model000004.pt", "ema_0.9999_000004.pt", "opt000004.pt"):  # as improved-diffusion's: no descriptions
        torch.save(load_tensors(ramped / name), tmp_path / name)
    assert continued(tmp_path, "of_improved_diffusion") is False
    assert continued(tmp_path, "asked_for", ema_ramp=True) is True

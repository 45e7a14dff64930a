"""Options that contradict each other, or that cannot be met, are refused under the name that the user wrote."""

from __future__ import annotations

import re

import pytest

from tdc_fast import prune, sample, train
from tests.training.small_run import TWO_STAGES, flags, small_config

SHORT = {**TWO_STAGES, "stage1_steps": 1, "stage2_steps": 1}


@pytest.fixture
def refused(capsys):
    """Asserts that a command refuses its arguments in one line that matches a pattern."""

    def refused(pattern: str, command, arguments: list[str]) -> None:
        assert command.main(arguments) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: ") and re.search(pattern, said[-1])

    return refused


def test_budgets_that_cannot_be_met_are_refused_by_their_name_before_anything_is_trained(tmp_path, refused):
    config = small_config(tmp_path, **{**SHORT, "k": 0.6, "budgets": "0.0001,1,1"})
    refused(r"error: budgets: got '0.0001,1,1'; expected a larger one", train, flags(config))
    assert not (tmp_path / "run").exists()


def test_a_k_that_cannot_be_met_is_refused_by_its_name_before_anything_is_trained(tmp_path, refused):
    config = small_config(tmp_path, **{**SHORT, "groups": 60, "k": 0.0001})
    refused(r"error: k: got 0.0001; expected a larger one", train, flags(config))
    assert not (tmp_path / "run").exists()


def test_noise_is_not_predicted_to_where_nothing_is_left_of_the_image(tmp_path, refused):
    config = small_config(tmp_path, noise_schedule="linear", diffusion_steps=20, learn_sigma=True, lr_anneal_steps=1)
    refused("diffusion_steps: got 'timestep 19, where alpha_bar is 0'; expected a model that", train, flags(config))
    assert not (tmp_path / "run").exists()
    assert train.main(flags(config.replace(predict_v=True))) == 0


def test_the_search_names_budgets_too(tmp_path, refused):
    config = small_config(tmp_path, **{**SHORT, "budgets": "0.9,1,1", "stop_after": "stage1"})
    train.train(config)
    options = ["--run", str(tmp_path / "run"), "--budgets", "0.0001,1,1"]
    refused("budgets", prune, options)  # either name would do here: budgets may not differ from the run's


def test_resuming_in_one_directory_and_running_in_another_is_refused(tmp_path, refused):
    config = small_config(tmp_path, **{**SHORT, "stop_after": "stage1"})
    train.train(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    options = ["--resume", str(tmp_path / "run"), "--run_dir", str(tmp_path / "other")]
    refused(r"run_dir: got '.*other'; expected none together with --resume", train, options)
    (tmp_path / "flags.yaml").write_text(f"run_dir: {tmp_path / 'other'}\n")
    options = ["--resume", str(tmp_path / "run"), "--config", str(tmp_path / "flags.yaml")]
    refused(r"run_dir: got '.*other'", train, options)
    with pytest.raises(ValueError, match="run_dir"):
        train.train(config.replace(resume=str(tmp_path / "run"), run_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train.main(["--resume", str(tmp_path / "run"), "--run_dir", f"{tmp_path}/./run"]) == 0  # the same one


def test_a_step_to_resume_at_without_a_run_to_resume_is_refused(tmp_path, refused):
    refused("resume_step: got 4; expected --resume", train, [*flags(small_config(tmp_path)), "--resume_step", "4"])


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_ddim_and_another_sampler_are_refused_together(tmp_path, refused, sampler):
    train.train(small_config(tmp_path, lr_anneal_steps=1))
    options = ["--run", str(tmp_path / "run"), "--use_ddim", "True", "--num_samples", "1", "--steps", "1"]
    refused(f"sampler: got '{re.escape(sampler)}'; expected ddim", sample, [*options, "--sampler", sampler])
    assert sample.main([*options, "--sampler", "ddim"]) == 0


def test_boundaries_imply_the_number_of_groups(tmp_path):
    config = small_config(tmp_path, boundaries="0,10,30,60", stage1_steps=1, stage2_steps=1)
    assert config.groups == 3
    with pytest.raises(ValueError, match="boundaries: .*5 of them for --groups 4"):
        small_config(tmp_path, boundaries="0,10,30,60", groups=4, stage1_steps=1, stage2_steps=1)
    with pytest.raises(ValueError, match="boundaries"):
        small_config(tmp_path, boundaries="60", stage1_steps=1, stage2_steps=1)

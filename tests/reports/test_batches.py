"""The batches of the commands that README shows are large enough for every expert."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest

from tdc_fast import train
from tdc_fast.training.messages import warn_of_small_batches
from tests.training.small_run import TWO_STAGES, flags, small_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/command_line.md", "docs/method.md", "tdc_fast/prune.py"])
def test_every_command_that_trains_experts_from_a_folder_names_its_batch_size(page):
    commands = re.findall(r"python -m tdc_fast\.\w+ (?:.*\\\n)*.*", (ROOT / page).read_text())
    began = [command for command in commands if re.search(r"--data_dir|--base", command) and "--run_dir" in command]
    assert began, "no command was found"
    for command in began:
        sizes = re.findall(r"--batch_size (\d+)", command)
        assert sizes and int(sizes[0]) >= 64, command


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 1, "groups": 8}, "every expert less than one image per step"),
        ({"batch_size": 7, "groups": 8}, "every expert less than one image per step"),
        ({"batch_size": 8, "groups": 8}, None),
        ({"batch_size": 64, "stage2_batch": 4, "groups": 8}, "--stage2_batch 4 over 8"),
        ({"batch_size": 10, "groups": 3, "stage2_shares": "1,18,1"}, "expert 0, 2 less than one image"),
    ],
)
def test_a_batch_that_gives_experts_less_than_one_image_each_is_warned_of(tmp_path, changes, said):
    config = small_config(tmp_path, **{**TWO_STAGES, **changes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_small_batches(config, config.groups)
    assert len(caught) == (said is not None)
    assert said is None or said in str(caught[0].message)


def test_training_warns_of_small_batches_before_it_begins_in_one_plain_line(tmp_path, capsys, monkeypatch):
    # pytest collects warnings; a process prints them as this does
    monkeypatch.setattr(
        warnings, "showwarning", lambda *warning: sys.stderr.write(warnings.formatwarning(*warning[:4]))
    )
    config = small_config(tmp_path, batch_size=1, **{**TWO_STAGES, "k": 1.0, "stage1_steps": 1, "stage2_steps": 1})
    assert train.main(flags(config)) == 0
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("warning: --batch_size 1 over 3 experts") for line in said) == 1
    assert not any("UserWarning" in line for line in said)


def test_the_number_of_calibration_images_is_warned_of(tmp_path):
    config = small_config(tmp_path, **{**TWO_STAGES, "stage1_steps": 1, "stage2_steps": 1})
    with pytest.warns(UserWarning, match="pruning is decided on 6 images"):
        train.train(config)

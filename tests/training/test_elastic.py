"""What torchrun asks of the options: a place where a restart finds the run, and an image for each process."""

from __future__ import annotations

import pytest

from tdc_fast.training.elastic import for_many_processes
from tests.training.small_run import small_config


def test_a_run_that_may_be_restarted_needs_a_directory(tmp_path, monkeypatch):
    config = small_config(tmp_path).replace(run_dir="")
    for name in ("OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"):
        monkeypatch.delenv(name, raising=False)
    assert for_many_processes(config, 2) == config
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match=r"^run_dir: got ''; expected --run_dir DIR, .*--max-restarts"):
        for_many_processes(config, 2)


def test_after_a_restart_a_run_goes_on_where_it_has_begun(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert for_many_processes(config, 2) == config  # killed before it had begun
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert for_many_processes(config, 2).resume == config.run_dir
    back = config.replace(resume=config.run_dir, resume_step=4)
    assert for_many_processes(back, 2).resume_step == -1  # the last checkpoint, not that one again
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert for_many_processes(back, 2) == back


def test_a_batch_has_an_image_for_each_process(tmp_path):
    config = small_config(tmp_path, batch_size=3)
    assert for_many_processes(config, 3) == config
    with pytest.raises(ValueError, match=r"^batch_size: got 3; expected at least 4"):
        for_many_processes(config, 4)
    resumed = config.replace(resume=config.run_dir)
    assert for_many_processes(resumed.replace(override="batch_size=4"), 4).batch_size == 3  # 4 once it is resumed
    with pytest.raises(ValueError, match=r"^batch_size: got 2; expected at least 3"):
        for_many_processes(resumed.replace(override="batch_size=2"), 3)
    experts = config.replace(groups=2, stage1_steps=1, stage2_steps=1, stage2_batch=2)
    with pytest.raises(ValueError, match=r"^stage2_batch: got 2; expected at least 3"):
        for_many_processes(experts, 3)
    assert for_many_processes(experts.replace(stop_after="stage1"), 3)

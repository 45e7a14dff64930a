"""A run whose small folder of images loses one goes on, by the means that the errors name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdc_fast.train import main
from tests.training.small_run import flags, small_config


@pytest.mark.parametrize("lost", ["damaged", "missing"])
def test_a_run_goes_on_after_an_image_was_lost(lost: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{'ab'[number % 2]}_{number}.png")
    config = small_config(tmp_path, "run", data_dir=str(folder), lr_anneal_steps=4, save_interval=2, in_channels=1)
    assert main(flags(config)) == 0
    resume = ["--resume", str(tmp_path / "run")]
    capsys.readouterr()
    if lost == "damaged":
        (folder / "a_4.png").write_bytes(b"")
        assert main(resume) == 2
        said = capsys.readouterr().err
        assert "a_4.png" in said and "--override on_corrupt=skip" in said
    else:
        (folder / "a_4.png").unlink()
        assert main(resume) == 2
        assert "an empty file may stand for a missing image, with --override" in capsys.readouterr().err
        (folder / "a_4.png").touch()
    status = main([*resume, "--override", "on_corrupt=skip,lr_anneal_steps=6"])
    assert status == 0, capsys.readouterr().err
    assert "left out 1 corrupt image" in capsys.readouterr().out
    assert main(resume) == 0  # recorded for the rest of the run

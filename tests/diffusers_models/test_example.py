"""examples/train_diffusers.py: both stages on the digits, continued from its checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("diffusers", "accelerate", "tensorboard", "sklearn"):
    pytest.importorskip(package, reason="the extras [diffusers] and [demo] are not installed")

from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from tdc_fast.diffusers_models import TDCModel  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train() -> Any:
    spec = importlib.util.spec_from_file_location("train_diffusers", ROOT / "examples" / "train_diffusers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_it_trains_continues_and_leaves_models_for_pipelines(train: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    flags = {
        "train_data_dir": "digits", "output_dir": out, "resolution": 8, "groups": 2, "k": 0.6, "train_batch_size": 4,
        "base_steps": 3, "checkpointing_steps": 2, "ddpm_num_inference_steps": 2, "eval_batch_size": 2,
        "prediction_type": "v_prediction",
    }  # fmt: skip
    common = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    common += ["--block_out_channels", "8", "16"]
    train([*common, "--expert_steps", "2"])
    assert sorted(path.name for path in (out / "checkpoints" / "base").iterdir()) == ["step-2", "step-3"]
    first = TDCModel.from_pretrained(out / "tdc")
    train([*common, "--expert_steps", "3", "--resume_from_checkpoint", "latest"])
    said = capsys.readouterr().out
    assert "base: continues from step 3" in said and "experts: continues from step 2" in said
    second = TDCModel.from_pretrained(out / "tdc")
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.config.base_hash == second.config.base_hash  # the base was not trained again
    pipeline = DDIMPipeline(second, DDIMScheduler(prediction_type="v_prediction"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    assert UNet2DModel.from_pretrained(out / "base").config.in_channels == 1
    assert (out / "expert_1" / "modeling_narrower.py").is_file()
    (log,) = {str(path.parent) for path in (out / "logs").rglob("events.*")}
    events = EventAccumulator(log).Reload()
    assert {"base/loss", "experts/loss"} <= set(events.Tags()["scalars"])
    assert {tag.split("/samples")[0] for tag in events.Tags()["images"]} == {"base", "experts"}

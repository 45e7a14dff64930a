"""examples/train_diffusers.py: both stages on the digits, continued from its checkpoints."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

for package in ("diffusers", "accelerate", "tensorboard", "sklearn"):
    pytest.importorskip(package, reason="the extras [diffusers] and [demo] are not installed")

from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from tdc_fast.data.dataset import load_dataset  # noqa: E402
from tdc_fast.diffusers_models import TDCModel  # noqa: E402
from tests.data.images import pixels, write  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("train_diffusers", ROOT / "examples" / "train_diffusers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_continues_and_leaves_models_for_pipelines(example: Any, tmp_path: Path, capsys: Any) -> None:
    train, out = example.main, tmp_path / "out"
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


class Rows(list):
    """The part of a datasets.Dataset that the example uses."""

    column_names = ("img", "label")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_data_set_of_the_hub_gives_the_images_of_a_folder(
    channels: int, example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for number, shape in enumerate([(12, 9, 3), (8, 8), (20, 31, 3)]):
        write(tmp_path / f"{number}.png", pixels(*shape, seed=number))
    asked = []

    def read(*names: Any, split: str) -> Rows:
        asked.append((*names, split))
        return Rows({"img": Image.open(path), "label": 0} for path in sorted(tmp_path.iterdir()))

    package = ModuleType("datasets")
    package.load_dataset = read  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    options = Namespace(
        dataset_name="name", dataset_config_name="small", train_data_dir="", resolution=8, in_channels=channels
    )
    images, folder = example.read_images(options), load_dataset(tmp_path, image_size=8, in_channels=channels)
    assert asked == [("name", "small", "train")] and len(images) == 3
    assert torch.equal(images.batch([2, 0, 1])[0], folder.batch([2, 0, 1])[0])
    monkeypatch.setattr(Rows, "column_names", ("text",))
    with pytest.raises(SystemExit, match="--dataset_name name: no column image or img in"):
        example.read_images(options)


def test_the_package_that_reads_the_hub_is_named_where_it_is_missing(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="--dataset_name needs a package: pip install datasets"):
        example.read_images(Namespace(dataset_name="name", resolution=8, in_channels=3))

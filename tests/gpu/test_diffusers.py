"""`TDCModel` in a pipeline on a GPU: placed there, or fetched when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
pytest.importorskip("accelerate", reason="the extra [diffusers] is not installed")

from diffusers import DDIMPipeline, DDIMScheduler  # noqa: E402

from tdc_fast.diffusers_models import TDCModel  # noqa: E402
from tests.diffusers_models.test_model import pruned  # noqa: E402

pytestmark = pytest.mark.gpu


def drawn(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same noise wherever the model is
    return pipeline(2, generator, num_inference_steps=6, output_type="np").images


def pipeline_of(model: TDCModel) -> Any:
    return DDIMPipeline(model, DDIMScheduler())


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_pipeline_that_offloads_draws_what_one_on_the_gpu_draws(offload: str) -> None:
    expected = drawn(pipeline_of(TDCModel.from_routed(pruned())).to("cuda"))
    pipeline = pipeline_of(TDCModel.from_routed(pruned()))
    getattr(pipeline, offload)()
    for _ in range(2):  # what was fetched for the first batch is elsewhere again before the second
        np.testing.assert_allclose(drawn(pipeline), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device_map", ["cuda", {"": 0}])
def test_a_device_map_places_the_model(device_map: Any, tmp_path: Path) -> None:
    model = TDCModel.from_routed(pruned())
    model.save_pretrained(tmp_path)
    loaded = TDCModel.from_pretrained(tmp_path, device_map=device_map)
    assert {parameter.device for parameter in loaded.parameters()} == {torch.device("cuda", 0)}
    np.testing.assert_allclose(drawn(pipeline_of(loaded)), drawn(pipeline_of(model.to("cuda"))), rtol=0, atol=1e-6)

"""`StableDiffusionPipeline` with packed experts in the place of its UNet, drawn, saved, loaded and offloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
pytest.importorskip("transformers", reason="StableDiffusionPipeline needs transformers, which is not installed")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from tdc_fast import TimestepGroups, WidthPlan, pack_experts  # noqa: E402
from tdc_fast.diffusers_models import TDCModel  # noqa: E402
from tdc_fast.nn.packing import RoutedModel  # noqa: E402
from tests.models.test_iddpm import randomise  # noqa: E402

GROUPS = TimestepGroups.uniform(1000, 3)
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def text_model(folder: Path) -> tuple[Any, Any]:
    """CLIP with random weights, and a tokenizer of letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": words[0], "eos_token": words[1], "unk_token": words[1], "pad_token": words[1]}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval(), CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def routed() -> RoutedModel:
    """Expert 0 is whole, the others are pruned to half of their widths."""
    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "cross_attention_dim": 16,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
    }  # fmt: skip
    base = randomise(UNet2DConditionModel(**settings), 0)
    return pack_experts(base, GROUPS, WidthPlan.uniform(base, GROUPS.boundaries, [1.0, 0.5, 0.5])).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    text_encoder, tokenizer = text_model(tmp_path_factory.mktemp("tokenizer"))
    return {
        "vae": AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).eval(),
        "text_encoder": text_encoder, "tokenizer": tokenizer, "safety_checker": None, "feature_extractor": None,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1), "requires_safety_checker": False,
    }  # fmt: skip


def drawn(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "np", "height": 8, "width": 8}
    generator = torch.Generator().manual_seed(0)
    return pipeline(["a cat", "two dogs"], generator=generator, **settings).images


def test_the_expert_of_each_step_predicts_for_both_halves_of_guidance(
    routed: RoutedModel, parts: dict[str, Any]
) -> None:
    experts = [routed.expert(index) for index in range(3)]

    class ByHand(UNet2DConditionModel):
        def forward(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Any:
            return experts[int(GROUPS.group_of(torch.as_tensor(t)))](x, t, *args, **kwargs)

    by_hand = ByHand.from_config(experts[0].config)
    images = drawn(StableDiffusionPipeline(unet=TDCModel.from_routed(routed), **parts))
    np.testing.assert_allclose(images, drawn(StableDiffusionPipeline(unet=by_hand, **parts)), rtol=0, atol=1e-4)
    assert images.shape == (2, 8, 8, 3) and np.abs(images[0] - images[1]).max() > 1e-3


def test_a_pipeline_with_it_is_saved_and_loaded_whole(
    routed: RoutedModel, parts: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = StableDiffusionPipeline(unet=TDCModel.from_routed(routed), **parts)
    images = drawn(pipeline)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert isinstance(again.unet, TDCModel) and again.unet.routed.groups == GROUPS
    np.testing.assert_array_equal(drawn(again), images)
    half = DiffusionPipeline.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}


def test_its_layers_can_wait_elsewhere_until_they_run(routed: RoutedModel, parts: dict[str, Any]) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the extra [diffusers] is not installed")
    pipeline = StableDiffusionPipeline(unet=TDCModel.from_routed(routed), **parts)
    images = drawn(pipeline)
    accelerate.cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))
    assert next(pipeline.unet.parameters()).is_meta
    np.testing.assert_allclose(drawn(pipeline), images, rtol=0, atol=1e-6)

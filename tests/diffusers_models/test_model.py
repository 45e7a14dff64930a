"""`TDCModel` in diffusers' pipelines and on disk, and experts that plain diffusers loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    AutoModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    IPNDMScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file  # noqa: E402

from tdc_fast import TimestepGroups, for_inference, pack_experts  # noqa: E402
from tdc_fast.diffusers_models import TDCModel, save_expert, save_two_experts  # noqa: E402
from tdc_fast.diffusion import create_diffusion, sample  # noqa: E402
from tdc_fast.nn.packing import RoutedModel  # noqa: E402
from tdc_fast.nn.units import units_of  # noqa: E402
from tdc_fast.ops.layout import is_channel_innermost  # noqa: E402
from tdc_fast.serving import Engine, Request  # noqa: E402
from tests.diffusers_models.test_packing import CLOSE, GROUPS, MODELS, TEXT, TOKENS, T, images, made  # noqa: E402
from tests.models.test_iddpm import randomise  # noqa: E402
from tests.nn.test_blocks import shuffled  # noqa: E402


@pytest.fixture(autouse=True)
def modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code files are copied to a folder of the test, not to that of the user."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def pruned(name: str = "unet", groups: TimestepGroups = GROUPS) -> RoutedModel:
    """Expert 0 is whole, the last one has nothing left."""
    base = made(name)
    units = units_of(base)
    some = {unit.name: unit.widths()[(index % 3) * (len(unit.widths()) - 1) // 2] for index, unit in enumerate(units)}
    none = {unit.name: 0 for unit in units}
    return pack_experts(base, groups, shuffled(base, [{}, some, none][: groups.num_groups], groups))


def output(model: Any, name: str = "unet") -> Tensor:
    return model(images(), timestep=T, **MODELS[name][1]).sample


@pytest.mark.parametrize("name", ["conditional unet", "dit"])
def test_a_folder_alone_gives_the_model_again(name: str, tmp_path: Path) -> None:
    routed = pruned(name)
    model = TDCModel.from_routed(routed)
    expected = output(model, name)
    torch.testing.assert_close(expected, routed(images(), T, **MODELS[name][1]).sample)
    model.save_pretrained(tmp_path / "tdc")
    config = json.loads((tmp_path / "tdc" / "config.json").read_text())
    assert config["boundaries"] == list(GROUPS.boundaries) and config["base_hash"] == routed.widths.base_hash
    assert config["widths"] == [routed.widths.expert_widths(index) for index in range(3)]
    for loaded in (
        TDCModel.from_pretrained(tmp_path / "tdc"),
        AutoModel.from_pretrained(str(tmp_path / "tdc"), trust_remote_code=True),
    ):
        assert type(loaded).__name__ == "TDCModel" and not loaded.training
        torch.testing.assert_close(output(loaded, name), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output(loaded.expert(1), name), output(routed.expert(1), name))
    again = TDCModel.from_pretrained(tmp_path / "tdc", torch_dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and again.routed.groups == GROUPS


@pytest.mark.parametrize("layers", ["conv_in,mid_block*:2", ["conv_in", "mid_block*:2"]])
def test_a_folder_tells_which_layers_the_experts_share(layers: str | list[str], tmp_path: Path) -> None:
    routed = pack_experts(made("unet"), GROUPS, shared_layers=layers)
    model = TDCModel.from_routed(routed)
    model.save_pretrained(tmp_path)
    loaded = TDCModel.from_pretrained(tmp_path)
    assert loaded.routed.shared == routed.shared and "conv_in" in routed.shared
    torch.testing.assert_close(output(loaded), output(model))


def test_weights_are_sharded_where_they_are_large(tmp_path: Path) -> None:
    model = TDCModel.from_routed(pack_experts(made("unet"), GROUPS, per_sample=()))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    loaded = TDCModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(model))
    assert loaded.routed.per_sample == () and loaded.routed.widths is None
    for one in (model, loaded):  # neither saving nor loading changed how filters are stored
        assert is_channel_innermost(one.routed.model.conv_in.weight)


def schedule(kind: Any = DDPMScheduler) -> Any:
    return kind(num_train_timesteps=1000)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_pipeline_draws_with_the_expert_of_each_step(kind: str) -> None:
    """The reference calls the plain expert at every step."""
    routed = pruned()
    pipeline = DDPMPipeline if kind == "ddpm" else DDIMPipeline
    scheduler = schedule(DDPMScheduler if kind == "ddpm" else DDIMScheduler)
    experts = [routed.expert(index) for index in range(3)]

    class ByHand(UNet2DModel):
        def forward(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Any:
            return experts[int(GROUPS.group_of(torch.as_tensor(t)))](x, t, *args, **kwargs)

    by_hand = ByHand.from_config(made("unet").config)
    drawn = []
    for denoiser in (TDCModel.from_routed(routed), by_hand):
        pipe = pipeline(denoiser, scheduler)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipe(2, generator, num_inference_steps=6, output_type="np").images)
    assert drawn[0].shape == (2, 8, 8, 3)
    torch.testing.assert_close(torch.tensor(drawn[0]), torch.tensor(drawn[1]), **CLOSE)


def test_the_pipeline_of_dit_takes_it_with_guidance() -> None:
    dit = DiTTransformer2DModel(**{**TOKENS, "in_channels": 4, "out_channels": 4}, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = DiTPipeline(TDCModel.from_routed(pack_experts(randomise(dit, 0), GROUPS)), vae, schedule(DDIMScheduler))
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe([1, 2], guidance_scale=2.0, num_inference_steps=2, output_type="np").images
    assert drawn.shape[0] == 2 and drawn[0].std() > 0


def test_it_is_called_as_stable_diffusion_calls_its_unet() -> None:
    """Twice the batch for guidance, arguments that are None, a tuple, and fractions of timesteps."""
    routed = pruned("conditional unet")
    model, scheduler = TDCModel.from_routed(routed), schedule(EulerDiscreteScheduler)
    scheduler.set_timesteps(5)
    assert any(t != t.round() for t in scheduler.timesteps) and model.config.in_channels == 3
    experts = [routed.expert(index) for index in range(3)]
    x, text = torch.cat([images()[:2]] * 2), torch.cat([TEXT[:2], 0 * TEXT[:2]])
    for t in scheduler.timesteps:
        settings = {"timestep_cond": None, "cross_attention_kwargs": None, "added_cond_kwargs": None}
        found = model(x, t, encoder_hidden_states=text, **settings, return_dict=False)[0]
        expert = experts[int(GROUPS.group_of(t.round().long()))]
        torch.testing.assert_close(found, expert(x, t, encoder_hidden_states=text).sample, **CLOSE)
    assert model(x, 1000.0, encoder_hidden_states=text).sample.shape == x.shape  # flow matching begins there


def test_it_runs_while_its_weights_are_elsewhere() -> None:
    """As pipelines offload: every layer's weights are fetched when it runs."""
    accelerate = pytest.importorskip("accelerate", reason="the extra [diffusers] is not installed")
    model = TDCModel.from_routed(pruned()).eval()
    with torch.no_grad():
        expected = output(model)
        offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(offloaded.parameters()).is_meta
        torch.testing.assert_close(output(offloaded), expected)


def test_gradient_checkpointing_and_training_reach_the_experts() -> None:
    model = TDCModel.from_routed(pack_experts(made("unet"), GROUPS)).train()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    output(model).square().mean().backward()
    assert model.routed.model.conv_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_device_map_may_name_one_device(device_map: Any, tmp_path: Path) -> None:
    model = TDCModel.from_routed(pruned())
    model.save_pretrained(tmp_path)
    loaded = TDCModel.from_pretrained(tmp_path, device_map=device_map)
    assert next(loaded.parameters()).device == torch.device("cpu")
    torch.testing.assert_close(output(loaded), output(model))


@pytest.mark.parametrize("name", ["unet", "dit", "transformer"])
def test_experts_load_in_plain_diffusers(name: str, tmp_path: Path) -> None:
    routed = pruned(name)
    for index in range(3):
        folder = tmp_path / str(index)
        save_expert(routed, index, folder)
        config = json.loads((folder / "config.json").read_text())
        base = type(made(name)).__name__
        assert config["_class_name"] == (base if index == 0 else f"Narrower{base}")
        assert (folder / "diffusion_pytorch_model.safetensors").is_file()
        loaded = AutoModel.from_pretrained(str(folder), trust_remote_code=index > 0)
        remapped = name == "transformer" and index == 0  # what diffusers makes of a Transformer2DModel of this kind
        assert isinstance(loaded, DiTTransformer2DModel if remapped else type(made(name)))
        torch.testing.assert_close(output(loaded, name), output(routed.expert(index), name))
        if index:
            code = (folder / "modeling_narrower.py").read_text()
            assert "tdc_fast" not in code.replace("tdc_fast.nn.blocks", "")
            assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in made(name).parameters())


def test_two_experts_are_the_two_denoisers_of_a_pipeline_with_a_boundary(tmp_path: Path) -> None:
    groups = TimestepGroups([0, 875, 1000])
    experts = [made("dit", seed) for seed in range(2)]
    assert save_two_experts(pack_experts(experts, groups), tmp_path) == 0.875
    assert json.loads((tmp_path / "boundary.json").read_text()) == {"boundary_ratio": 0.875}
    for folder, expert in (("transformer", experts[1]), ("transformer_2", experts[0])):
        torch.testing.assert_close(
            output(AutoModel.from_pretrained(str(tmp_path / folder)), "dit"), output(expert, "dit")
        )
    with pytest.raises(ValueError, match="routed: got '3 groups'; expected a packed model of two"):
        save_two_experts(pruned(), tmp_path)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, IPNDMScheduler])
def test_noise_levels_in_place_of_timesteps_are_not_taken_in_silence(kind: Any) -> None:
    model, scheduler = TDCModel.from_routed(pruned()), kind()
    scheduler.set_timesteps(5)
    given = [float(t) for t in scheduler.timesteps]
    if min(given) < 0:
        with pytest.raises(ValueError, match="timestep: got -.*; expected one from 0 to 999. .* DDIMScheduler"):
            [model(images(), t) for t in scheduler.timesteps if t < 0]
    with pytest.warns(UserWarning, match="timestep: between 0 and 1, .* IPNDMScheduler"):
        model(images(), next(t for t in scheduler.timesteps if 0 < t < 1))
    for beyond in (1001, 5000.5, torch.tensor(math.nan), torch.tensor([3, 999, -1, 7, 0])):
        with pytest.raises(ValueError, match=r"timestep: got (1001|5000.5|nan|-1).*num_train_timesteps=1000"):
            model(images(), beyond)


def test_weights_that_a_file_lacks_are_not_left_random(tmp_path: Path) -> None:
    TDCModel.from_routed(pack_experts(made("unet"), GROUPS)).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    loaded, info = TDCModel.from_pretrained(tmp_path, output_loading_info=True, device_map="cpu")
    assert isinstance(loaded, TDCModel) and not info["missing_keys"]
    del weights["routed.model.conv_in.bias"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights: got 'none for routed.model.conv_in.bias'; expected a file of all"):
        TDCModel.from_pretrained(tmp_path)


class Adapted(nn.Module):
    """A layer as peft wraps it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def test_layers_with_adapters_are_not_saved_under_names_that_no_model_has(tmp_path: Path) -> None:
    base = made("unet")
    base.conv_in = Adapted(base.conv_in)
    routed = pack_experts(base, GROUPS)
    model = TDCModel.from_routed(routed)
    torch.testing.assert_close(output(model), output(base), **CLOSE)
    for save in (model.save_pretrained, lambda folder: save_expert(routed, 0, folder)):
        with pytest.raises(ValueError, match=r"module 'model.conv_in': got 'a layer with adapters'; .*fuse_lora\(\)"):
            save(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_its_images_are_drawn_and_served_and_its_groups_are_those_of_the_process() -> None:
    routed = pack_experts([made("unet", seed) for seed in range(3)], GROUPS)
    diffusion = create_diffusion(1000)
    for model in (routed, TDCModel.from_routed(routed)):
        with Engine(model, diffusion, (3, 8, 8)) as engine:
            served = engine.submit(Request(seed=3, steps=4)).result(60).samples
        drawn = sample(diffusion, model, (1, 3, 8, 8), steps=4, generator=torch.Generator().manual_seed(3))
        assert torch.equal(served, drawn) and engine.statistics.expert_rows.tolist() == [2, 1, 1]
        with pytest.raises(ValueError, match="groups divide 1000 timesteps"):
            sample(create_diffusion(500), model, (1, 3, 8, 8), steps=4)


def test_in_16_bits_its_output_is_in_fp32() -> None:
    routed = pack_experts(made("unet"), GROUPS)
    expected = routed(images(), T)
    found = for_inference(routed, torch.bfloat16)(images(), T)
    assert type(found) is type(expected) and found.sample.dtype == torch.float32
    torch.testing.assert_close(found.sample, expected.sample, rtol=0.05, atol=0.05)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = TDCModel.from_routed(pruned())
    own = {name: value for name, value in model._internal_dict.items() if not name.startswith("_")}
    with pytest.raises(ValueError, match="routed: got 'UNet2DModel'"):
        TDCModel.from_routed(made("unet"))
    with pytest.raises(ValueError, match="base: got 'Sequential'; expected a class of models that diffusers has"):
        TDCModel.from_routed(pack_experts(nn.Sequential(nn.Linear(3, 3)), GROUPS))
    with pytest.raises(ValueError, match="base: got 'Popen'"):
        TDCModel(**{**own, "base": {"_class_name": "Popen"}})
    with pytest.raises(ValueError, match=r"widths\[0\]: got .*; expected exactly the units of the base"):
        TDCModel(**{**own, "widths": [{}, {}, {}]})
    with pytest.raises(ValueError, match="sample: got None"):
        model(timestep=3)
    with pytest.raises(ValueError, match="timestep: got 'two values'; expected one"):
        model(images(), 3, timestep=4)
    with pytest.raises(ValueError, match="arguments: got '5 in order'; expected at most 4, as the denoiser has"):
        model(images(), 3, None, True, None)
    for spread in ("auto", "balanced", {"": "disk"}, {"routed.model.conv_in": 0, "routed": "cpu"}, "nowhere", {}):
        with pytest.raises(ValueError, match="device_map: got .*expected one device"):
            TDCModel.from_pretrained(tmp_path, device_map=spread)

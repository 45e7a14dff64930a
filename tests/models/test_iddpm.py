"""The UNet is improved-diffusion's: keys, shapes, sizes, numerics; and what it adds refuses bad input by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast.models.blocks import timestep_embedding
from tdc_fast.models.iddpm import UNet, create_unet, default_channel_mult
from tdc_fast.nn.packing import pack_experts
from tdc_fast.routing import TimestepGroups
from tests.models import published_unet
from tests.operators import Recorded

SMALL = {
    "image_size": 8, "in_channels": 2, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1,
    "attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 4,
}  # fmt: skip


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Nothing stays at zero, so that every parameter shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return model


def inputs(model: UNet, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, model.in_channels, model.image_size, model.image_size, generator=generator)
    return x, torch.randint(0, 1000, (batch,), generator=generator)


@pytest.mark.parametrize(
    ("flags", "keys", "millions", "giga_macs"),
    [
        ({"image_size": 32, "num_channels": 128}, 446, 52.546, 8.387),
        ({"image_size": 64, "num_channels": 128}, 450, 121.064, 39.736),
        ({"image_size": 64, "num_channels": 192, "class_cond": True}, 451, 273.049, 89.086),
    ],
)
def test_published_configurations_have_their_published_keys_shapes_and_sizes(flags, keys, millions, giga_macs):
    size = flags["image_size"]
    with torch.device("meta"):
        model = create_unet(**flags, num_res_blocks=3, learn_sigma=True)
        x, t = torch.empty(1, 3, size, size), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(x, t, y=t if flags.get("class_cond") else None)
    expected = published_unet.state_shapes(
        channels=flags["num_channels"], mult=default_channel_mult(size), blocks=3, attention={size // 16, size // 8},
        out_channels=6, classes=1000 if flags.get("class_cond") else None,
    )  # fmt: skip
    state = model.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert len(state) == keys
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    assert round(counter.get_total_flops() / 2e9, 3) == giga_macs


@pytest.mark.parametrize("classes", [None, 5])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_published_state_dict_loads_strictly_and_gives_the_published_output(scale_shift, classes):
    shape = {"channels": 32, "mult": (1, 2), "blocks": 1, "scale_shift": scale_shift}
    shapes = published_unet.state_shapes(**shape, attention={2}, out_channels=4, in_channels=2, classes=classes)
    model = UNet(**SMALL, num_classes=classes, use_scale_shift_norm=scale_shift)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(size, generator=generator) / max(torch.empty(size)[0].numel(), 4) ** 0.5
        for name, size in shapes.items()
    }
    model.load_state_dict(state, strict=True)
    x, t = inputs(model)
    y = None if classes is None else torch.tensor([4, 0, 2])
    double = {name: value.double() for name, value in state.items()}
    expected = published_unet.forward(double, x.double(), t, y, **shape, heads=4, norm_groups=lambda c: 32)
    torch.testing.assert_close(model(x, t, y=y).double(), expected, rtol=1e-4, atol=2e-5)


def test_a_fresh_model_predicts_zero_because_its_closing_layers_start_at_zero():
    model = UNet(**SMALL)
    x, t = inputs(model)
    assert not model(x, t).any()
    zero = {name for name, value in model.state_dict().items() if name.endswith("weight") and not value.any()}
    blocks = {unit.name: unit.kind for unit in model.pruning_units()}
    closing = {f"{name}.{'out_layers.3' if kind == 'resblock' else 'proj_out'}.weight" for name, kind in blocks.items()}
    assert zero == closing | {"out.2.weight"}


def test_the_timestep_embedding_is_cosines_then_sines_with_period_up_to_10000():
    embedding = timestep_embedding(torch.tensor([0, 10]), 5)
    slow = 10 / 10000**0.5
    expected = torch.tensor([[1, 1, 0, 0, 0], [torch.tensor(10.0).cos(), torch.tensor(slow).cos(), 0, 0, 0]])
    expected[1, 2:4] = torch.tensor([10.0, slow]).sin()
    torch.testing.assert_close(embedding, expected)


def test_rescaled_timesteps_are_the_models_own_business():
    model = randomise(UNet(**SMALL))
    x, t = inputs(model)
    expected = model(x, t.float() * 4.0)
    model.timestep_scale = 4.0
    torch.testing.assert_close(model(x, t), expected)


@pytest.mark.parametrize("channels", [8, 12, 16, 48])
def test_channel_counts_below_or_beside_32_work(channels):
    model = randomise(UNet(**{**SMALL, "model_channels": channels}))
    assert {norm.num_groups for norm in model.modules() if isinstance(norm, nn.GroupNorm)} <= {8, 12, 16, 18, 24, 32}
    assert model(*inputs(model)).isfinite().all()


def test_resampling_without_convolutions_has_no_parameters():
    shapes = published_unet.state_shapes(
        channels=32, mult=(1, 2), blocks=1, attention={2}, out_channels=4, in_channels=2, scale_shift=False,
        conv_resample=False,
    )  # fmt: skip
    model = UNet(**SMALL, conv_resample=False)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert model(*inputs(model)).shape == (3, 4, 8, 8)


def test_checkpointing_changes_neither_output_nor_gradient_even_with_dropout():
    results = []
    for use_checkpoint in (False, True):
        model = randomise(UNet(**SMALL, dropout=0.3, use_checkpoint=use_checkpoint))
        torch.manual_seed(5)
        out = model(*inputs(model))
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_activations_stay_channels_last():
    model = randomise(UNet(**SMALL))
    strides = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm):
            module.register_forward_hook(
                lambda m, i, o: strides.append(o.is_contiguous(memory_format=torch.channels_last))
            )
    model(*inputs(model))
    assert strides and all(strides)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_every_attention_is_torchs_fused_one(packed):
    model = randomise(UNet(**SMALL))
    count = sum(unit.kind == "attention" for unit in model.pruning_units())
    routed = pack_experts(model, TimestepGroups.uniform(1000, 2)) if packed else model
    with Recorded() as called:
        routed(*inputs(model)).sum().backward()
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert called[fused] == called[f"{fused}_backward"] == count == 4
    assert not called.keys() & {"bmm", "_softmax"}


def test_a_recipe_and_a_state_dict_rebuild_the_model():
    widths = {"input_blocks.1.0": 8, "middle_block.0": 0, "middle_block.1": 0}
    model = randomise(UNet(**SMALL, use_scale_shift_norm=True, widths=widths))
    model.timestep_scale = 2.0
    twin = UNet.from_recipe(json.loads(json.dumps(model.recipe())))
    twin.load_state_dict(model.state_dict())
    x, t = inputs(model)
    assert torch.equal(model(x, t), twin(x, t))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 9}, "image_size: got 9"),
        ({"num_heads": 3}, "num_heads: got 3"),
        ({"dims": 3}, "dims: got 3"),
        ({"image_size": 8.0}, "image_size: got 8.0"),
        ({"model_channels": 0}, "model_channels: got 0"),
        ({"num_res_blocks": -1}, "num_res_blocks: got -1"),
        ({"dropout": 1.5}, "dropout: got 1.5"),
        ({"channel_mult": (1.5, 2)}, "channel_mult"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"widths": {"nowhere": 8}}, "widths.*nowhere"),
        ({"widths": {"middle_block.0": 3}}, r"widths\['middle_block.0'\]: got 3"),
    ],
)
def test_a_bad_argument_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        UNet(**{**SMALL, **change})


def test_inputs_that_do_not_fit_are_named():
    model = UNet(**SMALL, num_classes=3)
    x, t = inputs(model)
    with pytest.raises(ValueError, match="y: got None"):
        model(x, t)
    y = t % 3
    with pytest.raises(ValueError, match="x: got"):
        model(x[..., :7], t, y=y)
    with pytest.raises(ValueError, match="x: got .*expected shape"):
        model(x[0], t, y=y)
    with pytest.raises(ValueError, match="x: got .*expected shape"):
        model(x.repeat(1, 2, 1, 1), t, y=y)
    with pytest.raises(ValueError, match="timesteps: got"):
        model(x, t[:, None], y=y)
    with pytest.raises(ValueError, match="timesteps: got 3; expected a torch tensor"):
        model(x, 3, y=y)
    with pytest.raises(ValueError, match="y: got 3; expected labels from 0 to 2"):
        model(x, t, y=torch.full_like(y, 3))
    with pytest.raises(ValueError, match="y: got .*float32"):
        model(x, t, y=y.float())


def test_flags_mean_what_improved_diffusion_means():
    model = create_unet(
        image_size=64, num_channels=32, attention_resolutions="32,16", learn_sigma=True, class_cond=True
    )
    assert model.architecture["attention_resolutions"] == [2, 4]
    assert (model.out_channels, model.num_classes) == (6, 1000)
    assert model.architecture["use_scale_shift_norm"] and model.architecture["channel_mult"] == [1, 2, 3, 4]
    assert create_unet(image_size=8, num_channels=8, channel_mult="1,3").architecture["channel_mult"] == [1, 3]
    with pytest.raises(ValueError, match="attention_resolutions: got 'a,8'"):
        create_unet(attention_resolutions="a,8")


@pytest.mark.parametrize("size", [1, 7, 8, 12, 16, 28, 32, 48, 64, 96, 128, 200, 256, 320, 512])
def test_default_multipliers_suit_any_image_size(size):
    mult = default_channel_mult(size)
    published = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
    assert mult == published.get(size, mult)
    assert size % 2 ** (len(mult) - 1) == 0

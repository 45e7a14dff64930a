"""`python -m tdc_fast.convert`: weights of other projects and back, the same network or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tdc_fast import convert
from tdc_fast.models.guided import from_guided_diffusion, num_heads_of
from tdc_fast.models.iddpm import UNet, create_unet
from tests.models.test_iddpm import randomise

FLAGS = {
    "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "4",
    "num_heads": 4,
}  # fmt: skip


GUIDED = ["--guided", "True", "--model_path"]


def unet(**flags: Any) -> UNet:
    return randomise(create_unet(**{**FLAGS, **flags}), 0)


def words(flags: dict[str, Any]) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def in_new_order(state: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The file that guided-diffusion writes of this network under use_new_attention_order: all q, all k, all v."""
    state = dict(state)
    for name in [name for name in state if ".qkv." in name]:
        rows, size = state[name], state[name].shape[0] // (3 * heads)
        order = [(head * 3 + part) * size + row for part in range(3) for head in range(heads) for row in range(size)]
        state[name] = rows[order]
    return state


def test_a_file_of_ours_becomes_a_folder_of_diffusers_and_comes_back(tmp_path: Path, capsys: Any) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
    model = unet()
    torch.save(model.state_dict(), tmp_path / "unet.pt")
    arguments = ["--model_path", str(tmp_path / "unet.pt"), "--out", str(tmp_path / "folder"), *words(FLAGS)]
    assert convert.main(arguments) == 0
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "folder")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    torch.testing.assert_close(theirs(x, t).sample, model(x, t), rtol=1e-4, atol=1e-5)
    assert convert.main(["--model_path", str(tmp_path / "folder"), "--out", str(tmp_path / "back.pt")]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())
    said = capsys.readouterr().out
    assert "--image_size 8 --in_channels 3 --num_channels 32 --channel_mult 1,2" in said and "--num_heads 4" in said


@pytest.mark.parametrize("new_order", [False, True])
def test_a_file_of_guided_diffusion_becomes_one_of_ours(new_order: bool, tmp_path: Path) -> None:
    state = unet(use_scale_shift_norm=True).state_dict()
    guided = {name: value.half() for name, value in (in_new_order(state, 4) if new_order else state).items()}
    torch.save(guided, tmp_path / "guided.pt")
    flags = {**FLAGS, "num_heads": 1, "num_head_channels": 16, "use_new_attention_order": new_order}
    arguments = ["--guided", "True", "--model_path", str(tmp_path / "guided.pt"), "--out", str(tmp_path / "ours.pt")]
    assert convert.main([*arguments, *words(flags)]) == 0
    found = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert all(torch.equal(found[name], value.half().float()) for name, value in state.items())


def test_q_k_and_v_of_the_new_order_are_those_of_its_thirds() -> None:
    """As guided-diffusion computes them: three thirds of the channels, each of all heads."""
    weight, x = torch.randn(3 * 8, 8, 1), torch.randn(5, 8)
    converted = from_guided_diffusion({"m.qkv.weight": weight}, num_heads=2, use_new_attention_order=True)
    theirs = [part.unflatten(-1, (2, 4)) for part in (x @ weight[..., 0].T).chunk(3, dim=-1)]  # (tokens, heads, 4)
    ours = (x @ converted["m.qkv.weight"][..., 0].T).unflatten(-1, (2, 3, 4)).unbind(2)  # head by head
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_heads_of_one_size_are_one_number_of_heads_or_refused() -> None:
    state = unet(attention_resolutions="4,8").state_dict()
    with pytest.raises(ValueError, match=r"num_head_channels: got 16; .* \[32, 64\] channels they are \[2, 4\]"):
        num_heads_of(state, 16)
    with pytest.raises(ValueError, match="num_head_channels: got 7"):
        num_heads_of(state, 7)
    with pytest.raises(ValueError, match="num_heads: got 5"):
        from_guided_diffusion(state, num_heads=5, use_new_attention_order=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "unet.pt"], "out: got ''; expected a new file or folder"),
        (["--model_path", "unet.pt", "--out", "unet.pt"], "out: got 'unet.pt'"),
        (["--model_path", "unet.pt", "--out", "new", "--num_head_channels", "8"], "num_head_channels: got 8"),
        ([*GUIDED, "unet.pt", "--out", "new", "--resblock_updown", "True"], "resblock_updown: got True"),
        ([*GUIDED, "up.pt", "--out", "new"], "resblock_updown: got True"),
        ([*GUIDED, "list", "--out", "new"], "guided: got True; expected False: --model_path is a folder of diffusers"),
        (["--model_path", "list", "--out", "new"], r"config.json: got 'list.config.json'; .* it holds \[1\]"),
        (["--model_path", "cut", "--out", "new"], "config.json: got 'cut.config.json'; .* it does not parse"),
        ([*GUIDED, "unet.pt", "--out", "new", "--num_res_blocks", "2"], "model_path: .* a file that fits the flags"),
        (["--model_path", "nan.pt", "--out", "new"], "model_path: .* finite weights; out.2.bias holds .* NaN"),
        ([*GUIDED, "nan.pt", "--out", "new"], "model_path: .* finite weights; out.2.bias holds .* NaN"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    state = unet().state_dict()
    torch.save(state, "unet.pt")
    torch.save({**state, "output_blocks.1.2.in_layers.0.weight": torch.ones(3)}, "up.pt")
    torch.save({**state, "out.2.bias": torch.tensor([1.0, float("nan"), 0.0])}, "nan.pt")
    for name, text in (("list", "[1]"), ("cut", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    given = {name: value for name, value in FLAGS.items() if f"--{name}" not in arguments}
    assert convert.main([*arguments, *words(given)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "list", "nan.pt", "unet.pt", "up.pt"]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_folder_of_diffusers_with_weights_that_are_not_finite_is_refused(
    value: str, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
    from tdc_fast.diffusers_models.unets import to_diffusers

    theirs = to_diffusers(unet())
    with torch.no_grad():
        theirs.conv_out.bias[1] = float(value)
    theirs.save_pretrained(tmp_path / "folder")
    assert convert.main(["--model_path", str(tmp_path / "folder"), "--out", str(tmp_path / "back.pt")]) == 2
    assert "finite weights; conv_out.bias holds infinities or NaN" in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()

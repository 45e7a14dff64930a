"""From images to samples through latents: `encode`, `train --latents`, `sample --vae`, and what refuses latents."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
pytest.importorskip("sklearn", reason="the extra [demo] is not installed")

from tdc_fast import encode, evaluate, merge, nll, sample, serve, train  # noqa: E402
from tdc_fast.data.autoencoder import LatentDecoder  # noqa: E402
from tdc_fast.data.latents import load_latents  # noqa: E402
from tdc_fast.diffusion.sampling_loop import SamplingLoop  # noqa: E402
from tdc_fast.evaluation.samples import draw_samples  # noqa: E402
from tdc_fast.runs.checkpoint import ema_file, model_file  # noqa: E402
from tdc_fast.runs.config import TrainConfig  # noqa: E402
from tdc_fast.runs.denoisers import from_run  # noqa: E402
from tdc_fast.runs.lock import sole_writer  # noqa: E402
from tdc_fast.serving import Engine, Request  # noqa: E402
from tests.data.autoencoders import random_autoencoder, write_digits  # noqa: E402
from tests.training.small_run import SETTINGS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SMALL = {**SETTINGS, "image_size": 4, "attention_resolutions": "2", "ema_rate": "0.9"}
SCALING = {"scaling_factor": 0.7, "shift_factor": 0.3}


def flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A folder with an autoencoder (vae), digits, their latents, and a run of base and experts on them."""
    folder = tmp_path_factory.mktemp("latents")
    random_autoencoder(**SCALING).save_pretrained(folder / "vae")
    write_digits(folder / "digits.npz")
    options = flags(vae=folder / "vae", data_dir=folder / "digits.npz", out=folder / "latents", flips=True)
    assert encode.main([*options, *flags(shard_images=10)]) == 0
    size = {name: value for name, value in SMALL.items() if name != "image_size"}
    two_stages = {"groups": 2, "stage1_steps": 8, "stage2_steps": 8, "k": 0.7, "calibration_batches": 1}
    run = {"latents": folder / "latents", "run_dir": folder / "run", "class_cond": True, "heldout": 0.2}
    assert train.main(flags(**run, **size, **two_stages)) == 0
    return folder


def test_a_run_takes_size_channels_and_classes_from_its_latents(place: Path) -> None:
    denoiser = from_run(place / "run")
    assert denoiser.image_shape == (2, 4, 4) and denoiser.config.image_size == 4
    assert denoiser.num_classes == 10 and denoiser.latents == load_latents(place / "latents").space
    said = train.describe_next(denoiser.run.directory)
    assert "--vae DIR" in said and "nll" not in said


def test_latents_that_were_damaged_are_refused_before_the_run_begins(place: Path, tmp_path: Path, capsys: Any) -> None:
    """One bit, in the middle of the numbers: sizes and headers are as they were."""
    shutil.copytree(place / "latents", tmp_path / "latents")
    shard = tmp_path / "latents" / "latents-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    size = {name: value for name, value in SMALL.items() if name != "image_size"}
    argv = flags(latents=tmp_path / "latents", run_dir=tmp_path / "run", **size, lr_anneal_steps=1)
    assert train.main(argv) == 2 and not (tmp_path / "run").exists()
    said = f"error: latents: got '{shard}'; expected the content that index.json lists; it is damaged"
    assert said in capsys.readouterr().err
    options = flags(vae=place / "vae", data_dir=place / "digits.npz", out=tmp_path / "latents", flips=True)
    assert encode.main([*options, *flags(shard_images=10)]) == 0
    load_latents(tmp_path / "latents").shards.check_contents()


def test_samples_are_decoded_as_a_pipeline_of_diffusers_decodes(place: Path, tmp_path: Path, capsys: Any) -> None:
    options = flags(run=place / "run", vae=place / "vae", num_samples=6, batch_size=6, steps=4, seed=3, out=tmp_path)
    assert sample.main([*options, *flags(sampler="ddim")]) == 0
    assert "note" not in capsys.readouterr().out
    archive = np.load(tmp_path / "samples_6x8x8x1.npz")
    assert (tmp_path / "samples_6x8x8x1.png").is_file()
    denoiser = from_run(place / "run")
    loop = SamplingLoop(denoiser.diffusion, denoiser.model, sampler="ddim", steps=4, clip_denoised=False)
    generator = torch.Generator().manual_seed(3)
    labels = torch.from_numpy(archive["arr_1"])
    torch.randint(10, (6,), generator=generator)  # the labels were drawn first
    latents = loop.draw((6, 2, 4, 4), generator=generator, model_kwargs={"y": labels})
    vae = random_autoencoder(**SCALING)
    with torch.no_grad():
        images = vae.decode(latents / 0.7 + 0.3).sample
    pixels = ((images + 1) * 127.5).clamp(0, 255)
    assert (torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2).double() - pixels).abs().max() < 0.51


def test_only_the_autoencoder_that_made_the_latents_decodes_them(place: Path, tmp_path: Path, capsys: Any) -> None:
    def said(*, status: int = 2, run: Path = place / "run", **options: Any) -> str:
        arguments = flags(run=run, num_samples=2, steps=1, out=tmp_path / "out", **options)
        assert sample.main(arguments) == status
        return "".join(capsys.readouterr())

    assert "vae: got ''; expected --vae DIR, the folder of the AutoencoderKL that made them" in said()
    random_autoencoder(seed=1, **SCALING).save_pretrained(tmp_path / "other")
    assert "the AutoencoderKL that made the latents" in said(vae=tmp_path / "other")
    assert not (tmp_path / "out").exists()
    # The scale is the run's: an autoencoder of the same weights decodes in the same way, whatever its config says.
    random_autoencoder(scaling_factor=5.0).save_pretrained(tmp_path / "rescaled")
    drawn = []
    for name in (place / "vae", tmp_path / "rescaled"):
        said(status=0, vae=name)
        drawn.append(np.load(tmp_path / "out" / "samples_2x8x8x1.npz")["arr_0"])
    assert np.array_equal(*drawn)
    tuned = random_autoencoder(**SCALING)
    tuned.decoder.conv_out.bias.data += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    assert "note: " in (text := said(status=0, vae=tmp_path / "tuned")) and "another decoder" in text


def test_a_file_of_weights_remembers_its_latents(place: Path, tmp_path: Path, capsys: Any) -> None:
    weights = place / "run" / "base" / ema_file("0.9", 8)
    options = flags(model_path=weights, num_samples=2, steps=1, out=tmp_path, sampler="ddim")
    assert sample.main(options) == 2 and "--vae DIR" in capsys.readouterr().err
    assert sample.main([*options, *flags(vae=place / "vae")]) == 0
    assert (tmp_path / "samples_2x8x8x1.npz").is_file()


def test_merged_experts_remember_their_latents(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert merge.main(flags(run=place / "run", out=tmp_path / "merged.pt")) == 0
    assert capsys.readouterr().out.endswith(f"--model_path {tmp_path / 'merged.pt'} --vae DIR\n")
    options = flags(model_path=tmp_path / "merged.pt", num_samples=2, steps=1, out=tmp_path, sampler="ddim")
    assert sample.main(options) == 2 and "--vae DIR" in capsys.readouterr().err
    assert sample.main([*options, *flags(vae=place / "vae")]) == 0


def test_what_needs_images_refuses_a_run_on_latents(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert nll.main(flags(run=place / "run", out=tmp_path)) == 2
    assert "one of images: bits per dimension are of pixels" in capsys.readouterr().err
    with pytest.raises(ValueError, match="vae: got ''; expected --vae DIR"):
        Engine.of(from_run(place / "run"))
    assert evaluate.main([str(place / "run"), str(place / "digits.npz"), *flags(num_samples=4, steps=1)]) == 2
    assert "--vae DIR" in capsys.readouterr().err


def test_an_engine_decodes_what_sample_decodes_and_its_previews(place: Path, tmp_path: Path) -> None:
    denoiser = from_run(place / "run")
    decoder = LatentDecoder.load(str(place / "vae"), denoiser.latents)
    with Engine.of(denoiser, decoder=decoder) as engine:
        assert engine.image_shape == (1, 8, 8)
        generation = engine.submit(Request(num_images=3, seed=5, steps=4, preview_every=2))
        previews, result = list(generation.previews()), generation.result(60)
    expected, labels = draw_samples(denoiser, 3, steps=4, seed=5, decoder=decoder)
    assert torch.equal(result.images, expected) and torch.equal(result.labels, labels)
    assert {preview.images.shape for preview in previews} == {(3, 1, 8, 8)}
    assert engine.statistics.outcomes == {"completed": 1}


def test_a_server_takes_the_autoencoder_of_its_run_alone(place: Path, capsys: Any, monkeypatch: Any) -> None:
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    served = []
    monkeypatch.setattr(Engine, "of", lambda denoiser, **options: served.append(options["decoder"]) or stop())
    assert serve.main(flags(run=place / "run", port=0)) == 2
    assert "vae: got ''; expected --vae DIR" in capsys.readouterr().err and not served
    assert serve.main(flags(run=place / "run", vae=place / "vae", port=0)) == 130
    assert served[0].image_shape == (1, 8, 8)


def stop() -> None:
    raise KeyboardInterrupt


def test_a_run_is_compared_by_decoded_samples_and_the_loss_of_its_latents(place: Path, tmp_path: Path) -> None:
    options = evaluate.EvaluateOptions(num_samples=4, steps=1, features="random-conv", vae=str(place / "vae"))
    result = evaluate.evaluate(str(place / "run"), str(place / "digits.npz"), options)
    assert result["a"]["images"] == 4 and result["b"]["images"] == 24
    (losses,) = result["losses"].values()
    assert f"held-out images of {place / 'latents'}" in losses["images"]


def test_corrupt_images_are_left_out_and_counted(place: Path, tmp_path: Path, capsys: Any) -> None:
    for number in range(3):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"nonsense")
    options = flags(vae=place / "vae", data_dir=tmp_path, image_size=8, out=tmp_path / "latents", on_corrupt="skip")
    assert encode.main(options) == 0
    assert "left out 1 corrupt image\n" in capsys.readouterr().out and len(load_latents(tmp_path / "latents")) == 3


def test_a_run_on_latents_resumes_bit_for_bit(place: Path, tmp_path: Path, capsys: Any) -> None:
    # 24 latents in batches of 6: 10 steps pass through three epochs, each with draws and mirror images of its own.
    config = TrainConfig(**SMALL, latents=str(place / "latents"), run_dir=str(tmp_path / "run"), lr_anneal_steps=10)
    run = train.train(config)
    whole = (run.path / model_file(10)).read_bytes()
    (run.path / model_file(10)).unlink()
    train.train(config.replace(resume=str(run.path), resume_step=4))
    assert (run.path / model_file(10)).read_bytes() == whole
    shutil.copytree(place / "latents", tmp_path / "kept")
    shutil.rmtree(place / "latents")
    try:  # other latents under the name of the run's
        options = flags(vae=place / "vae", data_dir=place / "digits.npz", out=place / "latents")
        assert encode.main(options) == 0
        with pytest.raises(ValueError, match="latents: .*the latents, of the same autoencoder and scale, that the run"):
            train.train(config.replace(resume=str(run.path)))
    finally:
        shutil.rmtree(place / "latents")
        shutil.copytree(tmp_path / "kept", place / "latents")
    train.train(config.replace(resume=str(run.path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 8}, "image_size: got 8; expected 4, the size of"),
        ({"in_channels": 3}, "in_channels: got 3; expected 2, the channels of"),
        ({"data_dir": "digits"}, "latents: .*none together with --data_dir"),
        ({"preview": 4}, "preview: got 4; expected 0 with --latents"),
        ({"num_classes": 5, "class_cond": True}, "num_classes: got 5; expected at least the 10 classes of"),
        ({"latents": "nowhere"}, "latents: got 'nowhere'; expected a folder of latents, with an index.json"),
    ],
)
def test_flags_that_contradict_the_latents_are_refused(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = {**SMALL, "latents": str(place / "latents"), "run_dir": str(tmp_path / "run"), "lr_anneal_steps": 1}
    with pytest.raises(ValueError, match=message):
        train.train(TrainConfig(**{**values, **changes}))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_space_are_no_base(place: Path, tmp_path: Path) -> None:
    options = flags(vae=place / "vae", data_dir=place / "digits.npz", out=tmp_path / "rescaled", scaling_factor=2.0)
    assert encode.main(options) == 0
    values = {**SMALL, "base": str(place / "run" / "base" / ema_file("0.9", 8)), "groups": 2, "stage2_steps": 1}
    values |= {"class_cond": True, "k": 1.0, "run_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="base: .*these were on latents of another AutoencoderKL, or scaled in"):
        train.train(TrainConfig(**values, latents=str(tmp_path / "rescaled")))
    assert not (tmp_path / "run").exists()
    train.train(TrainConfig(**values, latents=str(place / "latents")))


def test_encode_goes_on_and_keeps_labels_only_where_there_are(place: Path, tmp_path: Path, capsys: Any) -> None:
    data = write_digits(tmp_path / "plain.npz", 9, labels=False)
    options = flags(vae=place / "vae", data_dir=data, out=tmp_path / "latents", shard_images=4)
    assert encode.main(options) == 0
    assert "moments of 9 images, 4x4x2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="class_cond: got True; expected False, as the images of"):
        load_latents(tmp_path / "latents", class_cond=True)
    assert encode.main(options) == 0
    assert "9 of 9 images are encoded already" in capsys.readouterr().out
    with sole_writer(tmp_path / "latents"):
        assert encode.main(options) == 2
        assert "expected a folder that no other process is working on" in capsys.readouterr().err
    assert encode.main([*options, *flags(flips=True)]) == 2
    assert "flips: got True; expected False, with which" in capsys.readouterr().err


def test_the_configuration_of_ffhq_runs_from_images_to_samples(tmp_path: Path) -> None:
    """bench/paper/configs/ffhq_ldm.yaml with a VQ autoencoder of a toy's size, and as few steps."""
    random_autoencoder("VQModel", latent_channels=3).save_pretrained(tmp_path / "vae")
    write_digits(tmp_path / "digits.npz")
    folders = flags(vae=tmp_path / "vae", data_dir=tmp_path / "digits.npz", out=tmp_path / "latents", image_size=16)
    assert encode.main(folders) == 0
    smaller = {
        "latents": tmp_path / "latents", "image_size": 8, "num_channels": 14, "channel_mult": "1,2",
        "attention_resolutions": "4", "num_res_blocks": 1, "batch_size": 10, "diffusion_steps": 50, "stage1_steps": 2,
        "stage2_steps": 2, "groups": 2, "rounds": 1, "candidates": 2, "calibration_batches": 1,
        "run_dir": tmp_path / "run", "tensorboard": False, "progress": "never",
    }  # fmt: skip
    pytest.importorskip("optuna", reason="the extra [search] is not installed")
    assert train.main(flags(config=ROOT / "bench" / "paper" / "configs" / "ffhq_ldm.yaml", **smaller)) == 0
    assert sample.main(flags(run=tmp_path / "run", vae=tmp_path / "vae", num_samples=3, steps=5)) == 0
    assert np.load(tmp_path / "run" / "samples" / "samples_3x16x16x1.npz")["arr_0"].shape == (3, 16, 16, 1)

"""Latents: encoded once, drawn anew in each epoch, scaled as diffusers does; folders that go on after any stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
pytest.importorskip("sklearn", reason="the extra [demo] is not installed")

from tdc_fast.data.autoencoder import Autoencoder, LatentDecoder  # noqa: E402
from tdc_fast.data.dataset import ImageDataset, load_dataset  # noqa: E402
from tdc_fast.data.encoding import encode_rest, plan_encoding, started  # noqa: E402
from tdc_fast.data.image_sources import ArraySource  # noqa: E402
from tdc_fast.data.latents import LatentDataset, load_latents  # noqa: E402
from tdc_fast.data.stream import BatchStream  # noqa: E402
from tests.data.autoencoders import random_autoencoder, trained_autoencoder, write_digits  # noqa: E402

COUNT = 24
SCALINGS: dict[str, dict[str, Any]] = {
    "factor": {"scaling_factor": 0.7},
    "factor and shift": {"scaling_factor": 0.7, "shift_factor": 0.3},
    "means and deviations": {"scaling_factor": 0.7, "latents_mean": [0.2, -0.4], "latents_std": [0.5, 2.0]},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: Any) -> ImageDataset:
    path = write_digits(tmp_path_factory.mktemp("digits") / "digits.npz", COUNT)
    return load_dataset(path, class_cond=True)


def encoded(folder: Path, images: ImageDataset, model: Any, **options: Any) -> LatentDataset:
    autoencoder = Autoencoder(model)
    folder.mkdir()
    index = plan_encoding(images, autoencoder, **{"shard_images": 10, **options})
    encode_rest(images, autoencoder, folder, index, batch_size=8)
    return load_latents(folder, class_cond=images.labels is not None)


def as_diffusers_scales(latents: Tensor, config: Any) -> Tensor:
    """The formula of diffusers' training scripts and pipelines."""
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor


@pytest.mark.parametrize("store", ["moments", "samples"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_latents_are_draws_from_the_encoders_distribution_scaled_as_in_diffusers(
    scaling: str, store: str, digits: ImageDataset, tmp_path: Path
) -> None:
    model = random_autoencoder(**SCALINGS[scaling])
    latents = encoded(tmp_path / "latents", digits, model, store=store)
    with torch.no_grad():
        distribution = model.encode(digits.images().contiguous()).latent_dist
    drawn = torch.stack([latents.draw(slice(None), (0, epoch))[0] for epoch in range(20 if store == "moments" else 1)])
    center = as_diffusers_scales(distribution.mean, model.config)
    spread = as_diffusers_scales(distribution.mean + distribution.std, model.config) - center
    normal = (drawn - center) / spread
    # Of n independent standard normals the mean is within 5 / sqrt(n), and the mean square within 5 sqrt(2 / n) of 1.
    assert abs(normal.mean()) < 5 / normal.numel() ** 0.5
    assert abs(normal.square().mean() - 1) < 5 * (2 / normal.numel()) ** 0.5
    assert latents.channels == 2 and latents.image_size == 4 and drawn.shape[1:] == (COUNT, 2, 4, 4)


def test_an_autoencoder_without_moments_gives_its_latents(digits: ImageDataset, tmp_path: Path) -> None:
    model = random_autoencoder("VQModel", scaling_factor=0.7)
    latents = encoded(tmp_path / "latents", digits, model)
    with torch.no_grad():
        torch.testing.assert_close(
            latents.batch(slice(None))[0], model.encode(digits.images().contiguous()).latents * 0.7, rtol=0, atol=1e-5
        )
    with pytest.raises(ValueError, match="store: got 'moments'; expected samples or auto: VQModel"):
        plan_encoding(digits, Autoencoder(model), store="moments")


def test_decoding_gives_the_images_again(tmp_path: Path) -> None:
    model = trained_autoencoder()
    images = ImageDataset.from_array(load_dataset("digits").images(slice(1000, 1100)).permute(0, 2, 3, 1).numpy())
    latents = encoded(tmp_path / "latents", images, model, shard_images=64)
    x = latents.batch(slice(None))[0]
    assert abs(x.mean()) < 0.2 and abs(x.std() - 1) < 0.2  # of digits that the scale was not measured on
    again = LatentDecoder(Autoencoder(model), latents.space, batch_size=32)(x)
    error = (again - images.images()).square().mean() / images.images().var()
    assert error < 0.4  # a wrong scale or shift leaves nothing of the image


def test_labels_and_numbers_of_images_are_kept(digits: ImageDataset, tmp_path: Path) -> None:
    latents = encoded(tmp_path / "latents", digits, random_autoencoder())
    assert len(latents) == COUNT and latents.num_classes == 10
    assert torch.equal(latents.batch([3, 13, 23])[1]["y"], digits.batch([3, 13, 23])[1]["y"])
    assert latents.labels is not None and np.array_equal(latents.labels, digits.labels)
    unconditional = load_latents(tmp_path / "latents")
    assert unconditional.batch([0])[1] == {} and unconditional.num_classes == 0


def test_a_draw_depends_on_the_seed_and_the_image_alone(digits: ImageDataset, tmp_path: Path) -> None:
    latents = encoded(tmp_path / "latents", digits, random_autoencoder(), flips=True)
    whole = latents.draw(slice(None), (5, 2))[0]
    assert torch.equal(latents.draw([17, 3], (5, 2))[0], whole[[17, 3]])
    kept, held = latents.split(0.25)
    assert torch.equal(held.draw(slice(None), (5, 2))[0], whole[held.indices])
    assert sorted([*kept.indices, *held.indices]) == list(range(COUNT))
    for other in ((5, 3), (6, 2)):
        assert not (latents.draw(slice(None), other)[0] == whole).flatten(1).all(dim=1).any()
    assert torch.equal(latents.batch(slice(None))[0], latents.batch(slice(None))[0])


def test_parts_together_have_the_epoch_of_one_process(digits: ImageDataset, tmp_path: Path) -> None:
    latents = encoded(tmp_path / "latents", digits, random_autoencoder(), flips=True)

    def epoch(rank: int, world_size: int, skip: int) -> set[bytes]:
        stream = BatchStream(latents, 6, seed=1, workers=rank)
        stream.part = lambda ahead: np.arange(rank, 6, world_size)
        batches = [next(stream)[0] for _ in range((skip + 1) * stream.batches_per_epoch)]
        stream.close()
        return {x.numpy().tobytes() for x in torch.cat(batches[-stream.batches_per_epoch :])}

    for skip in (0, 1):
        assert epoch(0, 2, skip) | epoch(1, 2, skip) == epoch(0, 1, skip)
    assert not epoch(0, 1, 0) & epoch(0, 1, 1)


def test_flips_take_each_image_or_its_mirror_image(digits: ImageDataset, tmp_path: Path) -> None:
    model = random_autoencoder("VQModel", scaling_factor=1.0)
    latents = encoded(tmp_path / "latents", digits, model, flips=True)
    images = digits.images().contiguous()
    with torch.no_grad():
        both = torch.stack([model.encode(pixels).latents for pixels in (images, images.flip(-1))])
    drawn = torch.stack([latents.draw(slice(None), (epoch,))[0] for epoch in range(10)])
    near = (drawn[:, None] - both).abs().amax(dim=(3, 4, 5)) < 1e-5  # (epochs, plain or mirrored, images)
    assert near.any(dim=1).all()
    assert 0.3 < near[:, 1].double().mean() < 0.7 and not near.all(dim=0).any()
    assert torch.allclose(latents.batch(slice(None))[0], both[0], atol=1e-5)


@pytest.mark.parametrize("store", ["moments", "samples"])
def test_an_interrupted_folder_goes_on_to_the_same_bytes(store: str, digits: ImageDataset, tmp_path: Path) -> None:
    autoencoder = Autoencoder(random_autoencoder())
    plan = plan_encoding(digits, autoencoder, store=store, flips=True, seed=3, shard_images=10)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    encode_rest(digits, autoencoder, tmp_path / "whole", plan, batch_size=4)
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > 15:  # in the middle of the second shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_rest(digits, autoencoder, tmp_path / "stopped", plan, batch_size=4, on_images=stop)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["index.json", "latents-00000.safetensors"]
    with pytest.raises(ValueError, match=r"latents: .*10 of 24 images are encoded: the same tdc_fast.encode goes on"):
        load_latents(tmp_path / "stopped")
    index = started(tmp_path / "stopped", plan)
    assert index.encoded == 10
    counts: list[int] = []
    encode_rest(digits, autoencoder, tmp_path / "stopped", index, batch_size=4, on_images=counts.append)
    assert sum(counts) == 14
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def test_shards_that_are_missing_or_damaged_are_made_again(digits: ImageDataset, tmp_path: Path, capsys: Any) -> None:
    folder, autoencoder = tmp_path / "latents", Autoencoder(random_autoencoder())
    encoded(folder, digits, autoencoder.model)
    plan = plan_encoding(digits, autoencoder, shard_images=10)
    assert started(folder, plan).complete and not capsys.readouterr().out
    shard = folder / "latents-00001.safetensors"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    content = before[shard]
    for damaged in (None, content[:-4], content[:-1] + bytes([content[-1] ^ 1])):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        index = started(folder, plan)
        assert index.encoded == 10 and f"{shard} is missing or damaged" in capsys.readouterr().out
        encode_rest(digits, autoencoder, folder, index, batch_size=8)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_other_latents_is_refused_by_the_setting_that_differs(digits: ImageDataset, tmp_path: Path) -> None:
    autoencoder = Autoencoder(random_autoencoder())
    folder = tmp_path / "latents"
    encoded(folder, digits, autoencoder.model)

    def plan(images: ImageDataset = digits, model: Any = autoencoder, **changes: Any) -> Any:
        return plan_encoding(images, model, **{"shard_images": 10, **changes})

    started(folder, plan())
    darker = ImageDataset.from_array(digits.images().permute(0, 2, 3, 1).numpy() * 0.5, digits.labels)
    for name, index in {
        "seed": plan(seed=1), "flips": plan(flips=True), "store": plan(store="samples"),
        "stored_dtype": plan(dtype="float16"), "scaling_factor": plan(scaling_factor=2.0),
        "vae": plan(model=Autoencoder(random_autoencoder(seed=1))), "images": plan(digits._take(np.arange(20))),
        "fingerprint": plan(darker), "shard_images": plan(shard_images=8),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: .*with which .*latents was begun; or another --out"):
            started(folder, index)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: .*a new or empty folder"):
        started(tmp_path / "other", plan())


def test_images_of_one_block_stay_on_one_side_of_a_split(tmp_path: Path) -> None:
    class Patches(ArraySource):
        def blocks(self, indices: np.ndarray) -> np.ndarray:
            return indices // 4

    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
    images = ImageDataset(Patches(pixels), np.arange(COUNT))
    kept, held = encoded(tmp_path / "latents", images, random_autoencoder()).split(0.3, seed=2)
    assert np.array_equal(held.indices, images.split(0.3, seed=2)[1].indices) and len(held) == 8
    assert not {*(kept.indices // 4)} & {*(held.indices // 4)}


def test_a_damaged_folder_is_refused_by_file(digits: ImageDataset, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    encoded(folder, digits, random_autoencoder())
    shard, index = folder / "latents-00001.safetensors", folder / "index.json"
    content, described = shard.read_bytes(), json.loads(index.read_text())

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            load_latents(folder)

    shard.write_bytes(content[:-4])
    refused("latents: .*latents-00001.*bytes; it has")
    shard.write_bytes(b"\xff" * len(content))
    refused("latents: .*latents-00001.*a whole safetensors file")
    (folder / "latents-00000.safetensors").rename(shard)
    refused("latents-00000.*an existing file")
    shard.rename(folder / "latents-00000.safetensors")
    shard.write_bytes(content)
    load_latents(folder)
    for key, value in {
        "format": 2, "images": 0, "store": "pixels", "shards": [{}], "shard_images": 12, "space": {}, "flips": 1,
        "num_classes": -1,
    }.items():  # fmt: skip
        index.write_text(json.dumps({**described, key: value}))
        refused(r"latents: .*index\.json")
    index.write_text(json.dumps({**described, "space": {**described["space"], "scale": [0.0, 1.0]}}))
    refused(r"index\.json.*its latent space is")
    index.unlink()
    refused("a folder of latents, with an index.json")


def test_half_precision_files_hold_the_latents_to_its_rounding(digits: ImageDataset, tmp_path: Path) -> None:
    model = random_autoencoder("VQModel")
    exact = encoded(tmp_path / "single", digits, model).batch(slice(None))[0]
    rounded = encoded(tmp_path / "half", digits, model, dtype="float16").batch(slice(None))[0]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=2**-11, atol=1e-7)
    model.quant_conv.bias.data.fill_(1e6)
    with pytest.raises(FloatingPointError, match="the output in float16 holds infinities or NaN"):
        encoded(tmp_path / "overflow", digits, model, dtype="float16")


def test_autoencoders_that_do_not_fit_are_refused(digits: ImageDataset, tmp_path: Path) -> None:
    model = random_autoencoder()
    space = Autoencoder(model).space(8)
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = Autoencoder.load(tmp_path / "pipeline" / "vae")
    random_autoencoder().half().save_pretrained(tmp_path / "half")
    halved = Autoencoder.load(tmp_path / "half").model
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.float32}
    (weights,) = (tmp_path / "half").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="vae: .*whole weights of AutoencoderKL"):
        Autoencoder.load(tmp_path / "half")
    assert loaded.space(8) == space and loaded.refuse_other(space, "vae") == ""
    with pytest.raises(ValueError, match="vae: .*the folder of its autoencoder, .*pipeline/vae"):
        Autoencoder.load(tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "UNet2DModel"))
    with pytest.raises(ValueError, match="vae: .*one of AutoencoderKL, VQModel.*says 'UNet2DModel'"):
        Autoencoder.load(config.parent)
    with pytest.raises(ValueError, match="vae: .*the AutoencoderKL that made the latents .*it is another one"):
        Autoencoder(random_autoencoder(seed=1)).refuse_other(space, "vae")
    other_decoder = random_autoencoder()
    other_decoder.decoder.conv_out.bias.data += 1
    assert "another decoder" in Autoencoder(other_decoder).refuse_other(space, "vae")
    with pytest.raises(ValueError, match="image_size: got 9; expected a multiple of 2"):
        Autoencoder(model).space(9)
    with pytest.raises(ValueError, match="data_dir: got 'images of 1 channels'; expected images of 3 channels"):
        plan_encoding(digits, Autoencoder(random_autoencoder(in_channels=3)))
    with pytest.raises(ValueError, match="vae: .*finite means and scales of 2 channels"):
        Autoencoder(random_autoencoder(latents_mean=[0.0], latents_std=[1.0])).space(8)

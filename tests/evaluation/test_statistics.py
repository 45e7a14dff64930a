"""Statistics of sets of images: gathered in bounded memory, read from reference batches, kept in a cache."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from tdc_fast.data.dataset import ImageDataset, load_dataset
from tdc_fast.evaluation import EvaluateOptions, comparison, evaluate
from tdc_fast.evaluation.comparison import describe
from tdc_fast.evaluation.image_sets import ImageSet, _read_images
from tdc_fast.evaluation.statistics import gather_statistics
from tdc_fast.evaluation.statistics_files import content_key
from tdc_fast.runs.config import TrainConfig


class Outputs(NamedTuple):
    pool: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor


class Small(torch.nn.Module):
    """An extractor that gives all that Inception gives, of images (B, C, 4, 4), and counts the images."""

    description = "nine means and corners"
    num_features = 9

    def __init__(self, fingerprint: str = "small") -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.seen: list[int] = []

    def outputs(self, images: torch.Tensor) -> Outputs:
        self.seen.append(len(images))
        x = images.float() / 255
        return Outputs(x.mean(dim=1)[:, :3, :3].flatten(1), x[:, 0, :2, :2].flatten(1), x.flatten(1)[:, :5])


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TDC_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def _pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def sets(tmp_path) -> tuple[str, str]:
    """Generated images as .npz, and real ones as a folder of .png files in folders."""
    np.savez(tmp_path / "generated.npz", _pixels(20, 0))
    for number, image in enumerate(_pixels(30, 1)):
        file = tmp_path / "real" / str(number % 3) / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return str(tmp_path / "generated.npz"), str(tmp_path / "real")


def test_statistics_of_few_kept_features_have_the_moments_of_all_images():
    images = torch.from_numpy(_pixels(50, 2)).permute(0, 3, 1, 2)
    extractor = Small()
    found = gather_statistics(images.split(8), 50, extractor, kept=10)
    whole = extractor.outputs(images)
    torch.testing.assert_close(found.moments.mean, whole.pool.double().mean(0))
    torch.testing.assert_close(found.moments.covariance, torch.cov(whole.pool.double().T))
    torch.testing.assert_close(found.spatial.covariance, torch.cov(whole.spatial.double().T))
    assert found.features.shape == (10, 9) and len(found.score.values) == 10
    assert all(any(torch.equal(row, other) for other in whole.pool) for row in found.features)
    assert torch.equal(gather_statistics(images.split(8), 50, extractor, kept=50).features, whole.pool)
    for count in (49, 51):
        with pytest.raises(ValueError, match=f"expected {count}"):
            gather_statistics(images.split(8), count, extractor)
    assert gather_statistics([images[:9]], 9, extractor).score is None


def test_images_are_read_and_go_through_the_extractor_in_batches(sets, monkeypatch):
    read = []
    batch = ImageDataset.batch

    def recorded(self: ImageDataset, indices: slice) -> object:
        images = batch(self, indices)
        read.append(len(images[0]))
        return images

    monkeypatch.setattr(ImageDataset, "batch", recorded)
    extractor = Small()
    evaluate(*sets, EvaluateOptions(batch_size=7), extractor=extractor)
    assert sum(extractor.seen) == 50 and max(extractor.seen) == max(read) == 7


def test_statistics_of_the_reference_are_kept_by_the_content_of_its_files(sets, cache, tmp_path, capsys):
    options, first = EvaluateOptions(), Small()
    before = evaluate(*sets, options, extractor=first)
    assert sum(first.seen) == 50 and len(list(cache.iterdir())) == 1
    assert "read from" not in capsys.readouterr().out

    def again(options: EvaluateOptions = options, fingerprint: str = "small") -> int:
        """Compares again; returns how many images of the reference went through the extractor."""
        extractor = Small(fingerprint)
        result = evaluate(*sets, options, extractor=extractor)
        if options == EvaluateOptions() and fingerprint == "small" and not changed:
            assert result == before
        return sum(extractor.seen) - 20

    changed = False
    assert again() == 0 and f"statistics of {sets[1]}: read from {cache}" in capsys.readouterr().out
    for path in [*Path(sets[1]).rglob("*.png")]:
        path.touch()  # times do not count
    assert again() == 0
    assert again(fingerprint="other weights") == again(EvaluateOptions(kept_features=15)) == 30
    assert again() == 0 and len(list(cache.iterdir())) == 3
    kept = min(cache.iterdir(), key=lambda path: path.stat().st_mtime)
    content = kept.read_bytes()
    others = next(path for path in cache.iterdir() if path != kept).read_bytes()
    directory = content.rindex(b"PK\1\2")  # of the archive: its last entry
    method, name = (content[:at] + b"\x63" + content[at + 1 :] for at in (directory + 10, content.rindex(b"features")))
    for damaged in (content[: len(content) // 2], b"", b"nonsense", others, method, name):
        kept.write_bytes(damaged)
        assert again() == 30 and kept.read_bytes() == content  # made again
    assert not list(cache.glob(".*"))
    changed = True
    image = next(Path(sets[1]).rglob("07.png"))
    image.rename(image.with_name("zz.png"))  # another order
    assert again() == 30
    Image.fromarray(_pixels(1, 9)[0]).save(image.with_name("zz.png"))  # other pixels
    assert again() == 30
    image.with_name("zz.png").unlink()  # one image fewer
    assert again() == 29


def test_statistics_of_transparent_images_are_kept_by_their_background(sets, tmp_path, monkeypatch):
    for number, image in enumerate(_pixels(5, 4)):
        Image.fromarray(np.dstack([image, image[..., 0]])).save(tmp_path / f"{number}.png")
    generated = tmp_path / "generated"
    found = []
    for background in ("white", "black", "white"):
        data = load_dataset(tmp_path, image_size=4, background=background)
        pair = ImageSet(sets[0], load_dataset(sets[0])), ImageSet(str(tmp_path), data, background=background)
        monkeypatch.setattr(comparison, "load_pair", lambda *_, pair=pair, **__: pair)
        found.append(evaluate(str(generated), str(tmp_path), extractor=Small())["frechet_distance"])
    assert found[0] == found[2] != found[1]


def test_files_that_changed_since_they_were_read_have_a_key_of_their_own(sets):
    read = load_dataset(sets[0])
    before = content_key(sets[0], read)
    np.savez(sets[0], _pixels(20, 7))
    assert content_key(sets[0], read) not in (before, content_key(sets[0], load_dataset(sets[0])))


def test_a_folder_is_read_with_the_background_of_the_run_that_it_is_compared_with(sets):
    class Run:
        image_shape = (3, 4, 4)
        config = TrainConfig(background="grey")

    assert _read_images(sets[1], 4, Run()).background == "grey"


def test_a_cache_that_cannot_be_written_costs_no_result(sets, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TDC_FAST_CACHE", str(tmp_path / "file"))
    assert evaluate(*sets, extractor=Small())["frechet_distance"] > 0
    assert "statistics are not kept" in capsys.readouterr().out


@pytest.fixture
def reference(tmp_path) -> Path:
    """A reference batch as guided-diffusion's: statistics of many images, and the pixels of some of them."""
    many = torch.from_numpy(_pixels(400, 3)).permute(0, 3, 1, 2)
    out = Small().outputs(many)
    arrays = {"mu": out.pool.mean(dim=0), "mu_s": out.spatial.mean(dim=0)}
    arrays |= {"sigma": torch.cov(out.pool.double().T), "sigma_s": torch.cov(out.spatial.double().T)}
    np.savez(tmp_path / "ref.npz", _pixels(400, 3)[:40], **{name: value.numpy() for name, value in arrays.items()})
    np.savez(tmp_path / "only.npz", **{name: value.numpy() for name, value in arrays.items()})
    np.savez(tmp_path / "many.npz", _pixels(400, 3))
    np.savez(tmp_path / "some.npz", _pixels(400, 3)[:40])
    return tmp_path


def test_statistics_of_a_reference_batch_are_taken_and_its_images_serve_what_compares_images(reference, sets):
    def numbers(name: str) -> dict:
        return evaluate(sets[0], str(reference / name), extractor=Small())

    found, of_all, of_some = numbers("ref.npz"), numbers("many.npz")["metrics"], numbers("some.npz")["metrics"]
    for name in ("frechet_distance", "spatial_frechet_distance"):
        assert found["metrics"][name] == pytest.approx(of_all[name], rel=1e-4)
        assert found["metrics"][name] != pytest.approx(of_some[name], rel=1e-4)
    for name in ("kernel_distance", "precision", "recall"):
        assert found["metrics"][name] == of_some[name]
    assert found["b"]["statistics"] == "from the file" and "statistics from the file, 40 images" in describe(found)


def test_statistics_alone_give_the_distances_and_say_what_is_not_measured(reference, sets):
    for pair in ((sets[0], str(reference / "only.npz")), (str(reference / "only.npz"), sets[0])):
        found = evaluate(*pair, extractor=Small())
        whole = evaluate(sets[0], str(reference / "many.npz"), extractor=Small())
        assert found["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-4)
        assert found["floors_of"] == str(reference / "only.npz") and found["floors"] == []
        assert found["metrics"]["not_measured"].keys() == {"kernel_distance", "precision", "recall"}
        assert "precision: not measured, only statistics" in describe(found)
    both = evaluate(str(reference / "only.npz"), str(reference / "ref.npz"), extractor=Small())
    assert both["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_statistics_that_do_not_fit_are_refused_by_the_name_of_the_file(reference, sets):
    with pytest.raises(ValueError, match=r"only.npz.*'arr_0'"):  # another feature space, whose statistics they are not
        evaluate(sets[0], str(reference / "only.npz"), EvaluateOptions(features="random-conv"))
    for arrays, message in (
        ({"mu": np.zeros(9), "sigma": np.eye(8)}, "a mean .F,. and a covariance"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "reference: got '.*bad.npz: statistics of 5 features'; expected 9"),
        ({"mu": np.zeros(9), "sigma": np.array("x")}, "arrays of numbers"),
    ):
        np.savez(reference / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            evaluate(sets[0], str(reference / "bad.npz"), extractor=Small())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: (x[:1], x, x), r"features torch.float32 \(1, 48\)'; expected a tensor of real numbers \(20, F\)"),
        (lambda x: (x[:, :0], x, x), r"features torch.float32 \(20, 0\)"),
        (lambda x: (None, x, x), "features: a NoneType"),
        (lambda x: (x + 1j, x, x), "features torch.complex64"),
        (lambda x: (x, x[:, 0], x), "spatial features"),
        (lambda x: (x, x, x[:, 0]), "logits"),
        (lambda x: (x, x, x * torch.nan), "the logits hold infinities or NaN"),
    ],
)
def test_extractors_that_give_no_row_of_numbers_for_each_image_are_refused(broken, message):
    class Broken(torch.nn.Module):
        def outputs(self, images: torch.Tensor) -> Outputs:
            return Outputs(*broken(images.float().flatten(1)))

    images = torch.from_numpy(_pixels(20, 0)).permute(0, 3, 1, 2)
    with pytest.raises((ValueError, FloatingPointError), match=message):
        gather_statistics([images], 20, Broken())


def test_an_image_that_shows_no_size_is_refused_by_name(tmp_path):
    """A header of 60000 x 60000 pixels, at which Pillow raises an error of its own."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    for content in (b"\x89PNG\r\n\x1a\n" + b"".join(parts), b"nonsense"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match="image: got '.*a.png'; expected an image that can be decoded"):
            evaluate(str(tmp_path), str(tmp_path))

"""Datasets: what a folder, an array file and a built-in set read as, how they split, and what is refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdc_fast.data.dataset import ImageDataset, load_dataset
from tdc_fast.data.fitting import fit_image
from tdc_fast.data.image_files import list_images
from tests.data.images import pixels, write


def unit_range(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1)


# Both ways to read a folder: decoded on loading, and as it is used.
BOTH_WAYS = pytest.mark.parametrize("cache_bytes", [2**20, 0], ids=["decoded at once", "decoded when read"])


def test_a_folder_is_listed_recursively_in_sorted_order(folder):
    found = [str(path.relative_to(folder)) for path in list_images(folder).files]
    in_a = ["a/bee_1.png", "a/deep/ant_1.gif"]
    assert found == [*in_a, "b/ant_2.PNG", "b/cat_1.png", "bee_2_x.png", "c/cat_4.jpeg", "c/cat_5.jpg", "cat_3.png"]


@BOTH_WAYS
def test_a_16_bit_grey_image_keeps_its_shades(tmp_path, cache_bytes):
    write(tmp_path / "ramp.png", np.linspace(0, 65535, 36).astype(np.uint16).reshape(6, 6))
    shades = load_dataset(tmp_path, image_size=6, cache_bytes=cache_bytes).images()[0, 0]
    torch.testing.assert_close(shades, torch.linspace(-1, 1, 36).view(6, 6), rtol=0, atol=1 / 127)


@BOTH_WAYS
def test_a_folders_class_is_the_file_name_up_to_the_first_underscore(folder, cache_bytes):
    dataset = load_dataset(folder, image_size=6, class_cond=True, cache_bytes=cache_bytes)
    x, kwargs = dataset.batch(slice(None))
    assert kwargs["y"].tolist() == [1, 0, 0, 2, 1, 2, 2, 2] and kwargs["y"].dtype == torch.int64
    assert dataset.num_classes == 3
    assert x.shape == (8, 3, 6, 6) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x[0].permute(1, 2, 0), unit_range(pixels(6, 6, 3, seed=2)))
    assert torch.equal(x[6, 0], x[6, 1])  # grey becomes RGB
    assert load_dataset(folder, image_size=6, cache_bytes=cache_bytes).batch(np.array([1]))[1] == {}


def test_large_images_are_halved_by_box_then_scaled_bicubic_then_cropped_at_the_centre():
    image = Image.fromarray(pixels(50, 33, 3))
    once = image.resize((16, 25), Image.Resampling.BOX)  # 16 < 2 * 12: halved once
    scaled = np.asarray(once.resize((12, round(25 * 12 / 16)), Image.Resampling.BICUBIC))
    top = (scaled.shape[0] - 12) // 2
    np.testing.assert_array_equal(fit_image(image, 12), scaled[top : top + 12])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 24))
def test_an_image_of_any_shape_fits_any_size(height, width, size):
    assert fit_image(Image.fromarray(pixels(height, width, 3)), size).shape == (size, size, 3)


@BOTH_WAYS
def test_a_corrupt_image_is_an_error_that_names_its_file(folder, cache_bytes):
    damaged = folder / "b" / "cat_1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cat_1\.png"):
        load_dataset(folder, image_size=6, cache_bytes=cache_bytes).images()


@BOTH_WAYS
def test_a_corrupt_image_is_skipped_and_counted_and_renumbers_no_class(folder, cache_bytes):
    for name in ("a/deep/ant_1.gif", "b/ant_2.PNG"):
        (folder / name).write_bytes(b"")
    dataset = load_dataset(folder, image_size=6, class_cond=True, on_corrupt="skip", cache_bytes=cache_bytes)
    x, kwargs = dataset.batch(slice(None))
    assert dataset.skipped == 2
    assert kwargs["y"].tolist() == [1, 2, 2, 2, 1, 2, 2, 2]  # the next good image, with its own class, stands in
    assert torch.equal(x[1], x[3]) and torch.equal(x[2], x[3])


@BOTH_WAYS
def test_a_folder_of_nothing_but_corrupt_images_is_an_error(tmp_path, cache_bytes):
    (tmp_path / "a.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="decoded"):
        load_dataset(tmp_path, image_size=4, on_corrupt="skip", cache_bytes=cache_bytes).images()


def test_a_folder_that_is_gone_is_no_folder_of_corrupt_images(folder):
    dataset = load_dataset(folder, image_size=8, on_corrupt="skip", cache_bytes=0)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(ValueError, match="data_dir: got .*a folder that stays there while it is read"):
        dataset.images()
    assert dataset.skipped == 0


def test_a_pipe_that_took_an_images_place_is_not_waited_for(tmp_path):
    (tmp_path / "a.png").touch()
    dataset = load_dataset(tmp_path, image_size=8, cache_bytes=0)
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(dataset.images)
        wait([read], timeout=10)
        if not read.done():
            os.close(os.open(tmp_path / "a.png", os.O_WRONLY))  # lets the thread end
        with pytest.raises(ValueError, match="no regular file"):
            read.result()


def test_digits_are_1797_grey_images_of_ten_classes():
    dataset = load_dataset("digits", class_cond=True)
    x, kwargs = dataset.batch(slice(None))
    assert x.shape == (1797, 1, 8, 8) and x.min() == -1 and x.max() == 1
    assert len(x.unique()) == 17  # the sixteenths of the original, exactly
    assert torch.bincount(kwargs["y"]).min() > 170 and dataset.num_classes == 10
    assert load_dataset("digits", image_size=12).images([0]).shape == (1, 1, 12, 12)


@pytest.mark.parametrize("size", [8, 60, 500])
def test_photo_patches_come_in_any_size_and_are_always_the_same(size):
    first, again = (load_dataset("photos", image_size=size, class_cond=True) for _ in range(2))
    x, kwargs = first.batch(np.array([0, 1, 2, 8191]))
    assert x.shape == (4, 3, size, size) and x.min() >= -1 and x.max() <= 1 and x.std() > 0.1
    assert set(first.labels) == {0, 1} and kwargs["y"].shape == (4,)
    assert torch.equal(x, again.images(np.array([0, 1, 2, 8191])))


@pytest.mark.parametrize("size", [8, 64, 128])
def test_held_out_photo_patches_share_no_pixel_with_training(size):
    train, held = load_dataset("photos", image_size=size).split(0.2)
    covered = [np.zeros((1000, 1000), bool) for _ in range(4)]
    source = train.source
    for part, masks in ((train, covered[:2]), (held, covered[2:])):
        for i in part.indices:
            top, left = source._tops[i], source._lefts[i]
            masks[source.photo_ids[i]][top : top + size, left : left + size] = True
    assert not (covered[0] & covered[2]).any() and not (covered[1] & covered[3]).any()
    assert len(train) > len(held) > 0 or size == 128


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("images", "labels")])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_holds_images_and_labels_under_either_pair_of_names(tmp_path, names, channels):
    images, labels = pixels(5, 4, 4, channels), np.array([3, 0, 1, 1, 2])
    np.savez(tmp_path / "data.npz", **dict(zip(names, (images, labels), strict=True)))
    dataset = load_dataset(tmp_path / "data.npz", class_cond=True)
    x, kwargs = dataset.batch([0, 4])
    torch.testing.assert_close(x.permute(0, 2, 3, 1), unit_range(images[[0, 4]]))
    assert kwargs["y"].tolist() == [3, 2] and dataset.channels == channels and dataset.num_classes == 4


def test_arrays_in_memory_are_a_dataset_like_any_other():
    images, labels = pixels(5, 4, 4, 3), np.array([1, 0, 2, 1, 0])
    x, kwargs = ImageDataset.from_array(images, labels).batch([2, 3])
    torch.testing.assert_close(x.permute(0, 2, 3, 1), unit_range(images[2:4]))
    assert kwargs["y"].tolist() == [2, 1]
    assert ImageDataset.from_array(images).batch([2])[1] == {}
    with pytest.raises(ValueError, match="labels"):
        ImageDataset.from_array(images, labels[:3])
    with pytest.raises(ValueError, match="labels"):
        ImageDataset.from_array(images, np.full(5, 2**64 - 1, np.uint64))
    assert np.array_equal(ImageDataset.from_array(images, labels.tolist()).labels, labels)


def test_an_npy_of_grey_images_needs_no_channel_axis(tmp_path):
    np.save(tmp_path / "grey.npy", pixels(5, 4, 4))
    dataset = load_dataset(str(tmp_path / "grey.npy"))
    assert dataset.images().shape == (5, 1, 4, 4)
    assert load_dataset(tmp_path / "grey.npy", image_size=2).images().shape == (5, 1, 2, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_are_minus_one_to_one_unless_nothing_is_negative(tmp_path, dtype):
    signed = np.linspace(-1, 1, 32).reshape(2, 4, 4, 1).astype(dtype)
    np.save(tmp_path / "signed.npy", signed)
    np.save(tmp_path / "unsigned.npy", (signed + 1) / 2)
    for name in ("signed", "unsigned"):
        x = load_dataset(tmp_path / f"{name}.npy").images()
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.permute(0, 2, 3, 1), torch.from_numpy(signed).float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("arrays", "argument"),
    [
        ({"arr_0": pixels(5, 3, 4, 4)}, "images"),  # NCHW of 3 rows: not square, channels last expected
        ({"arr_0": pixels(5, 4, 6, 3)}, "images"),
        ({"arr_0": pixels(5, 4, 4, 7)}, "images"),
        ({"arr_0": pixels(4, 4)}, "images"),
        ({"arr_0": pixels(0, 4, 4, 3)}, "images"),
        ({"arr_0": pixels(5, 4, 4, 3).astype(np.int64)}, "images"),
        ({"arr_0": pixels(5, 4, 4, 3).astype(np.float32)}, "images"),
        ({"arr_0": np.full((2, 4, 4, 1), np.nan)}, "images"),
        ({"arr_0": pixels(5, 4, 4, 3), "arr_1": np.arange(4)}, "labels"),
        ({"arr_0": pixels(5, 4, 4, 3), "arr_1": np.zeros((5, 10), int)}, "labels"),
        ({"arr_0": pixels(5, 4, 4, 3), "arr_1": np.linspace(0, 1, 5)}, "labels"),
        ({"arr_0": pixels(5, 4, 4, 3), "arr_1": np.arange(5) - 1}, "labels"),
        ({"arr_0": pixels(5, 4, 4, 3)}, "class_cond"),
        ({"pictures": pixels(5, 4, 4, 3)}, "data_dir"),
        ({"arr_0": np.array([pixels(2, 2, 3), pixels(3, 2, 1)], dtype=object)}, "data_dir"),  # mixed channels
    ],
)
def test_arrays_that_are_no_images_are_refused_by_name(tmp_path, arrays, argument):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=f"^{argument}"):
        load_dataset(tmp_path / "data.npz", class_cond=True)


def test_labels_that_nobody_asked_for_are_not_read(tmp_path):
    for labels in (np.linspace(0, 1, 5), np.array(list("abcde"), dtype=object)):
        np.savez(tmp_path / "data.npz", arr_0=pixels(5, 4, 4, 3), arr_1=labels)
        assert load_dataset(tmp_path / "data.npz").labels is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01"])
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_a_damaged_array_file_is_refused_by_name(tmp_path, content, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.{suffix}"):
        load_dataset(path)


def test_what_is_no_dataset_is_refused_by_name(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(folder)  # an empty name must not mean the images that happen to be here
    for path in (tmp_path / "missing", folder / "notes.txt", "", "cifar10"):
        with pytest.raises(ValueError, match="data_dir"):
            load_dataset(path, image_size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data_dir"):
        load_dataset(tmp_path / "empty", image_size=8)
    with pytest.raises(ValueError, match="image_size"):
        load_dataset(folder)
    with pytest.raises(ValueError, match="on_corrupt"):
        load_dataset("digits", on_corrupt="ignore")
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4, 1)))
    with pytest.raises(ValueError, match="images"):
        load_dataset(tmp_path / "float.npy", image_size=2)


def test_a_split_is_the_same_for_the_same_seed_and_covers_everything_once():
    dataset = load_dataset("digits", class_cond=True)
    train, held = dataset.split(0.1, seed=3)
    assert (len(train), len(held)) == (1617, 180)
    assert sorted([*train.indices, *held.indices]) == list(range(1797))
    assert np.array_equal(held.indices, dataset.split(0.1, seed=3)[1].indices)
    assert not np.array_equal(held.indices, dataset.split(0.1, seed=4)[1].indices)
    x, kwargs = held.batch(np.array([7]))
    assert torch.equal(x, dataset.images(held.indices[7:8]))
    assert kwargs["y"].item() == dataset.labels[held.indices[7]] and held.num_classes == 10
    for fraction in (0, 1, -0.1, 0.9999):
        with pytest.raises(ValueError, match="fraction"):
            dataset.split(fraction)

"""Image folders as people have them: links, hidden files, every format, orientation and transparency."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tdc_fast.data import image_files
from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.fitting import fit_image
from tdc_fast.data.image_files import list_images
from tests.data.images import pixels, write
from tests.generated import examples


def levels(folder, size, **options) -> np.ndarray:
    """The images of a folder as it is read, (N, H, W, C) in 0..255."""
    x = load_dataset(folder, image_size=size, **options).images()
    return ((x + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(int)


def test_links_in_a_circle_show_every_image_once(tmp_path, capsys):
    for number in range(5):
        write(tmp_path / "a" / "b" / f"{number}.png", pixels(4, 4, 3, seed=number))
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "z").symlink_to(tmp_path / "a" / "b", target_is_directory=True)
    dataset = load_dataset(tmp_path, image_size=4)
    assert (len(dataset), dataset.ignored) == (5, 3)
    assert "left out 3" in capsys.readouterr().out


def test_a_linked_folder_from_elsewhere_is_read(tmp_path):
    write(tmp_path / "store" / "cat_1.png", pixels(4, 4, 3))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "data" / "same.png").symlink_to(tmp_path / "store" / "cat_1.png")
    assert len(load_dataset(tmp_path / "data", image_size=4)) == 2


def test_hidden_files_are_left_out_and_counted_and_make_no_class(tmp_path):
    write(tmp_path / "cat_1.png", pixels(4, 4, 3))
    for name in (
        "._cat_1.png",
        "__MACOSX/._cat_1.png",
        "__MACOSX/dog_1.png",
        ".ipynb_checkpoints/cat_1-checkpoint.png",
        ".thumbnails/large/cat_1.png",
        "@eaDir/cat_1.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"\x00\x05\x16\x07AppleDouble")
    dataset = load_dataset(tmp_path, image_size=4, class_cond=True)
    assert (len(dataset), dataset.num_classes, dataset.ignored) == (1, 1, 5)


def test_pipes_and_devices_are_left_out(tmp_path):
    write(tmp_path / "cat_1.png", pixels(4, 4, 3))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    dataset = load_dataset(tmp_path, image_size=4)
    assert (len(dataset), dataset.ignored) == (1, 2)


def test_images_of_other_formats_are_counted(tmp_path):
    for name in ("cat_1.png", "dog_1.jfif", "eel_1.JPE", "fox_1.avif", "fox_2.PPM", "labels.txt", "notes"):
        (tmp_path / name).touch()
    found = list_images(tmp_path)
    assert [path.name for path in found.files] == ["cat_1.png", "dog_1.jfif", "eel_1.JPE"]
    assert [path.name for path in found.ignored] == ["fox_1.avif", "fox_2.PPM"]


def test_a_broken_link_is_an_error_that_names_it(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png"):
        load_dataset(tmp_path, image_size=4).images()


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "tiff", "TIF"])
def test_every_lossless_format_reads_as_its_pixels(tmp_path, suffix):
    image = pixels(6, 6, 3)
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(image).save(tmp_path / f"a.{suffix}", **options)
    np.testing.assert_array_equal(levels(tmp_path, 6)[0], image)


# The pixels of a stored image, for each orientation that says how to show it: rows a b / c d.
SHOWN = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path, orientation, suffix):
    shades = {"a": 10, "b": 80, "c": 160, "d": 240}
    image = Image.fromarray(np.array([[shades["a"], shades["b"]], [shades["c"], shades["d"]]], np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    wanted = [shades[name] for name in SHOWN[orientation]]
    assert levels(tmp_path, 2)[0, :, :, 0].reshape(-1).tolist() == wanted


def test_a_photograph_is_turned_before_it_is_cropped(tmp_path):
    bar = np.zeros((8, 24, 3), np.uint8)
    bar[:, :8] = 255  # to the left of the crop, in the stored image and in the upright one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(bar).save(tmp_path / "a.jpg", exif=exif, quality=100)
    assert levels(tmp_path, 8)[0].max() < 20


def test_damaged_exif_data_does_not_make_an_image_corrupt(tmp_path):
    Image.fromarray(pixels(6, 6, 3)).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    np.testing.assert_array_equal(levels(tmp_path, 6)[0], pixels(6, 6, 3))


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
@pytest.mark.parametrize("mode", ["1", "P", "L"])
def test_a_shrunk_checkerboard_is_grey_in_every_mode(tmp_path, mode, suffix):
    board = (np.indices((16, 16)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).convert(mode).save(tmp_path / f"a.{suffix}")
    assert np.abs(levels(tmp_path, 4)[0] - 127.5).max() <= 1


def with_hole(mode: str) -> Image.Image:
    """A red image, transparent everywhere, as one of the ways to store that."""
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    if mode == "RGBA":
        return rgba
    if mode == "LA":
        return Image.new("LA", (8, 8), (255, 0))
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "shade"), [(None, 255), ("white", 255), ("grey", 128), ("black", 0)])
def test_a_transparent_pixel_has_the_colour_of_the_background_at_any_size(tmp_path, mode, size, background, shade):
    with_hole(mode).save(tmp_path / "a.png")
    options = {} if background is None else {"background": background}
    assert (levels(tmp_path, size, **options) == shade).all()


@pytest.mark.parametrize("key", [0, 40000])
def test_a_transparent_16_bit_shade_has_the_colour_of_the_background(tmp_path, key):
    grey = np.full((4, 4), 20000, np.uint16)
    grey[0] = key
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=key)
    shown = levels(tmp_path, 4)[0, :, :, 0]
    assert (shown[0] == 255).all() and (shown[1:] == 20000 >> 8).all()


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(levels(tmp_path, 4)[0, 0, 0] - [255, 127, 127]).max() <= 1
    assert np.abs(levels(tmp_path, 4, background="black")[0, 0, 0] - [128, 0, 0]).max() <= 1


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    image = pixels(4, 4, 3)
    Image.fromarray(np.dstack([image, np.full((4, 4), 255, np.uint8)])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(levels(tmp_path, 4)[0], image)


def test_an_unknown_background_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="^background: got 'pink'"):
        load_dataset(tmp_path, image_size=4, background="pink")


def test_floating_point_images_are_refused_by_name(tmp_path):
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif.*floating-point"):
        load_dataset(tmp_path, image_size=4)


def test_integers_of_32_bits_are_refused_by_name(tmp_path):
    Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif.*32-bit"):
        load_dataset(tmp_path, image_size=4)


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_a_folder_is_read_as_grey_for_a_model_of_one_channel(tmp_path, cache_bytes):
    grey = pixels(4, 4)
    write(tmp_path / "grey.png", grey)
    write(tmp_path / "red.png", np.full((4, 4, 3), [255, 0, 0], np.uint8))
    data = load_dataset(tmp_path, image_size=4, in_channels=1, cache_bytes=cache_bytes)
    assert data.channels == 1
    x = levels(tmp_path, 4, in_channels=1, cache_bytes=cache_bytes)
    assert x.shape == (2, 4, 4, 1)
    np.testing.assert_array_equal(x[0, :, :, 0], grey)
    assert (x[1] == 76).all()  # Rec. 601 luma of red
    with pytest.raises(ValueError, match="in_channels: got 4"):
        load_dataset(tmp_path, image_size=4, in_channels=4)


def test_channels_that_the_data_does_not_have_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="in_channels: got 3; expected 1"):
        load_dataset("digits", in_channels=3)


def test_channels_of_an_array_are_scaled_one_by_one_unless_they_are_rgb(tmp_path):
    images = np.zeros((1, 8, 8, 4), np.uint8)
    images[..., 0] = 255  # PIL would take the fourth channel for alpha, and so lose the first
    np.save(tmp_path / "four.npy", images)
    np.save(tmp_path / "two.npy", images[..., :2])
    for name, channels in (("four", 4), ("two", 2)):
        shown = levels(tmp_path / f"{name}.npy", 2)
        assert shown.shape == (1, 2, 2, channels) and (shown[..., 0] == 255).all() and not shown[..., 1:].any()


def test_a_line_of_pixels_is_cropped_before_it_is_enlarged(tmp_path):
    Image.new("RGB", (100_000, 1), (9, 9, 9)).save(tmp_path / "line.png")
    code = f"""
from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.image_files import list_images
before = peak()
assert load_dataset({str(tmp_path)!r}, image_size=512).images().shape == (1, 3, 512, 512)
print(peak() - before)
"""
    assert int(run_with_peak(code)) < 200  # MB


def run_with_peak(code: str) -> str:
    """What a process prints that runs the code and may ask for its `peak()` of memory in MB.

    (The resource module's peak would include that of the process it was forked from.)
    """
    peak = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
"""
    limit = (resource.RLIMIT_AS, (8 << 30, 8 << 30))
    ran = subprocess.run(
        [sys.executable, "-c", peak + code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(*limit),
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@examples(30)
@given(st.integers(1, 3), st.integers(1, 300), st.integers(1, 12), st.booleans())
def test_long_images_are_cropped_at_their_middle(short, long, size, upright):
    image = np.zeros((short, long, 3), np.uint8)
    image[:, : long // 2] = 255  # a white and a black half
    image = image.transpose(1, 0, 2) if upright else image
    shown = fit_image(Image.fromarray(image), size)
    assert shown.shape == (size, size, 3)
    if long >= 3 * short and long % 2 == 0 and size % 2 == 0:
        assert abs(shown.mean() - 127.5) < 64


def test_an_image_of_too_many_pixels_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "PIXEL_LIMIT", 100)
    write(tmp_path / "large.png", pixels(10, 11, 3))
    with pytest.raises(ValueError, match=r"large\.png.*11 x 10 pixels are more than 100"):
        load_dataset(tmp_path, image_size=4)


def test_a_file_is_never_handed_to_a_format_that_runs_programs(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(ValueError, match=r"a\.png.*cannot identify"):
        load_dataset(tmp_path, image_size=4)


@pytest.mark.parametrize("member", ["arr_0", "arr_1"])
def test_a_member_of_an_npz_that_is_no_array_is_refused_by_name(tmp_path, member):
    np.savez(tmp_path / "good.npz", arr_0=pixels(2, 4, 4, 3), arr_1=np.zeros(2, int))
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for name in good.namelist():
            if name != f"{member}.npy":
                bad.writestr(name, good.read(name))
        bad.writestr(member, b"not an array")
    with pytest.raises(ValueError, match=rf"data_dir.*bad\.npz.*{member} is not an array"):
        load_dataset(tmp_path / "bad.npz", class_cond=True)


@pytest.mark.parametrize("size", [500, 2000])
def test_photo_patches_are_those_of_the_enlarged_photograph(size):
    from sklearn.datasets import load_sample_images

    photos = load_dataset("photos", image_size=size)
    shown = ((photos.images(np.array([0, 1])) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    for patch, photo in zip(shown, load_sample_images().images, strict=True):
        scale = size / min(photo.shape[:2])
        whole = Image.fromarray(photo).resize((round(photo.shape[1] * scale), size), Image.Resampling.BICUBIC)
        error = np.abs(patch - np.asarray(whole)[:size, :size].astype(float))
        assert error.max() <= 2 and error.mean() < 0.02  # Pillow rounds the corners of a box to float32


def test_photos_at_2000_pixels_take_less_than_a_gigabyte():
    code = """
from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.image_files import list_images
from tdc_fast.data.stream import BatchStream
train, held = load_dataset("photos", image_size=2000).split(0.4)
for _, (x, _) in zip(range(3), BatchStream(train, 2)):
    assert x.shape == (2, 3, 2000, 2000)
print(peak())
"""
    assert int(run_with_peak(code)) < 1000  # torch itself included

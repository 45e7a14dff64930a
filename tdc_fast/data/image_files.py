"""Image files: which files of a folder are images, and their pixels on an opaque background."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tdc_fast.data.fitting import fit_image

Background = Literal["white", "grey", "black"]
BACKGROUNDS: dict[str, int] = {"white": 255, "grey": 128, "black": 0}
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"})
SUFFIX_WORDS = "jpg, jpeg, jpe, jfif, png, gif, webp, bmp, tif or tiff"
PIXEL_LIMIT = 2**27
"""Pixels of the largest image file that is decoded, about 134 million."""

# Pillow also reads formats that run other programs, such as EPS; a file's name does not bind its content.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF")
# Images that are not read: they are counted, so that nobody trains on a part of a folder without knowing.
_OTHER_SUFFIXES = frozenset(
    {".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".dib"}
    | {".exr", ".hdr", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw"}
)
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Listing:
    """What a folder has in it.

    Attributes:
        files: the image files.
        ignored: what was left out: hidden images and folders, folders that other programs keep (`__MACOSX`), folders
            that were listed already (links in a circle), images of formats that are not read, and what has the name of
            an image but is no regular file.
    """

    files: list[Path] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)


def list_images(folder: Path) -> Listing:
    """All image files below a folder, depth first, with the entries of each directory sorted by name.

    Links are followed, and every directory is listed once.
    """
    found = Listing()
    visited = {_identity(folder)}
    pending = [_entries(folder)]
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
        elif entry.is_dir():
            if entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS or _identity(entry) in visited:
                found.ignored.append(entry)
            else:
                visited.add(_identity(entry))
                pending.append(_entries(entry))
        elif entry.suffix.lower() in SUFFIXES:
            hidden = entry.name.startswith(".")
            (found.ignored if hidden or _is_special(entry) else found.files).append(entry)
        elif entry.suffix.lower() in _OTHER_SUFFIXES:
            found.ignored.append(entry)
    return found


def _entries(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.iterdir(), key=lambda entry: entry.name))


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, a device or a socket, which must not be opened; a broken link fails when it is read."""
    return path.exists() and not stat.S_ISREG(path.stat().st_mode)


def read_image(path: Path, size: int, channels: int, background: Background) -> np.ndarray:
    """Decode an image file: its first frame, turned as its EXIF orientation says, on an opaque background.

    Args:
        path: the file.
        size: height and width to fit it to, see `tdc_fast.data.fitting.fit_image`.
        channels: 3 for RGB, 1 for grey.
        background: the colour behind transparent pixels.

    Returns:
        Pixels (size, size, channels) uint8.

    Raises:
        Exception: the file cannot be decoded, or is too large. Pillow's decoders raise many kinds.
    """
    from PIL import Image

    if _is_special(path):  # since the folder was listed
        raise ValueError("it is no regular file")
    with Image.open(path, formats=_FORMATS) as image:
        if image.width * image.height > PIXEL_LIMIT:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {PIXEL_LIMIT}")
        image.load()
        if image.mode == "I" and image.format == "TIFF":
            raise ValueError("its pixels are 32-bit or signed integers, not 8 or 16 bits")
        return fit_image(_opaque(_upright(image), background).convert("RGB" if channels == 3 else "L"), size)


def _upright(image: Any) -> Any:
    """The image, turned and mirrored as its EXIF orientation says (1 to 8; Pillow turns TIFF files itself)."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata beside sound pixels: without an orientation, as viewers show it
        return image
    return image if turn is None else image.transpose(turn)


def _opaque(image: Any, background: Background) -> Any:
    """The image in 8 bits without transparency: grey, RGB, or a mode that Pillow converts to either."""
    from PIL import Image

    key = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's conversions would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values from {values.min()} to {values.max()} are not 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if key is not None:
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, not 8 or 16 bits")
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    shade = BACKGROUNDS[background]
    return Image.alpha_composite(Image.new("RGBA", image.size, (shade, shade, shade, 255)), image)

"""Images as answers of a server: PNG, npz, JSON, and server-sent events."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from torch import Tensor

from tdc_fast.data.pixels import grid_image
from tdc_fast.serving.request import Preview, Request, Result


def as_png(images: Tensor) -> bytes:
    """One picture of all images uint8 (M, C, H, W), side by side without a gap, in rows of up to 8."""
    file = io.BytesIO()
    grid_image(images, columns=8, gap=0).save(file, format="PNG")
    return file.getvalue()


def as_npz(result: Result) -> bytes:
    """The archive that `tdc_fast.sample` writes: arr_0 the images (M, H, W, C) uint8, arr_1 the labels if there are."""
    arrays = [result.images.permute(0, 2, 3, 1).contiguous().numpy()]
    if result.labels is not None:
        arrays.append(result.labels.numpy())
    file = io.BytesIO()
    np.savez(file, *arrays)
    return file.getvalue()


def as_json(result: Result, request: Request) -> dict[str, Any]:
    """Every image as a PNG in base64, with what is needed to draw it again."""
    return {
        "images": [_base64(as_png(image[None])) for image in result.images],
        "labels": None if result.labels is None else result.labels.tolist(),
        "seed": request.seed,
        "steps": request.steps,
        "sampler": request.sampler,
        "waited_seconds": round(result.waited, 6),
        "seconds": round(result.took, 6),
    }


def preview_event(preview: Preview) -> bytes:
    """A preview as an event: the step, and one picture of all images."""
    image = _base64(as_png(preview.images))
    return event("preview", {"step": preview.step, "steps": preview.steps, "image": image})


def event(name: str, data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

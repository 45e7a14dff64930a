"""CUDA graphs of functions: captured once per signature of their inputs, replayed with new contents.

Starting a kernel from Python costs tens of microseconds, and a step of a UNet starts thousands. A captured step is
started as a whole:

    step = Graphed(train_step, "cuda", modules=[model])
    for x, y in batches:
        loss = step(x, y)  # the first two calls run as they are, the third captures, all later ones replay

`graphed` is for code that also runs where nothing can be captured: there it returns the function itself.
"""

from tdc_fast.graphs.capture import (
    Capture,
    CudaCapture,
    Recording,
    captures_on,
    is_capturing,
    outside_captures,
    use_capture,
)
from tdc_fast.graphs.graphed import CannotCapture, Graphed, graphed

__all__ = [
    "CannotCapture",
    "Capture",
    "CudaCapture",
    "Graphed",
    "Recording",
    "captures_on",
    "graphed",
    "is_capturing",
    "outside_captures",
    "use_capture",
]

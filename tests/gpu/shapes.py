"""The shapes that every backend is tested with on a GPU, by name: they cover tiles, routing and widths."""

from __future__ import annotations

from typing import Any

from tests.cases import ConvCase, NormCase, Routing

UNEVEN = Routing((0, 2, 0, 0, 2, 0, 1), 4, 4, None)  # group 3 has no samples
THREE = Routing((0, 2, 2, 1, 0, 2), 3, 3, None)
ALL = ("bias", "sample_bias", "residual")


def conv(routing: Routing, channels: tuple[int, int], size: tuple[int, int], **changes: Any) -> ConvCase:
    settings: dict[str, Any] = {
        "filter": (3, 3), "stride": (1, 1), "padding": (1, 1), "in_widths": None, "out_widths": None, "extras": ALL,
        "layout": "channels_last", "seed": 1,
    }  # fmt: skip
    return ConvCase(routing, *channels, size, **(settings | changes))


def norm(routing: Routing, channels: int, groups: int, size: tuple[int, int], **changes: Any) -> NormCase:
    settings: dict[str, Any] = {
        "widths": None, "extras": ("scale", "shift"), "activation": "silu", "layout": "channels_last", "seed": 1,
    }  # fmt: skip
    return NormCase(routing, channels, groups, size, **(settings | changes))


CONV_CASES: dict[str, ConvCase] = {
    "several tiles and K-steps": conv(UNEVEN, (96, 136), (16, 16)),
    "odd channels": conv(THREE, (11, 9), (7, 5), in_widths=(11, 4, 7), out_widths=(3, 9, 5)),
    "stride 2": conv(UNEVEN, (32, 64), (16, 16), stride=(2, 2)),
    "tokens": conv(UNEVEN, (64, 192), (64, 1), filter=(1, 1), padding=(0, 0)),
    "widths": conv(
        Routing((0, 1, 1, 2, 3, 3, 3, 0, 1), 4, 4, None),
        (72, 136),
        (8, 8),
        in_widths=(72, 40, 0, 8),
        out_widths=(136, 72, 16, 0),
    ),
    "stride 2 and an odd image": conv(THREE, (24, 16), (9, 7), stride=(2, 2), extras=("bias",)),
    "5x5": conv(THREE, (16, 24), (9, 9), filter=(5, 5), padding=(2, 2), extras=()),
    "1x3, strides 1 and 2, no padding": conv(
        THREE, (16, 8), (5, 9), filter=(1, 3), stride=(1, 2), padding=(0, 0), extras=("residual",)
    ),
    "more padding than filter": conv(THREE, (8, 8), (4, 5), padding=(3, 3)),
    "more groups than samples": conv(Routing((5, 2), 9, 9, None), (16, 16), (6, 6)),
    "one sample": conv(Routing((0,), 1, 1, None), (32, 32), (8, 8)),
    "no samples": conv(Routing((), 3, 3, None), (16, 16), (6, 6)),
    "experts shared at other widths": conv(
        Routing((0, 2, 2, 1, 0, 2), 3, 2, (1, 0, 1)), (32, 32), (6, 6), in_widths=(32, 16, 8), out_widths=(8, 32, 24)
    ),
    "an unused expert": conv(Routing((0, 2), 3, 4, (3, 1, 0)), (16, 16), (5, 5)),
    "many small images": conv(Routing(tuple(i * 7 % 5 for i in range(40)), 5, 5, None), (32, 48), (4, 4)),
    "one large group": conv(Routing((1,) * 9, 3, 3, None), (40, 24), (12, 12)),
    "image channels in": conv(UNEVEN, (3, 32), (8, 8), extras=("bias",)),
    "image channels out": conv(UNEVEN, (32, 6), (8, 8), extras=("bias",)),
    "image channels in, several runs": conv(UNEVEN, (3, 136), (40, 33)),
    "image channels out, several runs and widths": conv(
        Routing((0, 2, 2, 1, 0, 2), 3, 2, (1, 0, 1)), (200, 6), (33, 40), in_widths=(200, 16, 37), out_widths=(6, 3, 5)
    ),
    "a strided input": conv(THREE, (16, 16), (6, 6), layout="strided"),
    "two inputs": conv(UNEVEN, (384, 256), (16, 16), filter=(1, 1), padding=(0, 0), x2_channels=128),
    "two inputs, 3x3 and widths": conv(
        Routing((0, 1, 1, 2, 3, 3, 3, 0, 1), 4, 4, None),
        (136, 72),
        (8, 8),
        x2_channels=64,
        in_widths=(136, 40, 0, 104),
        out_widths=(72, 40, 16, 0),
    ),
    "two inputs, odd seam": conv(THREE, (19, 9), (7, 5), x2_channels=6, in_widths=(19, 4, 15)),
    "upsampled": conv(UNEVEN, (32, 64), (8, 8), upsample=2),
    "two inputs, upsampled": conv(
        THREE, (104, 136), (7, 5), x2_channels=40, upsample=2, in_widths=(104, 8, 70), out_widths=(136, 40, 72)
    ),
    "a contiguous input": conv(THREE, (16, 16), (6, 6), layout="contiguous"),
}
# Cases that depend on the dtype: forms of loads and products, not routing.
CONV_FORMS = ("several tiles and K-steps", "odd channels", "stride 2", "tokens", "widths")

POINTWISE: dict[str, Any] = {"filter": (1, 1), "padding": (0, 0)}
# What the convolution's Hopper form serves: its tiles, and what ends in the middle of one. On all SMs of a GPU these
# run in small tiles and by clusters, on few in large ones: together in every kernel (tests/native/test_gpu_cases.py).
HOPPER_CASES: dict[str, ConvCase] = {
    "tiles of 16x16": conv(UNEVEN, (128, 256), (32, 16)),
    "wide tiles": conv(THREE, (64, 192), (16, 16)),
    "tall tiles of 64 channels": conv(THREE, (64, 64), (32, 32), in_widths=(64, 21, 40), out_widths=(37, 64, 8)),
    "four samples of a tile": conv(Routing((0,) * 9 + (1,) * 6 + (3,), 4, 4, None), (192, 128), (8, 8)),
    "clipped images": conv(THREE, (72, 136), (11, 21)),
    "clipped small tiles": conv(THREE, (64, 64), (9, 8), extras=("residual",)),
    "small tiles of one sample": conv(
        Routing((0, 2, 3), 4, 3, (0, 1, 1, 2)), (72, 64), (15, 8), in_widths=(72, 8, 37, 66), out_widths=(64, 64, 41, 3)
    ),
    "widths": conv(
        Routing((0, 1, 1, 2, 3, 3, 3, 0, 1), 4, 4, None),
        (136, 264),
        (16, 16),
        in_widths=(136, 40, 0, 104),
        out_widths=(264, 129, 64, 0),
    ),
    "widths of no multiple of 16, small images": conv(
        Routing((0, 0, 0, 1, 1, 1, 1, 1, 2), 3, 2, (1, 0, 1)),
        (96, 80),
        (8, 8),
        in_widths=(37, 96, 9),
        out_widths=(80, 3, 65),
    ),
    "three quarters of a tile's columns, two inputs": conv(
        THREE, (232, 128), (16, 16), x2_channels=104, in_widths=(232, 97, 90), out_widths=(96, 97, 72)
    ),
    "three quarters of a wide tile's columns": conv(
        THREE, (192, 192), (16, 16), in_widths=(144, 145, 97), out_widths=(144, 145, 97)
    ),
    "more groups than samples": conv(Routing((5, 70, 70), 99, 99, None), (64, 64), (8, 8), extras=()),
    "two inputs": conv(UNEVEN, (384, 128), (16, 16), x2_channels=128),
    "two inputs of small images, whose seam is no multiple of 64": conv(
        THREE, (200, 136), (8, 8), x2_channels=112, in_widths=(200, 40, 103), out_widths=(136, 65, 0)
    ),
    "images of 4x4": conv(Routing((0,) * 9 + (1,) * 6 + (3,), 4, 4, None), (192, 136), (4, 4)),
    "images of 2x8 and two inputs with widths": conv(
        THREE, (200, 136), (2, 8), x2_channels=112, in_widths=(200, 40, 103), out_widths=(136, 65, 0)
    ),
    "stride 2": conv(UNEVEN, (64, 136), (32, 32), stride=(2, 2)),
    "stride 2, odd images and widths": conv(
        Routing((0, 1, 1, 2, 3, 3, 3, 0, 1), 4, 4, None),
        (136, 264),
        (35, 18),
        stride=(2, 2),
        in_widths=(136, 40, 0, 104),
        out_widths=(264, 129, 64, 0),
    ),
    "stride 2 to images of 4x4": conv(
        Routing((0,) * 9 + (1,) * 6 + (3,), 4, 4, None), (192, 136), (8, 7), stride=(2, 2), extras=("residual",)
    ),
    "upsampled": conv(UNEVEN, (136, 256), (16, 16), upsample=2),
    "upsampled, odd images and widths": conv(
        Routing((0, 1, 1, 2, 3, 3, 3, 0, 1), 4, 4, None),
        (136, 264),
        (9, 5),
        upsample=2,
        in_widths=(136, 40, 0, 104),
        out_widths=(264, 129, 64, 0),
    ),
    "upsampled images of 4x4": conv(
        Routing((0,) * 9 + (1,) * 6 + (3,), 4, 4, None), (192, 136), (4, 4), upsample=2, extras=("residual",)
    ),
    "clusters of two": conv(Routing((0,) * 20, 1, 1, None), (128, 256), (8, 8)),
    "clusters of two in dgrad": conv(Routing((0,) * 20, 1, 1, None), (256, 128), (8, 8)),
    "1x1 filters": conv(UNEVEN, (136, 256), (33, 16), **POINTWISE),
    "units of 384 channels": conv(THREE, (384, 136), (5, 7), **POINTWISE),
    "tokens": conv(UNEVEN, (64, 192), (77, 1), **POINTWISE),
    "one pixel": conv(THREE, (128, 72), (1, 1), extras=("bias",), **POINTWISE),
    "1x1 filters over two inputs with widths": conv(
        THREE, (200, 136), (16, 16), x2_channels=112, in_widths=(200, 40, 103), out_widths=(136, 65, 0), **POINTWISE
    ),
}

NORM_CASES: dict[str, NormCase] = {
    "scale, shift and SiLU": norm(UNEVEN, 64, 32, (16, 16)),
    "odd": norm(THREE, 15, 5, (7, 5), widths=(15, 3, 6)),
    "more than shared memory holds": norm(Routing((0, 1), 2, 2, None), 64, 2, (48, 48)),
    "nothing fused": norm(THREE, 24, 6, (6, 6), extras=(), activation=None),
    "shift alone": norm(THREE, 24, 6, (6, 6), extras=("shift",)),
    "scale alone": norm(THREE, 24, 6, (6, 6), extras=("scale",), activation=None),
    "widths": norm(Routing((0, 1, 1, 2, 3, 0), 4, 4, None), 128, 32, (8, 8), widths=(128, 64, 0, 4)),
    "one pixel": norm(THREE, 24, 6, (1, 1)),
    "one channel per group": norm(THREE, 16, 16, (5, 5)),
    "more groups than samples": norm(Routing((5, 2), 9, 9, None), 32, 8, (6, 6)),
    "no samples": norm(Routing((), 3, 3, None), 32, 8, (6, 6)),
    "experts shared at other widths": norm(
        Routing((0, 2, 2, 1, 0, 2), 3, 2, (1, 0, 1)), 32, 8, (6, 6), widths=(8, 32, 24)
    ),
    "two inputs, seam in a norm group": norm(UNEVEN, 384, 32, (16, 16), x2_channels=128),
    "two inputs, more than shared memory holds": norm(
        Routing((0, 1), 2, 2, None), 64, 2, (48, 48), x2_channels=24, widths=(64, 32)
    ),
    "two inputs, odd seam": norm(THREE, 15, 5, (7, 5), widths=(15, 3, 6), x2_channels=7),
    "a strided input": norm(THREE, 32, 8, (6, 6), layout="strided"),
}
NORM_FORMS = ("scale, shift and SiLU", "odd", "more than shared memory holds", "widths")

"""The Inception network of 2015 that FID, sFID, KID and the Inception Score are defined by.

It is TensorFlow's `classify_image` graph of 2015-12-05, which differs from torchvision's Inception v3: 1008 classes,
average pools that leave the padding out, and a max pool in the last block (Szegedy et al. 2016, arXiv:1512.00567;
Heusel et al. 2017, arXiv:1706.08500). Names of parameters are those of the published conversions (pytorch-fid,
torch-fidelity), so that their file of weights loads; the outputs are those of torch-fidelity's network, which is not
used itself because it does not import without a torchvision built for the installed torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.errors import invalid

INPUT_SIZE = 299
"""Height and width in pixels to which the metrics' definitions scale every image."""
POOL_FEATURES = 2048
SMALLEST_SIZE = 75  # of the input: smaller ones have no pixel left before the last blocks
_SPATIAL_CHANNELS = 7


class InceptionOutputs(NamedTuple):
    """What the metrics read from the network, for B images.

    Attributes:
        pool: (B, 2048), means over the last feature maps: features of FID, KID, precision and recall.
        spatial: (B, 17 * 17 * 7) at 299 pixels: the first 7 channels of the 1x1 convolution of the third 17x17 block,
            features of sFID (Nash et al. 2021, arXiv:2103.03841). Channels are innermost, as in guided-diffusion, whose
            stored statistics are in that order.
        logits: (B, 1008), of the classes, without their bias, as the published Inception Scores have them.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class _Conv(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, *, stride: int = 1, same: bool = False
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.bn.num_batches_tracked = None  # of training; some files of weights have it, some do not

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Parallel branches, concatenated. Each is a chain of the layers named `<branch>_1`, `<branch>_2`, ...

    A chain that ends in layers `<branch>_<n>a` and `<branch>_<n>b` ends in both, side by side.
    """

    chains: dict[str, list[str]]

    def __init__(self, layers: dict[str, _Conv], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.chains = {"branch_pool": []}
        for name, layer in layers.items():
            self.add_module(name, layer)
            branch = name if name == "branch_pool" else name.partition("_")[0]
            self.chains.setdefault(branch, []).append(name)
        self.chains["branch_pool"] = self.chains.pop("branch_pool")  # last in the concatenation

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for branch, names in self.chains.items():
            y = self._pooled(x) if branch == "branch_pool" else x
            for name in names:
                if name.endswith("a"):
                    parts.append(self.get_submodule(name)(y))
                elif name.endswith("b"):
                    parts.append(self.get_submodule(name)(y))
                    break
                else:
                    y = self.get_submodule(name)(y)
            else:
                parts.append(y)
        return torch.cat(parts, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":  # over the pixels that there are, without the padding
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=1, padding=1) if self.pool == "max" else F.max_pool2d(x, 3, stride=2)


def _block_35(inputs: int, pool_features: int) -> _Mixed:
    layers = {
        "branch1x1": _Conv(inputs, 64),
        "branch5x5_1": _Conv(inputs, 48),
        "branch5x5_2": _Conv(48, 64, 5, same=True),
        "branch3x3dbl_1": _Conv(inputs, 64),
        "branch3x3dbl_2": _Conv(64, 96, 3, same=True),
        "branch3x3dbl_3": _Conv(96, 96, 3, same=True),
        "branch_pool": _Conv(inputs, pool_features),
    }
    return _Mixed(layers, "average")


def _to_17(inputs: int) -> _Mixed:
    layers = {
        "branch3x3": _Conv(inputs, 384, 3, stride=2),
        "branch3x3dbl_1": _Conv(inputs, 64),
        "branch3x3dbl_2": _Conv(64, 96, 3, same=True),
        "branch3x3dbl_3": _Conv(96, 96, 3, stride=2),
    }
    return _Mixed(layers, "halve")


def _block_17(inner: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    layers = {
        "branch1x1": _Conv(768, 192),
        "branch7x7_1": _Conv(768, inner),
        "branch7x7_2": _Conv(inner, inner, row, same=True),
        "branch7x7_3": _Conv(inner, 192, column, same=True),
        "branch7x7dbl_1": _Conv(768, inner),
        "branch7x7dbl_2": _Conv(inner, inner, column, same=True),
        "branch7x7dbl_3": _Conv(inner, inner, row, same=True),
        "branch7x7dbl_4": _Conv(inner, inner, column, same=True),
        "branch7x7dbl_5": _Conv(inner, 192, row, same=True),
        "branch_pool": _Conv(768, 192),
    }
    return _Mixed(layers, "average")


def _to_8() -> _Mixed:
    layers = {
        "branch3x3_1": _Conv(768, 192),
        "branch3x3_2": _Conv(192, 320, 3, stride=2),
        "branch7x7x3_1": _Conv(768, 192),
        "branch7x7x3_2": _Conv(192, 192, (1, 7), same=True),
        "branch7x7x3_3": _Conv(192, 192, (7, 1), same=True),
        "branch7x7x3_4": _Conv(192, 192, 3, stride=2),
    }
    return _Mixed(layers, "halve")


def _block_8(inputs: int, pool: str) -> _Mixed:
    layers = {
        "branch1x1": _Conv(inputs, 320),
        "branch3x3_1": _Conv(inputs, 384),
        "branch3x3_2a": _Conv(384, 384, (1, 3), same=True),
        "branch3x3_2b": _Conv(384, 384, (3, 1), same=True),
        "branch3x3dbl_1": _Conv(inputs, 448),
        "branch3x3dbl_2": _Conv(448, 384, 3, same=True),
        "branch3x3dbl_3a": _Conv(384, 384, (1, 3), same=True),
        "branch3x3dbl_3b": _Conv(384, 384, (3, 1), same=True),
        "branch_pool": _Conv(inputs, 192),
    }
    return _Mixed(layers, pool)


class InceptionNetwork(nn.Module):
    """The network, without weights: they are whatever torch initialises until a state dict is loaded.

    Args:
        input_size: pixels to which images are scaled; the metrics are defined at 299, the smallest is 75.

    Raises:
        ValueError: `input_size` is below 75.
    """

    def __init__(self, input_size: int = INPUT_SIZE) -> None:
        if input_size < SMALLEST_SIZE:
            raise invalid("input_size", input_size, f"at least {SMALLEST_SIZE} pixels")
        super().__init__()
        self.input_size = input_size
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = _to_8()
        self.Mixed_7b = _block_8(1280, "average")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(POOL_FEATURES, 1008)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> InceptionOutputs:
        """Outputs of images (B, 3, H, W) uint8 of any size, in the dtype of the weights."""
        x = _scaled(images.to(self.fc.weight.dtype), self.input_size)
        x = (x - 128) / 128
        x = _through(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = F.max_pool2d(x, 3, stride=2)
        x = _through(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = F.max_pool2d(x, 3, stride=2)
        x = _through(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c)
        x = self.Mixed_6d(x)
        spatial = x[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # of the 1x1 convolution, which comes first
        x = _through(x, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)
        pool = x.mean(dim=(2, 3))
        return InceptionOutputs(pool, spatial, pool @ self.fc.weight.T)


def _through(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _scaled(images: Tensor, size: int) -> Tensor:
    """Scale images (B, C, H, W) as TensorFlow 1 does: bilinear, pixel i of the result at i * H / size of the image."""
    for axis in (3, 2):
        length = images.shape[axis]
        # Positions in float32, as there: another rounding would choose other pixels.
        places = torch.arange(size, dtype=torch.float32, device=images.device) * torch.tensor(length / size)
        low = places.long()
        high = (low + 1).clamp_max(length - 1)
        share = (places - low).to(images.dtype).view(-1, *[1] * (3 - axis))
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, high) - first) * share
    return images

"""Feature spaces in which image sets are compared: a fixed random network, or features that are at hand already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid


class PrecomputedFeatures(nn.Module):
    """Stands in for a feature extractor where the features (M, F) are at hand already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class RandomConvFeatures(nn.Module):
    """64 features of a small convolutional network with fixed random weights, for other images.

    Three 3x3 convolutions with ReLU and pooling, weights orthogonal from a fixed seed; the features are mean and
    standard deviation of 32 channels over the image. They follow texture, contrast and coarse shape, and know nothing
    of meaning. The weights depend on the number of channels and on nothing else, so that results of different days
    compare. Input (M, C, H, W) uint8 of any size from 4x4; output (M, 64) float32.
    """

    num_features = 64
    description = "64 features of a fixed random convolutional network (seed 0): texture and coarse shape only"

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 16), (16, 32), (32, 32)):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            nn.init.orthogonal_(conv.weight, gain=2**0.5, generator=generator)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # every layer here has a bias
            layers += [conv, nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)]
        self.layers = nn.Sequential(*layers[:-1])
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layers(images.float() / 127.5 - 1).flatten(2)
        return torch.cat([maps.mean(dim=2), maps.std(dim=2, correction=0)], dim=1)


def extract(images: Tensor, extractor: nn.Module, batch_size: int = 512) -> Tensor:
    """Features (M, F) of uint8 images (M, C, H, W), in float64 for the covariances that follow."""
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise invalid("images", f"{images.dtype} {tuple(images.shape)}", "uint8 images (M, C, H, W)")
    with torch.no_grad():
        return torch.cat([extractor(batch).double() for batch in images.split(batch_size)])

"""Feature extractors for the Fréchet distance: a fixed random network, or none for features computed already."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdc_fast.errors import invalid


class PrecomputedFeatures(nn.Module):
    """Extractor for features (M, F) that are computed already: returns them unchanged.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features (M, F) themselves."""
        return features


class RandomConvFeatures(nn.Module):
    """64 features of a small convolutional network with fixed random weights, for images of any size and kind.

    Three 3x3 convolutions with ReLU and pooling; the features are the mean and the standard deviation of 32 channels
    over the image. They measure texture, contrast and coarse shape, not what the image shows. The weights are
    orthogonal, from a fixed seed, and depend only on the number of channels, so results of different runs compare.

    Args:
        channels: C, the channels of the images.

    Attributes:
        num_features: length of a feature vector, 64.
        description: names the feature space in reports.
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
        """Features (M, 64) float32 of images (M, C, H, W) uint8, at least 4x4 pixels."""
        maps = self.layers(images.float() / 127.5 - 1).flatten(2)
        return torch.cat([maps.mean(dim=2), maps.std(dim=2, correction=0)], dim=1)


def extract(images: Tensor, extractor: nn.Module) -> Tensor:
    """Extract the features of a set of images in batches.

    Args:
        images: (M, C, H, W) uint8.
        extractor: module that maps a batch of images to features (B, F).

    Returns:
        Features (M, F) float64, the precision that their covariance needs.

    Raises:
        ValueError: the images have another dtype or shape.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise invalid("images", f"{images.dtype} {tuple(images.shape)}", "uint8 images (M, C, H, W)")
    with torch.no_grad():
        return torch.cat([extractor(batch).double() for batch in images.split(512)])

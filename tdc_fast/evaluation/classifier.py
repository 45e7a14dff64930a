"""A small digit classifier: its 64 features are the space in which 8x8 grey samples are compared.

It is trained afresh where it is needed, in seconds and deterministically, from scikit-learn's digits. So no downloaded
weights stand behind the distance, and the same machine gives the same features each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.pixels import to_uint8
from tdc_fast.errors import invalid


class DigitsClassifier(nn.Module):
    """Three convolutions, 64 features, ten classes. Images (M, 1, 8, 8) uint8; `features` gives (M, 64)."""

    num_features = 64
    description = "64 features of a small classifier of scikit-learn's digits"

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 2 * 2, self.num_features)
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        """The features: what a Fréchet distance asks of an extractor."""
        return self.features(images)


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with the share of held-out digits that it names correctly."""

    model: DigitsClassifier
    accuracy: float
    num_train: int
    num_heldout: int


def digits_uint8() -> tuple[Tensor, Tensor]:
    """All 1797 digits as uint8 (1797, 1, 8, 8), the 17 grey levels spread over 0..255, with int64 labels."""
    dataset = load_dataset("digits", class_cond=True)
    assert dataset.labels is not None
    return to_uint8(dataset.images()), torch.from_numpy(dataset.labels)


def train_classifier(*, seed: int = 0, epochs: int = 30, heldout_fraction: float = 0.2) -> TrainedClassifier:
    """Train on a random split of the digits, moved by up to one pixel.

    About 98% of the held-out ones come out right. The global random state is left as it was.
    Takes a few seconds on one core.
    """
    if not 0 < heldout_fraction < 1:
        raise invalid("heldout_fraction", heldout_fraction, "a fraction between 0 and 1")
    images, labels = digits_uint8()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    num_heldout = round(len(images) * heldout_fraction)
    heldout, train = order[:num_heldout], order[num_heldout:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsClassifier()
    _fit(model, images[train], labels[train], epochs, generator)
    model.eval().requires_grad_(False)
    predicted = model.logits(images[heldout]).argmax(dim=1)
    accuracy = float((predicted == labels[heldout]).double().mean())
    return TrainedClassifier(model, accuracy, len(train), num_heldout)


def _fit(model: DigitsClassifier, images: Tensor, labels: Tensor, epochs: int, generator: torch.Generator) -> None:
    batch_size = 64
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    padded = F.pad(images, (1, 1, 1, 1))  # (M, 1, 10, 10): a shift is a choice of the 8x8 window
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(batch_size):
            if len(rows) < batch_size:
                continue
            top, left = torch.randint(3, (2,), generator=generator).tolist()
            logits = model.logits(padded[rows, :, top : top + 8, left : left + 8])
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

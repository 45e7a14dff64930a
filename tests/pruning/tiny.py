"""A hand-made denoiser with units of single neurons, and a diffusion whose loss a test can work out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.nn.units import PruningUnit, UnitSlice
from tdc_fast.pruning.costs import UnitCosts, unit_costs
from tdc_fast.pruning.task import Task


class ResidualMlp(nn.Module):
    """x + down(silu(up(x) + time(t))); at width 0 only x."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.width = width
        if width:
            self.up, self.down = nn.Linear(features, width), nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x))) if self.width else x


class TinyNet(nn.Module):
    """Residual layers over (B, features); t shifts the input. Neurons are pruned `atom` at a time.

    With `flat_names` the units' names are not those of modules.
    """

    def __init__(
        self,
        features: int = 3,
        channels: tuple[int, ...] = (4, 6),
        atom: int = 1,
        widths: Mapping[str, int] | None = None,
        flat_names: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.channels, self.atom, self.flat_names = features, channels, atom, flat_names
        names = [self.name_of(i) for i in range(len(channels))]
        self.widths = dict(zip(names, channels, strict=True)) | dict(widths or {})
        self.enter = nn.Linear(features, features)
        self.layers = nn.ModuleList(ResidualMlp(features, width) for width in self.widths.values())

    def name_of(self, index: int) -> str:
        return f"unit{index}" if self.flat_names else f"layers.{index}"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x + t[:, None].to(x.dtype) / 100)
        for layer in self.layers:
            h = layer(h)
        return h

    def pruning_units(self) -> list[PruningUnit]:
        units = []
        for i, channels in enumerate(self.channels):
            slices = (UnitSlice(f"layers.{i}.up", "out"), UnitSlice(f"layers.{i}.down", "in"))
            units.append(PruningUnit(self.name_of(i), "mlp", channels, self.atom, self.atom, slices))
        return units

    def with_widths(self, widths: Mapping[str, int]) -> TinyNet:
        first = next(self.parameters())
        small = TinyNet(self.features, self.channels, self.atom, {**self.widths, **widths}, flat_names=self.flat_names)
        return small.to(device=first.device, dtype=first.dtype)


class RecordedDiffusion:
    """T = 100 steps whose loss is `loss(model, x0, t)`, noise playing no part; it remembers every t it was given."""

    num_timesteps = 100

    def __init__(self, loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None) -> None:
        self.loss = loss or (lambda model, x0, t: (model(x0, t) - x0).square().mean(1))
        self.timesteps: list[Tensor] = []

    def snr_db(self) -> np.ndarray:
        return np.linspace(40.0, -50.0, self.num_timesteps)

    def training_losses(
        self, model: nn.Module, x0: Tensor, t: Tensor, noise: Tensor | None = None, model_kwargs: object = None
    ) -> dict[str, Tensor]:
        self.timesteps.append(t)
        return {"loss": self.loss(model, x0, t)}


def tiny_net(**arguments: object) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(**arguments).double()  # type: ignore[arg-type]


def tiny_batches(count: int = 2, size: int = 8, features: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, features, generator=generator, dtype=torch.float64) for _ in range(count)]


def task_of(units: Sequence[PruningUnit], costs: UnitCosts, budget: int, seed: int = 0) -> Task:
    """A task of random importance."""
    rng = np.random.default_rng(seed)
    scores = {unit.name: rng.exponential(size=unit.num_atoms) for unit in units}
    return Task(0, (0, 10), tuple(units), costs, budget, 0.01, scores)


def tiny_task(budget: int) -> Task:
    net = tiny_net()
    return task_of(net.pruning_units(), unit_costs(net, tiny_batches()[0]), budget)

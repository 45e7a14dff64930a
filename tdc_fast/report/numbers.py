"""What a report knows: plain numbers, in the shape in which report.json holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tdc_fast.evaluation.frechet import DistanceSpread, Floor
from tdc_fast.evaluation.heldout import HeldoutLosses, compare


@dataclass(frozen=True)
class Curve:
    """Training loss against compute spent: `macs` (P,), `losses[g]` (P,), None where a group was not seen."""

    macs: tuple[float, ...]
    losses: tuple[tuple[float | None, ...], ...]

    def to_json(self) -> dict[str, Any]:
        return {"macs": list(self.macs), "losses": [list(values) for values in self.losses]}


@dataclass(frozen=True)
class ModelResult:
    """One trained model and all that was measured of it.

    `phases` names what its training spent, in MACs, shared stages included. `sampling_macs` is one image.
    `samples` (M, C, H, W) uint8 fills its sample grid.
    """

    key: str
    label: str
    family: Literal["uniform", "experts"]
    description: str
    phases: dict[str, float]
    steps: dict[str, int]
    parameters: int
    sampling_macs: float
    heldout: HeldoutLosses
    frechet: DistanceSpread
    curve: Curve
    samples: Tensor

    @property
    def training_macs(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True)
class ExpertWidths:
    """Live widths of one width plan: `widths[unit][expert]` of `channels[unit]` channels."""

    units: tuple[str, ...]
    channels: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    budgets: tuple[float, ...]  # allowed MACs of each expert, as a fraction of the base
    macs: tuple[float, ...]  # measured MACs of each expert, as a fraction of the base

    def to_json(self) -> dict[str, Any]:
        return {
            "units": [
                {"name": name, "channels": channels, "widths": list(widths)}
                for name, channels, widths in zip(self.units, self.channels, self.widths, strict=True)
            ],
            "budgets": list(self.budgets),
            "macs": list(self.macs),
        }


@dataclass(frozen=True)
class Comparison:
    """Models trained on the same data, measured alike. `models[0]` is the yardstick: its cost is 1 C."""

    title: str
    subtitle: str
    models: tuple[ModelResult, ...]
    boundaries: tuple[int, ...]
    snr_db: tuple[float, ...]
    widths: ExpertWidths
    floors: tuple[Floor, ...]
    feature_space: str
    reference: str
    sampler: str
    real_images: Tensor
    settings: dict[str, dict[str, Any]]
    environment: dict[str, str]
    seed_note: str  # what is known of how training seeds move the measures
    missing: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def yardstick(self) -> ModelResult:
        return self.models[0]

    def model(self, key: str) -> ModelResult:
        return next(model for model in self.models if model.key == key)

    def place_in_family(self, model: ModelResult) -> int:
        """How many models of its family stand before it."""
        return [other for other in self.models if other.family == model.family].index(model)

    def training_cost(self, model: ModelResult) -> float:
        """Training MACs as a fraction of the yardstick's."""
        return model.training_macs / self.yardstick.training_macs

    def sampling_cost(self, model: ModelResult) -> float:
        """MACs of one sampled image as a fraction of the yardstick's."""
        return model.sampling_macs / self.yardstick.sampling_macs

    def to_json(self) -> dict[str, Any]:
        """Every number of the report. Times stand apart under `seconds`: all else repeats from run to run."""
        models = {}
        for model in self.models:
            overall, per_group = compare(model.heldout, self.yardstick.heldout)
            models[model.key] = {
                "label": model.label,
                "description": model.description,
                "training_macs": model.training_macs,
                "training_macs_by_phase": model.phases,
                "training_cost": self.training_cost(model),
                "steps": model.steps,
                "parameters": model.parameters,
                "sampling_macs_per_image": model.sampling_macs,
                "sampling_cost": self.sampling_cost(model),
                "heldout_loss": model.heldout.to_json(),
                "heldout_against_yardstick": {
                    "mean": overall.to_json(),
                    "per_group": [difference.to_json() for difference in per_group],
                },
                "frechet_distance": model.frechet.to_json(),
                "loss_curve": model.curve.to_json(),
            }
        return {
            "version": 1,
            "title": self.title,
            "yardstick": self.yardstick.key,
            "models": models,
            "groups": {"boundaries": list(self.boundaries), "snr_db": list(self.snr_db)},
            "widths": self.widths.to_json(),
            "frechet_floors": [floor.to_json() for floor in self.floors],
            "feature_space": self.feature_space,
            "reference": self.reference,
            "sampler": self.sampler,
            "missing_controls": list(self.missing),
            "settings": self.settings,
            "environment": self.environment,
            "seconds": self.seconds,
        }

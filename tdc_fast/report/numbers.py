"""The numbers of a report, in the structure of report.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tdc_fast.evaluation.frechet import DistanceSpread, Floor
from tdc_fast.evaluation.heldout import HeldoutLosses, compare


@dataclass(frozen=True)
class Curve:
    """Training loss against compute.

    Attributes:
        macs: MACs spent up to each of P points.
        losses: for each group, its loss at each point; None where the group was not trained.
    """

    macs: tuple[float, ...]
    losses: tuple[tuple[float | None, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The curve as report.json holds it."""
        return {"macs": list(self.macs), "losses": [list(values) for values in self.losses]}


@dataclass(frozen=True)
class ModelResult:
    """One trained model and its measurements.

    Attributes:
        key: short name, in report.json.
        label: name in tables and figures.
        family: one denoiser for all timesteps, or experts.
        description: how it was trained, in one sentence.
        phases: training MACs by phase, those of shared phases included.
        steps: training steps by phase.
        parameters: number of parameters in use.
        sampling_macs: MACs of sampling one image.
        heldout: loss on held-out images.
        frechet: Fréchet distances of its draws.
        curve: training loss against compute.
        samples: images (M, C, H, W) uint8 for the grid.
        sampling_time: estimated time of sampling one image as a share of the base's; None where none was estimated.
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
    sampling_time: float | None = None

    @property
    def training_macs(self) -> float:
        """MACs of the whole training."""
        return sum(self.phases.values())


@dataclass(frozen=True)
class ExpertWidths:
    """The widths of a width plan, and the MACs and the estimated time of its experts as shares of the base's.

    Attributes:
        units: names of the prunable units.
        channels: channels of each unit in the base.
        widths: for each unit, the channels that each expert keeps.
        budgets: MACs that each expert may use; () where budgets are in time.
        macs: MACs that each expert uses.
        boundaries: boundaries of the experts' groups of timesteps, from 0 to T.
        times: estimated time of each expert; () where not estimated.
        time_budgets: time that each expert may take; () where budgets are in MACs.
        base_ms: estimated milliseconds of one forward of the whole base on a batch.
    """

    units: tuple[str, ...]
    channels: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    budgets: tuple[float, ...]
    macs: tuple[float, ...]
    boundaries: tuple[int, ...]
    times: tuple[float, ...] = ()
    time_budgets: tuple[float, ...] = ()
    base_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The widths as report.json holds them."""
        return {
            "units": [
                {"name": name, "channels": channels, "widths": list(widths)}
                for name, channels, widths in zip(self.units, self.channels, self.widths, strict=True)
            ],
            "budgets": list(self.budgets),
            "macs": list(self.macs),
            "boundaries": list(self.boundaries),
            **({"times": list(self.times), "base_ms": self.base_ms} if self.times else {}),
            **({"time_budgets": list(self.time_budgets)} if self.time_budgets else {}),
        }


@dataclass(frozen=True)
class Comparison:
    """Models trained on the same data and measured in the same way.

    Attributes:
        title: heading of the report.
        subtitle: what is compared, in one sentence.
        models: the models; the first is the baseline, whose training cost is C.
        boundaries: boundaries of the intervals of timesteps by which losses are told, from 0 to T.
        snr_db: signal-to-noise ratio of each timestep in decibels.
        widths: widths of the pruned experts.
        floors: Fréchet distances between real images.
        feature_space: description of the feature space of the distance.
        reference: description of the real images that samples are compared with.
        sampler: description of the sampler.
        real_images: real images (M, C, H, W) uint8 for the grid.
        settings: settings to list, by heading.
        environment: versions and machine.
        seed_note: what the report says about training seeds.
        missing: sentences on controls that were left out.
        seconds: time taken, by job.
    """

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
    seed_note: str
    missing: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def baseline(self) -> ModelResult:
        """The model that the others are compared with."""
        return self.models[0]

    @property
    def interval(self) -> str:
        """What one of the intervals of `boundaries` is called: a group, if the experts have the same."""
        return "group" if self.boundaries == self.widths.boundaries else "interval"

    def model(self, key: str) -> ModelResult:
        """The model with this key."""
        return next(model for model in self.models if model.key == key)

    def place_in_family(self, model: ModelResult) -> int:
        """Number of models of the same family before this one."""
        return [other for other in self.models if other.family == model.family].index(model)

    def training_cost(self, model: ModelResult) -> float:
        """Training MACs as a fraction of the baseline's."""
        return model.training_macs / self.baseline.training_macs

    def sampling_cost(self, model: ModelResult) -> float:
        """MACs of one sampled image as a fraction of the baseline's."""
        return model.sampling_macs / self.baseline.sampling_macs

    def to_json(self) -> dict[str, Any]:
        """Every number of the report; all but `seconds` are the same each time."""
        models = {}
        for model in self.models:
            overall, per_group = compare(model.heldout, self.baseline.heldout)
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
                **(
                    {}
                    if model.sampling_time is None or not self.widths.times
                    else {"sampling_time": model.sampling_time}
                ),
                "heldout_loss": model.heldout.to_json(),
                "heldout_against_baseline": {
                    "mean": overall.to_json(),
                    "per_group": [difference.to_json() for difference in per_group],
                },
                "frechet_distance": model.frechet.to_json(),
                "loss_curve": model.curve.to_json(),
            }
        return {
            "version": 1,
            "title": self.title,
            "baseline": self.baseline.key,
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

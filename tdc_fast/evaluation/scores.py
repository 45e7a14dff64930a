"""All metrics between two sets of images, by their names: FID and the like only where Inception's weights were used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tdc_fast.evaluation.class_score import ClassScore
from tdc_fast.evaluation.manifolds import NEIGHBOURS, precision_recall
from tdc_fast.evaluation.mmd import kernel_distance
from tdc_fast.evaluation.moments import moments_distance
from tdc_fast.evaluation.statistics import SetStatistics


@dataclass(frozen=True)
class MetricNames:
    """What the metrics of a feature space are called, as keys of a file; `LABELS` has the words.

    Attributes:
        distance: the Fréchet distance of the features.
        spatial: that of the spatial features.
        kernel: the kernel distance.
        score: the class score.
    """

    distance: str
    spatial: str
    kernel: str
    score: str


PUBLISHED = MetricNames("fid", "sfid", "kid", "inception_score")
OTHERS = MetricNames("frechet_distance", "spatial_frechet_distance", "kernel_distance", "class_score")
LABELS = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "Inception Score",
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "kernel_distance": "kernel distance",
    "class_score": "class score",
    "precision": "precision",
    "recall": "recall",
}


def metrics(reference: SetStatistics, compared: SetStatistics, *, published: bool, seed: int = 0) -> dict[str, Any]:
    """Every metric that two sets' statistics give.

    Args:
        reference: of the real images.
        compared: of the generated ones.
        published: the features are those of Inception with its own weights, which the names of the metrics stand for.
        seed: seed of the blocks of the kernel distance.

    Returns:
        By key: distances as numbers, `precision` and `recall` as shares, the kernel distance as `{"mean", "sd",
        "blocks", "block_size"}`, and the class score of each set as `{"mean", "sd"}`. What the statistics do not give
        is left out; `not_measured` says why.
    """
    names = PUBLISHED if published else OTHERS
    found: dict[str, Any] = {names.distance: moments_distance(reference.moments, compared.moments)}
    missing: dict[str, str] = {}
    if reference.spatial is not None and compared.spatial is not None:
        found[names.spatial] = moments_distance(reference.spatial, compared.spatial)
    if reference.features is None or compared.features is None:
        missing[names.kernel] = missing["precision"] = missing["recall"] = "only statistics of a set are known"
    else:
        kernel = kernel_distance(reference.features, compared.features, seed=seed)
        found[names.kernel] = {
            "mean": kernel.mean,
            "sd": kernel.standard_deviation,
            "blocks": len(kernel.values),
            "block_size": kernel.block_size,
        }
        if min(len(reference.features), len(compared.features)) > NEIGHBOURS:
            shares = precision_recall(reference.features, compared.features)
            found["precision"], found["recall"] = shares.precision, shares.recall
        else:
            missing["precision"] = missing["recall"] = f"a set has no more than {NEIGHBOURS} images"
    scores = {"reference": reference.score, "compared": compared.score}
    if any(scores.values()):
        found[names.score] = {name: _spread(score) for name, score in scores.items() if score is not None}
    return {**found, "not_measured": missing} if missing else found


def _spread(score: ClassScore) -> dict[str, float]:
    return {"mean": score.mean, "sd": score.standard_deviation}


def describe_metrics(found: dict[str, Any]) -> list[str]:
    """The metrics that `metrics` returned, as lines of text."""
    lines = []
    for key, value in found.items():
        if key == "not_measured":
            lines += [f"{LABELS[name]}: not measured, {reason}" for name, reason in value.items()]
        elif not isinstance(value, dict):
            lines.append(f"{LABELS[key]}: {value:.4f}")
        elif "mean" in value:
            spread = "" if value["sd"] is None else f" ± {value['sd']:.5f}"
            blocks = f"{value['blocks']} {'blocks' if value['blocks'] > 1 else 'block'} of {value['block_size']}"
            lines.append(f"{LABELS[key]}: {value['mean']:.5f}{spread} ({blocks})")
        else:
            scores = (f"{score['mean']:.3f} ± {score['sd']:.3f} ({name})" for name, score in value.items())
            lines.append(f"{LABELS[key]}: {', '.join(scores)}")
    return lines

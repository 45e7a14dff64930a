"""The sentences of a report: which differences the numbers show, whether better, worse or too small to tell."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tdc_fast.evaluation.heldout import compare
from tdc_fast.report.numbers import Comparison, ModelResult

# A difference is clear if noise alone would cause one as large less than 1 time in 20.
CLEAR = 1.96  # standard errors, for a normal distribution
# The same for few draws of a distance, by Student's t: degrees of freedom -> standard errors.
CLEAR_BY_FREEDOM = {2: 4.30, 4: 2.78, 6: 2.45, 8: 2.31, 10: 2.23}


@dataclass(frozen=True)
class Verdict:
    """How a model compares with another one on one measure.

    Attributes:
        outcome: "better", "worse", or "level" if the difference is within the noise.
        sentence: the outcome in words, with numbers.
    """

    outcome: str
    sentence: str


def heldout_verdict(candidate: ModelResult, baseline: ModelResult) -> Verdict:
    """Compare the held-out loss over all timesteps, paired over images."""
    overall, _ = compare(candidate.heldout, baseline.heldout)
    size = f"{abs(overall.relative):.2%} ± {overall.standard_error:.2%}"
    if abs(overall.relative) <= CLEAR * overall.standard_error:
        return Verdict("level", f"level on held-out loss ({overall.relative:+.2%} ± {overall.standard_error:.2%})")
    if overall.relative < 0:
        return Verdict("better", f"better on held-out loss (lower by {size})")
    return Verdict("worse", f"worse on held-out loss (higher by {size})")


def frechet_verdict(candidate: ModelResult, baseline: ModelResult) -> Verdict:
    """Compare the mean Fréchet distance, with the standard error over the draws."""
    ours, theirs = candidate.frechet, baseline.frechet
    difference = ours.mean - theirs.mean
    draws = min(len(ours.values), len(theirs.values))
    error = math.hypot(ours.standard_deviation, theirs.standard_deviation) / math.sqrt(draws)
    clear = CLEAR_BY_FREEDOM.get(2 * (draws - 1), CLEAR) * error
    values = f"{ours.mean:.3g} against {theirs.mean:.3g}"
    if not abs(difference) > clear:  # also for a single draw, whose error is NaN
        return Verdict("level", f"level on Fréchet distance, within the noise of the draws ({values})")
    outcome = "better" if difference < 0 else "worse"
    return Verdict(outcome, f"{outcome} on Fréchet distance ({values})")


def versus(comparison: Comparison, candidate_key: str, baseline_key: str) -> str:
    """One sentence on two models: cost, held-out loss, Fréchet distance."""
    candidate, baseline = comparison.model(candidate_key), comparison.model(baseline_key)
    cost = comparison.training_cost(candidate) / comparison.training_cost(baseline)
    spent = "the same training compute" if abs(cost - 1) < 0.01 else f"{cost:.2f} times its training compute"
    sampling = candidate.sampling_macs / baseline.sampling_macs
    per_image = "the same" if abs(sampling - 1) < 0.005 else f"{sampling:.2f} times the"
    loss, distance = heldout_verdict(candidate, baseline), frechet_verdict(candidate, baseline)
    joint = "and" if loss.outcome == distance.outcome else "but"
    return (
        f"“{candidate.label}” against “{baseline.label}”: with {spent} and {per_image} compute per image, "
        f"{loss.sentence}, {joint} {distance.sentence}."
    )


def headline(comparison: Comparison, candidate_key: str, baseline_key: str) -> str:
    """Whether this run shows the method's claim: better samples for less training compute."""
    candidate, baseline = comparison.model(candidate_key), comparison.model(baseline_key)
    outcomes = {heldout_verdict(candidate, baseline).outcome, frechet_verdict(candidate, baseline).outcome}
    saved = 1 - comparison.training_cost(candidate) / comparison.training_cost(baseline)
    less = f"With {saved:.0%} less training compute, the pruned experts"
    worse = f"The claim is not confirmed. {less} are worse"
    shown = {
        frozenset({"better"}): f"{less} beat the uniform baseline on both measures",
        frozenset({"better", "level"}): f"{less} beat the uniform baseline on one measure and are level on the other",
        frozenset({"level"}): f"{less} are level with the uniform baseline on both measures",
        frozenset({"better", "worse"}): f"{less} are better on one measure and worse on the other",
        frozenset({"level", "worse"}): f"{worse} on one measure, level on the other",
        frozenset({"worse"}): f"{worse} on both measures",
    }
    return f"{shown[frozenset(outcomes)]}, in this run."


def group_sentence(comparison: Comparison, candidate_key: str, baseline_key: str) -> str:
    """One sentence on the difference in held-out loss by group."""
    candidate, baseline = comparison.model(candidate_key), comparison.model(baseline_key)
    _, per_group = compare(candidate.heldout, baseline.heldout)
    parts = []
    for i, difference in enumerate(per_group):
        clear = abs(difference.relative) > CLEAR * difference.standard_error
        parts.append(f"{comparison.interval} {i} {difference.relative:+.1%}{'' if clear else ' (not clear)'}")
    by = f"by {comparison.interval}: {', '.join(parts)}"
    return f"Held-out loss of “{candidate.label}” against “{baseline.label}” {by}."

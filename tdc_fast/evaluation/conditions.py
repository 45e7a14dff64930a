"""Class labels and guidance of samples: checking them, drawing labels, and the model with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tdc_fast.diffusion.guidance import GuidedDenoiser, check_scales
from tdc_fast.errors import invalid
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.denoisers import TrainedDenoiser
from tdc_fast.runs.limits import comma_numbers

MAX_GUIDANCE = 1000
LabelChoice = Literal["uniform", "data"]
"""How labels are drawn: each class as often as the others, or as often as the training images have it."""


def classes_to_draw(
    denoiser: TrainedDenoiser, classes: Sequence[int], labels: LabelChoice, null_class: int | None
) -> tuple[Sequence[int], list[int] | None]:
    """The classes that images are drawn of, and how likely each is.

    Args:
        denoiser: the denoiser.
        classes: the classes that are asked for; empty for all but the label for no class.
        labels: draw each class as often as the others, or as often as the training images have it.
        null_class: the label for no class where the denoiser's record does not tell it.

    Returns:
        The classes, and how many training images have each of them; None where all are equally likely.

    Raises:
        ValueError: the model was not trained on one of the classes, or it is not recorded how often they occur.
    """
    for value in classes:
        check_class("classes", value, denoiser.classes)
    chosen = classes or other_classes(denoiser.classes, null_class)
    if labels not in get_args(LabelChoice):
        raise invalid("labels", labels, f"one of {', '.join(get_args(LabelChoice))}")
    if labels == "uniform":
        return chosen, None
    if not denoiser.num_classes:
        raise invalid("labels", labels, "uniform, as the model has no classes")
    if not denoiser.class_counts:
        remedy = f"uniform, as {denoiser.name} does not record how many images had each class"
        raise invalid("labels", labels, remedy)
    counts = dict(zip(denoiser.classes, denoiser.class_counts, strict=True))
    return chosen, [counts[value] for value in chosen]


def other_classes(classes: Sequence[int], null_class: int | None) -> list[int]:
    """The classes without the label for no class.

    Raises:
        ValueError: there is no other class.
    """
    others = [value for value in classes if value != null_class]
    if classes and not others:
        raise invalid("null_class", null_class, "a label for no class beside the model's classes; it is their only one")
    return others


def draw_labels(
    classes: Sequence[int], count: int, generator: torch.Generator, weights: Sequence[float] | None = None
) -> Tensor:
    """Labels int64 (count,) on the CPU.

    Args:
        classes: the classes.
        count: how many labels.
        generator: on the CPU.
        weights: how likely each class is, up to a factor; None for each as likely as the others.
    """
    if weights is None:
        chosen = torch.randint(len(classes), (count,), generator=generator)
    else:
        shares = torch.tensor(weights, dtype=torch.float64)
        chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
    return torch.tensor(classes, dtype=torch.int64)[chosen]


def check_class(argument: str, value: int, classes: Sequence[int]) -> None:
    """Refuse a class that a model was not trained on.

    Args:
        argument: its name, for errors.
        value: the class.
        classes: the model's; empty for a model without classes.

    Raises:
        ValueError: naming the classes that there are.
    """
    if value not in classes:
        raise invalid(argument, value, f"classes that the model was trained on: {_ranges(classes)}")


def with_guidance(denoiser: TrainedDenoiser, scale: float | Sequence[float], null_class: int | None) -> nn.Module:
    """The model of a denoiser with guidance, or as it is where that is none.

    Args:
        denoiser: the denoiser.
        scale: the guidance scale, or one for each group of its timesteps; 1 is none.
        null_class: the label for no class; None takes the one that the denoiser was trained with.

    Raises:
        ValueError: the denoiser has no such label, or another number of groups.
    """
    no_class = denoiser.null_class if null_class is None else null_class
    scales = tuple(scale) if isinstance(scale, Sequence) else (scale,)
    groups = denoiser.groups if len(scales) > 1 else None
    check_guidance(scale, no_class, denoiser.num_classes, groups)
    if all(one == 1 for one in scales):
        return denoiser.model
    assert no_class is not None
    return GuidedDenoiser(denoiser.model, scale, no_class, groups)


def check_guidance(
    scale: float | Sequence[float], null_class: int | None, num_classes: int, groups: TimestepGroups | None = None
) -> None:
    """Refuse guidance that a model cannot give.

    Args:
        scale: the guidance scale, or one for each group of timesteps; 1 asks for none.
        null_class: the label that stands for no class, or None.
        num_classes: rows of the model's label embedding; 0 for a model without classes.
        groups: the model's groups of timesteps; None without.

    Raises:
        ValueError: naming what is missing.
    """
    check_scales(scale, groups)
    scales = tuple(scale) if isinstance(scale, Sequence) else (scale,)
    if not scales or not all(0 <= one <= MAX_GUIDANCE for one in scales):
        remedy = f"a number from 0 to {MAX_GUIDANCE}, or one for each group of timesteps; 1 is no guidance"
        raise invalid("guidance_scale", scale, remedy)
    if null_class is not None and not 0 <= null_class < num_classes:
        rows = (
            f"a label of the model from 0 to {num_classes - 1}" if num_classes else "none, as the model has no classes"
        )
        raise invalid("null_class", null_class, rows)
    if null_class is None and any(one != 1 for one in scales):
        remedy = (
            "1, or --null_class as well: the label that the model was trained with where it got no class (a run with "
            "--label_dropout knows it)"
        )
        raise invalid("guidance_scale", scale, remedy if num_classes else "1, as the model has no classes")


def read_guidance(text: str) -> float | list[float]:
    """The value of --guidance_scale: a number, or a list with one for each group.

    Raises:
        ValueError: an entry is no finite number, or there is none.
    """
    scales: list[float] = comma_numbers("guidance_scale", text, float)
    if not scales:
        raise invalid("guidance_scale", text, "a number, or a comma list of one for each group; 1 is no guidance")
    return scales if len(scales) > 1 else scales[0]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as "0 to 9, 12"; "none" if there are none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "none"

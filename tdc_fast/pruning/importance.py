"""The importance of every atom of every unit: Taylor importance on a group's own timesteps, and weight magnitude.

An atom is the smallest set of channels that is kept or dropped together: a normalisation group, or an attention head.
Its parameters are the rows and columns that its unit's slices name: in a ResBlock the rows of the first convolution and
of the embedding layer, the scale and shift of the norm, and the columns of the second convolution.

    Taylor      I(a) = sum over batches of | sum over the atom's parameters of w * dL/dw |
    magnitude   I(a) = sqrt(sum over the atom's parameters of w ** 2)

where L is the training loss of the batch at timesteps of one group. The inner sum is the first-order change of L when
all parameters of the atom are set to zero, so importance is in units of loss (P. Molchanov et al., "Importance
Estimation for Neural Network Pruning", arXiv 1906.10771, with the absolute value in place of the square; summed over
timesteps as in G. Fang et al., "Structural Pruning for Diffusion Models", arXiv 2305.10924).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.diffusion.calibration import Batch, Calibration
from tdc_fast.diffusion.protocols import DiffusionProcess
from tdc_fast.errors import invalid
from tdc_fast.nn.inference import denoiser_in
from tdc_fast.nn.modes import evaluating
from tdc_fast.nn.units import PruningUnit, UnitSlice

Importance = dict[str, np.ndarray]  # unit name -> (atoms,) float64


class TaylorImportance:
    """First-order importance of every atom, group by group.

    Args:
        model: the trained denoiser. Its weights, gradients and mode are left unchanged.
        units: its pruning units.
        diffusion: the process that the model was trained with.
        dtype: what the model computes in, as `tdc_fast.nn.inference.denoiser_in` takes it; weights and gradients are
            multiplied in fp64.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[PruningUnit],
        diffusion: DiffusionProcess,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._units = model, units
        self._axes = [(unit, part, tensor) for unit in units for part, tensor in _slice_tensors(model, unit)]
        self._tensors = list({id(tensor): tensor for *_, tensor in self._axes}.values())
        self._calibration = Calibration(model, diffusion, self._changes, denoiser_in(model, dtype))

    def of(self, batches: Iterable[Batch], group: tuple[int, int], *, seed: int = 0) -> Importance:
        """The importance on the timesteps of one group; arguments and result as in `taylor_importance`."""
        start, stop = group
        if not 0 <= start < stop:
            raise invalid("group", group, "the interval (start, stop) of at least one timestep")
        scores = {unit.name: np.zeros(unit.num_atoms) for unit in self._units}
        with evaluating(self._model), _requiring_grad(self._tensors), torch.enable_grad():
            for changes in self._calibration.of(batches, group, seed=seed):
                for name, change in changes.items():
                    scores[name] += np.abs(change.cpu().numpy())
        for name, values in scores.items():
            if not np.isfinite(values).all():
                where = f"the importance of {name} on timesteps {start} to {stop - 1}"
                raise FloatingPointError(f"{where} is infinite or NaN: the base has diverged")
        return scores

    def _changes(self, losses: Tensor) -> dict[str, Tensor]:
        """The first-order change of the mean loss without each atom, float64 (atoms,) by unit."""
        grads = torch.autograd.grad(losses.mean(), self._tensors, allow_unused=True)
        products = {
            id(tensor): tensor.detach().double() * grad.double()
            for tensor, grad in zip(self._tensors, grads, strict=True)
            if grad is not None
        }
        changes = {
            unit.name: torch.zeros(unit.num_atoms, dtype=torch.float64, device=losses.device) for unit in self._units
        }
        for unit, part, tensor in self._axes:
            if id(tensor) in products:
                changes[unit.name] += _per_atom(products[id(tensor)], unit, part)
        return changes


def taylor_importance(
    model: nn.Module,
    units: Sequence[PruningUnit],
    batches: Iterable[Batch],
    diffusion: DiffusionProcess,
    group: tuple[int, int],
    *,
    seed: int = 0,
) -> Importance:
    """First-order importance of every atom on the timesteps of one group.

    Args:
        model: the trained denoiser. Its weights, gradients and mode are left unchanged.
        units: its pruning units.
        batches: x0 (B, ...) or (x0, model_kwargs); see `Calibration` for timesteps and noise.
        diffusion: the process that the model was trained with.
        group: the timesteps (start, stop).
        seed: seed of timesteps and noise.

    Returns:
        {unit name: importance >= 0 of its atoms, float64 (atoms,)}.

    Raises:
        ValueError: the group has no timesteps.
        FloatingPointError: the model's gradients are infinite or NaN.
    """
    return TaylorImportance(model, units, diffusion).of(batches, group, seed=seed)


def magnitude_importance(model: nn.Module, units: Sequence[PruningUnit]) -> Importance:
    """Euclidean norm of every atom's parameters, {unit name: float64 (atoms,)}; it needs no data and no timesteps."""
    squares = {unit.name: np.zeros(unit.num_atoms) for unit in units}
    for unit in units:
        for part, tensor in _slice_tensors(model, unit):
            squares[unit.name] += _per_atom(tensor.detach().double() ** 2, unit, part).cpu().numpy()
    return {name: np.sqrt(total) for name, total in squares.items()}


def balanced(importance: Importance, weights: Mapping[str, float]) -> Importance:
    """Scale every unit's scores so that they sum to its weight; a unit of zeros is left unchanged.

    Magnitudes of different layers are not comparable. With the units' MACs as weights, the mean importance of an atom
    is its cost, and only differences within a unit count.

    Args:
        importance: scores of every unit, {unit name: (atoms,)}.
        weights: the wanted sums, {unit name: sum}.
    """
    return {name: scores * (weights[name] / (scores.sum() or 1.0)) for name, scores in importance.items()}


def _slice_tensors(model: nn.Module, unit: PruningUnit) -> Iterator[tuple[UnitSlice, Tensor]]:
    """The parameters of a unit: weights, and for output channels also biases."""
    for part in unit.slices:
        leaf = model.get_submodule(part.module)
        names = ("weight", "bias") if part.dim == "out" else ("weight",)
        for name in names:
            tensor = getattr(leaf, name, None)
            if tensor is not None:
                yield part, tensor


def _per_atom(values: Tensor, unit: PruningUnit, part: UnitSlice) -> Tensor:
    """Sum a parameter-shaped tensor over everything but the unit's atoms: (atoms,) float64."""
    axis = 1 if part.dim == "in" else 0
    per_entry = values.movedim(axis, 0).flatten(1).sum(1) if values.dim() > 1 else values
    span = unit.atom * part.scale
    if per_entry.numel() != part.copies * unit.num_atoms * span:
        raise invalid(
            f"slices of {unit.name}", (part, per_entry.numel()), f"{part.copies} x {unit.num_atoms} x {span} entries"
        )
    return per_entry.view(part.copies, unit.num_atoms, span).sum((0, 2))


@contextmanager
def _requiring_grad(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Require gradients inside the block, also of a frozen copy such as an EMA."""
    flags = [tensor.requires_grad for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)

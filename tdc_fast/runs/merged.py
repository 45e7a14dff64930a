"""The experts of a run, or files of weights, merged into one dense denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdc_fast.errors import invalid
from tdc_fast.models.iddpm import UNet
from tdc_fast.nn.merging import Merging, expert_states, merge_states
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.runs.denoisers import TrainedDenoiser


def merge_run(experts: TrainedDenoiser, merging: Merging) -> TrainedDenoiser:
    """One dense denoiser of a run's experts, from the averages (EMA) that the run is sampled with.

    Args:
        experts: the experts of a run, as `from_run(run, "experts")` reads them, in fp32.
        merging: how.

    Raises:
        ValueError: it is no run with experts, or has another number of them than there are weights.
        FloatingPointError: a merged weight is not finite.
    """
    if experts.run is None or not isinstance(experts.model, RoutedModel):
        raise invalid("experts", experts.name, "the experts of a run, in float32")
    model = experts.run.base()
    states = expert_states(experts.model, model, merging.missing)
    model.load_state_dict(merge_states(model.state_dict(), states, merging))
    return replace(experts, model=model.eval(), name=f"{experts.name}, merged")


def merge_files(base: TrainedDenoiser | None, experts: Sequence[TrainedDenoiser], merging: Merging) -> TrainedDenoiser:
    """One dense denoiser of several of one architecture.

    Args:
        base: what they were all trained from; only task arithmetic needs it.
        experts: the denoisers, in float32.
        merging: how.

    Raises:
        ValueError: task arithmetic without a base, or denoisers of another architecture or latents; names the file.
        FloatingPointError: a merged weight is not finite.
    """
    if merging.method == "task_arithmetic" and base is None:
        raise invalid("base", "", "--base FILE, the weights that the experts were trained from, for task arithmetic")
    first = base or experts[0]
    for expert in experts:
        ours, theirs = (_architecture(denoiser) for denoiser in (first, expert))
        if ours != theirs:
            raise invalid("experts", expert.name, f"a file with the architecture and the data of {first.name}")
    state = first.model.state_dict()
    merged = merge_states(state, [expert.model.state_dict() for expert in experts], merging)
    first.model.load_state_dict(merged)
    return replace(first, name=", ".join(expert.name for expert in experts) + ", merged")


def _architecture(denoiser: TrainedDenoiser) -> object:
    assert isinstance(denoiser.model, UNet)
    return denoiser.model.architecture, denoiser.num_classes, denoiser.latents

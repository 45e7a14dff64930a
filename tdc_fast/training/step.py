"""One step of training, from the draw of timesteps to the averages of the weights, as work that a GPU can replay."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from tdc_fast.diffusion import Diffusion, distilled_losses
from tdc_fast.diffusion.protocols import Denoiser
from tdc_fast.diffusion.timestep_samplers import Draw, TimestepSampler
from tdc_fast.nn.inference import denoiser_in
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.config import TrainConfig
from tdc_fast.training.ema import WeightAverages
from tdc_fast.training.expert_rows import SlowRows, blocks_of, clip_by_row
from tdc_fast.training.optimization import create_optimizer, gradient_norm, rate_of
from tdc_fast.training.portion import Shard
from tdc_fast.training.stage import Stage
from tdc_fast.training.telemetry import QUARTILES, RunningMeans


class TrainingStep:
    """Draws timesteps and noise, trains the model on one batch, and lets an adaptive sampler learn from its losses.

    Nothing here waits for the device, and every number that changes from step to step is a tensor. So the same code
    runs as it is and from a CUDA graph (`tdc_fast.graphs`).

    Args:
        config: the settings of the optimizer.
        stage: the settings of the stage.
        model: changed in place.
        diffusion: its process.
        sampler: draws timesteps.
        groups: groups by which losses are logged; None for none.
        shard: the part of every batch that this process trains on, of several; None for the whole batch.

    Attributes:
        optimizer: AdamW.
        averages: the moving averages of the weights.
        means: the running means of the log.
        samples_per_group: samples so far, int64 (N,), or (1,) without groups.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        model: nn.Module,
        diffusion: Diffusion,
        sampler: TimestepSampler,
        groups: TimestepGroups | None,
        shard: Shard | None = None,
    ) -> None:
        device = next(model.parameters()).device
        num_groups = groups.num_groups if groups else 0
        self.optimizer = create_optimizer(model, config.lr, config.weight_decay)
        self.averages = WeightAverages(model, config.ema_rates, config.ema_ramp is True, stage.ema_lengths)
        in_part = shard is not None and shard.experts is not None
        self.means = RunningMeans(num_groups, device, stage.group_weights, partial_norms=in_part)
        self.samples_per_group = torch.zeros(max(num_groups, 1), dtype=torch.int64, device=device)
        self._config, self._stage, self._diffusion = config, stage, diffusion
        self._sampler, self._groups, self._device, self._shard = sampler, groups, device, shard
        self._parameters = list(model.parameters())
        self._blocks = blocks_of(model)
        self._slow = SlowRows(self._blocks, stage.rate_factors) if stage.rate_factors else None
        self._cast_once = model.cast_once if isinstance(model, RoutedModel) else nullcontext
        self._denoise: Denoiser = denoiser_in(model, torch.bfloat16 if config.mixed_precision else torch.float32)

    def __call__(
        self,
        x: Tensor,
        condition: Mapping[str, Tensor],
        prepared: Mapping[str, Tensor],
        rate: Tensor,
        n: Tensor,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Train on one batch, or on this process's part of it.

        Args:
            x: images (b, C, H, W); b is B but for a part.
            condition: further arguments of the model, each (b, ...).
            prepared: what the sampler prepared for B samples.
            rate: the learning rate, 0-dim.
            n: number of the step, from 1: float64, 0-dim.
            places: the places of these images in the whole batch, int64 (b,); None for the whole batch.

        Returns:
            The timesteps (b,) and the unweighted losses (b,).
        """
        condition = self._with_labels_dropped(condition, places)
        whole, drawn, noise = self._draw(x, prepared, places)
        group = self._group_of(drawn)
        if group is not None and self._chooses_experts:
            own = None if self._shard is None else self._shard.experts
            condition = {**condition, "expert_ids": group if own is None else own[group]}
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(x, drawn.t, noise, drawn.weights, condition, len(whole.t))
        self._count(drawn, group, losses)
        limit = self._config.grad_clip
        norm = clip_by_row(self._blocks, limit) if self._blocks else gradient_norm(self._parameters, limit)
        self.means.add_gradient_norm(self._counted(norm))
        rate_of(self.optimizer).copy_(rate)
        if self._slow is not None:
            self._slow.keep()
        self.optimizer.step()
        if self._slow is not None:
            self._slow.move_back()
        self.averages.update(n)
        if self._sampler.adaptive:
            self._learn(whole, drawn, losses["loss"])
        return drawn.t, losses["loss"]

    def _with_labels_dropped(self, condition: Mapping[str, Tensor], places: Tensor | None) -> Mapping[str, Tensor]:
        """The arguments with a share of the labels replaced by the one for no class; without that, nothing is drawn."""
        share, no_class = self._config.label_dropout, self._config.null_class
        if no_class is None:
            return condition
        if self._shard is None or places is None:
            drawn = torch.rand(condition["y"].shape, device=self._device)
        else:
            size, generator = self._shard.portion.batch_size, self._shard.generator
            drawn = torch.rand(size, generator=generator, device=self._device)[places]
        dropped = drawn < share
        return {**condition, "y": condition["y"].masked_fill(dropped, no_class)}

    def _draw(self, x: Tensor, prepared: Mapping[str, Tensor], places: Tensor | None) -> tuple[Draw, Draw, Tensor]:
        """Timesteps of the whole batch, and timesteps and noise of the samples x."""
        if self._shard is None or places is None:
            drawn = self._sampler.draw(len(x), prepared, device=self._device)
            return drawn, drawn, torch.randn_like(x)
        size, generator = self._shard.portion.batch_size, self._shard.generator
        whole = self._sampler.draw(size, prepared, generator=generator, device=self._device)
        own = Draw(*(None if part is None else part[places] for part in whole))  # type: ignore[arg-type]
        return whole, own, self._shard.noise_like(x)[places]

    def _learn(self, whole: Draw, drawn: Draw, losses: Tensor) -> None:
        """Let an adaptive sampler learn: in stage 1 from the whole batch, in stage 2 each process from its samples."""
        if self._shard is None or self._shard.experts is not None:
            self._sampler.update(drawn.t, losses)
        else:
            self._sampler.update(whole.t, self._shard.losses_of_all(losses))

    @property
    def _chooses_experts(self) -> bool:
        """Whether the model is told the expert of each sample, which its timestep alone does not say."""
        return self._stage.soft_boundaries or (self._shard is not None and self._shard.experts is not None)

    def _counted(self, norm: Tensor) -> Tensor:
        """A gradient norm, once for the processes that have the same weights."""
        repeated = self._shard is not None and self._shard.experts is not None and self._shard.portion.member > 0
        return torch.zeros_like(norm) if repeated else norm

    def _group_of(self, drawn: Draw) -> Tensor | None:
        if self._chooses_experts:
            return drawn.groups
        return self._groups.group_of(drawn.t) if self._groups else None

    def _backward(
        self,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        weights: Tensor,
        condition: Mapping[str, Tensor],
        batch_size: int,
    ) -> dict[str, Tensor]:
        """Add the gradient of the whole batch's mean loss, microbatch by microbatch; the losses (b,) by name."""
        gradients = None if self._shard is None else self._shard.gradients
        microbatch = self._config.microbatch
        size = microbatch if microbatch > 0 else len(x)
        parts: list[dict[str, Tensor]] = []
        with self._cast_once():
            for start in range(0, len(x), size):
                part = slice(start, start + size)
                labels = {name: value[part] for name, value in condition.items()}
                losses = self._losses(x[part], t[part], noise[part], labels)
                # Divided by the whole batch's size: the parts add up to the gradient of the unsplit batch.
                mean = (losses["loss"] * weights[part]).sum() * (self._stage.loss_scale / batch_size)
                is_last = start + size >= len(x)
                with gradients.during_backward() if gradients is not None and is_last else nullcontext():
                    mean.backward()
                parts.append({name: value.detach() for name, value in losses.items()})
        return parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _losses(self, x: Tensor, t: Tensor, noise: Tensor, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._stage.teacher is None:
            return self._diffusion.training_losses(self._denoise, x, t, noise, condition)
        of_teacher = {name: value for name, value in condition.items() if name != "expert_ids"}
        weight = self._config.distillation_weight
        return distilled_losses(
            self._diffusion, self._denoise, self._stage.teacher, weight, x, t, noise, condition, of_teacher
        )

    def _count(self, drawn: Draw, group: Tensor | None, losses: dict[str, Tensor]) -> None:
        if group is None:
            self.samples_per_group += len(drawn.t)
        else:
            self.samples_per_group.index_add_(0, group, torch.ones_like(group))
        # improved-diffusion logs weighted losses; for a stratified batch the unweighted loss of each group is logged.
        if self._stage.group_weights is None:
            losses = {name: value * drawn.weights for name, value in losses.items()}
        quartiles = (drawn.t * QUARTILES).div(self._diffusion.num_timesteps, rounding_mode="floor")
        self.means.add(losses, quartiles, group)

"""The training loop of a stage: steps, averages, log rows, checkpoints, and resuming bit for bit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdc_fast.data.stream import BatchStream
from tdc_fast.data.transfer import to_device
from tdc_fast.diffusion import Diffusion
from tdc_fast.diffusion.timestep_samplers import TimestepSampler
from tdc_fast.distributed import on_all, world
from tdc_fast.errors import invalid
from tdc_fast.graphs import CannotCapture, graphed
from tdc_fast.progress import on_terminal
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.averages import UNTRAINED, initial_share
from tdc_fast.runs.checkpoint import (
    discard_after,
    ema_file,
    finished_steps,
    model_file,
    optimizer_file,
    save_checkpoint,
    state_file,
)
from tdc_fast.runs.directory import RunDirectory
from tdc_fast.runs.opening import find_step
from tdc_fast.runs.weights import read_state
from tdc_fast.training.distributed_state import DistributedState, WholeModel
from tdc_fast.training.interrupts import StopRequest, TrainingInterrupted, how_to_continue, interrupts_named
from tdc_fast.training.optimization import load_moments
from tdc_fast.training.portion import Shard, groups_in
from tdc_fast.training.random_state import check_random_state, random_state, restore_random_state
from tdc_fast.training.stage import Stage
from tdc_fast.training.step import TrainingStep
from tdc_fast.training.stop_agreement import StopAgreement
from tdc_fast.training.stored_state import StoredState, read_moments, read_rest
from tdc_fast.training.telemetry import MAX_UNSETTLED, ProgressLog, speed_words
from tdc_fast.training.throughput import Throughput, throughput_on


class StageLoop:
    """Trains a model; model, data and sampler are changed in place.

    The caller seeds torch's generators; every draw of the stage comes from them.

    As one of several processes (`shard`) it trains on its part of every batch. All call its methods together; the first
    process writes the files, which are those that one process writes.

    Args:
        run: where checkpoints and logs go; its configuration has the optimizer's settings.
        stage: the settings of the stage.
        model: the base, or all experts as one routed model.
        diffusion: its process.
        data: batches of images.
        sampler: draws timesteps.
        groups: groups by which losses are logged; None for none.
        shard: the part of every batch that this process trains on; None for the whole batch.
        distributed_state: which of the weights this process has; None for all of them.

    Attributes:
        step: finished steps.
        averages: the moving averages of the weights.
    """

    def __init__(
        self,
        run: RunDirectory,
        stage: Stage,
        model: nn.Module,
        diffusion: Diffusion,
        data: BatchStream,
        sampler: TimestepSampler,
        groups: TimestepGroups | None,
        shard: Shard | None = None,
        distributed_state: DistributedState | None = None,
    ) -> None:
        config = run.config
        self.run, self.stage, self.model = run, stage, model
        self.data, self.sampler = data, sampler
        self.device = next(model.parameters()).device
        self.step = 0
        work = TrainingStep(config, stage, model, diffusion, sampler, groups, shard)
        self.optimizer, self.averages, self.means = work.optimizer, work.averages, work.means
        self.samples_per_group = work.samples_per_group
        self.shard, self.distributed_state, self._world = shard, distributed_state or WholeModel(model), world()
        self._settled = 0
        self._totals = self.samples_per_group
        if shard is not None:
            shard.begin_draws()
            data.part = self._places
        self.wall_seconds = 0.0
        self._work: Callable[..., tuple[Tensor, Tensor]] = work
        if config.cuda_graph != "off":
            self._work = graphed(
                work,
                self.device,
                name=f"the step of stage {stage.name}",
                modules=[model] if stage.teacher is None else [model, stage.teacher],
                generators=[] if shard is None else [shard.generator],
                clone=False,
                required=config.cuda_graph == "on",
            )

    @property
    def directory(self) -> Path:
        """Where the stage's checkpoints are."""
        return self.run.stage_directory(self.stage.name)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.stage.steps is not None and self.step >= self.stage.steps

    @property
    def samples(self) -> int:
        """Images that this stage has trained on so far, of several processes as of the last report or checkpoint."""
        return int(self._totals.sum())

    @property
    def macs(self) -> int:
        """MACs that this stage has spent on these images."""
        samples = self._totals.tolist()
        if len(self.stage.macs_per_sample) == 1:
            return sum(samples) * self.stage.macs_per_sample[0]
        return sum(count * macs for count, macs in zip(samples, self.stage.macs_per_sample, strict=True))

    def train(self) -> None:
        """Run to the end of the stage.

        Raises:
            TrainingInterrupted: after Ctrl-C, SIGTERM or SIGHUP; everything up to the last finished step is saved.
            FloatingPointError: the loss is no longer finite.
            ValueError: the step cannot be captured and --cuda_graph is on.
        """
        config = self.run.config
        shown = config.progress == "always" or (config.progress == "auto" and on_terminal())
        self.model.train()
        self._warn_of_untrained_averages()
        shown = shown and self._world.first
        log = self._world.by_first(lambda: self._open_log(quiet=shown))
        bar = _progress_bar(self.stage.name, self.step, self.stage.steps) if shown else None
        throughput = throughput_on(self.device, torch.bfloat16 if config.mixed_precision else torch.float32)
        if throughput is not None:
            throughput.start(self.samples, self.macs)
        self._clock = time.perf_counter()
        try:
            with interrupts_named(self.run, self.stage.name), StopRequest() as stop:
                agreement = StopAgreement(self._world)
                while not self.finished:
                    self._train_step()
                    if bar is not None:
                        bar.update()
                    if self.step % config.log_interval == 0 or self.finished:
                        self._report(log, bar, throughput)
                    elif self.step - self._settled >= MAX_UNSETTLED:
                        self._settle()
                    saves = self.step % config.save_interval == 0 or self.finished
                    stops = agreement.stops_at(self.step, stop.requested, waits=saves)
                    if saves or stops:
                        if log is not None:
                            log.sync()
                        self.save()
                    if stops:
                        raise on_all(
                            TrainingInterrupted(
                                f"stopped after step {self.step} of stage {self.stage.name}, which is saved; "
                                + how_to_continue(self.run.path)
                            )
                        )
        except FloatingPointError as error:
            if log is not None:
                log.say(str(error))
            raise
        finally:
            if log is not None:
                log.close()
            if bar is not None:
                bar.close()

    def _open_log(self, quiet: bool) -> ProgressLog:
        name = self.stage.name
        board = self.run.path / "tensorboard" / name if self.run.config.tensorboard else None
        directory = self.run.log_directory(name)
        return ProgressLog(directory, self.step, board, quiet=quiet, stage=name, steps=self.stage.steps)

    def _warn_of_untrained_averages(self) -> None:
        config, steps = self.run.config, self.stage.steps
        if steps is None or self.finished or config.ema_ramp:
            return
        rate = config.ema_rates[0]
        share = initial_share(rate, steps)
        if share > UNTRAINED:
            use = "sampling uses" if self.stage.name == "experts" or not config.groups else "the experts are split from"
            warnings.warn(
                f"after the {steps} steps of stage {self.stage.name} the average of --ema_rate {rate}, which {use}, is "
                f"still {share:.0%} the weights that it starts from; set --ema_ramp True or a lower --ema_rate",
                stacklevel=2,
            )

    def _train_step(self) -> None:
        prepared = self.sampler.prepare(self.stage.batch_size)
        places: tuple[Tensor, ...] = ()
        if self.shard is not None:
            self._groups_now = groups_in(prepared)
            places = (torch.from_numpy(self._places(0)),)
            if self.run.config.dropout:
                self.shard.own_draws(self.run.config.seed, self.stage.name, self.step)
        x, condition = next(self.data)
        rate = torch.tensor(self.stage.learning_rate(self.step), dtype=torch.float64)
        n = torch.tensor(float(self.step + 1), dtype=torch.float64)
        batch = (x, condition, prepared, rate, n, *places)
        try:
            self._work(*to_device(batch, self.device))
        except CannotCapture as error:
            raise invalid("cuda_graph", "on", f"auto or off: {error}") from error
        self.step += 1

    def _places(self, ahead: int) -> np.ndarray:
        """The places in a batch of the images that this process trains on."""
        assert self.shard is not None
        if ahead:
            return self.shard.portion.later(self.sampler, ahead)
        return self.shard.portion.places(self._groups_now)

    def _settle(self) -> None:
        """Bring together in the first process what all have counted since the last time."""
        self._settled = self.step
        if self.shard is None:
            return
        first, total = self._world.first, self._world.sum
        self.means.settle(total, first)
        self._totals = total(self.samples_per_group)
        self.samples_per_group.copy_(self._totals if first else torch.zeros_like(self._totals))
        if self.shard.experts is not None:
            self.sampler.settle(total, first)

    def _finite_means(self) -> dict[str, float | None]:
        means = self.means.take()
        for name, mean in {"loss": means.get("loss"), **means}.items():
            if mean is not None and not math.isfinite(mean):
                what = "the loss" if name == "loss" else name
                raise self._diverged(f"{what} of stage {self.stage.name} is {mean} at step {self.step}")
        return means

    def _report(self, log: ProgressLog | None, bar: Any, throughput: Throughput | None) -> None:
        self._settle()
        means = self._world.from_first(self._finite_means, "telemetry")
        self.wall_seconds += self._lap()
        if log is None:
            return
        loss = means.get("loss")
        row: dict[str, float | int | None] = {
            "step": self.step,
            "samples": self.samples,
            **means,
            "lr": self.stage.learning_rate(self.step - 1),
            "macs": self.stage.macs_before + self.macs,
            **self.sampler.columns(),
        }
        if self.run.config.mixed_precision:
            row["lg_loss_scale"] = 0  # bf16 has fp32's range: the loss is not scaled
        row["wall_seconds"] = round(self.wall_seconds, 3)
        if throughput is not None:
            row |= throughput.columns(self.samples, self.macs)
        log.row(row)
        if bar is not None and loss is not None:
            bar.set_postfix_str(", ".join([f"loss={loss:.4f}", *speed_words(row)]))

    def _lap(self) -> float:
        now = time.perf_counter()
        passed, self._clock = now - self._clock, now
        return passed

    def description(self) -> dict[str, Any]:
        """The description that every checkpoint of this stage carries, and that a loaded one must carry."""
        return self.run.description(self.stage.name, **self.stage.origin)

    def save(self) -> None:
        """Write a checkpoint of the current step.

        Raises:
            FloatingPointError: weights, averages or optimizer hold infinities or NaN; nothing is written then.
        """
        self.wall_seconds += self._lap()
        self._settle()
        stored = self.distributed_state.gathered(self.averages, self.optimizer)
        self._world.by_first(lambda: self._write(*stored) if stored is not None else None, "checkpoints")

    def _write(
        self, model: Mapping[str, Tensor], averages: Mapping[str, Mapping[str, Tensor]], optimizer: Mapping[str, Any]
    ) -> None:
        contents: dict[str, Any] = {model_file(self.step): model}
        for rate, state in averages.items():
            contents[ema_file(rate, self.step)] = state
        contents[optimizer_file(self.step)] = optimizer
        contents[state_file(self.step)] = {
            "step": self.step,
            "random": random_state(None if self.shard is None else self.shard.generator),
            "data": self.data.state_dict(),
            "sampler": self.sampler.state_dict(),
            "means": self.means.state_dict(),
            "samples_per_group": self.samples_per_group,
            "wall_seconds": self.wall_seconds,
        }
        macs = self.stage.macs_before + self.macs
        try:
            save_checkpoint(self.directory, self.step, contents, {**self.description(), "macs": macs})
        except FloatingPointError as error:
            raise self._diverged(f"stage {self.stage.name} diverged by step {self.step}: {error}") from error

    def _diverged(self, what: str) -> FloatingPointError:
        """The error for a stage whose numbers are no longer finite: where to go on from, and what to change."""
        config = self.run.config
        name = "stage2_lr" if self.stage.name == "experts" and config.stage2_lr else "lr"
        steps = finished_steps(self.directory)
        last = f"the last finite checkpoint is step {steps[-1]}" if steps else "there is no checkpoint before it"
        return FloatingPointError(
            f"{what}. Nothing of this step is saved; {last}. Lower the learning rate and limit the gradients: "
            f"{how_to_continue(self.run.path)} --override {name}={getattr(config, name) / 10:g},grad_clip=1"
            + (" (and --resume_step for an earlier checkpoint, where that one is ruined already)" if steps[1:] else "")
        )

    def resume(self) -> bool:
        """Continue from the stage's latest checkpoint, or from `config.resume_step`.

        Returns:
            False if there is no checkpoint: the stage begins at step 0.

        Raises:
            ValueError: the checkpoint is damaged or of another run; names the file and the last good checkpoint.
        """
        expected = {key: value for key, value in self.description().items() if key != "config"}
        step = self._world.from_first(lambda: find_step(self.run, self.stage.name, expected, self._check))
        if step is not None:
            self.restore(self.directory, step, exact=True)
        self._world.by_first(lambda: discard_after(self.directory, step or 0))
        return step is not None

    def restore(self, directory: Path, step: int, exact: bool) -> None:
        """Load model, averages and optimizer of a checkpoint, once all its files are read and checked.

        Args:
            directory: of the checkpoint.
            step: its step.
            exact: load also random numbers, data position and the rest of the state.

        Raises:
            ValueError: a file is damaged or does not fit the model; names it.
        """
        read = self._world.by_first(lambda: self._read(directory, step, exact))
        stored = self.distributed_state.scattered(read)
        self.model.load_state_dict(stored.model)
        for rate, state in stored.averages.items():
            self.averages.load_state_dict(rate, state)
        load_moments(self.optimizer, stored.moments)
        self.step = step
        if stored.rest is None:
            return
        self.data.load_state_dict(self._data_position(stored.rest["data"]))
        self.sampler.load_state_dict(stored.rest["sampler"])
        self.means.load_state_dict(stored.rest["means"])
        self.samples_per_group.copy_(stored.rest["samples_per_group"])
        self._totals = self.samples_per_group if self.shard is None else self.samples_per_group.clone()
        self.wall_seconds = float(stored.rest["wall_seconds"])
        restore_random_state(stored.rest["random"])
        if self.shard is not None:
            self.shard.begin_draws(stored.rest["random"])
            if not self._world.first:  # what was counted before is the first process's
                self.means.clear()
                self.samples_per_group.zero_()
                if self.shard.experts is not None:
                    self.sampler.settle(torch.clone, keep=False)

    def _data_position(self, position: Mapping[str, int]) -> dict[str, int]:
        """The position in the data of a checkpoint, in batches of the size that holds since it was overridden."""
        before, size = position["batch_size"], self.data.batch_size
        if before == size or not self.run.overridden & {"batch_size", "stage2_batch"}:
            return dict(position)
        epoch, index = position["epoch"], position["index"] * before // size
        if index >= self.data.batches_per_epoch:
            epoch, index = epoch + 1, 0
        return {**position, "batch_size": size, "epoch": epoch, "index": index}

    def _check(self, step: int) -> None:
        """ValueError if a finished checkpoint of the stage does not fit the model."""
        self._read(self.directory, step, exact=True)

    def _read(self, directory: Path, step: int, exact: bool) -> StoredState:
        weights = self.distributed_state.whole.state_dict()
        parameters = dict(self.distributed_state.whole.named_parameters())
        return StoredState(
            model=read_state(directory / model_file(step), weights),
            averages={rate: read_state(directory / ema_file(rate, step), weights) for rate in self.averages.averages},
            moments=read_moments(directory / optimizer_file(step), parameters),
            rest=self._read_rest(directory / state_file(step), step) if exact else None,
        )

    def _read_rest(self, path: Path, step: int) -> Mapping[str, Any]:
        means = {name: value for name, value in self.means.state_dict().items() if name != "sums"}
        rest = read_rest(path, step, self.samples_per_group, means)
        try:  # on copies: nothing is loaded before everything is checked
            copy(self.data).load_state_dict(self._data_position(rest["data"]))
            copy(self.sampler).load_state_dict(rest["sampler"])
            float(rest["wall_seconds"])
            check_random_state(rest["random"])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            remedy = f"the state of this training: {' '.join(str(error).split())}"
            raise invalid("checkpoint", str(path), remedy) from error
        return rest


def _progress_bar(name: str, step: int, steps: int | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=step, desc=f"training {name}", unit="step", dynamic_ncols=True, smoothing=0.05)

"""The tree-structured Parzen estimator of optuna as an agent."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from tdc_fast.errors import require
from tdc_fast.pruning.agents.starts import distinct, starting_proposals
from tdc_fast.pruning.task import Proposal, Task


class Tpe:
    """Models the widths of good and of other trials over all units jointly (J. Bergstra et al., 2011).

    In each round a new study is told the trials of the memory, with the widths after projection, and asked for the next
    candidates. The first round is that of `starting_proposals`.

    Raises:
        ImportError: optuna is not installed; names the extra `search`.
    """

    name = "tpe"

    def __init__(self) -> None:
        self.optuna: Any = require("optuna", extra="search")

    def propose(self, task: Task, count: int) -> list[Proposal]:
        """Return `count` samples of the estimator, or starting points while nothing is scored."""
        if not any(trial.score is not None for trial in task.memory):
            return starting_proposals(task, count)
        return distinct(task, [], self._asked(task), count)

    def _asked(self, task: Task) -> Iterator[Proposal]:
        optuna = self.optuna
        space = {
            unit.name: optuna.distributions.IntDistribution(0, unit.channels, step=unit.step) for unit in task.units
        }
        seed = int(task.rng().integers(2**31))
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate and constant_liar count as experimental
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=0)
            study = optuna.create_study(sampler=sampler)
            for trial in task.memory:
                if trial.score is not None:
                    told = optuna.trial.create_trial(params=trial.widths, distributions=space, value=trial.score)
                    study.add_trial(told)
        optuna.logging.set_verbosity(verbosity)
        told = len(study.trials)
        while True:
            yield Proposal(dict(study.ask(fixed_distributions=space).params), f"sampled from a model of {told} trials")

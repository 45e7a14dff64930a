"""Who takes part in the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tdc_fast.errors import invalid
from tdc_fast.serving.live import LiveRequest

PolicyName = Literal["slack", "fifo", "shortest"]


@dataclass(frozen=True)
class Policy:
    """Which requests go first when not all fit into the batch. The order is decided again before every step.

    slack: the request that arrived first, where a request counts as one step older for each of its steps. This
    shortens the longest latencies. fifo: the request that arrived first. shortest: the request with the fewest
    remaining steps, where each `patience` engine steps of age count as one step less; most requests finish sooner,
    and long ones later.

    A request's rank depends on its own steps and arrival alone, does not grow, and whoever is first takes part in every
    step. So only a bounded number of later requests can ever go before it, and it ends.

    Attributes:
        name: "slack", "fifo" or "shortest".
        patience: engine steps of waiting that count as one remaining step less; only of "shortest".

    Raises:
        ValueError: there is no such policy.
    """

    name: PolicyName = "slack"
    patience: float = 4.0

    def __post_init__(self) -> None:
        if self.name not in ("slack", "fifo", "shortest"):
            raise invalid("policy", self.name, '"slack", "fifo" or "shortest"')
        if not self.patience > 0:
            raise invalid("patience", self.patience, "a number of steps above 0")

    def rank(self, live: LiveRequest) -> tuple[float, int]:
        """Lower goes first."""
        if self.name == "slack":
            return live.arrived - live.plan.timesteps.size, live.number
        if self.name == "fifo":
            return 0.0, live.number
        return live.remaining + live.arrived / self.patience, live.number

    def choose(self, waiting: Sequence[LiveRequest], places: int) -> list[LiveRequest]:
        """The requests of a step with so many places: in the order of rank, those that fit."""
        chosen = []
        for live in sorted(waiting, key=self.rank):
            if live.rows <= places:
                chosen.append(live)
                places -= live.rows
            if not places:
                break
        return chosen

    def choose_filled(
        self, waiting: Sequence[LiveRequest], places: int, sizes: Sequence[int], min_fill: float
    ) -> list[LiveRequest]:
        """As `choose`, where batches have sizes.

        Args:
            waiting: the live requests.
            places: the most places of the step.
            sizes: the sizes of batches, increasing; () for all.
            min_fill: where a batch would fill less of its size than this, the next smaller size is filled.
        """
        chosen = self.choose(waiting, places)
        rows = sum(live.rows for live in chosen)
        smaller = [size for size in sizes if size < rows]
        if smaller and rows < min_fill * sizes[len(smaller)]:
            fewer = self.choose(waiting, smaller[-1])
            if fewer[:1] == chosen[:1]:  # whoever is first takes part in every step, or might never
                return fewer
        return chosen

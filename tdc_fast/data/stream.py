"""The endless shuffled stream of batches that training reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from tdc_fast.data.dataset import Dataset, DrawsAnew
from tdc_fast.data.transfer import Arriving, Transfer, to_device
from tdc_fast.errors import invalid

Batch = tuple[Tensor, dict[str, Tensor]]
Position = tuple[int, int]


class BatchStream:
    """Endless shuffled batches, each as `Dataset.batch` returns it, or drawn anew in each epoch (`DrawsAnew`).

    The order of the images in an epoch depends only on the seed and the number of the epoch. An incomplete last batch
    is dropped. If there are fewer images than a batch, they repeat inside it: an epoch is then one batch, in which
    every image appears equally often, give or take one. Several processes have the same batches and the same position
    in them; each loads its `part` of every batch.

    Threads load batches before they are asked for, and copy them to the device, while the step before runs. That
    changes neither the batches nor their order, nor the position that is saved. An error in a thread is raised where
    its batch is asked for.

    Args:
        dataset: the images.
        batch_size: images per batch.
        seed: seed of the order.
        workers: threads that load ahead, each a whole batch; 0 loads a batch when it is asked for.
        device: where the batches are; None leaves them where the dataset has them.

    Attributes:
        part: which images of a batch are loaded: called with how many batches it is after the one asked for next (0 for
            that one), it gives their places in the batch, int64 (b,). What it says of later batches may turn out wrong.
            None for all images.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int = 0,
        *,
        workers: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise invalid("batch_size", batch_size, "at least one image")
        if workers < 0:
            raise invalid("workers", workers, "a number of threads, 0 for none")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.part: Callable[[int], np.ndarray] | None = None
        self.epoch, self.index = 0, 0
        self._order_of: tuple[int, np.ndarray] | None = None
        self._workers, self._device = workers, device
        self._transfer = None if device is None else Transfer(device)
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[Position, np.ndarray, Future[Arriving]]] = deque()

    @property
    def batches_per_epoch(self) -> int:
        """Batches per epoch, at least one."""
        return max(1, len(self.dataset) // self.batch_size)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        position = (self.epoch, self.index)
        if not self._workers:
            batch = self._read(position[0], self._indices(*position, ahead=0))
            batch = batch if self._device is None else to_device(batch, self._device)
        else:
            self._load_ahead(position, ahead=0)
            batch = self._ahead[0][2].result().wait()
            self._ahead.popleft()
        self.epoch, self.index = self._after(*position)
        if self._workers:
            self._load_ahead((self.epoch, self.index), ahead=1)
        return batch

    def state_dict(self) -> dict[str, int]:
        """The settings, and the position after the last batch returned; batches loaded ahead do not count."""
        return {**self._identity(), "epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch that would have come next.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: the state is of another dataset, batch size or seed.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                remedy = f"{mine}, as this stream has: the same data and settings"
                if name == "images":
                    remedy += " (an empty file may stand for a missing image, with --override on_corrupt=skip)"
                raise invalid(f"state[{name!r}]", state.get(name), remedy)
        epoch, index = state.get("epoch", -1), state.get("index", -1)
        if epoch < 0 or not 0 <= index < self.batches_per_epoch:
            raise invalid("state", state, f"an epoch from 0 and an index below {self.batches_per_epoch}")
        self.epoch, self.index = int(epoch), int(index)

    def close(self) -> None:
        """Stop the threads once they have loaded what they are at; the stream can still be read."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._threads, self._ahead = None, deque()

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "images": len(self.dataset),
            "batch_size": self.batch_size,
        }

    def _after(self, epoch: int, index: int) -> Position:
        return (epoch, index + 1) if index + 1 < self.batches_per_epoch else (epoch + 1, 0)

    def _indices(self, epoch: int, index: int, ahead: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, self._order(epoch))
        batch = self._order_of[1][index * self.batch_size : (index + 1) * self.batch_size]
        return batch if self.part is None else batch[self.part(ahead)]

    def _order(self, epoch: int) -> np.ndarray:
        """The images of an epoch in order, at least as many as a batch."""
        rng, images = np.random.default_rng([self.seed, epoch]), len(self.dataset)
        rounds = -(-self.batch_size // images) if images < self.batch_size else 1
        return np.concatenate([rng.permutation(images) for _ in range(rounds)])

    def _load_ahead(self, position: Position, ahead: int) -> None:
        """Have the batch at a position loaded, which is `ahead` after the one asked for, and one more than threads."""
        if self._ahead and not self._is_next(position, ahead):
            self._ahead = deque()  # a thread may still be at work on it
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="load-ahead")
        while len(self._ahead) <= self._workers:
            if self._ahead:
                position = self._after(*self._ahead[-1][0])
            indices = self._indices(*position, ahead=ahead + len(self._ahead))
            self._ahead.append((position, indices, self._threads.submit(self._load, position[0], indices)))

    def _is_next(self, position: Position, ahead: int) -> bool:
        """Whether the first of the batches that are being loaded is the one at a position, and the part that it is."""
        there, indices, _ = self._ahead[0]
        foreseen = self.part is not None and ahead == 0
        return there == position and (not foreseen or np.array_equal(indices, self._indices(*position, ahead=0)))

    def _read(self, epoch: int, indices: np.ndarray) -> Batch:
        if isinstance(self.dataset, DrawsAnew):
            return self.dataset.draw(indices, (self.seed, epoch))
        return self.dataset.batch(indices)

    def _load(self, epoch: int, indices: np.ndarray) -> Arriving:
        batch = self._read(epoch, indices)
        return Arriving(batch) if self._transfer is None else self._transfer.start(batch)

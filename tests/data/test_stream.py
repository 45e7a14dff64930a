"""The stream of training batches: order, ranks, and a position that can be restored."""

from __future__ import annotations

import itertools
import queue
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.stream import BatchStream
from tests.data.images import pixels


@pytest.fixture
def numbered(tmp_path):
    """A maker of datasets whose image i is labelled i."""

    def make(count: int):
        np.savez(tmp_path / "n.npz", arr_0=pixels(count, 2, 2, 1), arr_1=np.arange(count))
        return load_dataset(tmp_path / "n.npz", class_cond=True)

    return make


def labels(stream: BatchStream, batches: int) -> list[list[int]]:
    return [kwargs["y"].tolist() for _, kwargs in itertools.islice(stream, batches)]


def test_an_epoch_shows_every_image_once_shuffled_and_drops_the_last_short_batch(numbered):
    stream = BatchStream(numbered(11), 3, seed=1)
    epochs = [sum(labels(stream, 3), []) for _ in range(3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert labels(BatchStream(numbered(11), 3, seed=1), 1)[0] == epochs[0][:3]
    assert labels(BatchStream(numbered(11), 3, seed=2), 1)[0] != epochs[0][:3]


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_of_a_batch_are_those_asked_for_also_where_they_were_foreseen_wrongly(numbered, workers):
    whole = labels(BatchStream(numbered(13), 4, 5, workers=0), 6)
    stream = BatchStream(numbered(13), 4, 5, workers=workers)
    asked = [[1, 3], [0], [2, 1], [3], [0, 1, 2], [2]]
    for number, part in enumerate(asked):
        # Of later batches it says [3], which is right once.
        stream.part = lambda ahead, part=part: np.array(part if ahead == 0 else [3])
        assert labels(stream, 1) == [[whole[number][place] for place in part]]
    stream.close()
    assert stream.state_dict() == {"seed": 5, "images": 13, "batch_size": 4, "epoch": 2, "index": 0}


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 12), batch=st.integers(1, 40))
def test_a_batch_larger_than_the_dataset_repeats_it_evenly(size, batch):
    dataset = load_dataset("digits")._take(np.arange(size))
    stream = BatchStream(dataset, batch)
    for epoch in range(2):
        x, _ = next(stream)
        assert x.shape == (batch, 1, 8, 8)
        if batch >= size:
            counts = np.bincount(stream._order(epoch)[:batch], minlength=size)
            assert counts.max() - counts.min() <= 1


@settings(deadline=None, max_examples=20)
@given(before=st.integers(0, 20), batch=st.integers(1, 15))
def test_a_restored_stream_continues_bit_for_bit(before, batch):
    dataset = load_dataset("digits", class_cond=True)._take(np.arange(11))
    stream = BatchStream(dataset, batch, seed=4)
    labels(stream, before)
    state = stream.state_dict()
    restored = BatchStream(dataset, batch, seed=4)
    restored.load_state_dict(state)
    assert labels(stream, 8) == labels(restored, 8)


def test_loading_ahead_does_not_move_the_position(folder):
    dataset = load_dataset(folder, image_size=6, class_cond=True, cache_bytes=0)
    loaded = load_dataset(folder, image_size=6, class_cond=True)
    stream, plain = BatchStream(dataset, 3), BatchStream(loaded, 3, workers=0)
    for _ in range(5):
        (x, kwargs), (x_plain, kwargs_plain) = next(stream), next(plain)
        assert torch.equal(x, x_plain) and torch.equal(kwargs["y"], kwargs_plain["y"])
        assert stream.state_dict() == plain.state_dict()
    restored = BatchStream(dataset, 3)
    next(restored)  # has loaded ahead from another position
    restored.load_state_dict(stream.state_dict())
    assert torch.equal(next(restored)[0], next(plain)[0])
    stream.close()
    assert next(stream)[0].shape == (3, 3, 6, 6)
    stream.close()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load-ahead")]


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_neither_batches_nor_positions(numbered, workers):
    ahead, plain = BatchStream(numbered(11), 3, workers=workers), BatchStream(numbered(11), 3, workers=0)
    for _ in range(9):
        assert labels(ahead, 1) == labels(plain, 1) and ahead.state_dict() == plain.state_dict()
    assert threads()
    ahead.close(), plain.close()
    assert not threads()


class Gated:
    """A dataset that notes the batches it is asked for, and fails or waits where it is told to."""

    def __init__(self, images) -> None:
        self.images, self.asked, self.open = images, queue.SimpleQueue(), threading.Event()
        self.open.set()
        self.fails_at = -1
        self.count = 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices):
        self.count += 1
        if self.count == self.fails_at:
            raise ValueError("image: got broken.png; expected an image that can be decoded")
        self.asked.put(list(indices))
        assert self.open.wait(30)
        return self.images.batch(indices)


def test_a_batch_is_loaded_while_the_one_before_is_used(numbered):
    dataset = Gated(numbered(11))
    stream = BatchStream(dataset, 3)
    first = labels(stream, 1)
    assert len(first[0]) == 3
    order = stream._order(0)
    asked = [dataset.asked.get(timeout=30) for _ in range(3)]  # the first, and two more that nobody asked for yet
    assert asked == [order[at : at + 3].tolist() for at in (0, 3, 6)]
    stream.close()


def test_without_threads_nothing_is_loaded_before_it_is_asked_for(numbered):
    dataset = Gated(numbered(11))
    labels(BatchStream(dataset, 3, workers=0), 2)
    assert dataset.count == 2 and not threads()


def test_an_error_in_a_thread_is_raised_by_name_where_its_batch_is_asked_for(numbered):
    dataset = Gated(numbered(11))
    dataset.fails_at = 3
    stream = BatchStream(dataset, 3)
    assert len(labels(stream, 2)) == 2
    for _ in range(2):  # it does not go on to the next batch as if nothing had happened
        with pytest.raises(ValueError, match=r"broken\.png"):
            next(stream)
    stream.close()
    assert not threads()


def test_a_stream_is_closed_while_a_thread_loads(numbered):
    dataset = Gated(numbered(11))
    stream = BatchStream(dataset, 3)
    dataset.open.clear()
    opener = threading.Timer(0.1, dataset.open.set)
    with pytest.raises(KeyboardInterrupt), closing(stream):
        stream._load_ahead((0, 0), ahead=0)
        opener.start()
        raise KeyboardInterrupt
    assert not threads() and dataset.count == 1  # what had not begun is not loaded


@pytest.mark.parametrize("change", [{"seed": 9}, {"images": 12}, {"batch_size": 2}, {"index": 99}, {"epoch": -1}])
def test_the_position_of_another_stream_is_refused(numbered, change):
    stream = BatchStream(numbered(11), 3)
    with pytest.raises(ValueError, match="state"):
        stream.load_state_dict({**stream.state_dict(), **change})


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
    ],
)
def test_streams_that_cannot_be_are_refused_by_name(numbered, options, argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        BatchStream(numbered(5), **{"batch_size": 1, **options})

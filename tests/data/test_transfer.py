"""Batches on their way to a device, which is pretended, and on a GPU."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc_fast.data import transfer
from tdc_fast.data.dataset import ImageDataset
from tdc_fast.data.stream import BatchStream


def test_a_batch_that_is_there_stays_as_it_is():
    x, y = torch.ones(2, 1), torch.zeros(2)
    there = transfer.to_device((x, {"y": y}, 3), torch.device("cpu"))
    assert there[0] is x and there[1]["y"] is y and there[2] == 3
    assert transfer.Transfer(torch.device("cpu")).start((x, {})).wait()[0] is x


def test_copies_run_on_a_stream_of_their_own_and_only_the_device_waits_for_them(monkeypatch):
    log = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "copies"

        def wait_event(self, event: object) -> None:
            log.append(f"{self.name} waits for the copies")

    class Event:
        def record(self, stream: Stream) -> None:
            log.append(f"recorded on {stream.name}")

    @contextmanager
    def on(stream: Stream):
        log.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(transfer, "to_device", lambda batch, device: log.append("copied") or batch)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: log.append(f"in use on {stream.name}"))
    arriving = transfer.Transfer(torch.device("cuda", 0)).start((torch.ones(1), {}))
    assert log == ["on copies", "copied", "recorded on copies"]
    arriving.wait()
    assert log[3:] == ["main waits for the copies", "in use on main"]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_a_gpu_as_they_are_on_the_cpu(workers):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    dataset = ImageDataset.from_array(images, np.arange(20) % 4)
    there = BatchStream(dataset, 6, workers=workers, device=torch.device("cuda", 0))
    for (x, labels), (expected, expected_labels), _ in zip(
        there, BatchStream(dataset, 6, workers=0), range(8), strict=False
    ):
        assert x.is_cuda and x.stride() == expected.stride() and torch.equal(x.cpu(), expected)
        assert torch.equal(labels["y"].cpu(), expected_labels["y"])
    there.close()

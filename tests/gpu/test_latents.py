"""Latents on a GPU: encoded and decoded there as on the CPU, and the same draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra [diffusers] is not installed")
pytest.importorskip("sklearn", reason="the extra [demo] is not installed")

from tdc_fast.data.autoencoder import Autoencoder, LatentDecoder  # noqa: E402
from tdc_fast.data.dataset import load_dataset  # noqa: E402
from tdc_fast.data.encoding import encode_rest, plan_encoding  # noqa: E402
from tdc_fast.data.latents import LatentDataset, load_latents  # noqa: E402
from tdc_fast.data.stream import BatchStream  # noqa: E402
from tests.data.autoencoders import random_autoencoder, write_digits  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def encoded(folder: Path, device: str) -> LatentDataset:
    images = load_dataset(write_digits(folder.with_suffix(".npz")), class_cond=True)
    autoencoder = Autoencoder(random_autoencoder().to(device))
    folder.mkdir()
    encode_rest(images, autoencoder, folder, plan_encoding(images, autoencoder, shard_images=10), batch_size=8)
    return load_latents(folder, class_cond=True)


def test_the_gpu_encodes_and_decodes_as_the_cpu(exact_float32: None, tmp_path: Path) -> None:
    on_cpu, on_gpu = (encoded(tmp_path / device, device) for device in ("cpu", "cuda"))
    assert on_cpu.space == on_gpu.space
    x, again = (latents.draw(slice(None), (1, 2))[0] for latents in (on_cpu, on_gpu))
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-4)  # the draws are the same, so only rounding differs
    decoded = LatentDecoder(Autoencoder(random_autoencoder().cuda()), on_cpu.space, batch_size=10)(x.cuda())
    expected = LatentDecoder(Autoencoder(random_autoencoder()), on_cpu.space)(x)
    torch.testing.assert_close(decoded.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_batches_on_the_gpu_hold_the_bits_of_those_on_the_cpu(tmp_path: Path) -> None:
    latents = encoded(tmp_path / "latents", "cpu")

    def epochs(**options: Any) -> list[torch.Tensor]:
        stream = BatchStream(latents, 6, seed=3, **options)
        batches = [next(stream)[0].cpu() for _ in range(2 * stream.batches_per_epoch)]
        stream.close()
        return batches

    ahead = epochs(workers=2, device=torch.device("cuda"))
    assert all(torch.equal(a, b) for a, b in zip(ahead, epochs(workers=0), strict=True))

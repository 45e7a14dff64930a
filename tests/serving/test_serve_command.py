"""`python -m tdc_fast.serve`: from a run to images over HTTP, and an end that loses no request."""

from __future__ import annotations

import gc
import importlib.resources
import importlib.util
import io
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdc_fast import sample, serve
from tdc_fast.serving import Request
from tdc_fast.train import TrainConfig, train
from tests.serving.http import Client, wait_for

needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("fastapi", "uvicorn", "prometheus_client")),
    reason="no fastapi, uvicorn or prometheus_client: pip install tdc_fast[serve]",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A class-conditional run of two experts, trained for two steps."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        data_dir="digits", image_size=8, num_channels=8, channel_mult="1,2", num_res_blocks=1, num_heads=1,
        attention_resolutions="4", diffusion_steps=20, noise_schedule="cosine", batch_size=8, groups=2,
        class_cond=True, num_classes=10, k=1.0, stage1_steps=2, stage2_steps=2, tensorboard=False, progress="never",
        run_dir=str(directory),
    )  # fmt: skip
    train(config)
    return directory


@contextmanager
def command(*flags: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """The command in a process of its own, once it serves."""
    arguments = [sys.executable, "-m", "tdc_fast.serve", "--port", "0", "--num_threads", "1", *flags]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"on http://127\.0\.0\.1:(\d+)", line):
                    yield process, Client(("127.0.0.1", int(found[1])))
                    break
            else:
                pytest.fail("the command ended before it served")
        finally:
            process.kill()


def all_arrived(health: dict[str, int], answered: int) -> bool:
    """Whether each of four requests waits, runs or is answered."""
    return health["waiting"] + health["running"] + answered >= 4


@needs_server
def test_a_run_is_served_with_the_images_of_sample_and_sigterm_finishes_what_is_live(run, tmp_path):
    flags = ["--seed", "5", "--classes", "3", "--sampler", "ddpm", "--steps", "20", "--num_samples", "3"]
    assert sample.main(["--run", str(run), *flags, "--out", str(tmp_path)]) == 0
    expected = np.load(tmp_path / "samples_3x8x8x1.npz")
    wish = {"seed": 5, "label": 3, "sampler": "ddpm", "steps": 20, "num_images": 3, "format": "npz"}
    answers = []
    with command("--run", str(run), "--max_batch", "4") as (process, client):
        drawn = np.load(io.BytesIO(client.draw(**wish).body))
        assert np.array_equal(drawn["arr_0"], expected["arr_0"]) and np.array_equal(drawn["arr_1"], expected["arr_1"])
        asking = [threading.Thread(target=lambda: answers.append(client.draw(**wish))) for _ in range(4)]
        for thread in asking:
            thread.start()
        wait_for(lambda: all_arrived(client.get("/health").json, len(answers)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        for thread in asking:
            thread.join(60)
        assert process.stdout is not None and "stopped; requests: 5 completed" in process.stdout.read()
    assert [answer.status for answer in answers] == [200] * 4


@needs_server
def test_a_base_is_served_with_the_images_of_sample_too(run, tmp_path, monkeypatch):
    """The command in this process, up to its engine."""
    from tdc_fast.serving.server import Server

    served = []

    def serve_on(server: Server, listener: socket.socket) -> None:
        assert gc.get_freeze_count() > 0  # collections of garbage are short while it serves
        with server._engine as engine:
            served.append(engine.submit(Request(seed=2, label=1, steps=5, num_images=2)).result(60).images)

    monkeypatch.setattr(Server, "serve_on", serve_on)
    flags = ["--run", str(run), "--which", "base"]
    drawn = ["--seed", "2", "--classes", "1", "--steps", "5", "--num_samples", "2", "--sampler", "ddim"]
    assert sample.main([*flags, *drawn, "--deterministic", "True", "--out", str(tmp_path)]) == 0
    expected = np.load(tmp_path / "samples_2x8x8x1.npz")["arr_0"]
    assert serve.main([*flags, "--port", "0"]) == 0
    assert np.array_equal(served[0].permute(0, 2, 3, 1), expected)


@needs_server
def test_a_sigterm_right_after_it_says_that_it_serves_is_an_end_like_any_other(run, capsys, monkeypatch):
    really_print = print

    def say(*words: object, **options: Any) -> None:
        really_print(*words, **options)
        if "on http" in str(words):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("builtins.print", say)
    assert serve.main(["--run", str(run), "--port", "0"]) == 0
    said = capsys.readouterr().out
    assert "on http://127.0.0.1:" in said and "stopped; requests: none" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_images", "9", "--max_batch", "8"], "max_images: got 9; expected at most --max_batch, 8"),
        (["--sizes", "4,2"], "sizes: got"),
        (["--sizes", "a"], "sizes: got 'a'"),
        (["--host", "256.0.0.1"], "port: got 8000; expected a port that is free at --host 256.0.0.1"),
        (["--null_class", "10"], "null_class: got 10"),
        (["--max_queue", "0"], "max_queue: got 0"),
        (["--grace", "-1"], "grace: got -1.0"),
        (["--dtype", "float16"], "dtype: got 'float16'; expected float32 or bfloat16 on the CPU"),
    ],
)
@needs_server
def test_flags_that_make_no_server_are_refused(run, flags, said, capsys):
    assert serve.main(["--run", str(run), *flags]) == 2
    assert said in capsys.readouterr().err


@needs_server
def test_memory_for_less_than_one_image_is_refused_in_the_unit_of_the_flag(run, capsys, monkeypatch):
    monkeypatch.setattr("tdc_fast.serving.admission._COPIES_PER_IMAGE", 2**13 + 1)  # images of 8x8: 2 MiB and a bit
    assert serve.main(["--run", str(run), "--max_memory", "2"]) == 2
    assert "max_memory: got 2; expected at least 3 MiB, for one image" in capsys.readouterr().err


def test_without_the_packages_of_the_extra_it_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert serve.main(["--run", str(run)]) == 2
    assert "fastapi is needed here: pip install 'tdc_fast[serve]'" in capsys.readouterr().err


def test_the_page_is_installed_with_the_package():
    assert importlib.resources.files("tdc_fast.serving").joinpath("page.html").is_file()
    data = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert "serving/page.html" in data["tdc_fast"]

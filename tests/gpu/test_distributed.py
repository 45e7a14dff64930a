"""Sums of gradients by NCCL: inside a captured step, and over two GPUs where there are two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tdc_fast.distributed import GradientSum, World
from tdc_fast.graphs import Graphed
from tests.training.small_run import TWO_STAGES, flags, rows, small_config

pytestmark = pytest.mark.gpu
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def group():
    """A group of one process, whose sums go through NCCL like those of many."""
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_captured_step_holds_the_sums(group):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)).cuda()
    parameters = list(model.parameters())
    world = World()
    sums = GradientSum(parameters, group, world, bucket=4096)  # several buckets

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        with sums.during_backward():
            loss.backward()
        return [parameter.grad * 1 for parameter in parameters]

    captured = Graphed(step, "cuda", modules=[model], required=True)
    for _ in range(5):
        x = torch.randn(2, 3, 8, 8, device="cuda")
        found = captured(x)
        expected = torch.autograd.grad(model(x).square().mean(), parameters)
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert captured.num_graphs == 1
    assert world.sent["gradients"] >= 3 * sum(parameter.nbytes for parameter in parameters)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_does(tmp_path):
    config = small_config(tmp_path, "one", **TWO_STAGES, device="cuda")
    alone = [sys.executable, "-m"]
    two = [*alone, "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    path = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    for command, name in ((alone, "one"), (two, "two")):
        argv = [*command, "tdc_fast.train", *flags(config.replace(run_dir=str(tmp_path / name)))]
        subprocess.run(argv, check=True, env={**os.environ, "PYTHONPATH": path})
    for stage in ("base", "experts"):
        one, other = (rows(tmp_path / name / stage / "progress.csv") for name in ("one", "two"))
        for left, right in zip(one, other, strict=True):
            assert float(left["loss"]) == pytest.approx(float(right["loss"]), rel=1e-3)

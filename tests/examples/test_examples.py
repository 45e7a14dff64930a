"""Every example runs as a script, and what it prints and writes is what it promises."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tdc_fast.nn.width_plan import WidthPlan
from tdc_fast.pruning import read_trials
from tdc_fast.training import load_run
from tests.models.published_unet import state_shapes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as a script, in this process, which has imported all that it needs; returns its output."""

    def run(name: str, *arguments: str | Path) -> str:
        path = str(ROOT / "examples" / name)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def number_after(text: str, output: str) -> float:
    """The number that follows these words."""
    (found,) = re.findall(re.escape(text) + r"\D*?([-+\d.e]+)$", output, re.M)
    return float(found)


def test_a_module_of_ones_own_gives_what_its_experts_give_one_by_one(run_example: Callable[..., str]) -> None:
    output = run_example("route_your_own_module.py")
    assert 0 <= number_after("largest difference from one expert after the other:", output) < 1e-5
    assert "one slice per expert: (4, 32, 3, 3, 3)" in output
    assert "expert 0: SmallDenoiser with 1891 parameters" in output


def test_training_from_python_leaves_a_run_with_experts_of_falling_width(
    tmp_path: Path, run_example: Callable[..., str]
) -> None:
    output = run_example("train_from_python.py", tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.widths is not None and run.groups is not None
    assert f"MACs of each expert: {list(run.widths.macs)}" in output
    assert f"boundaries of the groups: {list(run.groups.boundaries)}" in output
    sizes = ast.literal_eval(re.findall(r"parameters of each expert: (.*)", output)[0])
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_the_search_asks_the_agent_of_ones_own_and_keeps_the_best_of_its_candidates(
    tmp_path: Path, run_example: Callable[..., str]
) -> None:
    output = run_example("prune_with_your_own_agent.py", tmp_path)
    assert "output of a mixed batch: (4, 1, 8, 8)" in output
    trials = read_trials(tmp_path / "memory.jsonl")
    assert {trial.agent for trial in trials} == {"exchange"} and len(trials) == 24  # 2 groups, 3 rounds, 4 candidates
    plan = WidthPlan.load(tmp_path / "widths.json")
    for group in (1, 2):
        best = min((trial for trial in trials if trial.group == group), key=lambda trial: trial.score or 0.0)
        assert plan.expert_widths(group) == best.widths


def test_requests_that_came_at_different_times_share_a_batch(run_example: Callable[..., str]) -> None:
    output = run_example("sample_a_mixed_batch.py")
    assert "tick 15: timesteps of the batch: [40, 40, 70, 110, 110, 160]" in output
    assert "finished 6 images in 32 ticks" in output
    assert 0 <= number_after("sampled alone:", output) < 1e-4


def test_a_checkpoint_of_improved_diffusion_is_sampled_and_split(
    tmp_path: Path, run_example: Callable[..., str]
) -> None:
    output = run_example("convert_improved_diffusion.py", tmp_path)
    assert (tmp_path / "samples" / "samples_4x8x8x3.npz").is_file()
    assert "expert 0 is again a file for improved-diffusion: True" in output
    shares = ast.literal_eval(re.findall(r"each expert keeps: (.*)", output)[0])
    assert shares[0] == 1.0 and 0.6 < shares[1] < 0.9
    published = state_shapes(channels=16, mult=(1, 2), blocks=1, attention=(2,), out_channels=3)
    for name in ("ema_0.9999_000010.pt", "expert_0.pt"):
        state = torch.load(tmp_path / name, weights_only=True)
        assert {key: tuple(value.shape) for key, value in state.items()} == published


def test_the_readme_links_every_example() -> None:
    assert len(EXAMPLES) == 6
    readme = (ROOT / "README.md").read_text()
    assert [name for name in EXAMPLES if f"(examples/{name})" not in readme] == []

"""compute-sanitizer finds no access out of bounds and no race in shared memory in any kernel."""

from __future__ import annotations

import subprocess

import pytest

from tests.gpu import sanitized, sanitizer


@pytest.mark.gpu
@pytest.mark.skipif(sanitizer.program() is None, reason="compute-sanitizer is not installed (CUDA's toolkit has it)")
@pytest.mark.parametrize(("backend", "tool"), sanitizer.RUNS)
def test_it_finds_nothing(backend: str, tool: str, watched: dict[tuple[str, str], sanitizer.Watched]) -> None:
    if not sanitizer.serves(backend):
        pytest.skip(f"{backend} is for compute capability 9.0")
    run = watched[backend, tool]
    try:
        code = run.wait()
    except subprocess.TimeoutExpired:
        last = run.output.read_text(errors="replace").splitlines()[-1:]
        pytest.skip(f"{tool} of {backend} takes too long on this machine; it got to {last}")
    output = run.output.read_text(errors="replace")
    if "Device not supported" in output or "not supported on this" in output:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert code == 0, output[-4000:]
    assert f"ran {len(sanitized.cases_of(backend))} cases on {backend}" in output, output[-2000:]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert sanitized.command(["hopper"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_watched_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run: the same program with the reference backend on the CPU."""
    sanitized.main("reference", "cpu")
    assert f"ran {len(sanitized.cases_of('reference'))} cases on reference" in capsys.readouterr().out

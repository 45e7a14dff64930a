"""The documentation builds without a warning, and what it must not let through is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["docs", "examples", "tdc_fast", "kernels", "bench/results"]
PAGES = ["mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra 'docs'"),
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of everything that the site is made of."""
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path)
    return tmp_path


def build(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=checkout, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_site_builds_without_a_warning(checkout: Path) -> None:
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    site = checkout / "build" / "site"
    index = (site / "index.html").read_text()
    assert 'src="routing.svg"' in index
    for page in ("examples/route_your_own_module.html", "bench/results/gpu-nvidia-h200.html", "CONTRIBUTING.html"):
        assert f'href="{page}"' in index and (site / page).is_file()
    assert 'id="tdc_fast.pack_experts"' in (site / "api" / "tdc_fast.html").read_text()


def test_a_broken_link_and_an_undocumented_public_name_fail_the_build(checkout: Path) -> None:
    for page in (checkout / "docs" / "api").iterdir():
        if page.stem not in ("grouping", "data"):
            page.unlink()  # each takes a second
    page = checkout / "docs" / "results.md"
    page.write_text(page.read_text() + "\n[gone](../bench/results/gone.md) [no heading](method.md#gone)\n")
    (checkout / "docs" / "api" / "grouping.md").write_text("# grouping\n\n::: tdc_fast.grouping.elbow\n")
    module = checkout / "tdc_fast" / "data" / "pixels.py"
    module.write_text(module.read_text() + "\n\ndef undocumented() -> None:\n    return None\n")
    done = build(checkout)
    assert done.returncode != 0
    for warning in (
        "docs/results.md links to ../bench/results/gone.md, which does not exist",
        "'method.md#gone'",
        "the API reference (docs/api) lacks tdc_fast.grouping.divide",
        "tdc_fast.data.pixels.undocumented is in the API reference and has no docstring",
    ):
        assert warning in done.stderr

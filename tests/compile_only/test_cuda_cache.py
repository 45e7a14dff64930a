"""NVRTC's kernels are cached on disk: found again, never stale or damaged, also when processes write at once."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tdc_fast.ops import cuda_families, cuda_nvrtc, native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason="the native module is not built"),
    pytest.mark.skipif(cuda_nvrtc.unavailable(80) is not None, reason=str(cuda_nvrtc.unavailable(80))),
]
FAMILY = "plan"  # the one that compiles fastest
TINY = 'extern "C" __global__ void tiny(int* p) { *p = 1; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TDC_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Architectures compiled for; a small kernel replaces the family's, so that compiling is fast."""
    made: list[str] = []
    original = cuda_nvrtc.compile_family

    def compile_family(family: str, arch_name: str, options: Any = ()) -> tuple[bytes, str]:
        made.append(arch_name)
        return original(family, arch_name, options)

    monkeypatch.setattr(cuda_nvrtc, "compile_family", compile_family)
    monkeypatch.setattr(cuda_nvrtc, "read_sources", lambda family: {"cuda/tiny.cuh": TINY})
    return made


def test_a_second_use_finds_what_the_first_one_compiled(cache: Path, compilations: list[str]) -> None:
    first = cuda_nvrtc.cubin_of(FAMILY, "sm_80")
    assert first.startswith(b"\x7fELF")
    assert cuda_nvrtc.cubin_of(FAMILY, "sm_80") == first
    assert compilations == ["sm_80"]
    [entry] = cache.iterdir()
    assert entry.name.startswith("plan-sm_80-") and entry.suffix == ".cubin"


def test_a_cubin_is_as_long_as_its_header_says(compilations: list[str]) -> None:
    """cupy leaves out the last byte; the driver does not notice, the disassembler does."""
    cubin, _ = cuda_nvrtc.compile_family(FAMILY, "sm_80")
    tables = [(0x20, 0x36), (0x28, 0x3A)]  # of segments and sections: where the place, and the size and number, are
    ends = []
    for place, sizes in tables:
        size, number = struct.unpack_from("<HH", cubin, sizes)
        ends.append(struct.unpack_from("<Q", cubin, place)[0] + size * number)
    assert len(cubin) == max(ends)
    # One that is whole stays as it is.
    assert cuda_nvrtc._whole(cubin) == cuda_nvrtc._whole(cubin[:-1]) == cubin


def test_another_architecture_source_option_or_compiler_is_another_entry(
    cache: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {cuda_nvrtc.cache_path(FAMILY, "sm_80"), cuda_nvrtc.cache_path(FAMILY, "sm_90a")}
    monkeypatch.setattr(cuda_nvrtc, "read_sources", lambda family: {"cuda/tiny.cuh": TINY + "// changed\n"})
    seen.add(cuda_nvrtc.cache_path(FAMILY, "sm_80"))
    monkeypatch.setattr(cuda_nvrtc, "read_sources", lambda family: {"cuda/tiny.cuh": TINY, "cuda/new.cuh": ""})
    seen.add(cuda_nvrtc.cache_path(FAMILY, "sm_80"))
    monkeypatch.setattr(cuda_nvrtc, "_OPTIONS", (*cuda_nvrtc._OPTIONS, "--use_fast_math"))
    seen.add(cuda_nvrtc.cache_path(FAMILY, "sm_80"))
    from cupy_backends.cuda.libs import nvrtc

    monkeypatch.setattr(nvrtc, "getVersion", lambda: (99, 9))
    seen.add(cuda_nvrtc.cache_path(FAMILY, "sm_80"))
    assert len(seen) == 6


def test_a_changed_source_is_compiled_anew(
    cache: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cuda_nvrtc.cubin_of(FAMILY, "sm_80")
    changed = {"cuda/tiny.cuh": TINY.replace("= 1", "= 2")}
    monkeypatch.setattr(cuda_nvrtc, "read_sources", lambda family: changed)
    assert cuda_nvrtc.cubin_of(FAMILY, "sm_80") != first
    assert compilations == ["sm_80", "sm_80"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_entry_is_compiled_anew_and_mended(cache: Path, compilations: list[str], damage: str) -> None:
    whole = cuda_nvrtc.cubin_of(FAMILY, "sm_80")
    [entry] = cache.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(
        {
            "cut": content[:-1],
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "empty": b"",
            "foreign": b"not a cubin at all, but long enough to hold a digest",
        }[damage]
    )
    assert cuda_nvrtc.cubin_of(FAMILY, "sm_80") == whole
    assert cuda_nvrtc.cubin_of(FAMILY, "sm_80") == whole
    assert len(compilations) == 2
    assert entry.read_bytes() == content


def test_processes_that_write_at_once_leave_one_whole_entry(cache: Path) -> None:
    program = f"""
from tdc_fast.ops import cuda_nvrtc
cuda_nvrtc.read_sources = lambda family: {{"cuda/tiny.cuh": {TINY!r}}}
print(cuda_nvrtc.cubin_of("plan", "sm_80").hex())
"""
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(outputs) == 1 and outputs.pop().strip()
    [entry] = cache.iterdir()
    assert cuda_nvrtc._read_entry(entry)


def test_a_cache_that_cannot_be_written_warns_and_the_kernels_run_anyway(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TDC_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be kept .*TDC_FAST_CACHE"):
        assert cuda_nvrtc.cubin_of(FAMILY, "sm_80").startswith(b"\x7fELF")


def test_a_kernel_that_does_not_compile_is_named_with_the_compilers_words(
    cache: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_nvrtc, "read_sources", lambda family: {"cuda/tiny.cuh": "int nonsense = undeclared;"})
    with pytest.raises(RuntimeError, match='(?s)tdc_routing_plan for sm_80.*"undeclared" is undefined'):
        cuda_nvrtc.cubin_of(FAMILY, "sm_80")
    assert not cache.exists() or not list(cache.iterdir())


def test_the_sources_that_decide_an_entry_are_all_that_a_family_includes() -> None:
    sources = cuda_families.read_sources("conv_forward")
    assert next(iter(sources)) == "conv_forward.cu"
    assert {"cuda/device.cuh", "cuda/conv/params.h"} <= set(sources)
    assert not any("launch" in name or "group_norm" in name for name in sources)


def test_every_family_is_shipped_with_the_package() -> None:
    assert set(cuda_families.families()) == set(native.module.cuda_kernels)
    for family in native.module.cuda_kernels:
        assert cuda_families.read_sources(family)


def test_an_architecture_that_the_compiler_does_not_know_is_a_reason() -> None:
    assert "not sm_999" in (cuda_nvrtc.unavailable(999) or "")
    assert cuda_nvrtc.target(90) == "sm_90a" and cuda_nvrtc.target(86) == "sm_86"

"""Every CUDA kernel compiles for every architecture that runs it, ahead of time and by NVRTC, without spilling a
register.

What nvcc made is read back from the module that was installed. NVRTC compiles here: every family for every
architecture, or where nvcc has built all of that, one family of every source for one architecture, and one of the
kernels that differ in the type, the tile, the access or the pass alone. Families of the `hopper` backend are for
sm_90a alone.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tdc_fast.ops import cuda_families, cuda_nvrtc, native
from tests.chosen_kernels import unit_of
from tests.compile_only.cuda_resources import (
    Resources,
    cuobjdump,
    registers_moved,
    resources_in_log,
    resources_of,
    table,
)
from tests.emulator.harness import CSRC
from tests.gpu import hangs, restarting, units

pytestmark = pytest.mark.skipif(native.module is None, reason="the native module is not built")
ARCHITECTURES = (80, 90, 100)
FAMILIES: dict[str, list[str]] = {} if native.module is None else native.module.cuda_kernels
KERNELS = {name for names in FAMILIES.values() for name in names}


def is_for_hopper(family: str) -> bool:
    return "hopper" in family or family in ("group_norm_stream", "group_norm_cluster")


HOPPER_KERNELS = {name for family, names in FAMILIES.items() if is_for_hopper(family) for name in names}


def tool() -> str:
    found = cuobjdump()
    if found is None:
        pytest.skip("cuobjdump is neither on PATH nor bundled with triton")
    return found


def assert_nothing_spills(found: dict[str, Resources], arch: str) -> None:
    spilling = {name: used for name, used in found.items() if used.stack or used.local}
    remedy = "In Hopper kernels compare what registers_give and registers_take leave to producer and consumers"
    assert not spilling, f"{arch}: these spill registers or use a stack: {spilling}. {remedy}"
    assert max(used.registers for used in found.values()) <= 255


def assert_registers_suffice(kernel: str, at_entry: int, moved: list[tuple[str, int, int]]) -> None:
    """A block of three warpgroups has what the first gives and two take; they would wait for more for ever."""
    registers = {operation: own for operation, own, _ in moved}
    assert set(registers) == {"DEALLOC", "TRY_ALLOC"}, (kernel, moved)
    assert registers["DEALLOC"] + 2 * registers["TRY_ALLOC"] <= 3 * at_entry, (kernel, at_entry, moved)
    assert 384 * at_entry <= 65536
    for _, own, named in moved:
        assert 0 < named <= own, (kernel, moved)


def assert_planners_count_static_shared(found: dict[str, Resources]) -> None:
    """Of group norms, which fill the rest of shared memory."""
    source = (CSRC / "cuda" / "group_norm" / "split.cpp").read_text(encoding="utf-8")
    counted = int(re.findall(r"kStaticShared = (\d+);", source)[0])
    for kernel, used in found.items():
        if "group_norm" in kernel and "expert_sums" not in kernel:
            assert used.shared <= counted, (kernel, used, counted)


def show(title: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{title}\n{text}")


def test_nvcc_built_every_kernel_for_every_architecture_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    if not native.module.cuda_architectures:
        pytest.skip("the native module was built without nvcc")
    found = resources_of(Path(native.module.__file__), tool())
    built = [a.removesuffix("-real") for a in native.module.cuda_architectures.split() if a.endswith("-real")]
    assert {"80", "90a"} <= set(built)
    for arch in built:
        kernels = found[f"sm_{arch}"]
        assert set(kernels) == (KERNELS if arch == "90a" else KERNELS - HOPPER_KERNELS), f"sm_{arch}"
        assert_nothing_spills(kernels, arch)
        if arch == "80":
            assert_planners_count_static_shared(kernels)
    assert "virtual" in native.module.cuda_architectures  # PTX, for what comes after
    show(f"nvcc, {native.module.cuda_runtime_version()}", table(found), capsys)


def of_one_type(kernels: Iterable[str]) -> list[str]:
    """Of kernels that differ in the 16-bit type alone one, of each type in turn; all others too."""
    forms = sorted({name.replace("_bf16", "_TYPE").replace("_fp16", "_TYPE") for name in kernels})
    return [form.replace("TYPE", ("bf16", "fp16")[turn % 2]) for turn, form in enumerate(forms)]


def of_one_pass(kernels: Iterable[str]) -> list[str]:
    """Of kernels that differ in the 16-bit type and in the pass (forward or dgrad) alone one, of each in turn."""
    alike: dict[str, list[str]] = {}
    for name in sorted(kernels):
        alike.setdefault(re.sub("forward|dgrad", "PASS", re.sub("bf16|fp16", "TYPE", name)), []).append(name)
    return [names[turn % len(names)] for turn, names in enumerate(alike.values())]


def of_one_tile(kernels: Iterable[str]) -> list[str]:
    """Of kernels that differ in the numbers of their tile, in their pass, in how many inputs they have, in how they
    access them and in the type of what they read and write alone, one: of each form in turn another. Products in tf32
    are code of their own."""
    templates: dict[str, list[str]] = {}
    for name in of_one_type(kernels):
        form = re.sub(r"\d+(x\d+)*", "#", re.sub("bf16|fp16|fp32", "TYPE", name.replace("tf32", "tf")))
        form = re.sub("_(any|scalar|vector|two)", "", re.sub("forward|dgrad", "PASS", form))
        templates.setdefault(form, []).append(name)
    return [names[turn % len(names)] for turn, names in enumerate(templates.values())]


@dataclass(frozen=True)
class Job:
    """Kernels of a family that NVRTC compiles for an architecture."""

    family: str
    arch: int
    kernels: tuple[str, ...]


@functools.cache
def compiled() -> dict[Job, tuple[bytes, str]]:
    """(cubin, log) of kernels for architectures."""
    reason = cuda_nvrtc.unavailable(ARCHITECTURES[0])
    if reason is not None:
        pytest.skip(reason)
    return {job: _compile(job) for job in chosen(sorted(native.module.cuda_kernels, reverse=True), known())}


def chosen(families: list[str], architectures: list[int]) -> list[Job]:
    """What NVRTC compiles: all, or where nvcc has compiled all, one family of every source, for its own or the next
    architecture, in one type and with one tile."""
    kernels = native.module.cuda_kernels
    if not built_by_nvcc(architectures):
        return [
            Job(family, arch, tuple(kernels[family]))
            for family in families
            for arch in architectures
            if arch == 90 or not is_for_hopper(family)
        ]
    units = {family: cuda_families.translation_unit(family).splitlines() for family in families}
    of_source: dict[str, str] = {}
    for family in sorted(families, key=lambda family: (-len(units[family]), family)):
        of_source.setdefault(units[family][0], family)
    turns = itertools.cycle(architectures)
    return [
        Job(
            family,
            90 if is_for_hopper(family) else next(turns),
            tuple(of_one_tile(kernels[family])),
        )
        for family in of_source.values()
    ]


def built_by_nvcc(architectures: list[int]) -> bool:
    """Whether the native module has device code for all of these architectures."""
    targets = {cuda_nvrtc.target(arch).replace("sm_", "") for arch in architectures}
    return {f"{target}-real" for target in targets} <= set(native.module.cuda_architectures.split())


def _compile(job: Job) -> tuple[bytes, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_nvrtc, "read_sources", lambda family: sources_of(family, job.kernels))
        return cuda_nvrtc.compile_family(job.family, cuda_nvrtc.target(job.arch), ("--ptxas-options=-v",))


def sources_of(family: str, kernels: tuple[str, ...]) -> dict[str, str]:
    """The sources of a family, whose translation unit defines these of its kernels."""
    sources = cuda_families.read_sources(family)
    return sources | {next(iter(sources)): unit_of(family, kernels)}


def known() -> list[int]:
    return [arch for arch in ARCHITECTURES if cuda_nvrtc.unavailable(arch) is None]


def test_nvrtc_compiles_kernels_of_every_source_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, dict[str, Resources]] = {}
    for job, (cubin, log) in compiled().items():
        assert cubin.startswith(b"\x7fELF")
        kernels = resources_in_log(log)
        assert set(kernels) == set(job.kernels) and kernels
        found.setdefault(cuda_nvrtc.target(job.arch), {}).update(kernels)
    assert set(found) == {cuda_nvrtc.target(arch) for arch in known()}
    for name, kernels in found.items():
        assert_nothing_spills(kernels, name)
        assert_planners_count_static_shared(kernels)
    show("NVRTC", table(found), capsys)


def test_nvrtc_has_nothing_to_warn_about() -> None:
    for job, (_, log) in compiled().items():
        assert "warning" not in log, f"{job}: {log}"
        # The assembler says so where it makes products wait for each other.
        assert "C75" not in log and "wgmma" not in log, f"{job}: {log}"


def test_the_kernels_that_test_hoppers_units_compile() -> None:
    reason = cuda_nvrtc.unavailable(90)
    if reason is not None:
        pytest.skip(reason)
    cubin, log = units.compiled("--ptxas-options=-v")
    assert cubin.startswith(b"\x7fELF") and "warning" not in log, log
    names = ("box", "wgmma", "pipeline", "cluster", "cluster_ring")
    assert set(resources_in_log(log)) == {f"self_test_{name}" for name in names}


def test_kernels_that_report_hangs_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cuda_nvrtc.unavailable(90)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv(restarting.ALONE, "1")
    cubin, log = units.compiled()
    assert b"waits for %s" in cubin and b"full + stage" in cubin and "error" not in log
    kernel = "tdc_conv_hopper_rows_forward_bf16_128x64"
    sources = hangs.sources_of(kernel)
    assert sources[hangs.HEADER].endswith(hangs.WAITS.read_text(encoding="utf-8"))
    assert f"TDC_CHOOSE_{kernel}(...) TDC_DEFINE_KERNEL" in next(iter(sources.values()))


def test_registers_are_counted_where_a_warpgroup_has_them() -> None:
    code = """
        /*0000*/                   MOV R167, RZ ;
        /*0010*/               @P0 BRA 0x60 ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x38 ;
        /*0030*/                   LDS.128 R52, [R2+0x10] ;
        /*0040*/                   BRA UP0, 0x30 ;
        /*0050*/                   EXIT ;
        /*0060*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe0 ;
        /*0070*/                   HGMMA.64x96x16.F32.BF16 R24, gdesc[UR8], R24, UP0 ;
        /*0080*/                   STG.E.64 desc[UR8][R4.64], R200 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   MOV R220, RZ ;
    """
    assert registers_moved(code) == [("DEALLOC", 56, 56), ("TRY_ALLOC", 224, 202)]


def test_every_hopper_kernel_copies_by_tma_and_multiplies_by_wgmma() -> None:
    """SASS: UTMALDG, UTMASTG, UTMAPF: TMA's loads, stores, prefetches; HGMMA: wgmma; USETMAXREG moves registers.

    Reading takes half a second a kernel: of those that differ in type and pass alone one is read, of each in turn.
    """
    if "90a-real" not in native.module.cuda_architectures:
        pytest.skip("the native module was built without nvcc")
    families = [names for family, names in native.module.cuda_kernels.items() if "hopper" in family]
    others = ("reduce", "merge", "window")
    kernels = of_one_pass(name for name in itertools.chain(*families) if not any(part in name for part in others))
    assert {"forward", "dgrad", "bf16", "fp16"} <= {part for name in kernels for part in name.split("_")}
    command = [tool(), "-sass", "-arch", "sm_90a", "-fun", ",".join(kernels), native.module.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = dict(function.split("\n", 1) for function in text.split("Function : ")[1:])
    assert set(code) == set(kernels)
    used = resources_of(Path(native.module.__file__), tool())["sm_90a"]
    for kernel in kernels:
        assert_registers_suffice(kernel, used[kernel].registers, registers_moved(code[kernel]))
        wgrad, rows = "wgrad" in kernel, "rows" in kernel or "strided" in kernel
        wanted = {"UTMALDG", "HGMMA", "USETMAXREG", "SYNCS"}
        wanted |= (set() if wgrad else {"UTMASTG"}) | (set() if wgrad or rows else {"UTMAPF"})
        assert wanted <= set(re.findall(r"\b[A-Z0-9]+\b", code[kernel])), kernel
        columns = 128 if wgrad else int(kernel.rsplit("x", 1)[1])
        narrows = columns > 64 or "32x16" in kernel
        expected = {columns, columns * 3 // 4, columns // 2} if narrows else {columns}
        expected -= {columns * 3 // 4} if "rows256" in kernel or "rows384" in kernel else set()
        assert set(map(int, re.findall(r"HGMMA\.64x(\d+)x16", code[kernel]))) == expected, kernel
        # Of each group of products one ends it, and the next wait leaves it under way: none waits for every product.
        groups = len(re.findall(r"HGMMA[^;]*gsb0", code[kernel]))
        assert groups == code[kernel].count("WARPGROUP.DEPBAR.LE gsb0, 0x1") > 0, kernel

"""Translation units that define some kernels of a family, where compiling all of them would show no more."""

from __future__ import annotations

from collections.abc import Collection

from tdc_fast.ops import cuda_families, native


def unit_of(family: str, kernels: Collection[str]) -> str:
    """The family's translation unit, which defines these of its kernels."""
    unit = cuda_families.translation_unit(family)
    every = f"TDC_KERNELS_{family}(TDC_DEFINE_KERNEL)\n"
    assert unit.endswith(every)
    choices = "".join(
        f"#define TDC_CHOOSE_{name}(...) {'TDC_DEFINE_KERNEL(__VA_ARGS__)' if name in kernels else ''}\n"
        for name in native.module.cuda_kernels[family]
    )
    choose = f"#define TDC_CHOOSE(name, ...) TDC_CHOOSE_##name(name, __VA_ARGS__)\nTDC_KERNELS_{family}(TDC_CHOOSE)\n"
    return unit.removesuffix(every) + choices + choose

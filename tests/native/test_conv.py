"""The native routed convolution against fp64 torch: forward, dgrad and wgrad on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdc_fast import _native

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]  # samples of each group
    image: tuple[int, int]
    channels: tuple[int, int]  # in, out
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    in_widths: tuple[int, ...] | None = None
    out_widths: tuple[int, ...] | None = None
    weight_index: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    channels_last_weight: bool = False
    extras: bool = True  # bias, sample_bias and residual
    threads: int = 1
    seed: int = field(default=0)

    @property
    def batch(self) -> int:
        return sum(self.sizes)

    @property
    def experts(self) -> int:
        return len(self.sizes) if self.weight_index is None else max(self.weight_index) + 2

    @property
    def out_image(self) -> tuple[int, int]:
        sizes = zip(self.image, self.kernel, self.stride, self.padding, strict=True)
        h, w = ((n + 2 * pad - k) // step + 1 for n, k, step, pad in sizes)
        return h, w


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, last: bool = True) -> torch.Tensor:
    """Memory full of NaN, so that an unwritten element fails the test."""
    tensor = torch.full(shape, NAN, dtype=dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else tensor


class Run:
    """One case's operands, the native kernels' results, and the fp64 reference."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        n, (cin, cout) = len(case.sizes), case.channels
        self.in_widths = case.in_widths or (cin,) * n
        self.out_widths = case.out_widths or (cout,) * n
        self.index = case.weight_index or tuple(range(n))
        ends = torch.tensor((0, *case.sizes)).cumsum(0)
        self.offsets = ends.to(torch.int32)
        self.spans = [(int(a), int(b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(case.dtype)

        last = torch.channels_last
        self.x = normal(case.batch, cin, *case.image).contiguous(memory_format=last)
        self.dy = normal(case.batch, cout, *case.out_image).contiguous(memory_format=last)
        for (a, b), width, out in zip(self.spans, self.in_widths, self.out_widths, strict=True):
            self.x[a:b, width:] = NAN
            self.dy[a:b, out:] = NAN
        self.weight = normal(case.experts, cout, cin, *case.kernel)
        if case.channels_last_weight:
            self.weight = self.weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        self.bias = self.sample_bias = self.residual = None
        if case.extras:
            self.bias, self.sample_bias = normal(case.experts, cout), normal(case.batch, cout)
            self.residual = normal(case.batch, cout, *case.out_image).contiguous(memory_format=last)
            for (a, b), out in zip(self.spans, self.out_widths, strict=True):
                self.residual[a:b, out:] = NAN
                self.sample_bias[a:b, out:] = NAN

    def routing(self) -> dict[str, int]:
        case = self.case
        tensors = {"offsets": self.offsets, "weight_index": torch.tensor(self.index, dtype=torch.int32)}
        if case.in_widths is not None:
            tensors["in_widths"] = torch.tensor(self.in_widths, dtype=torch.int32)
        if case.out_widths is not None:
            tensors["out_widths"] = torch.tensor(self.out_widths, dtype=torch.int32)
        self.kept = tensors
        return {name: address(tensor) for name, tensor in tensors.items()} | {"threads": case.threads}

    def geometry(self) -> dict[str, object]:
        case = self.case
        return dict(
            dtype=int(case.dtype == torch.bfloat16),
            batch=case.batch,
            height=case.image[0],
            width=case.image[1],
            in_channels=case.channels[0],
            out_channels=case.channels[1],
            filter_height=case.kernel[0],
            filter_width=case.kernel[1],
            stride_height=case.stride[0],
            stride_width=case.stride[1],
            pad_height=case.padding[0],
            pad_width=case.padding[1],
            num_groups=len(case.sizes),
            num_experts=case.experts,
            weight_strides=self.weight.stride(),
        )

    def native(self) -> dict[str, torch.Tensor]:
        case, routing = self.case, self.routing()
        y = poisoned((case.batch, case.channels[1], *case.out_image), case.dtype)
        conv = _native.Conv2d(**self.geometry())
        conv.forward(
            x=address(self.x),
            weight=address(self.weight),
            bias=address(self.bias),
            sample_bias=address(self.sample_bias),
            residual=address(self.residual),
            y=address(y),
            **routing,
        )
        dx = poisoned((case.batch, case.channels[0], *case.image), case.dtype)
        conv.dgrad(dy=address(self.dy), weight=address(self.weight), dx=address(dx), **routing)
        dweight = torch.full_like(self.weight, NAN)
        dbias = poisoned((case.experts, case.channels[1]), case.dtype)
        dsample_bias = poisoned((case.batch, case.channels[1]), case.dtype)
        conv.wgrad(
            x=address(self.x),
            dy=address(self.dy),
            dweight=address(dweight),
            dbias=address(dbias),
            dsample_bias=address(dsample_bias),
            **routing,
        )
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "dsample_bias": dsample_bias}

    def expected(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """name -> (value, sum of the magnitudes of its terms), both fp64."""
        true, size = self._expected(lambda t: t), self._expected(torch.abs)
        return {name: (true[name], size[name]) for name in true}

    def _expected(self, of) -> dict[str, torch.Tensor]:
        case = self.case
        y = torch.zeros((case.batch, case.channels[1], *case.out_image), dtype=torch.float64)
        dx = torch.zeros(self.x.shape, dtype=torch.float64)
        dweight = torch.zeros(self.weight.shape, dtype=torch.float64)
        dbias = torch.zeros((case.experts, case.channels[1]), dtype=torch.float64)
        dsample_bias = torch.zeros((case.batch, case.channels[1]), dtype=torch.float64)
        for (a, b), cin, cout, e in zip(self.spans, self.in_widths, self.out_widths, self.index, strict=True):
            if a == b or cout == 0:
                continue
            dy = of(self.dy[a:b, :cout].double())
            if cin:
                x = of(self.x[a:b, :cin].double()).requires_grad_()
                w = of(self.weight[e, :cout, :cin].double()).requires_grad_()
                out = F.conv2d(x, w, stride=case.stride, padding=case.padding)
                out.backward(dy)
                y[a:b, :cout] = out.detach()
                dx[a:b, :cin] = x.grad
                dweight[e, :cout, :cin] += w.grad
            if case.extras:
                y[a:b, :cout] += of(self.bias[e, :cout].double())[:, None, None]
                y[a:b, :cout] += of(self.sample_bias[a:b, :cout].double())[:, :, None, None]
                y[a:b, :cout] += of(self.residual[a:b, :cout].double())
            sums = dy.sum((2, 3))
            dsample_bias[a:b, :cout] = sums
            dbias[e, :cout] += sums.sum(0)
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "dsample_bias": dsample_bias}


def check(case: Case) -> None:
    run = Run(case)
    # A sum of fp32 terms, then one rounding to the dtype; a dead element has size 0 and must be an exact zero.
    rounding = 2.0**-8 if case.dtype == torch.bfloat16 else 0.0
    results = run.native()
    for name, (true, size) in run.expected().items():
        error = (results[name].double() - true).abs()
        bad = ~(error <= 4e-6 * size + rounding * true.abs())
        assert not bad.any(), f"{name}: {int(bad.sum())} wrong of {bad.numel()}, first at {bad.nonzero()[0].tolist()}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n = draw(st.integers(1, 5))
    channels = draw(st.tuples(*[st.sampled_from([1, 2, 3, 5, 8, 13, 16, 17, 24, 33, 40])] * 2))
    kernel = draw(st.tuples(*[st.sampled_from([1, 1, 3, 3, 5, 7])] * 2))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 2))
    image = tuple(draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True))
    widths = st.one_of(st.none(), st.just(True))
    per_group = st.tuples(*[st.integers(0, 3)] * n)
    shared = draw(st.booleans())
    return Case(
        sizes=draw(per_group.filter(any)),
        image=image,
        channels=channels,
        kernel=kernel,
        stride=draw(st.tuples(*[st.integers(1, 2)] * 2)),
        padding=padding,
        in_widths=draw(widths) and draw(st.tuples(*[st.integers(0, channels[0])] * n)),
        out_widths=draw(widths) and draw(st.tuples(*[st.integers(0, channels[1])] * n)),
        weight_index=draw(st.tuples(*[st.integers(0, 2)] * n)) if shared else None,
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        channels_last_weight=draw(st.booleans()),
        extras=draw(st.booleans()),
        threads=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 3)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_forward_and_gradients_equal_fp64_torch(case: Case) -> None:
    check(case)


NAMED = {
    "whole panels": Case((3, 2), (8, 8), (32, 64)),
    "large image in row bands": Case((1, 1), (37, 19), (5, 20)),
    "large image, stride 2": Case((2,), (33, 30), (20, 7), stride=(2, 2)),
    "one sample among many groups": Case((0, 0, 1, 0), (4, 4), (16, 16)),
    "linear": Case((7, 0, 30), (1, 1), (40, 72), kernel=(1, 1), padding=(0, 0)),
    "tokens": Case((2, 3), (1, 50), (33, 19), kernel=(1, 1), padding=(0, 0)),
    "width 0 on either side": Case((2, 2, 2), (5, 5), (8, 8), in_widths=(0, 8, 0), out_widths=(8, 0, 0)),
    "one expert at several widths": Case(
        (2, 1, 2), (6, 6), (48, 40), in_widths=(48, 17, 32), out_widths=(9, 40, 24), weight_index=(0, 0, 0)
    ),
    "filter wider than the image": Case((2, 1), (2, 1), (3, 4), kernel=(7, 5), padding=(3, 2)),
    "1x1 by pairs of panels": Case(
        (70, 69, 1), (3, 5), (72, 92), kernel=(1, 1), padding=(0, 0), in_widths=(72, 64, 0), out_widths=(92, 60, 5)
    ),
    "1x1 by pairs of panels, bf16": Case(
        (70, 71), (2, 7), (9, 64), kernel=(1, 1), padding=(0, 0), dtype=torch.bfloat16
    ),
    "1x1 whose samples share a run of pixels": Case(
        (120, 80), (2, 5), (12, 64), kernel=(1, 1), padding=(0, 0), extras=False
    ),
    "1x1 in chunks of rows": Case((2, 1), (9, 16), (17, 48), kernel=(1, 1), padding=(0, 0), in_widths=(17, 3)),
    "1x1 with stride 2, chunks of several samples": Case(
        (4, 1), (8, 6), (20, 48), kernel=(1, 1), stride=(2, 2), padding=(0, 0)
    ),
    "1x1 with stride 2": Case((2, 1), (7, 6), (12, 20), kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    "bf16": Case((2, 3), (8, 8), (33, 48), dtype=torch.bfloat16, channels_last_weight=True),
    "no padding": Case((2,), (9, 9), (4, 6), padding=(0, 0)),
    "more weights than one wave packs": Case((1, 1), (2, 2), (448, 448)),
    "many chunks, several ranges of panels": Case((20, 0, 12), (8, 8), (40, 136)),
    "rows of three row tiles": Case((2, 1, 1), (5, 24), (90, 44), in_widths=(90, 0, 20), out_widths=(44, 20, 17)),
    "row tiles of one vector": Case((2, 1, 2), (5, 16), (35, 16), in_widths=(35, 1, 20), out_widths=(16, 9, 3)),
    "rows of two row tiles, bf16": Case((2, 1), (6, 16), (50, 20), dtype=torch.bfloat16),
    "row tiles with stride 2 over rows": Case((2, 1), (9, 8), (10, 24), kernel=(5, 3), stride=(2, 1)),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_case(name: str) -> None:
    check(NAMED[name])


@pytest.mark.parametrize(
    "name",
    [
        "whole panels",
        "large image in row bands",
        "one expert at several widths",
        "tokens",
        "many chunks, several ranges of panels",
        "rows of three row tiles",
    ],
)
def test_results_are_bitwise_equal_for_any_number_of_threads(name: str) -> None:
    from dataclasses import replace

    runs = [Run(replace(NAMED[name], threads=threads)).native() for threads in (1, 2, 5, 2)]
    for other in runs[1:]:
        for key, value in runs[0].items():
            assert torch.equal(value, other[key]), key


def test_one_expert_with_all_samples_is_split_without_changing_with_threads() -> None:
    outputs = [Run(Case((40,), (8, 8), (16, 16), threads=threads)).native()["dweight"] for threads in (1, 3)]
    assert torch.equal(*outputs)
    check(Case((40,), (8, 8), (16, 16), threads=2))


def test_concurrent_callers_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    runs = [Run(Case((2, 3), (6, 6), (24, 24), seed=seed, threads=1 + seed % 2)) for seed in range(4)]
    alone = [run.native() for run in runs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for first, second in zip(alone, pool.map(Run.native, runs), strict=True):
                assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_width_past_the_channels_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="in_widths: got 9"):
        Run(Case((1,), (4, 4), (8, 8), in_widths=(9,))).native()

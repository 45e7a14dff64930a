"""The CUDA group norm in the emulator: as accurate as torch in every dtype, on every path, under every schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tdc_fast import _native, explain, routed_group_norm
from tdc_fast.kernels.problems import NormTensors
from tdc_fast.ops import cuda, cuda_launch
from tdc_fast.ops.checks import norm_problem
from tests.cases import NormCase, Routing, norm_cases
from tests.emulator.harness import (
    AT_RUNTIME,
    FACTS,
    SANITIZED,
    SCHEDULES,
    EmulatorError,
    EmulatorLauncher,
    emulated,
    plain_only,
)
from tests.tolerance import assert_as_accurate_as_torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
if SANITIZED:
    del DTYPES["fp16"]  # is not built there
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
# (compute capability * 10, SMs, bytes of shared memory): room for whole samples; for short runs of pixels only.
ROOMY, TIGHT = FACTS, (80, 4, 2500)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@contextmanager
def emulator(facts: tuple[int, int, int] = ROOMY, schedule: int = 0) -> Iterator[EmulatorLauncher]:
    libraries = [emulated(family, AT_RUNTIME) for family in ("group_norm", "group_norm_two")]
    launcher = EmulatorLauncher(*libraries, schedule=schedule, facts=facts)
    with cuda_launch.use_launcher(launcher):
        yield launcher


def some_case(**changes: Any) -> NormCase:
    """Uneven groups, one of them empty, two that share an expert at different widths."""
    settings = {
        "routing": Routing((0, 2, 2, 3, 0), 4, 3, (2, 1, 0, 2)),
        "channels": 32,
        "num_groups": 4,
        "size": (7, 5),
        "widths": (32, 8, 16, 24),
        "extras": ("scale", "shift"),
        "activation": "silu",
        "layout": "channels_last",
        "seed": 3,
    }
    return NormCase(**(settings | changes))


def routed(case: NormCase, tensors: dict[str, Tensor], backend: str = "cuda") -> Tensor:
    extras = {name: tensors.get(name) for name in ("scale", "shift", "x2")}
    arguments = case.settings() | extras | {"backend": backend}
    return routed_group_norm(tensors["x"], tensors["weight"], tensors["bias"], case.routing.plan(), **arguments)


def gradients(case: NormCase, y: Tensor, tensors: dict[str, Tensor], dead: float = 0.0) -> dict[str, Tensor]:
    """The output and the gradient of every input; `dead` is what dy holds past the widths."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(y.dtype)
    for group, _, start, stop in case.routing.segments():
        if case.widths is not None:
            dy[start:stop, case.widths[group] :] = dead
    if y.requires_grad:
        grads = torch.autograd.grad(y, list(tensors.values()), dy, allow_unused=True, materialize_grads=True)
    else:  # an empty batch
        grads = tuple(torch.zeros_like(t) for t in tensors.values())
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def assert_matches_torch(case: NormCase, dtype: torch.dtype, backend: str = "cuda") -> None:
    tensors, copies, exact = (case.tensors(d) for d in (dtype, dtype, torch.float64))
    ours = gradients(case, routed(case, tensors, backend), tensors, dead=float("nan"))
    torchs, plain = gradients(case, case.plain(copies), copies), gradients(case, case.plain(exact), exact)
    # Terms are products of dy, 1 + scale and the slope of SiLU, about 2 in size: as noisy as four of size 1.
    terms = max(64, 4 * case.routing.batch * case.size[0] * case.size[1])
    for name in ours:
        assert_as_accurate_as_torch(ours[name], torchs[name], plain[name], f"{name} of {case}", terms)


def has_gradient(case: NormCase) -> bool:
    """Any two values normalise to +1 and -1, so the exact dx is almost zero and the computed one is rounding error."""
    return case.channels // case.num_groups * case.size[0] * case.size[1] > 2


@every_dtype
@pytest.mark.parametrize(
    ("facts", "two"), [(ROOMY, False), (TIGHT, False), (TIGHT, True)], ids=["roomy", "tight", "two"]
)
def test_any_problem_is_as_accurate_as_torch(dtype: str, facts: tuple[int, int, int], two: bool) -> None:
    @settings(max_examples=6 if SANITIZED else 14, deadline=None, derandomize=True)
    @given(case=norm_cases(fused=two).filter(has_gradient))
    def check(case: NormCase) -> None:
        launcher.schedule = SCHEDULES[case.seed % len(SCHEDULES)]
        assert_matches_torch(case, DTYPES[dtype])

    with emulator(facts) as launcher:
        check()


ONE_SAMPLE = Routing((0,), 4, 3, (2, 1, 0, 2))
SIXTEEN_BYTES = {"channels": 32, "num_groups": 4}  # whole vectors in every dtype
MANY_PIXELS = {"size": (17, 13), "routing": Routing((3,), 4, 3, (2, 1, 0, 2))}
STRADDLING = {"channels": 24, "num_groups": 8, "widths": (24, 3, 9, 15)}  # live channels end within a vector
SEAM = {"channels": 48, "num_groups": 4, "x2_channels": 16, "widths": (48, 12, 24, 36)}  # in the third norm group
ODD = {"channels": 15, "num_groups": 5, "widths": (15, 0, 3, 9)}
WHOLE = ["whole", "backward_whole"]
RUNS = ["partial", "apply", "backward_partial", "backward_apply"]
PATHS = {
    "a sample at once": (SIXTEEN_BYTES, ROOMY, "vector", WHOLE),
    "vectors with dead channels": (STRADDLING, ROOMY, "vector", WHOLE),
    # Copies wait until it is known which channels are dead.
    "a chunk of many pixels": (SIXTEEN_BYTES | MANY_PIXELS, (80, 1, ROOMY[2]), "vector", WHOLE),
    # One sample: of more the forward, whose rows are short, is in runs. See also the test of what is kept.
    "dy read twice": (SIXTEEN_BYTES | {"size": (9, 8), "routing": ONE_SAMPLE}, TIGHT, "vector", WHOLE),
    "runs of pixels": (SIXTEEN_BYTES | {"size": (17, 13)}, TIGHT, "vector", RUNS),
    "runs with dead channels": (STRADDLING | {"size": (17, 13)}, TIGHT, "vector", RUNS),
    "single channels": (ODD, ROOMY, "scalar", RUNS),
    "runs of single channels": (ODD | {"size": (29, 19)}, ROOMY, "scalar", RUNS),
    "two inputs": (SEAM, ROOMY, "vector_two", WHOLE),
    "runs of two inputs": (SEAM | {"size": (17, 13)}, TIGHT, "vector_two", RUNS),
    "single channels of two inputs": (ODD | {"x2_channels": 7}, ROOMY, "scalar_two", RUNS),
}


def for_dtype(facts: tuple[int, int, int], dtype: str) -> tuple[int, int, int]:
    """Shared memory that fp32 fills as two-byte types fill `facts`."""
    return (*facts[:2], facts[2] * 3 // 2) if dtype == "fp32" and facts == TIGHT else facts


@every_dtype
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_as_accurate_as_torch(path: str, dtype: str) -> None:
    changes, facts, access, stages = PATHS[path]
    with emulator(for_dtype(facts, dtype)) as launcher:
        assert_matches_torch(some_case(**changes), DTYPES[dtype])
    assert launcher.launched == [f"tdc_group_norm_{stage}_{dtype}_{access}" for stage in stages]


@every_dtype
def test_of_many_samples_the_affines_gradients_are_summed_in_a_launch_of_their_own(dtype: str) -> None:
    routing = Routing(tuple(i % 7 % 3 for i in range(257)), 4, 3, (2, 1, 0, 2))
    with emulator() as launcher:
        assert_matches_torch(some_case(routing=routing, **STRADDLING | {"size": (1, 2)}), DTYPES[dtype])
    assert launcher.launched[-1] == f"tdc_group_norm_expert_sums_{dtype}" and len(launcher.launched) == 3


def planned(planner: str, **changes: Any) -> list[Any]:
    """Launches for bf16 (5, 32, 9, 8) on four SMs, at made-up addresses."""
    sizes = {"dtype": 1, "batch": 5, "height": 9, "width": 8, "channels": 32, "num_norm_groups": 4}
    sizes |= {"num_groups": 4, "num_experts": 3, "eps": 1e-5, "silu": True, "device": TIGHT, "y": 1 << 20}
    addresses = dict.fromkeys(("x", "weight", "bias", "mean", "rstd", "offsets", "weight_index", "workspace"), 1 << 20)
    absent = {"scale": 0, "shift": 0, "widths": 0}
    if planner == "backward":
        del sizes["y"]
        absent |= {"dweight": 0, "dbias": 0, "dscale": 0, "dshift": 0}
        addresses |= {"dy": 1 << 20, "dx": 1 << 20}
    return getattr(_native, f"cuda_launches_group_norm_{planner}")(**sizes | addresses | absent | changes)


def test_where_x_and_dy_do_not_both_fit_x_alone_is_kept() -> None:
    pixels, chunk = 9 * 8, 8 * 2  # bytes of a chunk of one norm group
    roomy, tight = (planned("backward", device=facts)[0] for facts in ((80, 40, ROOMY[2]), TIGHT))
    assert roomy.kernel == tight.kernel == "tdc_group_norm_backward_whole_bf16_vector"
    assert roomy.shared_bytes - tight.shared_bytes == pixels * chunk


@pytest.mark.parametrize("tensor", ["x", "y"])
def test_addresses_between_16_bytes_take_single_channels(tensor: str) -> None:
    assert planned("forward", **{tensor: (1 << 20) + 8})[0].kernel == "tdc_group_norm_partial_bf16_scalar"


@plain_only
def test_a_norm_group_too_large_for_shared_memory_is_refused_with_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"shared memory does not hold .* x \(5, 40000, 9, 8\) bf16"):
        planned("forward", channels=40000, num_norm_groups=1)


@pytest.mark.parametrize(("dtype", "channels"), [("fp32", 4096), ("bf16", 1030)])
def test_groups_of_more_vectors_than_a_block_has_threads(dtype: str, channels: int) -> None:
    routing = Routing((0, 1), 2, 2, None)
    changes = {"channels": channels, "num_groups": 1, "size": (1, 3), "widths": (channels, 0)}
    with emulator():
        assert_matches_torch(some_case(routing=routing, **changes), DTYPES[dtype])


@pytest.mark.parametrize("groups", [(), (3,), (1, 1, 1, 1), (0, 0, 4, 0)])
def test_batches_of_nothing_of_one_sample_and_of_one_group(groups: tuple[int, ...]) -> None:
    with emulator():
        assert_matches_torch(some_case(routing=Routing(groups, 5, 5, None), widths=None), torch.float32)


def test_many_groups_of_few_experts() -> None:
    """More groups than a block has threads to look for a sample's, and experts used by groups far apart."""
    groups = tuple(i * 37 % 700 for i in range(9))
    routing = Routing(groups, 700, 3, tuple(i % 3 for i in range(700)))
    with emulator():
        assert_matches_torch(some_case(routing=routing, widths=None, size=(2, 3)), torch.float32)


@every_dtype
@pytest.mark.parametrize("facts", [ROOMY, TIGHT], ids=["whole", "runs"])
@pytest.mark.parametrize("changes", [STRADDLING, SEAM], ids=["one input", "two inputs"])
def test_everything_past_the_widths_is_exactly_zero(
    changes: dict[str, Any], dtype: str, facts: tuple[int, int, int]
) -> None:
    case = some_case(**changes, size=(17, 13), routing=Routing((0, 2, 2, 1, 3), 4, 4, None))
    tensors = case.tensors(DTYPES[dtype])
    with torch.no_grad():
        for group, expert, _, _ in case.routing.segments():  # each expert serves one group here
            for name in ("weight", "bias"):
                tensors[name][expert, case.widths[group] :] = float("nan")
    with emulator(facts):
        values = gradients(case, routed(case, tensors), tensors, dead=float("nan"))
    assert not any(value.isnan().any() for value in values.values())
    if case.x2_channels:
        values["dx"] = torch.cat([values["dx"], values["dx2"]], dim=1)
    for group, expert, start, stop in case.routing.segments():
        live = case.widths[group]
        dead = [values[name][start:stop, live:] for name in ("y", "dx", "dscale", "dshift")]
        dead += [values[name][expert, live:] for name in ("dweight", "dbias")]
        assert all(torch.equal(value, torch.zeros_like(value)) for value in dead)


@plain_only
@pytest.mark.parametrize("path", PATHS)
def test_no_schedule_changes_a_bit(path: str) -> None:
    changes, facts, _, _ = PATHS[path]
    case = some_case(**changes)
    results = []
    for schedule in SCHEDULES:
        tensors = case.tensors(torch.bfloat16)
        with emulator(facts, schedule):
            results.append(gradients(case, routed(case, tensors), tensors))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("facts", [ROOMY, TIGHT], ids=["whole", "runs"])
@pytest.mark.parametrize("mean", [100.0, 3000.0, 1e5])
def test_a_large_mean_costs_no_accuracy(mean: float, facts: tuple[int, int, int]) -> None:
    """y is as near to fp64 as torch's result without the mean. A one-pass variance in fp32 loses all digits here,
    as does a mean without its low bits."""
    case = some_case(widths=None, size=(17, 13), extras=(), activation=None)
    tensors, copies, exact = (case.tensors(d) for d in (torch.float32, torch.float32, torch.float64))
    with torch.no_grad():
        tensors["x"] += mean
        for t in (copies, exact):
            t["x"].copy_(tensors["x"] - mean)  # exact in fp32
    with emulator(facts):
        ours = routed(case, tensors)
    assert_as_accurate_as_torch(ours, case.plain(copies), case.plain(exact))


@pytest.mark.parametrize("facts", [ROOMY, TIGHT], ids=["whole", "runs"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "scale", "shift", "x of two", "x2 of two"])
def test_each_gradient_alone_is_the_one_among_all(wanted: str, facts: tuple[int, int, int]) -> None:
    wanted, *two = wanted.split(" of ")
    case = some_case(size=(17, 13), **(SEAM if two else {}))
    tensors = case.tensors(torch.bfloat16)
    with emulator(facts):
        every = gradients(case, routed(case, tensors), tensors)
        alone = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
        y = routed(case, alone)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        for group, _, start, stop in case.routing.segments():
            dy[start:stop, case.widths[group] :] = 0
        (grad,) = torch.autograd.grad(y, alone[wanted], dy)
    assert torch.equal(grad, every[f"d{wanted}"])


def test_scale_and_shift_may_be_halves_of_one_tensor_or_one_row_for_all() -> None:
    case = some_case(widths=None)
    tensors = {name: t.detach() for name, t in case.tensors(torch.float32).items()}
    both = torch.cat([tensors["scale"], tensors["shift"]], dim=1)
    scale, shift = both.chunk(2, dim=1)
    one = both[:1, : case.channels].expand(case.routing.batch, -1)
    with emulator():
        assert torch.equal(routed(case, tensors | {"scale": scale, "shift": shift}), routed(case, tensors))
        assert torch.equal(
            routed(case, tensors | {"scale": one, "shift": one}),
            routed(case, tensors | {"scale": one.clone(), "shift": one.clone()}),
        )


@pytest.mark.parametrize("x2_channels", [0, 12])
def test_group_numbers_that_make_no_sense_stay_within_bounds(x2_channels: int) -> None:
    """They are never read back to be checked, so no values may lead outside a tensor (the sanitizers check that)."""
    case, plan = some_case(x2_channels=x2_channels), some_case().routing.plan()
    x, weight, bias, scale, shift, *x2 = (t.detach() for t in case.tensors(torch.float32).values())
    widths = torch.tensor([10**6, -5, 7, 31], dtype=torch.int32)
    for offsets, index in ((plan.offsets * 1000 - 7, plan.weight_index), (plan.offsets, plan.weight_index * 99 - 50)):
        tensors = NormTensors(x, weight, bias, offsets, index, widths, scale, shift, *x2)
        problem = norm_problem("routed_group_norm", tensors, case.num_groups, 1e-5, True)
        with emulator():
            y, mean, rstd, counters = cuda.group_norm(problem, tensors)
            tensors = tensors._replace(counters=counters)
            everything = (True, True, True, True, True, bool(x2))
            grads = cuda.group_norm_backward(problem, torch.ones_like(y), mean, rstd, tensors, everything)
        shapes = [t.shape for t in (x, weight, bias, scale, shift, *x2)]
        assert y.shape[1] == case.channels and [g.shape for g in grads if g is not None] == shapes


PLANTED = {
    "NORM_WAITS_FOR_NOTHING": "x that is read before its copies have arrived",
    "NORM_NO_SUM_BARRIER": "a barrier missing between writing and adding the sums of each warp",
    "NORM_NO_COEFFICIENT_BARRIER": "a barrier missing between the coefficients and their use",
    "NORM_READS_DEAD": "dead channels not cleared when x is read again",
    "NORM_ALL_RUNS_ALIKE": "the last, shorter run of pixels weighed like the others",
    "NORM_DROPS_LAST_RUN": "the sums of the last run of pixels left out",
    "NORM_NO_RELEASE": "a block that counts itself before others see what it wrote",
    "NORM_NO_ACQUIRE": "a block that adds up what it need not see yet",
    "NORM_SUMS_TOO_EARLY": "the last block but one that adds up the samples",
    "NORM_KEEPS_COUNTER": "a counter that the next backward does not find at zero",
}


def test_two_inputs_are_read_where_they_are() -> None:
    case = some_case(**SEAM)
    t = case.tensors(torch.bfloat16)
    with emulator():
        said = explain(
            routed_group_norm, t["x"], t["weight"], t["bias"], case.routing.plan(), **case.settings(), x2=t["x2"]
        )
    assert said.reasons["cuda"] is None and "cuda" not in said.copies


def assert_twice_the_same(case: NormCase) -> None:
    tensors = case.tensors(torch.float32)
    y = routed(case, tensors)
    once, again = (torch.autograd.grad(y.sum(), list(tensors.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("facts", [ROOMY, TIGHT], ids=["whole", "runs"])
def test_a_backward_may_run_again(facts: tuple[int, int, int]) -> None:
    with emulator(facts):
        assert_twice_the_same(some_case(**STRADDLING, size=(17, 13)))


@plain_only
@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_bug_is_caught(plant: str) -> None:
    def passes(schedule: int, facts: tuple[int, int, int]) -> bool:
        case = some_case(**STRADDLING, size=(17, 13))
        try:
            with emulator(facts, schedule) as launcher, launcher.planted(plant):
                assert_matches_torch(case, torch.float32)
                assert_twice_the_same(case)
        except (AssertionError, EmulatorError):
            return False
        return True

    runs = [(schedule, facts) for facts in (ROOMY, TIGHT) for schedule in SCHEDULES]
    assert not all(passes(*run) for run in runs), PLANTED[plant]

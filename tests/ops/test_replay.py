"""A repeated call launches what its backend would launch, with the addresses of its own tensors."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _python_dispatch

from tdc_fast import RoutingPlan, routed_conv2d, routed_group_norm, routed_linear
from tdc_fast.kernels import launch, recording, triton_launcher
from tdc_fast.ops import backends, call_cache, native, replay
from tdc_fast.ops.cuda_planned import Planned
from tdc_fast.ops.replay import Replayed

pytest.importorskip("triton")

from bench.stand_in_gpu import StandInDriver, dense_memory, stand_in_gpu, with_tiles

BATCH, GROUPS = 6, 3


pytestmark = pytest.mark.usefixtures("repeating")


@pytest.fixture(scope="module")
def driver() -> Iterator[StandInDriver]:
    with stand_in_gpu(records=True) as stand_in:
        yield stand_in


class Bottom:
    """What reaches the C functions under Triton's launcher; tensor maps are described by what they were encoded from.

    Attributes:
        launched: grid and arguments of each launch.
        ways: Of each launch that can be repeated, the function that does it without Triton's launcher, or None.
    """

    def __init__(self, stand_in: StandInDriver, patch: pytest.MonkeyPatch) -> None:
        self.launched: list[tuple[tuple[int, ...], list[Any]]] = []
        self.ways: list[Any] = []
        self._maps: list[tuple[Any, int, tuple[Any, ...]]] = []
        module, note = sys.modules[stand_in.launcher_cls.__module__], self._launch
        name = next(n for n in ("fill_tma_descriptor_tiled", "fill_tma_descriptor") if hasattr(stand_in.utils, n))
        fill, direct = getattr(stand_in.utils, name), launch.direct

        class Launcher(stand_in.launcher_cls):
            def __init__(self, source: Any, metadata: Any) -> None:
                super().__init__(source, metadata)
                self.launch = module.wrap_handle_tensordesc(note, source.signature, metadata.tensordesc_meta)

        def encode(address: int, *rest: Any) -> Any:
            self._maps.append((fill(address, *rest), address, rest))
            return self._maps[-1][0]

        def noted(*arguments: Any) -> Any:
            self.ways.append(direct(*arguments))
            return self.ways[-1]

        Launcher.__module__ = module.__name__
        patch.setattr(stand_in, "launcher_cls", Launcher)
        patch.setattr(stand_in.utils, name, encode)
        patch.setattr(launch, "direct", noted)
        patch.setattr(triton_launcher, "_MAPS", 2)
        self._apart = getattr(module, "_BASE_ARGS_FORMAT_LEN", None)  # Triton 3.6: where the kernel's arguments begin

    def _launch(self, *given: Any) -> None:
        arguments = given[-1] if self._apart is None else given[self._apart :]
        self.launched.append((given[:3], [self._described(argument) for argument in arguments]))

    def _described(self, argument: Any) -> Any:
        for encoded, address, rest in self._maps:
            if encoded is argument:
                return Map(address, rest)
        return argument


class Map(NamedTuple):
    """A tensor map."""

    address: int
    settings: tuple[Any, ...]


@pytest.fixture(scope="module")
def bottom() -> Iterator[Bottom]:
    with stand_in_gpu() as stand_in, pytest.MonkeyPatch.context() as patch:
        yield Bottom(stand_in, patch)


def plan() -> RoutingPlan:
    return with_tiles(RoutingPlan.from_groups(torch.arange(BATCH) * GROUPS // BATCH, GROUPS))


def widths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def conv(channels: int = 16, out: int = 16, size: int = 8, taps: int = 3) -> dict[str, Tensor]:
    shapes = {"x": (BATCH, channels, size, size), "weight": (GROUPS, out, channels, taps, taps), "bias": (GROUPS, out)}
    return {name: dense_memory(*shape) for name, shape in shapes.items()}


def norm(channels: int = 16) -> dict[str, Tensor]:
    rows = {"weight": GROUPS, "bias": GROUPS, "scale": BATCH, "shift": BATCH}
    return {"x": dense_memory(BATCH, channels, 4, 4)} | {n: dense_memory(r, channels) for n, r in rows.items()}


Case = tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {
    "convolution": lambda: (routed_conv2d, conv(), {"padding": 1}),
    "its epilogue": lambda: (
        routed_conv2d,
        conv() | {"residual": dense_memory(BATCH, 16, 8, 8), "sample_bias": dense_memory(BATCH, 16)},
        {"padding": 1},
    ),
    "widths": lambda: (
        routed_conv2d, conv(), {"padding": 1, "in_widths": widths(16, 8, 0), "out_widths": widths(8, 8, 16)}
    ),
    "stride 2 without bias": lambda: (
        routed_conv2d, {n: t for n, t in conv().items() if n != "bias"}, {"padding": 1, "stride": 2}
    ),
    "upsampling": lambda: (routed_conv2d, conv(), {"padding": 1, "upsample": 2}),
    "two inputs": lambda: (
        routed_conv2d, conv(32) | {n: dense_memory(BATCH, 16, 8, 8) for n in ("x", "x2")}, {"padding": 1}
    ),
    "linear": lambda: (
        routed_linear,
        {"x": dense_memory(BATCH, 16), "weight": dense_memory(GROUPS, 16, 16), "bias": dense_memory(GROUPS, 16)},
        {},
    ),
    "tokens": lambda: (
        routed_linear,
        {name: dense_memory(*shape) for name, shape in (("x", (BATCH, 6, 16)), ("weight", (GROUPS, 16, 16)),
                                                        ("residual", (BATCH, 6, 16)))},
        {"in_widths": widths(16, 8, 0), "out_widths": widths(8, 8, 16)},
    ),
    "group norm": lambda: (routed_group_norm, norm(), {"num_groups": 4, "activation": "silu"}),
    "a norm's widths": lambda: (routed_group_norm, norm(), {"num_groups": 4, "widths": widths(16, 8, 0)}),
}  # fmt: skip


class Names:
    """Names for addresses: of given tensors, and of others in the order in which they appear."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self._names: dict[int, str] = {t.data_ptr(): name for name, t in given.items()}

    def of(self, address: int) -> str:
        return self._names.setdefault(address, f"made {len(self._names)}")


def launches(driver: StandInDriver | Bottom, case: Case, plan: RoutingPlan) -> list[Any]:
    """The launches of a forward and backward; addresses have names, and what is given as a tensor is its address."""
    operator, tensors, settings = case
    wanting = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    driver.launched.clear()
    y = operator(**{"bias": None} | wanting, plan=plan, backend="triton", **settings)
    dy = torch.ones_like(y)
    grads = torch.autograd.grad(y, list(wanting.values()), dy)
    routing = {"offsets": plan.offsets, "tiles": plan.tiles, "index": plan.weight_index}
    others = {name: t for name, t in settings.items() if isinstance(t, Tensor)}
    names = Names(tensors | routing | others | {"dy": dy})
    kept = (y, grads)

    def described(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return names.of(argument.data_ptr())
        if isinstance(argument, Map):
            return names.of(argument.address), *map(str, argument.settings)
        if hasattr(argument, "block_shape"):
            box = (argument.shape, argument.strides, argument.block_shape, argument.padding)
            return names.of(argument.base.data_ptr()), *map(str, box)
        return names.of(argument) if isinstance(argument, int) and argument >= 2**32 else argument

    found = [(grid, [described(a) for a in arguments]) for grid, arguments in driver.launched]
    del kept
    return found


def compare_repeated(driver: StandInDriver | Bottom, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asserts that a repeated call launches what the general way does."""
    kept: list[Tensor] = []

    def keeping(make: Callable[..., Tensor]) -> Callable[..., Tensor]:  # so that no address comes twice
        def kept_empty(*arguments: Any) -> Tensor:
            kept.append(make(*arguments))
            return kept[-1]

        return kept_empty

    backends.forget()
    for device, empty in replay._EMPTY.items():
        monkeypatch.setitem(replay._EMPTY, device, keeping(empty))
    one_plan = plan()
    for _ in range(2):  # the general way, then recorded
        launches(driver, CASES[name](), one_plan)
    replays = [call.run for call in call_cache.cached_calls()]
    assert not any(isinstance(r, Replayed) and r.never_repeats for r in replays)
    last, other_plan = CASES[name](), plan()
    repeated = launches(driver, last, other_plan)
    assert kept
    monkeypatch.undo()
    backends.forget()
    assert repeated == launches(driver, last, other_plan)


@pytest.mark.parametrize("name", CASES)
def test_a_repeated_call_launches_what_the_backend_would(
    driver: StandInDriver, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_repeated(driver, name, monkeypatch)


@pytest.mark.parametrize("name", ["its epilogue", "widths", "two inputs", "group norm"])
def test_a_repeated_call_passes_the_driver_what_tritons_launcher_would(
    bottom: Bottom, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bottom.ways.clear()
    compare_repeated(bottom, name, monkeypatch)
    assert bottom.ways and None not in bottom.ways


def test_memory_that_is_less_aligned_takes_the_backends_way(driver: StandInDriver) -> None:
    case = CASES["group norm"]()
    one_plan = plan()
    for _ in range(3):
        launches(driver, case, one_plan)
    operator, tensors, settings = case
    odd = torch.empty(GROUPS * 16 + 1, dtype=torch.bfloat16)[1:].view(GROUPS, 16)
    assert odd.data_ptr() % 16
    case = (operator, tensors | {"bias": odd}, settings)
    repeated = launches(driver, case, one_plan)
    backends.forget()
    assert repeated == launches(driver, case, one_plan)


class Noted:
    """A launch that writes down the addresses it is repeated with."""

    def __init__(self, *tensors: Tensor) -> None:
        self.addresses, self.calls = [t.data_ptr() for t in tensors], list[list[int]]()

    def again(self, place: recording.Place) -> recording.Again:
        places = [place(address) for address in self.addresses]

        def note(tensors: list[Tensor], addresses: list[int], stream: int) -> None:
            self.calls.append([addresses[p] + past for p, past in places])

        return recording.Again(note)


def replayed(function: Callable[..., Any]) -> tuple[Replayed, list[int]]:
    runs: list[int] = []

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        return function(*arguments)

    return Replayed(counted, torch.device("cpu"), 2), runs


def test_a_call_is_repeated_with_new_results_and_workspaces() -> None:
    noted: list[Noted] = []

    def function(x: Tensor, absent: None, factor: int) -> tuple[Tensor, Tensor]:
        workspace = x.new_empty(7, dtype=torch.float64)
        images = torch.empty(2, 3, 4).permute(0, 2, 1)
        noted.append(Noted(x, workspace, images, images[1]))
        recording.note(noted[-1])
        return images, x.new_empty(0)

    call, runs = replayed(function)
    results: list[Tensor] = []
    for _ in range(4):
        x = torch.randn(8)
        images, nothing = call(x, None, 3)
        assert not any(result is images or result is nothing for result in results)
        results += [images, nothing]
        assert images.shape == (2, 4, 3) and images.stride() == (12, 1, 4)
        assert nothing.shape == (0,)
    assert len(runs) == 1 and len(noted[0].calls) == 3
    first, _, second, third = noted[0].calls[-1]
    assert (first, second, third) == (x.data_ptr(), images.data_ptr(), images[1].data_ptr())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, n: x.clone(),
        lambda x, y, n: torch.empty(8).copy_(x),
        lambda x, y, n: x,
        lambda x, y, n: torch.empty(8)[:4],
        lambda x, y, n: torch.empty(8, 8)[:, ::2],
        lambda x, y, n: (z := torch.empty(8), z),
        lambda x, y, n: (recording.note(Noted(torch.zeros(3))), torch.empty(8))[1],
        lambda x, y, n: (recording.note(Noted(x[1:])), torch.empty(8))[1],
    ],
    ids=["a copy", "a copy in place", "x", "a part", "gaps", "one twice", "a constant", "part of an argument"],
)  # fmt: skip
def test_what_does_more_than_to_allocate_and_launch_is_never_repeated(function: Callable[..., Any]) -> None:
    call, runs = replayed(function)
    for _ in range(3):
        call(torch.randn(8), None, 3)
    assert len(runs) == 3


def state_of_modes() -> list[Any]:
    """What torch and the recording note while a call is recorded."""
    noted = {name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")}
    return [noted, torch._C._len_torch_dispatch_stack(), recording._recording.launches]


def test_an_interrupt_at_any_instruction_of_a_recording_leaves_nothing_active() -> None:
    before = state_of_modes()
    traced = (_python_dispatch.__file__, recording.__file__, replay.__file__)
    count = 0

    def interrupt_at(instruction: int) -> Any:
        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            if frame.f_code.co_filename not in traced or frame.f_code.co_name == "_end_recording":
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                count += 1
                if count == instruction:
                    raise KeyboardInterrupt
            return trace

        return trace

    instruction, is_interrupted = 0, True
    while is_interrupted:
        instruction, count, is_interrupted = instruction + 1, 0, False
        call, _ = replayed(lambda x, y, n: torch.empty_like(x))
        usual = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 has to see it set before it traces
        sys.settrace(interrupt_at(instruction))
        try:
            call(torch.randn(8), None, 3)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            sys.settrace(usual)
        assert state_of_modes() == before, instruction
    assert instruction > 300


def test_nothing_that_was_recorded_keeps_memory() -> None:
    call, _ = replayed(lambda x, y, n: torch.empty_like(x))
    x = torch.randn(1000)
    before = gc_tensors()  # other tests' too
    for _ in range(2):
        result = call(x, None, 3)
    known = {id(t) for t in (*before, result)}
    others = [t for t in gc_tensors() if id(t) not in known and t.numel() == 1000]
    assert all(t.untyped_storage().nbytes() == 0 for t in others)


def gc_tensors() -> list[Tensor]:
    import gc

    return [item for item in gc.get_objects() if type(item) is Tensor]


@pytest.mark.skipif(native.module is None, reason="the native module is not built")
class TestPlanned:
    """Of planners: functions of addresses and sizes."""

    x, y = torch.zeros(4), torch.zeros(4)

    def launch(self, *words: int, grid: int = 1) -> Any:
        return native.module.Launch(
            kernel="k", grid=(grid, 1, 1), threads=32, shared_bytes=0, shapes="x",
            params=struct.pack(f"<{len(words)}Q", *words),
        )  # fmt: skip

    def repeated(self, plan: Callable[..., list[Any]], **sizes: Any) -> Any:
        """The parameters and grid of a repetition with x at 64 and y 8 bytes past 120, or None."""
        ran: list[Any] = []
        launcher = SimpleNamespace(run=lambda launches, device: ran.extend(launches))
        arguments = {"x": self.x.data_ptr(), "y": self.y.data_ptr(), **sizes}
        planned = Planned(lambda replaced: plan(**arguments | replaced), arguments, launcher, self.x.device)
        again = planned.again({self.x.data_ptr(): (0, 0), self.y.data_ptr(): (1, 8)}.__getitem__)
        if again is None:
            return None
        again.run([], [64, 120], 0)
        return [(launch.grid, struct.unpack(f"<{len(launch.params) // 8}Q", launch.params)) for launch in ran]

    def test_every_address_is_replaced_and_nothing_else(self) -> None:
        def plan(x: int, y: int, size: int, eps: float) -> list[Any]:
            return [self.launch(x, size, y, y + 24), self.launch(0, x, grid=size)]

        assert self.repeated(plan, size=5, eps=1e-5) == [((1, 1, 1), (64, 5, 128, 152)), ((5, 1, 1), (0, 64))]

    def test_a_launch_without_addresses_is_repeated_as_it_is(self) -> None:
        assert self.repeated(lambda x, y: [self.launch(7), self.launch(y)]) == [((1, 1, 1), (7,)), ((1, 1, 1), (128,))]

    @pytest.mark.parametrize(
        "plan",
        [
            lambda self, x, y: [self.launch(x, grid=1 + (x > y))],
            lambda self, x, y: [self.launch(x)] * (1 + (x > 2**41)),
            lambda self, x, y: [self.launch(x ^ y)],
            lambda self, x, y: [self.launch(x + y)],
            lambda self, x, y: [self.launch(x >> 3)],
        ],
        ids=["the grid", "the number of launches", "both in one", "their sum", "in other words"],
    )
    def test_a_plan_that_addresses_decide_is_not_repeated(self, plan: Callable[..., list[Any]]) -> None:
        assert self.repeated(lambda x, y: plan(self, x, y)) is None

    def test_an_unknown_address_is_an_error(self) -> None:
        with pytest.raises(KeyError):
            self.repeated(lambda x, y, z: [self.launch(z)], z=2**45)

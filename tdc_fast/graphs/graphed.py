"""A function that replays from a graph, and the function itself where it cannot."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module_hooks
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from tdc_fast.errors import invalid
from tdc_fast.graphs.capture import Recording, captures_on, current_capture
from tdc_fast.graphs.flops import Counts, active_counters, add_flops, difference

_log = logging.getLogger("tdc_fast.graphs")
_lock = threading.RLock()
_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _MODULE_HOOKS)

R = TypeVar("R")


class CannotCapture(RuntimeError):
    """A function that had to be captured cannot be; the message says why."""


@dataclass
class _Signature:
    """What is known of one signature: calls so far, FLOPs if they were counted; static inputs and the recording."""

    key: _Key
    calls: int = 0
    flops: Counts | None = None
    inputs: Sequence[Tensor] = ()
    recording: Recording | None = None


class Graphed:
    """A function whose work on a GPU is captured once per signature of its arguments and then replayed.

    The first `warmup` calls with a signature run the function as it is, on a stream of its own; the next one captures
    it and replays at once. So every call has the effect of one call of the function. A signature is: shapes, strides,
    dtypes and devices of the tensors among the arguments, at any depth of tuples, lists and dicts; everything else in
    the arguments by value; grad mode, autocast, and whether each of `modules`, and each module in them, is training;
    torch's settings of what an operator computes with: the default dtype, the precision of fp32 products, determinism,
    and which kernels cuDNN and attention may take.

    What the function must keep to:

    - Tensors among its arguments are copied into static buffers before each replay, and are not written into. All other
      tensors that it reads, such as weights, are read where they were when it was captured: write into them; after
      replacing them, call `reset`.
    - Python does not run in a replay: numbers, branches and hooks are those of the capture. What changes is a tensor.
      After adding a hook or another module, call `reset`.
    - It never waits for the device (`.item()`, `.tolist()`, a copy to the CPU, a condition on a tensor's value).
    - Random numbers come from the default generator of the device, or from one of `generators`. They are then those of
      the function itself, and a saved state of the generator continues as usual.
    - It returns tensors without gradients. A training step calls `backward` inside.

    Where it cannot be captured, all calls run the function as it is, and one line of the log (`tdc_fast.graphs`) says
    why: `why_not` has the same text.

    Under a dispatch mode of torch, such as `FlopCounterMode`, and under torch.compile, the function runs as it is.

    Calls from several threads take turns. Replays are queued on the caller's current stream, after those of other
    streams, as all graphs of a device share their memory.

    Args:
        function: the function.
        device: where all tensors among its arguments are.
        name: what the log calls it.
        modules: the modules that it runs. One with hooks is not captured, as a hook is Python.
        generators: generators of the device that it draws from, besides the default one.
        clone: return copies of the results. False returns the buffers that every replay writes: read them before the
            next call of any graphed function of the device.
        warmup: calls before the capture, at least 1. The last of them is watched for waiting.
        max_graphs: graphs kept; where another signature is captured, the one used longest ago is dropped. After eight
            times as many captures there are no more: signatures without a graph then run as they are.
        fixed_flops: every call with a signature takes the same FLOPs, as that of a dense model does and that of pruned
            experts does not. Replays then go on under a `FlopCounterMode`, and are counted.
        required: raise CannotCapture where it cannot be captured, instead of running the function as it is.

    Attributes:
        why_not: why the function is not captured, or "".

    Raises:
        ValueError: a number is out of range.
        CannotCapture: it is `required` and there is nothing that can capture on the device.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device | str,
        *,
        name: str = "",
        modules: Sequence[nn.Module] = (),
        generators: Sequence[torch.Generator] = (),
        clone: bool = True,
        warmup: int = 2,
        max_graphs: int = 8,
        fixed_flops: bool = False,
        required: bool = False,
    ) -> None:
        for argument, value in (("warmup", warmup), ("max_graphs", max_graphs)):
            if value < 1:
                raise invalid(argument, value, "at least 1")
        self._function = function
        self._device = _with_index(torch.device(device))
        self._name = name or getattr(function, "__name__", type(function).__name__)
        self._modules, self._generators = tuple(modules), tuple(generators)
        self._with_modes = _all_modules(self._modules)
        self._clone, self._warmup, self._max_graphs, self._required = clone, warmup, max_graphs, required
        self._fixed_flops = fixed_flops
        self._signatures: OrderedDict[_Key, _Signature] = OrderedDict()
        self._captures, self._full = 0, False
        self.why_not = ""
        if not captures_on(self._device):
            self._give_up(f"there are no CUDA graphs on {self._device}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run or replay the function; see the class."""
        capture = current_capture()
        counters = active_counters()
        if self.why_not or capture.capturing or counters is None or torch.compiler.is_compiling():
            return self._function(*args, **kwargs)
        if counters and not self._fixed_flops:
            return self._function(*args, **kwargs)
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with _lock:
            try:
                entry = self._entry(_key(leaves, spec, self._device, self._with_modes))
            except TypeError:
                self._give_up("an argument that is no tensor cannot be compared between calls: it has no hash")
                return self._function(*args, **kwargs)
            if counters and entry.flops is None:
                before = counters[-1].get_flop_counts()
                result = self._run(entry, tensors, args, kwargs)
                entry.flops = difference(counters[-1].get_flop_counts(), before)
                return result
            if entry.recording is None and (entry.calls < self._warmup or self._is_full()):
                return self._run(entry, tensors, args, kwargs)
            with _disable_current_modes() if counters else nullcontext():
                if entry.recording is None:
                    self._record(entry, leaves, spec, tensors)
                if entry.recording is not None:
                    for counter in counters:
                        add_flops(counter, entry.flops or {})
                    capture.begin(self._device)
                    return self._replay(entry, tensors)
            return self._function(*args, **kwargs)

    def reset(self) -> None:
        """Drop all graphs: the next calls warm up and capture again."""
        with _lock:
            self._signatures.clear()
            self._with_modes = _all_modules(self._modules)

    @property
    def num_graphs(self) -> int:
        """How many graphs there are."""
        return sum(entry.recording is not None for entry in self._signatures.values())

    def _entry(self, key: _Key) -> _Signature:
        found = self._signatures.get(key)
        if found is None:
            found = self._signatures[key] = _Signature(key)
            waiting = [other for other, known in self._signatures.items() if known.recording is None]
            if len(waiting) > 4 * self._max_graphs:  # signatures that came once or twice and were not seen again
                del self._signatures[waiting[0]]
        self._signatures.move_to_end(found.key)
        return found

    def _run(self, entry: _Signature, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
        """Run the function as it is, and look for what would keep it from being captured."""
        before = _versions(tensors)
        result, waits = current_capture().warm_up(lambda: self._function(*args, **kwargs), self._device)
        entry.calls += 1
        if entry.calls == self._warmup:
            written = "" if before == _versions(tensors) else "it writes into an argument, of which a graph has a copy"
            obstacle = self._obstacle(tensors, result) or written or waits
            if obstacle:
                self._give_up(obstacle)
        return result

    def _is_full(self) -> bool:
        """Whether there were so many captures that there is no other one; says so once."""
        if self._captures < 8 * self._max_graphs:
            return False
        if not self._full:
            self._full = True
            text = "%s: too many signatures; those without a CUDA graph run without one from now on"
            _log.warning(text, self._name)
        return True

    def _obstacle(self, tensors: Sequence[Tensor], result: Any) -> str:
        for tensor in tensors:
            if tensor.device != self._device:
                return f"an argument is on {tensor.device}, not on {self._device}"
            if tensor.requires_grad and torch.is_grad_enabled():
                return "an argument requires a gradient"
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in _pytree.tree_leaves(result)):
            return "its result requires a gradient: call backward inside, or run it under torch.no_grad()"
        if not active_counters() and any(getattr(_module_hooks, name, None) for name in _GLOBAL_HOOKS):
            return "there are global hooks of modules"
        for name, module in self._submodules():
            if any(getattr(module, hooks, None) for hooks in _MODULE_HOOKS):
                return f"module {name or type(module).__name__} has hooks"
        return ""

    def _submodules(self) -> Iterator[tuple[str, nn.Module]]:
        for module in self._modules:
            yield from module.named_modules()

    def _record(self, entry: _Signature, leaves: Sequence[Any], spec: Any, tensors: Sequence[Tensor]) -> None:
        """Capture the signature; the reason is logged if that fails."""
        captured = [other for other in self._signatures.values() if other.recording is not None]
        for oldest in captured[: max(0, len(captured) + 1 - self._max_graphs)]:
            oldest.recording, oldest.inputs, oldest.calls = None, (), 0
        with torch.no_grad():
            static = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
        given = iter(static)
        args, kwargs = _pytree.tree_unflatten([next(given) if isinstance(v, Tensor) else v for v in leaves], spec)
        self._captures += 1
        torch.clear_autocast_cache()  # weights that were cast before the capture would not be cast in a replay
        try:
            entry.recording = current_capture().record(
                lambda: self._function(*args, **kwargs), self._device, self._generators
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            self._give_up(f"the capture failed: {type(error).__name__}: {reason}")
            return
        finally:
            torch.clear_autocast_cache()  # what was cast in it is in the memory of the graph
        entry.inputs = static

    @torch.no_grad()
    def _replay(self, entry: _Signature, tensors: Sequence[Tensor]) -> Any:
        recording = entry.recording
        assert recording is not None
        changed = [
            (static, tensor)
            for static, tensor in zip(entry.inputs, tensors, strict=True)
            if static.data_ptr() != tensor.data_ptr()
        ]
        if changed:
            torch._foreach_copy_([static for static, _ in changed], [tensor for _, tensor in changed])
        recording.replay()
        if not self._clone:
            return recording.outputs
        return _pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, recording.outputs)

    def _give_up(self, reason: str) -> None:
        if self._required:
            raise CannotCapture(f"{self._name} cannot run as a CUDA graph: {reason}")
        self.why_not = reason
        self._signatures.clear()
        _log.warning("%s runs without a CUDA graph: %s", self._name, reason)


def graphed(function: Callable[..., R], device: torch.device | str, **options: Any) -> Callable[..., R]:
    """The function as a `Graphed` one where its device has graphs, else the function itself.

    Args:
        function: see `Graphed`.
        device: where all tensors among its arguments are.
        **options: further arguments of `Graphed`.
    """
    return Graphed(function, device, **options) if captures_on(_with_index(torch.device(device))) else function


class _Key:
    """A signature, hashed once."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, *parts: Hashable) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._parts == other._parts


def _all_modules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [inner for module in modules for inner in module.modules()]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """What changes when a tensor is written into; tensors of the inference mode do not count that."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _key(leaves: Sequence[Any], spec: Any, device: torch.device, modules: Sequence[nn.Module]) -> _Key:
    parts = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf.hex() if isinstance(leaf, float) else leaf)  # as -0.0 == 0.0, and nan != nan
        for leaf in leaves
    )
    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        bytes([module.training for module in modules]),
    )
    return _Key(spec, parts, modes, _settings())


def _settings() -> tuple[Hashable, ...]:
    """The settings of torch that decide what operators compute, or in which kernel; a graph keeps those it had."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        cuda.matmul.fp32_precision,  # torch.set_float32_matmul_precision sets it too
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def _with_index(device: torch.device) -> torch.device:
    """The device with its number, which tensors on it have."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())

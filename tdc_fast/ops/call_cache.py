"""A cache of operator calls: a call like an earlier one skips torch's dispatcher and all checks that that one passed.

A call of a registered operator goes the general way: autocast, autograd, torch's modes, the checks of the arguments,
the choice of a backend. All of that depends on the settings, the metadata of the tensors and torch's state alone, but
for the numbers in index tensors, which backends check where they read them. So once a call went well, what it came down
to is kept, for calls that

* are watched by nothing: no tracing, no mode of torch, no profiler, no forward-mode derivative (`_unobserved`);
* have the same settings, environment and precision of fp32 products;
* have tensors of the same types, dispatch keys, dtypes, devices, sizes, strides and `requires_grad`, which one call of
  a guard of torch's compiler compares; the keys tell of torch.func, autocast and inference mode, too;
* have one tensor in several places where the earlier call had;
* have tensors that are still in memory, which is checked for every call.

Anything else goes the general way, which raises what it always raised.

On a GPU the calls are also kept by an extension in C++, where there is one (host.py): it finds, repeats and
differentiates them in less time, and leaves what it does not find to the code here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from operator import is_
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tdc_fast.ops import host, library
from tdc_fast.ops.checks import are_in_memory, extents, tf32_is_allowed
from tdc_fast.ops.replay import Replayed, picker

ENVIRONMENT = "TDC_FAST_BACKEND"
_LIMIT = 4096  # keys remembered
_MOST_ALIKE = 16  # calls remembered of one key

try:  # what torch tells in private of who watches a call, and of tensors; a torch without it takes the general way
    _Guards: Any = torch._C._dynamo.guards.TensorGuards
    _function_mode: Any = torch._C._is_torch_function_mode_enabled
    _dispatch_modes: Any = torch._C._len_torch_dispatch_stack
    _profiling: Any = torch.autograd._profiler_enabled
    _autocasts: Any = torch._C._is_any_autocast_enabled
    _is_nested: Any = vars(torch._C.TensorBase)["is_nested"].__get__
    _is_told = True
except (AttributeError, KeyError):
    _is_told = False

_is_compiling = torch.compiler.is_compiling
_environment = os.environ._data  # type: ignore[attr-defined]  # os.environ.get takes as long as all other checks
_grad_enabled = torch.is_grad_enabled
_nbytes, _storage, _offset = torch.UntypedStorage.nbytes, Tensor.untyped_storage, Tensor.storage_offset
_VARIABLE = ENVIRONMENT.encode()


class Bound(NamedTuple):
    """An operator whose arguments are checked and whose backend is chosen.

    Attributes:
        run: Computes it, of the same arguments or of others whose tensors have the same metadata.
        only_launches: Whether `run` does nothing but to allocate tensors and to launch kernels.
    """

    run: Callable[..., Any]
    only_launches: bool


class CachedCall:
    """A call that went well.

    Attributes:
        matches: Whether tensors have the metadata that its tensors had, and are all different.
        differentiable: Whether one of them requires a gradient.
        run: Computes it, given all arguments.
    """

    __slots__ = ("_held", "_once", "_repeated", "_spans", "differentiable", "matches", "run")

    def __init__(self, args: Sequence[Any], tensors: int, run: Callable[..., Any]) -> None:
        """Keeps it.

        Args:
            args: Its arguments.
            tensors: How many of them, the first ones, are tensors or None.
            run: Computes it.
        """
        firsts = list(enumerate(_shared(args[:tensors]) or range(tensors)))
        self._once = picker([place for place, first in firsts if place == first and args[place] is not None])
        self._repeated = [(place, first) for place, first in firsts if place != first and args[place] is not None]
        given = self._once(args)
        sizes, strides = ([list(of(t)) for t in given] for of in (Tensor.size, Tensor.stride))
        self.matches = _Guards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self.differentiable = any(t.requires_grad for t in given)
        self.run = run
        self._spans = extents(given)
        self._held: Any = None

    def given(self, args: Sequence[Any]) -> Sequence[Tensor] | None:
        """The tensors among the arguments of a call of the same types, each once; None where the call is another.

        It is where one tensor is not in the same places, and where one is nested, at which `matches` would end the
        process.
        """
        for place, first in self._repeated:
            if args[place] is not args[first]:
                return None
        given = self._once(args)
        return None if any(map(_is_nested, given)) else given

    def are_in_memory(self, given: Sequence[Tensor]) -> bool:
        """Whether the storage of every tensor covers it; they must match."""
        held = [*map(_nbytes, map(_storage, given))], [*map(_offset, given)]
        if held == self._held:  # storages and places in them as large as those that were found to do
            return True
        found = are_in_memory(given, self._spans)
        if found:
            self._held = held
        return found


class Context:
    """Stands for the context of torch.autograd.Function in the functions that `Operator.add_autograd` takes.

    Attributes:
        needs_input_grad: Whether each tensor of a call requires a gradient.
        saved_tensors: What `save` saved.
        constant: The results that have no gradient.
        materializes: Whether an absent gradient counts as zeros.
    """

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs_input_grad)
        self.saved_tensors: tuple[Any, ...] = ()
        self.constant: tuple[Tensor, ...] = ()
        self.materializes = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """As torch's."""
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """As torch's."""
        self.constant = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """As torch's."""
        self.materializes = value

    def of(self, saved: tuple[Any, ...]) -> Context:
        """The same of a call that saved other tensors."""
        context = Context.__new__(Context)
        vars(context).update(vars(self), saved_tensors=saved)
        return context


class Operator:
    """A registered operator with a cache of its calls.

    Attributes:
        overload: The operator itself, as torch calls it.
        bind: As given.
        fake: As given.
        find: The result for all arguments, which need not be right, where an earlier call was like this one, else None.
            Not to be called while torch traces (torch.compiler.is_compiling).
    """

    def __init__(self, schema: str, bind: Callable[..., Bound], fake: Callable[..., Any]) -> None:
        """Registers it.

        Args:
            schema: As of `library.define`. The first two arguments are tensors, and the others that are come next.
            bind: Checks the arguments and chooses what computes them.
            fake: As of `library.define`.
        """
        self.overload = library.define(schema, lambda *args: bind(*args).run(*args), fake)
        kinds = [str(argument.type) for argument in self.overload._schema.arguments]
        self._tensors = sum(kind in ("Tensor", "Optional[Tensor]") for kind in kinds)
        self.bind, self.fake = bind, fake
        # By the types of all arguments, then by `_key`.
        self._kept: dict[Hashable, dict[Hashable, list[CachedCall]]] = {}
        self._calls: Any = None  # those that the extension in C++ keeps
        self.find: Callable[..., Any] = self._find_in_python
        self._apply: Callable[..., Any] | None = None
        self._save: Callable[..., None] | None = None
        self._backward: Callable[..., Any] | None = None
        self._cast: Callable[..., tuple[Any, ...]] = lambda device, *args: args
        self._is_cast = False
        _operators.append(self)

    def add_autograd(
        self, save: Callable[..., None], backward: Callable[..., Any], tangent: Callable[..., Any]
    ) -> None:
        """As `library.add_autograd`."""
        self._apply = library.add_autograd(self.overload, save, backward, tangent)
        self._save, self._backward = save, backward

    def add_autocast(self, cast: Callable[..., tuple[Any, ...]]) -> None:
        """As `library.add_autocast`."""
        library.add_autocast(self.overload, cast)
        self._cast, self._is_cast = cast, True

    def call(self, *args: Any) -> Any:
        """The result for right arguments, by the shortest way.

        Args:
            *args: All its arguments, hashable where they are not tensors.
        """
        result = None if _is_compiling() else self.find(*args)
        return self.call_first(*args) if result is None else result

    def call_first(self, *args: Any) -> Any:
        """The result for right arguments, the general way, after `find` found none.

        Args:
            *args: As of `call`.
        """
        result = self.overload(*args)
        if not _is_compiling() and _unobserved():
            device = self._autocast_device(args)
            with library.without_autocast() if device else nullcontext():
                cast = self._cast(device, *args) if device else args
                call = self._remember(cast)
            # The extension tells tensors apart by their identity.
            if call is not None and all(map(is_, cast, args)) and not _shared(args[: self._tensors]):
                self._remember_in_extension(args, result, call.run)
        return result

    def _find_in_python(self, *args: Any) -> Any:
        """The result where an earlier call that is kept here was like this one, else None."""
        if not _unobserved():
            return None
        device = self._autocast_device(args)
        if not device:
            return self._again(args)
        if not _are_dense(args[: self._tensors]):
            return None
        with library.without_autocast():
            return self._again(self._cast(device, *args))

    def _autocast_device(self, args: tuple[Any, ...]) -> str:
        """The type of device on which autocast changes the arguments; "" where it does not."""
        if not _autocasts() or not self._is_cast or not isinstance(args[0], Tensor):
            return ""
        device = args[0].device.type
        return device if torch.is_autocast_enabled(device) else ""

    def _again(self, args: tuple[Any, ...]) -> Any:
        """The result where a call that is kept here was like this one, else None."""
        kept = self._kept.get((*map(type, args),))
        if kept is None:
            return None
        try:
            calls = kept[_key(args, self._tensors)]
        except (KeyError, TypeError, RuntimeError):
            return None  # it is new, or a setting has no hash, or a nested tensor no shape: the general way says more
        for call in calls:
            given = call.given(args)
            if given is not None and call.matches(*given):
                break
        else:
            return None
        if call is not calls[0]:
            calls[:] = [call, *(other for other in calls if other is not call)]
        if not call.are_in_memory(given):
            return None
        if call.differentiable and self._apply is not None and _grad_enabled():
            return self._apply(*args, call.run)
        return call.run(*args)

    def _remember(self, args: tuple[Any, ...]) -> CachedCall | None:
        """Keeps a call that went well, where that can be done, and returns it."""
        given = [t for t in args[: self._tensors] if t is not None]
        if not library.are_plain(given):
            return None
        bound = self.bind(*args)
        run = library.below_autograd(bound.run)
        if bound.only_launches:
            run = Replayed(run, given[0].device, self._tensors)
        if sum(map(len, self._kept.values())) >= _LIMIT:
            self.forget()
        calls = self._kept.setdefault((*map(type, args),), {}).setdefault(_key(args, self._tensors), [])
        calls.insert(0, CachedCall(args, self._tensors, run))
        del calls[_MOST_ALIKE:]
        return calls[0]

    def _remember_in_extension(self, args: tuple[Any, ...], result: Any, run: Callable[..., Any]) -> None:
        """Keeps a call in the extension in C++ too, where there is one."""
        extension = host.extension(args[0].device)
        if extension is None:
            return
        if self._calls is None:
            self._calls = extension.Calls(self._settings())
            self.find = self._calls
        self._calls.add(args, run, isinstance(run, Replayed), self._derivative(args, result))

    def _settings(self) -> SimpleNamespace:
        """What the extension has to know of the operator."""
        return SimpleNamespace(
            count=len(self.overload._schema.arguments),
            tensors=self._tensors,
            is_cast=self._is_cast,
            otherwise=self._find_in_python,
            watchers=(_dispatch_modes, _function_mode, _profiling),
            forward_ad=vars(forward_ad),
            variables=_environment,
            variable=_VARIABLE,
            tf32_is_allowed=tf32_is_allowed,
            device=getattr(torch._C, "_cuda_getDevice", None),
            stream=getattr(torch._C, "_cuda_getCurrentRawStream", None),
            most=_LIMIT,
            most_alike=_MOST_ALIKE,
        )

    def _derivative(self, args: tuple[Any, ...], result: Any) -> tuple[Any, ...] | None:
        """How the extension records the graph of a call and its likes: what `save` does with its arguments.

        Returns:
            The name of the node, `backward` for it, what it takes in the place of torch's context, the places of the
            tensors to save (-1 - i for result i, the number of tensors for none), those of the results that have a
            gradient, and whether an absent gradient counts as zeros. None for an operator that has no derivative.
        """
        if self._save is None or self._backward is None:
            return None
        given, results = args[: self._tensors], [result] if isinstance(result, Tensor) else list(result)
        context = Context([isinstance(t, Tensor) and t.requires_grad for t in given])
        self._save(context, args, result)
        numbers = {id(t): place for place, t in enumerate(given) if t is not None}
        numbers |= {id(t): -1 - place for place, t in enumerate(results)}
        saved = [self._tensors if t is None else numbers[id(t)] for t in context.saved_tensors]
        constant = [id(t) for t in context.constant]
        moving = [place for place, t in enumerate(results) if id(t) not in constant]
        context.saved_tensors = context.constant = ()  # of which no memory is kept
        backward = self._backward

        def gradients(context: Context, saved: tuple[Any, ...], grads: tuple[Any, ...]) -> Any:
            return backward(context.of(saved), *grads)

        return f"{self.overload._opname}Backward", gradients, context, saved, moving, context.materializes

    def cached_calls(self) -> list[CachedCall]:
        """All calls that are kept."""
        return [call for kept in self._kept.values() for calls in kept.values() for call in calls]

    def forget(self) -> None:
        """Forgets all of them."""
        self._kept.clear()
        self._calls, self.find = None, self._find_in_python


_operators: list[Operator] = []


def forget() -> None:
    """Forgets the calls of every operator, after a change in what backends support."""
    for operator in _operators:
        operator.forget()


def cached_calls() -> list[CachedCall]:
    """The calls of every operator that are kept."""
    return [call for operator in _operators for call in operator.cached_calls()]


def _unobserved() -> bool:
    """Whether nothing that the guards cannot see watches a call."""
    return _is_told and not (_dispatch_modes() or _function_mode() or _profiling() or forward_ad._current_level >= 0)


def _shared(tensors: Sequence[Any]) -> tuple[int, ...]:
    """For each tensor the place at which it is first given; () where all are different."""
    given = [id(t) for t in tensors if t is not None]
    if len(set(given)) == len(given):
        return ()
    places: dict[int, int] = {}
    return tuple([places.setdefault(id(t), place) for place, t in enumerate(tensors)])


def _are_dense(tensors: Sequence[Any]) -> bool:
    """Whether all are dense tensors or None, so that autocast's conversions of them go well."""
    return all(t is None or (isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested) for t in tensors)


def _key(args: tuple[Any, ...], tensors: int) -> Hashable:
    """What neither the types of arguments nor the guards tell, and two shapes, so that few calls share a key."""
    first = args[0]
    return (
        first.shape, args[1].shape, args[tensors:], _environment.get(_VARIABLE),
        first.dtype is torch.float32 and tf32_is_allowed(),
    )  # fmt: skip

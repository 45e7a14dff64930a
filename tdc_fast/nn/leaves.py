"""Which modules of a model hold parameters, and which models cannot be packed."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from types import CellType, FunctionType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from tdc_fast.errors import invalid, is_out_of_memory
from tdc_fast.nn.leaf import RoutedLeaf
from tdc_fast.nn.per_group import PerGroup, holders, own_parameters

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def find_leaves(base: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters of their own, by path; those in lists of parameters belong to the list's owner.

    Raises:
        ValueError: naming, with its path, what cannot be packed and what to do.
    """
    leaves: dict[str, nn.Module] = {}
    owner: dict[int, str] = {}
    read_by_parent: set[nn.Module] = set()
    known = set(base.modules())
    for name, module in base.named_modules():
        _check_packable(name, module)
        _check_functions(name, module, known)
        if module in read_by_parent:
            continue
        read_by_parent.update(holders(module).values())
        own = own_parameters(module)
        for key, parameter in own.items():
            path = f"{name}.{key}" if name else key
            if is_lazy(parameter):
                raise invalid(f"parameter {path}", "no shape yet", "a model that has run once")
            if id(parameter) in owner:
                raise invalid(
                    f"parameter {path}", f"shared with {owner[id(parameter)]}", "parameters of its own: copy it there"
                )
            owner[id(parameter)] = path
        if own:
            leaves[name] = module
    return leaves


def _check_packable(name: str, module: nn.Module) -> None:
    """Raises ValueError for a module whose result cannot be computed sample by sample, or group by group."""
    kind, remedy = type(module).__name__, ""
    if isinstance(module, _NormBase) and (
        isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
    ):
        remedy = "a norm of each sample by itself, such as GroupNorm: statistics of a batch would mix the experts"
    elif isinstance(module, nn.RNNBase):
        remedy = "another layer; recurrent ones keep their weights in a form that cannot be routed"
    elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        if not module.self_attn.batch_first:
            remedy = "batch_first=True: samples are in the first dimension"
    elif isinstance(module, nn.MultiheadAttention):
        if not module.batch_first and (module.bias_k is not None or module.add_zero_attn):
            remedy = "batch_first=True, or no add_bias_kv and add_zero_attn"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.sparse:
            remedy = "sparse=False: gradients of the experts are stacked"
        elif module.max_norm is not None:
            remedy = "max_norm=None: a look-up would change the table"
    elif kind == "AdaLayerNorm" and getattr(module, "chunk_dim", 1) == 0:  # of diffusers, in VQ-Diffusion's transformer
        remedy = "a norm with a scale and shift for each sample: this one has those of one timestep for the whole batch"
    elif isinstance(module, RoutedLeaf):
        remedy = "a dense model: this one is packed already, and expert(i) of it is dense"
    elif any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        kind, remedy = f"{kind} with spectral_norm", "plain parameters: torch.nn.utils.remove_spectral_norm"
    elif parametrize.is_parametrized(module):
        remedy = "plain parameters: torch.nn.utils.parametrize.remove_parametrizations"
    elif isinstance(module, nn.ParameterList | nn.ParameterDict):
        if any(True for _ in module.children()):
            kind, remedy = f"a {kind} within a {kind}", "one list of parameters, without others in it"
    elif isinstance(module, torch.jit.ScriptModule):
        remedy = "the Python module that the script was made from"
    elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        remedy = "the model itself, .module"
    elif "forward" in vars(module) and not hasattr(module, "_orig_mod"):  # torch.compile makes a new one in a copy
        kind = f"{kind} whose forward was replaced"
        remedy = "the forward of its class, which finds the expert's weights: remove hooks such as accelerate's"
    else:
        made = [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.grad_fn is not None]
        if made:
            kind = f"{kind} with {made[0]} computed from parameters"
            remedy = "parameters alone: torch.nn.utils.remove_weight_norm, or a detached tensor"
    if remedy:
        raise invalid(f"module {name!r}", kind, remedy)


def _check_functions(name: str, module: nn.Module, known: Collection[nn.Module]) -> None:
    """Raises ValueError for a function that computes with the model's own layers: so would a copy of it."""
    named = vars(module) | {f"{key}[{i}]": hook for key in _HOOKS for i, hook in vars(module)[key].items()}
    for key, function in named.items():
        if not isinstance(function, FunctionType) or hasattr(module, "_orig_mod"):  # torch.compile makes a new one
            continue
        held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        for value in (*held, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            has_parameters = isinstance(value, nn.Module) and value in known and any(True for _ in value.parameters())
            if has_parameters or isinstance(value, nn.Parameter):
                path = f"{name}.{key}" if name else key
                remedy = "a method: in the packed model this function would still use the weights of the original"
                raise invalid(path, f"a function that holds a {type(value).__name__}", remedy)


def with_path(error: ValueError, model: nn.Module) -> ValueError:
    """The error of a packed model's forward, with the path of the routed leaf that raised it if one did."""
    leaves = [module for module in _running_when(error) if isinstance(module, RoutedLeaf)]
    if not leaves or isinstance(leaves[-1], PerGroup):  # which tells its own path
        return error
    remedy = ""
    if str(error).startswith("plan: "):
        remedy = ". Layers of a packed model take one entry per sample in their first dimension, no more"
    return ValueError(f"module {_path_of(leaves[-1], model)!r}: {error}{remedy}")


def note_path(error: RuntimeError, model: nn.Module) -> None:
    """Adds to the error of a packed model's forward, as a note, the path of the module that raised it."""
    known = set(model.modules())
    running = [module for module in _running_when(error) if module in known]
    if running and not is_out_of_memory(error):
        error.add_note(
            f"raised in module {_path_of(running[-1], model)!r} of a packed model, whose layers hold the weights of "
            "all experts, (E, ...): a module that computes with another one's parameters needs parameters of its own"
        )


def _running_when(error: Exception) -> list[nn.Module]:
    """The modules whose methods ran when the error was raised, the innermost last."""
    selves = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return [module for module in selves if isinstance(module, nn.Module)]


def _path_of(wanted: nn.Module, model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)

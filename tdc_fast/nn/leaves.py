"""Which modules of a model hold parameters, and which models cannot be packed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tdc_fast.errors import invalid
from tdc_fast.nn.per_group import holders, own_parameters


def find_leaves(base: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters of their own, by path; those in lists of parameters belong to the list's owner.

    Raises:
        ValueError: naming, with its path, what cannot be packed and what to do.
    """
    leaves: dict[str, nn.Module] = {}
    owner: dict[int, str] = {}
    read_by_parent: set[nn.Module] = set()
    for name, module in base.named_modules():
        _check_packable(name, module)
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
    elif parametrize.is_parametrized(module):
        remedy = "plain parameters: torch.nn.utils.parametrize.remove_parametrizations"
    elif isinstance(module, torch.jit.ScriptModule):
        remedy = "the Python module that the script was made from"
    elif isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        remedy = "the model itself, .module"
    if remedy:
        raise invalid(f"module {name!r}", kind, remedy)

"""The self-attention of improved-diffusion's UNet, differentiable any number of times.

On a GPU it is one of torch's fused kernels; on the CPU the fastest way that gives a sample the same bits in every
batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

# Up to here torch's CPU kernel adds in an order that depends on the thread a head falls to, and divides a single head
# among threads. Computed in fp64, that is lost in the rounding, so that a sample has the same bits in every batch.
_FEW_TOKENS = 32
# Up to here products one by one are faster on a CPU with matrix units for bf16; the scores (T, T) of more take much
# memory.
_MANY_TOKENS = 1024


def qkv_attention(qkv: Tensor, head_dim: int, live: Tensor | None = None) -> Tensor:
    """Self-attention, softmax in fp32 (improved-diffusion's QKVAttention).

    Scores are scaled by head_dim ** -0.5 (improved-diffusion scales q and k by its square root). Differentiable in
    reverse mode any number of times, and in forward mode.

    Args:
        qkv: (B, T, heads * 3 * head_dim); the channels of a head are its q, k and v.
        head_dim: channels per head.
        live: bool (B, heads), the heads that each sample has; None for all. On the CPU the other heads are not
            computed, and their output is zero.

    Returns:
        (B, T, heads * head_dim).
    """
    batch, tokens, channels = qkv.shape
    heads = channels // (3 * head_dim)
    split = qkv.view(batch, tokens, heads, 3, head_dim)
    if live is not None and picks_heads(qkv.device):
        sample, head = live.nonzero(as_tuple=True)
        out = _attend(split[sample, :, head].unsqueeze(2)).squeeze(2)  # each live head as a sample of one head
        everywhere = out.new_zeros(batch, tokens, heads, head_dim).transpose(1, 2).index_put((sample, head), out)
        return everywhere.transpose(1, 2).reshape(batch, tokens, heads * head_dim)
    return _attend(split).reshape(batch, tokens, heads * head_dim)


def picks_heads(device: torch.device) -> bool:
    """Whether heads that a sample lacks are skipped on this device. Not on a GPU, which would have to wait."""
    return device.type != "cuda" and not torch.compiler.is_compiling()


def _attend(qkv: Tensor) -> Tensor:
    """Attention of each head: (B, T, heads, 3, head_dim) -> (B, T, heads, head_dim)."""
    dtype, tokens = qkv.dtype, qkv.shape[1]
    if qkv.device.type != "cpu" or dtype == torch.float64:
        return _fused(qkv)
    if tokens <= _FEW_TOKENS:
        return _fused(qkv.double()).to(dtype)
    if dtype == torch.bfloat16 and tokens <= _MANY_TOKENS and _multiplies_bf16():
        return _by_products(qkv)
    if dtype == torch.float32:
        return _fused(qkv)
    with torch.autocast("cpu", enabled=False):
        return _fused(qkv.float()).to(dtype)  # as fast as in 16 bits in the forward, and faster in the backward


def _fused(qkv: Tensor) -> Tensor:
    """`_attend` in torch's fused kernel for the device and dtype."""
    # Four dimensions, since torch computes three by plain products; views, since its kernels take any strides.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))  # (B, heads, T, head_dim)
    if forward_ad._current_level >= 0 or _is_nested_transform():  # what the fused kernels do not have
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v)
    if out.requires_grad and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        out = _DifferentiableAgain.apply(out, q, k, v)
    return out.transpose(1, 2)


def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16; without them they are many times slower than of fp32."""
    if torch.compiler.is_compiling():
        return False
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(is_supported() for is_supported in known if is_supported is not None)


def _by_products(qkv: Tensor) -> Tensor:
    """`_attend` as two products with a softmax in fp32 between them."""
    batch, tokens, heads, _, dim = qkv.shape
    q, k, v = (part.transpose(1, 2).reshape(batch * heads, tokens, dim) for part in qkv.unbind(3))
    scale = dim**-0.25
    weights = torch.softmax(torch.bmm(q * scale, (k * scale).transpose(1, 2)).float(), dim=-1).to(qkv.dtype)
    return torch.bmm(weights, v).view(batch, heads, tokens, dim).transpose(1, 2)


def _is_nested_transform() -> bool:
    """Whether transforms of `torch.func` are nested, such as grad of grad, which differentiate a backward again."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return (torch._C._functorch.maybe_current_level() or 0) > 1


class _DifferentiableAgain(torch.autograd.Function):
    """Lets the backward of a fused kernel be differentiated, which torch's own cannot be.

    It follows the kernel, whose output it passes on, and hands the gradient back to it. Where the backward records a
    graph (`create_graph=True`), it passes by the kernel and computes the same gradient by operators with derivatives.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)  # what the kernel keeps as well
        ctx.set_materialize_grads(False)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None or not torch.is_grad_enabled():
            return dy, None, None, None
        q, k, v = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            return None, *_gradients(q, k, v, dy)


def _gradients(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The gradients of softmax(q k^T / sqrt(head_dim)) v: (B, heads, T, head_dim) each."""
    scale = q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    q32, k32, v32, dy32 = (value.to(wide) for value in (q, k, v, dy))
    weights = torch.softmax(q32 @ k32.transpose(-2, -1) * scale, dim=-1)  # (B, heads, T, T)
    of_weights = dy32 @ v32.transpose(-2, -1)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    grads = (of_scores @ k32, of_scores.transpose(-2, -1) @ q32, weights.transpose(-2, -1) @ dy32)
    return tuple(grad.to(value.dtype) for grad, value in zip(grads, (q, k, v), strict=True))

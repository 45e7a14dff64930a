"""Under autocast a packed model casts its parameters once, and keeps nothing in fp32 that its layers read in bf16."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tdc_fast.graphs import Graphed, use_capture
from tdc_fast.nn import attention, packing
from tdc_fast.nn.casts import Copies
from tdc_fast.nn.packing import RoutedModel, pack_experts
from tdc_fast.routing import TimestepGroups
from tests.graphs.tape import TapeCapture
from tests.models.test_iddpm import randomise
from tests.nn.test_packing import GROUPS, PRUNED, batch, shuffled_plan, unet
from tests.reports.test_routed_forward import gradients, packed, samples
from tests.tolerance import assert_as_accurate_as_torch


class Casts(TorchDispatchMode):
    """Notes tensors that are copied to another floating dtype, images made in fp32, and images copied as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.at_once: list[tuple[torch.dtype, list[tuple[int, ...]]]] = []
        self.images: set[tuple[int, ...]] = set()
        self.cloned: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._opname
        if name == "_foreach_copy_":
            self.at_once.append((args[0][0].dtype, [tuple(t.shape) for t in args[0]]))
        elif name in ("_to_copy", "copy_"):
            source, made = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            if source.is_floating_point() and source.dtype != made.dtype:
                self.copied[(str(made.dtype).removeprefix("torch."), tuple(made.shape))] += 1
        elif name in ("clone", "cat") and out.dim() == 4 and out.shape[2] > 1:
            self.cloned.add(tuple(out.shape))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor) and made.dtype == torch.float32 and made.dim() == 4 and made.shape[2] > 1:
                self.images.add(tuple(made.shape))
        return out


def step(routed: RoutedModel) -> tuple[Tensor, Tensor, Casts]:
    """Forward and backward as in training: the input, the output and the casts."""
    x, t, y = batch()
    x = x.repeat(1, 1, 2, 2)
    routed.zero_grad()
    with Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            out = routed(x, t, y=y).float()
        out.square().mean().backward()
    return x, out.detach(), casts


@pytest.fixture
def work_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs on a GPU: the embedding's one launch, torch's SiLU, all heads at once and in their own dtype."""
    monkeypatch.setattr("tdc_fast.nn.one_input.launches_cost", lambda device: True)
    monkeypatch.setattr(attention, "_attend", attention._fused)
    monkeypatch.setattr("tdc_fast.models.blocks.silu", F.silu)
    monkeypatch.setattr("tdc_fast.models.iddpm.silu", F.silu)
    monkeypatch.setattr("tdc_fast.models.blocks.picks_heads", lambda device: False)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_on_a_gpu_no_activation_is_cast_or_copied(scale_shift: bool, use_checkpoint: bool, work_of_a_gpu: None) -> None:
    model = unet(use_scale_shift_norm=scale_shift, use_checkpoint=use_checkpoint, image_size=16)
    x, out, casts = step(pack_experts(model, GROUPS, shuffled_plan(model, PRUNED)))
    ends = {tuple(x.shape), tuple(out.shape)}  # images come and leave in fp32, one channel after the other
    assert casts.images <= ends and {shape for shape in casts.cloned if shape[0] == len(x)} <= ends
    assert {shape for dtype, shape in casts.copied if len(shape) == 4 and shape[2] > 1} == ends


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_training_step_casts_each_parameter_once_and_no_activation(
    scale_shift: bool, use_checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_attend", attention._fused)  # as on a GPU: a CPU attends to bf16 in fp32
    model = unet(use_scale_shift_norm=scale_shift, use_checkpoint=use_checkpoint, image_size=16)
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED))
    x, out, casts = step(routed)
    shapes = [tuple(p.shape) for name, p in routed.named_parameters() if "label_emb" not in name]  # a table is not cast
    assert [dtype for dtype, _ in casts.at_once] == [torch.bfloat16, torch.float32]
    assert all(sorted(cast) == sorted(shapes) for _, cast in casts.at_once)
    images = {tuple(x.shape), tuple(out.shape)}  # they come and leave in fp32
    assert casts.images <= images
    vectors = {(len(x), 32), (len(x), 128)}  # the sinusoids; SiLU and labels, which are computed in fp32
    assert {shape for _, shape in casts.copied} == images | vectors
    assert casts.copied["bfloat16", tuple(x.shape)] == casts.copied["bfloat16", tuple(out.shape)] == 1
    assert sum(casts.copied.values()) <= 12, casts.copied


def separately(routed: RoutedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer casts its own parameters, as outside of a packed model."""
    monkeypatch.setattr(routed, "_copies", lambda device: None)


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_outputs_and_gradients_are_those_of_layers_that_cast_for_themselves(
    pruned: bool, use_checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unet(use_checkpoint=use_checkpoint, image_size=16)
    routed = pack_experts(model, GROUPS, shuffled_plan(model, PRUNED) if pruned else None)
    routed.model.get_submodule("out.2").weight.requires_grad_(False)
    _, out, _ = step(routed)
    grads = [parameter.grad for parameter in routed.parameters()]
    separately(routed, monkeypatch)
    _, expected, casts = step(routed)
    assert not casts.at_once and torch.equal(out, expected)
    for ours, parameter in zip(grads, routed.parameters(), strict=True):
        if parameter.grad is None:
            assert ours is None and not parameter.requires_grad
        else:
            assert torch.equal(ours, parameter.grad) and ours.stride() == parameter.stride()


@pytest.mark.parametrize("how", ["none", "plain", "nested", "reentrant"])
def test_any_checkpoint_gives_the_gradients_of_layers_that_cast_for_themselves(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with two forwards before the backward; nothing of them stays in memory."""
    routed = packed(how)
    made: list[weakref.ref[Copies]] = []

    def copies(*args: Any) -> Copies:
        found = Copies(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(packing, "Copies", copies)

    def loss(seed: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return routed(*samples(seed)).float().square().sum()

    both = gradients(routed, lambda: loss(0) + loss(1))
    loss(0)  # its backward never comes
    gc.collect()
    assert len(made) == 3 and not any(ref() for ref in made)
    separately(routed, monkeypatch)
    for ours, right in zip(both, gradients(routed, lambda: loss(0) + loss(1)), strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-2, atol=1e-3)


def test_microbatches_share_one_cast_that_ends_with_the_step() -> None:
    routed = packed()
    x, t = samples(0)

    def microbatches() -> None:
        for part in (slice(0, 3), slice(3, 8)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = routed(x[part], t[part]).float().square().sum()
            loss.backward()

    microbatches()
    apart = [parameter.grad.clone() for parameter in routed.parameters()]
    routed.zero_grad()
    with Casts() as casts, routed.cast_once():
        microbatches()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert not routed(x, t).requires_grad
    assert [dtype for dtype, _ in casts.at_once].count(torch.float32) == 2  # the gradients of two backwards
    assert [dtype for dtype, _ in casts.at_once].count(torch.bfloat16) == 2  # with and without gradients
    for parameter, grad in zip(routed.parameters(), apart, strict=True):
        assert torch.equal(parameter.grad, grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = routed(x, t)
        for parameter in routed.parameters():
            parameter.mul_(2)
        assert not torch.equal(routed(x, t), before)


def test_a_graph_that_is_captured_within_cast_once_has_casts_of_its_own() -> None:
    """Its replays come after the block, and after the parameters have changed."""
    routed, (x, t) = packed(), samples(0)

    @torch.no_grad()
    def forward(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return routed(x, t)

    with use_capture(TapeCapture()):
        inner, outer = Graphed(forward, "cpu", warmup=1), Graphed(in_microbatches(routed, forward), "cpu", warmup=1)
        with routed.cast_once():
            for _ in range(3):
                inner(x, t)
        for _ in range(3):
            outer(x, t)
        with torch.no_grad():
            for parameter in routed.parameters():
                parameter.mul_(2)
        assert inner.num_graphs == outer.num_graphs == 1
        assert torch.equal(inner(x, t), forward(x, t))
        assert torch.equal(outer(x, t), forward(x, t))


def in_microbatches(routed: RoutedModel, forward: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def parts(x: Tensor, t: Tensor) -> Tensor:
        with Casts() as casts, routed.cast_once():
            out = torch.cat([forward(x[part], t[part]) for part in (slice(0, 3), slice(3, 8))])
        assert len(casts.at_once) == 1
        return out

    return parts


def test_a_copy_of_a_model_casts_its_own_parameters() -> None:
    routed = copy.deepcopy(pack_experts(unet(image_size=16), GROUPS))
    _, _, casts = step(routed)
    assert not casts.copied.keys() & {("bfloat16", tuple(parameter.shape)) for parameter in routed.parameters()}
    assert len(casts.at_once) == 2


class NormFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.norm(x)


def test_a_norm_that_gets_fp32_keeps_its_parameters_in_fp32() -> None:
    norm = NormFirst()
    nn.init.normal_(norm.norm.weight)
    routed = pack_experts(norm, TimestepGroups.uniform(100, 4))
    x, t = torch.randn(5, 4, 6, 6), torch.tensor([1, 50, 99, 3, 70])
    expected = routed(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(routed(x, t), expected)


class PartlyInFp32(nn.Module):
    """As networks do that keep a part in fp32: autocast is switched off there."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.linear, self.norm = nn.Linear(8, 8), nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.before(x)
        with torch.autocast("cpu", enabled=False):
            tokens = self.linear(self.norm(h.float()).flatten(2).transpose(1, 2))
            tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        assert tokens.dtype == torch.float32
        return self.after(tokens.transpose(1, 2).view_as(h))


def test_where_a_model_switches_autocast_off_its_parameters_are_in_fp32() -> None:
    experts = [randomise(PartlyInFp32(), seed) for seed in range(4)]
    groups = TimestepGroups.uniform(100, 4)
    routed = pack_experts(experts, groups)
    x, t = torch.randn(4, 4, 6, 6), torch.tensor([1, 30, 60, 99])
    with torch.autocast("cpu", torch.bfloat16):
        ours = routed(x, t)
        plain = torch.cat([expert(x[i : i + 1], t[i : i + 1]) for i, expert in enumerate(experts)])
    ours.float().sum().backward()
    assert all(parameter.grad is not None for parameter in routed.parameters())
    exact = torch.cat([expert(x[i : i + 1], t[i : i + 1]) for i, expert in enumerate(experts)])
    assert_as_accurate_as_torch(ours, plain, exact)


def test_transforms_and_forward_mode_go_through_layers_that_cast_for_themselves() -> None:
    routed = packed()
    x, t = samples(0)
    with torch.autocast("cpu", torch.bfloat16):
        y, along = torch.func.jvp(lambda image: routed(image, t), (x,), (torch.ones_like(x),))
    assert y.isfinite().all() and along.abs().sum() > 0

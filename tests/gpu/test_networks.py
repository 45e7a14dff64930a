"""A whole routed UNet on a GPU: never waits for the host, is captured in a CUDA graph, works under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tdc_fast.nn.attention import qkv_attention
from tdc_fast.nn.inference import ForInference, for_inference
from tdc_fast.nn.packing import RoutedModel
from tdc_fast.ops.backends import ENVIRONMENT
from tests.gpu.networks import NUM_GROUPS, SHARED, batch_for, no_synchronisation, recorded, routed_unet
from tests.gpu.problems import on_device, on_every_choice
from tests.operators import Recorded
from tests.tolerance import max_error

pruned = pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])


def gradients_of(model: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x, t).float(), target.float())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@on_device
@pruned
@pytest.mark.parametrize("shared", ["", SHARED], ids=["apart", "shared"])
def test_every_sample_gets_its_experts_result(device: str, pruned: bool, shared: str) -> None:
    """The routed model against each expert as an ordinary module, in fp64 on the CPU."""
    model = routed_unet(device, torch.bfloat16, pruned=pruned, shared_layers=shared)
    x, t, _ = batch_for(model, seed=1)
    groups = model.groups.group_of(t.cpu())
    with torch.no_grad():
        ours = model(x, t).cpu()
        plain, exact = torch.empty_like(ours), ours.double()
        for index in range(NUM_GROUPS):
            expert = model.expert(index).to(ours.dtype)
            chosen = (groups == index).nonzero().squeeze(1)
            there = chosen.to(x.device)
            plain[chosen] = expert(x[there], t[there]).cpu()
            exact[chosen] = expert.cpu().double()(x[there].cpu().double(), t[there].cpu())
    assert max_error(ours, exact) <= 2 * max_error(plain, exact) + 2 * torch.finfo(torch.bfloat16).eps


@on_device
@pruned
def test_weights_that_groups_share_get_the_sum_of_their_gradients_without_waiting(device: str, pruned: bool) -> None:
    """The reference has the same weights in every group, each with a gradient of its own."""
    shared = routed_unet(device, torch.float32, pruned=pruned, shared_layers=SHARED)
    apart = routed_unet(device, torch.float32, pruned=pruned)
    for group in range(NUM_GROUPS):
        apart.load_expert_state(group, shared.expert_state(group))
    gradients_of(shared, *batch_for(shared, seed=0))  # compiles, autotunes, allocates
    batch = batch_for(shared, seed=1)
    with no_synchronisation(device):
        loss, _ = gradients_of(shared, *batch)
    expected, _ = gradients_of(apart, *batch)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    twins = apart.routed_leaves()
    for name, leaf in shared.routed_leaves().items():
        rows = torch.tensor(leaf.rows or range(NUM_GROUPS), device=device)
        for key, parameter in leaf.named_parameters():
            grad = twins[name].get_parameter(key).grad
            if parameter.grad is None or grad is None:
                assert parameter.grad is grad
                continue
            added = torch.zeros_like(parameter).index_add_(0, rows, grad)
            assert max_error(parameter.grad, added) <= 1e-2 * float(added.abs().max()) + 1e-6, name


@on_every_choice
@pruned
def test_forward_and_backward_never_wait_for_the_gpu(
    device: str, backend: str, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, backend)
    model = routed_unet(device, torch.bfloat16, pruned=pruned)
    gradients_of(model, *batch_for(model, seed=0))  # compiles, autotunes, allocates
    batch = batch_for(model, seed=1)
    with no_synchronisation(device):
        loss, grads = gradients_of(model, *batch)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())


@on_every_choice
@pruned
def test_a_captured_forward_follows_the_timesteps_it_is_given(
    device: str, backend: str, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between replays the group ids change: other segments, other tiles, the same graph and the same bits as eager."""
    monkeypatch.setenv(ENVIRONMENT, backend)
    model = routed_unet(device, torch.bfloat16, pruned=pruned)
    x, t, _ = (v.clone() for v in batch_for(model, seed=0))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        replay, out = recorded(device, lambda: model(x, t))
        for seed in (1, 2, 3):
            new_x, new_t, _ = batch_for(model, seed)
            x.copy_(new_x), t.copy_(new_t)
            replay()
            assert torch.equal(out, model(new_x, new_t)), f"batch {seed}"


@on_every_choice
def test_a_captured_training_step_trains_as_the_eager_one(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, backend)
    eager = routed_unet(device, torch.bfloat16, pruned=True)
    captured = copy.deepcopy(eager)
    start = {name: value.clone() for name, value in captured.state_dict().items()}

    def step_of(model: RoutedModel, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
        loss, grads = gradients_of(model, x, t, target)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in grads:
                    parameter.sub_(grads[name], alpha=0.05)
        return loss

    x, t, target = (v.clone() for v in batch_for(captured, seed=0))
    with sdpa_kernel(SDPBackend.MATH):
        replay, loss = recorded(device, lambda: step_of(captured, x, t, target))
        captured.load_state_dict(start)  # in place: the graph reads the same memory
        for seed in (1, 2, 3):
            batch = batch_for(captured, seed)
            for static, new in zip((x, t, target), batch, strict=True):
                static.copy_(new)
            replay()
            expected = step_of(eager, *batch)
            torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5, msg=lambda m, s=seed: f"batch {s}: {m}")
    for (name, ours), theirs in zip(captured.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(start[name], value) for name, value in captured.state_dict().items())


@on_device
def test_two_training_steps_give_the_same_bits(device: str) -> None:
    model = routed_unet(device, torch.bfloat16, pruned=True)
    batch = batch_for(model, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        runs = [gradients_of(model, *batch) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    for name in runs[0][1]:
        assert torch.equal(runs[0][1][name], runs[1][1][name]), name


@on_device
@pruned
def test_attention_runs_in_a_fused_kernel(device: str, pruned: bool) -> None:
    model = routed_unet(device, torch.bfloat16, pruned=pruned)
    batch = batch_for(model, seed=1)
    gradients_of(model, *batch)
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        gradients_of(model, *batch)
        if device == "cuda":
            torch.cuda.synchronize()
    kernels = {event.name.lower() for event in profile.events() if event.device_type == kind}
    assert any(name in kernel for kernel in kernels for name in ("flash", "fmha", "sdpa")), kernels
    assert not any("softmax" in kernel for kernel in kernels), kernels


@on_device
@pruned
def test_the_embedding_is_one_launch_with_the_results_of_many(
    device: str, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = routed_unet(device, torch.float32, pruned=pruned)
    batch = batch_for(model, seed=1)
    monkeypatch.setattr("tdc_fast.nn.one_input.launches_cost", lambda device: True)
    with Recorded() as together:
        loss, grads = gradients_of(model, *batch)
    monkeypatch.setattr("tdc_fast.nn.one_input.launches_cost", lambda device: False)
    with Recorded() as apart:
        expected_loss, expected = gradients_of(model, *batch)
    blocks = sum(unit.kind == "resblock" for unit in model.model.pruning_units())
    assert together["routed_linear"] == apart["routed_linear"] - blocks + 1
    torch.testing.assert_close(loss, expected_loss)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@on_device
def test_autocast_computes_in_bf16_and_gives_fp32_gradients(device: str) -> None:
    model = routed_unet(device, torch.float32, pruned=False)
    batch = batch_for(model, seed=1)
    wide_loss, wide = gradients_of(model, *batch)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert model(*batch[:2]).dtype == torch.bfloat16
        loss, grads = gradients_of(model, *batch)
    torch.testing.assert_close(loss, wide_loss, rtol=2e-2, atol=1e-3)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    norm = lambda g: torch.stack([v.double().square().sum() for v in g.values()]).sum().sqrt()  # noqa: E731
    assert norm({k: grads[k] - wide[k] for k in wide}) < 0.1 * norm(wide)


@on_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dense_model_for_inference_runs_on_the_routed_kernels_and_is_captured(
    device: str, dtype: torch.dtype
) -> None:
    """An expert as a plain module: at most twice the error of torch's kernels under autocast, in a graph too."""
    expert = routed_unet(device, torch.float32, pruned=True).expert(0)
    x = torch.randn(6, 3, expert.image_size, expert.image_size, generator=torch.Generator().manual_seed(1)).to(device)
    t = torch.tensor([0, 3, 5, 9, 1, 2], device=device)
    with torch.no_grad():
        exact = copy.deepcopy(expert).cpu().double()(x.cpu().double(), t.cpu())
        with torch.autocast(device, dtype):
            plain = expert(x, t).float().cpu()
        chosen = None if device == "cuda" else True  # on the CPU only where asked
        prepared = for_inference(copy.deepcopy(expert), dtype, routed_kernels=chosen)
        assert isinstance(prepared, ForInference) and prepared.on_routed_kernels
        if device == "cuda":
            assert for_inference(expert) is expert  # fp32 stays on torch's kernels
        with Recorded() as called:
            ours = prepared(x, t)
        assert ours.dtype == torch.float32 and called["routed_conv2d"] and not called["convolution"]
        bound = 2 * max_error(plain, exact) + 2 * torch.finfo(dtype).eps
        assert max_error(ours.cpu(), exact) <= bound
        with sdpa_kernel(SDPBackend.MATH):
            static = x.clone()
            replay, out = recorded(device, lambda: prepared(static, t))
            static.copy_(x.flip(0))
            replay()
            assert torch.equal(out, prepared(x.flip(0), t))


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [20, 64])
def test_attention_is_differentiated_twice_through_the_fused_kernel(device: str, dtype: torch.dtype, dim: int) -> None:
    """Heads of 20 channels are padded and cut on the way into some kernels."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 64, 2 * 3 * dim, generator=generator).to(dtype)
    along = torch.randn(qkv.shape, generator=generator).to(dtype)

    def both(values: Tensor, step: Tensor) -> list[Tensor]:
        leaf = values.detach().requires_grad_()
        (grad,) = torch.autograd.grad(qkv_attention(leaf, dim).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((grad * step).sum(), leaf)
        return [grad.detach().cpu().double(), second.cpu().double()]

    exact = both(qkv.double(), along.double())
    found = both(qkv.to(device), along.to(device))
    for ours, right in zip(found, exact, strict=True):
        assert (ours - right).norm() <= 8 * torch.finfo(dtype).eps * right.norm() + 1e-3 * right.norm()

"""The forward of a packed model: every call has its own plan and its own samples, whatever runs beside it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdc_fast import TimestepGroups, pack_experts
from tdc_fast.nn.packing import RoutedModel

GROUPS = TimestepGroups.uniform(100, 4)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Block(nn.Module):
    """Convolution and norm, recomputed in the backward as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        def half(h: Tensor) -> Tensor:
            return self.norm(self.conv(h)).relu()

        def whole(h: Tensor) -> Tensor:
            return self.last(checkpoint(half, h, use_reentrant=self.how == "reentrant"))

        if self.how == "nested":
            return x + checkpoint(whole, x, use_reentrant=False)
        if self.how == "none":
            return x + self.last(half(x))
        return x + whole(x)


class Net(nn.Module):
    """A denoiser of two blocks; the first convolution has a gradient even where inputs have none."""

    def __init__(self, how: str = "none") -> None:
        super().__init__()
        self.start, self.blocks = nn.Conv2d(3, 4, 1), nn.Sequential(Block(how), Block(how))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks(self.start(x)) * (1 + 0.01 * t[:, None, None, None])


def packed(how: str = "none", seed: int = 0) -> RoutedModel:
    torch.manual_seed(seed)
    return pack_experts([Net(how) for _ in range(4)], GROUPS)


def samples(seed: int, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(0, 100, (count,), generator=generator)


def gradients(model: nn.Module, *losses: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    for loss in losses:
        loss().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001  (raised again in the test's thread)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def test_forwards_in_several_threads_do_not_mix() -> None:
    model = packed()
    inputs = [samples(seed) for seed in range(3)]
    with torch.no_grad():
        expected = [model(x, t) for x, t in inputs]
    wrong = [0, 0, 0]

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                wrong[index] += not torch.allclose(model(*inputs[index]), expected[index], **CLOSE)

    in_threads(3, work)
    assert wrong == [0, 0, 0]


@pytest.mark.parametrize("how", ["none", "reentrant", "not reentrant", "nested"])
def test_backwards_in_several_threads_do_not_mix(how: str) -> None:
    model = packed(how)
    inputs = [samples(seed) for seed in range(3)]

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        model(leaf, t).square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    expected = [gradient(x, t) for x, t in inputs]

    def work(index: int) -> None:
        for _ in range(10):
            torch.testing.assert_close(gradient(*inputs[index]), expected[index], rtol=1e-4, atol=1e-3)

    in_threads(3, work)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "nested"])
def test_a_checkpoint_in_a_packed_module_recomputes_under_the_plan_of_its_own_forward(how: str) -> None:
    model, plain = packed(how), packed("none")
    plain.load_state_dict(model.state_dict())
    (xa, ta), (xb, tb) = samples(0), samples(1, 5)
    expected = gradients(plain, lambda: plain(xa, ta).square().sum(), lambda: plain(xb, tb).square().sum())

    def both(reverse: bool) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            first, second = model(xa, ta).square().sum(), model(xb, tb).square().sum()
            model(xa[:3], ta[:3])  # a third one, without a backward
            return second + first if reverse else first + second

        return loss

    for loss in (both(False), both(True)):
        for a, b in zip(gradients(model, loss), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_the_backward_of_a_forward_may_run_in_another_thread(how: str) -> None:
    model, plain = packed(how), packed("none")
    x, t = samples(0)
    expected = gradients(plain, lambda: plain(x, t).square().sum())
    model.zero_grad()
    loss = model(x, t).square().sum()
    in_threads(1, lambda _: loss.backward())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-3)


def test_a_packed_model_within_another_has_its_own_plan() -> None:
    inner, outer_groups = packed("not reentrant", seed=1), TimestepGroups.uniform(100, 2)

    class Outer(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.start(x)
            other = helper[0](x, 99 - t)
            return self.blocks(h) + other

    torch.manual_seed(2)
    helper = [inner]  # in a list: not a submodule
    outer = pack_experts([Outer("not reentrant"), Outer("not reentrant")], outer_groups)
    x, t = samples(3)
    expected = inner(x, 99 - t)
    for group in range(2):
        dense = outer.expert(group)
        at = outer_groups.group_of(t) == group
        expected = torch.where(at[:, None, None, None], dense.blocks(dense.start(x)) + expected, expected)
    found = outer(x, t)
    torch.testing.assert_close(found, expected, **CLOSE)
    found.square().sum().backward()  # both recompute, each under its own plan
    gradient = outer.model.start.weight.grad.clone()
    outer.zero_grad()
    (outer(x, t) + 0 * inner(x, t)).square().sum().backward()
    torch.testing.assert_close(outer.model.start.weight.grad, gradient)


def test_compiled_forwards_in_several_threads_do_not_mix() -> None:
    torch._dynamo.reset()
    model = packed()
    inputs = [samples(seed) for seed in range(2)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = [model(x, t) for x, t in inputs]
        compiled(*inputs[0])
    wrong = [0, 0]

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                wrong[index] += not torch.allclose(compiled(*inputs[index]), expected[index], **CLOSE)

    in_threads(2, work)
    assert wrong == [0, 0]
    torch._dynamo.reset()


def test_a_copied_or_pickled_model_runs_under_its_own_plan() -> None:
    model = packed()
    x, t = samples(0)
    expected = model(x, t)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.routing is not model.routing
        assert all(leaf.routing is twin.routing for leaf in twin.routed_leaves().values())
        torch.testing.assert_close(twin(x, t), expected)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_a_checkpointed_loss_beside_the_output_is_refused_with_a_remedy(how: str) -> None:
    """Its layers run again in a backward that knows nothing of the model's forward."""

    class Auxiliary(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.start(x)
            kept.append(self.blocks(h).square().mean())
            return h * (1 + 0.01 * t[:, None, None, None])

    kept: list[Tensor] = []
    model = pack_experts(Auxiliary(how), GROUPS)
    model(*samples(0)).sum().backward()
    with pytest.raises(ValueError, match="^plan: got None; expected a part of the model's output.*auxiliary loss"):
        kept[0].backward()


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_a_checkpointed_loss_that_is_returned_has_its_gradient(how: str) -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            h = self.start(x)
            return h, self.blocks(h).square().mean()

    model = pack_experts([Auxiliary(how) for _ in range(4)], GROUPS)
    plain = pack_experts([Auxiliary("none") for _ in range(4)], GROUPS)
    plain.load_state_dict(model.state_dict())
    found, expected = (gradients(m, lambda m=m: m(*samples(0))[1]) for m in (model, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

"""Any module can be packed: what no kernel serves runs once per group, and gives what its dense experts give."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdc_fast import TimestepGroups, pack_experts
from tdc_fast.nn.per_group import PerGroup
from tests.models.test_iddpm import randomise
from tests.nn.foreign import Block, Scaled, Transformer

GROUPS = TimestepGroups.uniform(100, 4)
T = torch.tensor([90, 10, 60, 99, 0, 12])  # no sample in group 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Around(nn.Module):
    """A layer as a denoiser."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


class SelfAttention(nn.Module):
    """Attention of x to itself, with or without weights, masks and another layout."""

    def __init__(self, need_weights: bool = False, masked: bool = False, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **settings)
        self.need_weights, self.masked = need_weights, masked
        self.other = settings.get("kdim") is not None

    def forward(self, x: Tensor) -> Tensor:
        keys = x[..., :6] if self.other else x
        masks = {}
        if self.masked:
            causal = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)
            masks = {"attn_mask": causal, "key_padding_mask": x[..., 0] > 1.5, "is_causal": True}
            masks["key_padding_mask"][:, 0] = False
        x, keys = (v if self.attention.batch_first else v.transpose(0, 1) for v in (x, keys))
        y, weights = self.attention(x, keys, keys, need_weights=self.need_weights, **masks)
        y = y if self.attention.batch_first else y.transpose(0, 1)
        return y if weights is None else torch.cat([y, weights.flatten(1)[:, None, :8].expand_as(y)], dim=1)


class Twice(nn.Module):
    """One layer under three names, beside one with a hook that reads its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = nn.Sequential(nn.Tanh(), self.first)
        self.further = nn.ModuleList([self.again, nn.Linear(8, 8)])
        self.further[1].register_forward_hook(lambda layer, args, y: y * layer.weight.sum())

    def forward(self, x: Tensor) -> Tensor:
        return self.further[1](self.again(self.first(x)))


IMAGE, TOKENS = (4, 6, 6), (5, 8)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {  # layer, shape of a sample, per group
    "layer norm": (lambda: nn.LayerNorm(8), TOKENS, False),
    "layer norm of two axes without bias": (lambda: nn.LayerNorm((5, 8), bias=False), (3, 5, 8), False),
    "layer norm of vectors": (lambda: nn.LayerNorm(8), (8,), False),
    "rms norm": (lambda: nn.RMSNorm(8), TOKENS, True),
    "depthwise convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), IMAGE, True),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), IMAGE, True),
    "dilated convolution": (lambda: nn.Conv2d(4, 5, 3, dilation=2, padding=2), IMAGE, True),
    "reflecting convolution": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), IMAGE, True),
    "convolution of the same size": (lambda: nn.Conv2d(4, 5, (3, 1), padding="same"), IMAGE, False),
    "convolution with an even filter": (lambda: nn.Conv2d(4, 5, 2, padding="same"), IMAGE, True),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 5, 4, stride=2, padding=1), IMAGE, True),
    "convolution of sequences": (lambda: nn.Conv1d(4, 5, 3, padding=1), (4, 7), True),
    "convolution of volumes": (lambda: nn.Conv3d(4, 5, 3, padding=1), (4, 3, 4, 4), True),
    "group norm of volumes": (lambda: nn.GroupNorm(2, 4), (4, 3, 4, 4), False),
    "group norm of pixels": (lambda: nn.GroupNorm(4, 8), (8,), False),
    "prelu": (lambda: nn.PReLU(4), IMAGE, True),
    "attention": (lambda: SelfAttention(batch_first=True), TOKENS, False),
    "attention, sequence first": (lambda: SelfAttention(), TOKENS, False),
    "attention with weights": (lambda: SelfAttention(True, bias=False, batch_first=True), TOKENS, False),
    "attention with masks": (lambda: SelfAttention(True, True, batch_first=True), TOKENS, False),
    "attention with masks, fused": (lambda: SelfAttention(False, True, batch_first=True), TOKENS, False),
    "attention to other widths": (lambda: SelfAttention(kdim=6, vdim=6, batch_first=True), TOKENS, False),
    "attention with a bias of keys": (lambda: SelfAttention(add_bias_kv=True, batch_first=True), TOKENS, True),
    "an encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), TOKENS, False),
    "parameters of no layer": (lambda: Scaled(8), TOKENS, True),
    "a layer under several names, and one with a hook": (Twice, TOKENS, True),
    "layers beside a parameter": (lambda: Block(8), TOKENS, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_every_sample_gets_its_own_experts_layer(name: str) -> None:
    make, shape, per_group = LAYERS[name]
    experts = [randomise(Around(make()), seed).double() for seed in range(4)]
    routed = pack_experts(experts, GROUPS)
    assert any(isinstance(leaf, PerGroup) for leaf in routed.routed_leaves().values()) == per_group
    x = torch.randn(len(T), *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x_routed, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.cat([experts[g](x_dense[i, None], T[i, None]) for i, g in enumerate(GROUPS.group_of(T))])
    found = routed(x_routed, T)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(routed.eval()(x, T), expected, rtol=1e-10, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_routed.grad, x_dense.grad, rtol=1e-9, atol=1e-9)
    for index, expert in enumerate(experts):
        for key, parameter in expert.named_parameters():
            grad = routed.model.get_parameter(key).grad[index].reshape(parameter.shape)
            torch.testing.assert_close(
                grad, torch.zeros_like(grad) if parameter.grad is None else parameter.grad, rtol=1e-9, atol=1e-9
            )
        back = routed.expert(index)
        assert repr(back) == repr(expert)
        for state in (back.state_dict(), routed.expert_state(index)):
            assert state.keys() == expert.state_dict().keys()
            assert all(torch.equal(value, state[key]) for key, value in expert.state_dict().items())
    routed.load_expert_state(0, routed.expert_state(3))
    torch.testing.assert_close(routed.expert(0)(x, T), experts[3](x, T))


def transformers(recompute: str = "none") -> list[Transformer]:
    return [randomise(Transformer(recompute=recompute), seed) for seed in range(4)]


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 2, 8, 8, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def test_a_model_with_parameters_at_its_root_is_packed_with_all_that_is_inside() -> None:
    experts, (x, y) = transformers(), batch()
    routed = pack_experts(experts, GROUPS)
    scale = torch.rand(6) + 0.5
    ids = GROUPS.group_of(T)
    expected = torch.cat(
        [
            experts[g](x[i, None], T[i, None], y[i, None], extra={"scale": [scale[i, None]]})["sample"]
            for i, g in enumerate(ids)
        ]
    )
    found = routed(x, T, y, extra={"scale": [scale]})["sample"]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert {name for name, _ in routed.model.named_parameters()} == {name for name, _ in experts[0].named_parameters()}
    assert routed.model.recompute == "none"
    for twin in (copy.deepcopy(routed), pickle.loads(pickle.dumps(routed))):
        torch.testing.assert_close(twin(x, T, y, extra={"scale": [scale]})["sample"], expected, **CLOSE)
        twin.model.position.data.zero_()
    assert routed.model.position.abs().min() > 0
    back = routed.expert(2)
    assert type(back) is Transformer and type(back.blocks[1]) is Block and type(back.scaled) is Scaled
    torch.testing.assert_close(back(x, T, y)["sample"], experts[2](x, T, y)["sample"])
    back.scaled.tables[0].data.add_(1)
    assert not torch.equal(routed.expert(2).scaled.tables[0], back.scaled.tables[0])


@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
def test_a_checkpoint_inside_recomputes_with_the_samples_of_its_group(recompute: str) -> None:
    plain, other = pack_experts(transformers(), GROUPS), pack_experts(transformers(recompute), GROUPS)
    (x, _), (x2, _) = batch(), batch(4)

    def gradients(model: nn.Module) -> list[Tensor]:
        first, second = model(x, T)["sample"], model(x2, T[2:])["sample"]
        (first.square().sum() + second.square().sum()).backward()
        return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]

    for a, b in zip(gradients(other), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


class Recomputed(nn.Module):
    """Runs a module again in the backward, beside a parameter if it has one."""

    def __init__(self, inside: nn.Module, reentrant: bool, own: bool) -> None:
        super().__init__()
        self.inside, self.reentrant = inside, reentrant
        self.own = nn.Parameter(torch.ones(8)) if own else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.own * checkpoint(self.inside, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_recorded_before_a_module_with_parameters_keeps_the_plan_of_the_whole_batch(reentrant: bool) -> None:
    def make(seed: int) -> nn.Module:
        mlp = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
        parts = [
            nn.Linear(8, 8),
            *(Recomputed(part, reentrant, own) for part, own in zip(mlp, (False, True), strict=True)),
        ]
        return randomise(Around(nn.Sequential(*parts)), seed)

    experts = [make(seed) for seed in range(4)]
    routed, x = pack_experts(experts, GROUPS), torch.randn(6, 5, 8)
    routed(x, T).square().sum().backward()
    torch.cat([experts[g](x[i, None], T[i, None]) for i, g in enumerate(GROUPS.group_of(T))]).square().sum().backward()
    for name, parameter in routed.model.named_parameters():
        expected = [expert.get_parameter(name).grad for expert in experts]
        expected = [torch.zeros_like(parameter[0]) if grad is None else grad for grad in expected]
        torch.testing.assert_close(parameter.grad, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_threads_share_a_model_with_parameters_of_its_own() -> None:
    routed, (x, y) = pack_experts(transformers(), GROUPS), batch()
    expected = [routed(x, T.roll(shift), y)["sample"] for shift in range(3)]
    wrong: list[int] = []

    def work(shift: int) -> None:
        for _ in range(10):
            found = routed(x, T.roll(shift), y)["sample"]
            wrong.extend([shift] * (not torch.allclose(found, expected[shift], **CLOSE)))

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_settings_reach_the_module_inside() -> None:
    routed, (x, y) = pack_experts(transformers(), GROUPS), batch()
    routed.model.recompute = "not reentrant"
    assert routed.expert(0).recompute == "not reentrant"
    before = routed(x, T, y)["sample"]
    routed.model.scaled.gain.mul_(2)
    assert not torch.allclose(routed(x, T, y)["sample"], before)


def test_groups_share_modules_that_run_once_per_group() -> None:
    base, (x, y) = randomise(Transformer(), 0), batch()
    routed = pack_experts(base, GROUPS, shared_layers="scaled:2, blocks.0")
    assert routed.model.scaled.gamma.shape == (2, 8) and routed.model.blocks[0].table.shape == (1, 2, 8)
    routed.model.scaled.gamma.data[1] *= 2
    first = GROUPS.group_of(T) < 2
    ids = GROUPS.group_of(T)
    expected = torch.cat([routed.expert(g)(x[i, None], T[i, None], y[i, None])["sample"] for i, g in enumerate(ids)])
    found = routed(x, T, y)["sample"]
    torch.testing.assert_close(found, expected, **CLOSE)
    dense = base(x, T, y)["sample"]
    torch.testing.assert_close(found[first], dense[first], **CLOSE)
    assert not torch.allclose(found[~first], dense[~first], **CLOSE)


class Counts(nn.Module):
    """Assigns to a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("samples", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.samples = self.samples + len(x)
        return x * self.weight


def test_what_a_module_assigns_to_its_buffers_stays() -> None:
    routed = pack_experts(Around(Counts()), GROUPS)
    for _ in range(2):
        routed(torch.randn(6, 3), T)
    assert routed.model.layer.samples == 12 and routed.expert(1).layer.samples == 12


class Folded(nn.Module):
    """Takes the tokens of all samples as one batch, or computes with the weights of another layer."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.dense, self.tied = nn.Linear(3, 3), tied

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense.weight) if self.tied else self.dense(x.flatten(0, 1)).view_as(x)


def test_a_module_that_turns_out_not_to_fit_is_named_with_its_path() -> None:
    x = torch.randn(6, 5, 3)
    with pytest.raises(ValueError, match=r"module 'layer.0.dense': plan: .* of 30 samples. Layers of a packed model"):
        pack_experts(Around(nn.Sequential(Folded(False))), GROUPS)(x, T)
    with pytest.raises(RuntimeError) as raised:
        pack_experts(Around(nn.Sequential(Folded(True))), GROUPS)(x, T)
    assert "raised in module 'layer.0' of a packed model" in raised.value.__notes__[0]


class Odd(nn.Module):
    """A module that takes and returns what cannot be divided into groups."""

    def __init__(self, result: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.result = nn.Parameter(torch.ones(3)), result

    def forward(self, x: Tensor) -> Tensor:
        return self.result(x, self.weight)


def test_a_result_without_samples_is_refused_by_path() -> None:
    x = batch()[0]
    shared = pack_experts(Around(Odd(lambda x, w: w[None])), GROUPS)
    assert shared(x, T).shape == (6, 3)  # one for all samples of a group: each sample gets its own
    for result in (lambda x, w: w.repeat(10), lambda x, w: x.transpose(0, 1)):
        with pytest.raises(ValueError, match="module 'layer': got 'a result of shape"):
            pack_experts(Around(Odd(result)), GROUPS)(x, T)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def weight_normed() -> nn.Module:
    layer = nn.Linear(3, 3)
    magnitude = nn.Parameter(torch.ones(3, 1))
    del layer.weight
    layer.weight_g, layer.weight = magnitude, magnitude * 2  # what torch.nn.utils.weight_norm leaves behind
    return nn.Sequential(layer)


def replaced() -> nn.Module:
    """As hooks of accelerate do it."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))
    model[1].forward = functools.partial(type(model[1]).forward, model[1])
    return model


class Crowded(nn.Module):
    """Names that a packed module needs for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.dense = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)), "module '1': got 'BatchNorm2d'; expected a norm of each"),
        (lambda: nn.Sequential(nn.BatchNorm2d(2, affine=False)), "module '0': got 'BatchNorm2d'"),
        (lambda: nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True)), "module '0': got 'InstanceNorm2d'"),
        (lambda: nn.Sequential(nn.ReLU(), nn.LSTM(3, 3)), "module '1': got 'LSTM'"),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8)), "module '0': .* expected batch_first=True"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "parameter 0.weight: .* expected a model that has run once"),
        (lambda: nn.Sequential(nn.Embedding(3, 3, sparse=True)), "module '0': .* expected sparse=False"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), "remove_parametrizations"),
        (lambda: nn.Sequential(nn.Embedding(3, 3, max_norm=1.0)), "module '0': .* expected max_norm=None"),
        (lambda: nn.Sequential(nn.ParameterList([nn.ParameterList()])), "a ParameterList within a ParameterList"),
        (weight_normed, "module '0': got 'Linear with weight computed from parameters'; .*remove_weight_norm"),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3))), "module '0': .*remove_spectral_norm"),
        (lambda: pack_experts(nn.Sequential(nn.Linear(3, 3)), GROUPS), "module 'model.0': .* is packed already"),
        (replaced, "module '1': got 'Linear whose forward was replaced'; expected the forward of its class"),
        (tied, "parameter 1.weight: got 'shared with 0.weight'; expected parameters of its own"),
        (lambda: nn.Sequential(nn.ReLU(), Crowded()), "module '1': got 'dense'; expected another name"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_named_with_its_path(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_experts(model(), GROUPS)

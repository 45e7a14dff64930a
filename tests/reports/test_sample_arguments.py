"""Arguments with an entry per sample are sorted with the samples, wherever they are; shared ones never are."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, pack_experts

GROUPS = TimestepGroups.uniform(100, 4)
BATCH = 6
T = torch.tensor([90, 10, 60, 30, 99, 0])
Pair = namedtuple("Pair", "first second")


@dataclass
class Condition:
    """Tensors in an object that nothing can look into."""

    text: Tensor


class Net(nn.Module):
    """Adds what it is given to each sample; `find` takes it out of the arguments."""

    def __init__(self, find: Any) -> None:
        super().__init__()
        self.layer, self.find = nn.Conv2d(BATCH, BATCH, 1), find

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, scale: Tensor | None = None) -> Tensor:
        h = self.layer(x) + self.find(cond).float()[:, None, None, None]
        return h if scale is None else h * scale[:, None, None]


class Slots:
    """Tensors in an object without a __dict__."""

    __slots__ = ("text",)

    def __init__(self, text: Any) -> None:
        self.text = text


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, BATCH, 3, 3, generator=generator), torch.randn(BATCH, generator=generator)


NESTED = {
    "a tensor": (lambda y: y, lambda c: c),
    "a dict": (lambda y: {"text": y}, lambda c: c["text"]),
    "an ordered dict": (lambda y: OrderedDict(text=y), lambda c: c["text"]),
    "a list": (lambda y: [None, y], lambda c: c[1]),
    "a tuple": (lambda y: (y, "name"), lambda c: c[0]),
    "a named tuple": (lambda y: Pair(1, y), lambda c: c.second),
    "a dict of lists of dicts": (lambda y: {"a": [{"b": y}]}, lambda c: c["a"][0]["b"]),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("positional", [False, True])
def test_what_each_sample_has_is_sorted_with_it(kind: str, positional: bool) -> None:
    wrap, find = NESTED[kind]
    base = Net(find)
    routed = pack_experts(base, GROUPS)
    x, y = inputs()
    found = routed(x, T, wrap(y)) if positional else routed(x, T, cond=wrap(y))
    torch.testing.assert_close(found, base(x, T, wrap(y)))


@pytest.mark.parametrize("named", [("cond",), ("cond.text",)])
def test_a_shared_tensor_as_long_as_the_batch_stays_as_it_is_where_per_sample_says_so(named: tuple[str, ...]) -> None:
    base = Net(lambda c: c["text"])
    x, y = inputs()
    per_channel = torch.arange(1.0, BATCH + 1)
    expected = base(x, T, {"text": y}, per_channel)
    routed = pack_experts(base, GROUPS, per_sample=named)
    torch.testing.assert_close(routed(x, T, {"text": y}, per_channel), expected)
    torch.testing.assert_close(routed(x, T, scale=per_channel, cond={"text": y}), expected)
    with pytest.raises(ValueError, match=r"cond.text: got \(1,\); expected one entry for each of the 6 samples"):
        routed(x, T, {"text": y[:1]})


def test_outputs_of_several_tensors_follow_the_same_rule() -> None:
    class Two(Net):
        def forward(self, x: Tensor, t: Tensor) -> Any:  # type: ignore[override]
            return {"sample": self.layer(x), "channels": torch.arange(BATCH)}

    base = Two(None)
    x, _ = inputs()
    expected = base(x, T)
    found = pack_experts(base, GROUPS, per_sample=("return.sample",))(x, T)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(BATCH),
        ["text"] * BATCH,
        {"texts": ["text"] * BATCH},
        ["text", *[None] * (BATCH - 1)],
        {"numbers": [[0.5] * BATCH]},
        tuple(T),
        Condition(T),
        UserDict(text=T),
        {Condition(T).text},
        Slots(T),
        SimpleNamespace(parts=[{"text": T}]),
    ],
    ids=[
        "numpy",
        "texts",
        "texts in a dict",
        "some texts",
        "numbers",
        "tensors",
        "dataclass",
        "another mapping",
        "set",
        "slots",
        "lists in an object",
    ],  # fmt: skip
)
def test_what_cannot_be_sorted_is_refused_by_name(value: Any) -> None:
    routed = pack_experts(Net(lambda c: torch.zeros(BATCH)), GROUPS)
    with pytest.raises(ValueError, match="^cond"):
        routed(inputs()[0], T, value)


@pytest.mark.parametrize("value", [np.arange(BATCH), ["text"] * BATCH, (1,) * BATCH, Condition(T), Slots([T])])
def test_what_per_sample_does_not_name_is_shared_whatever_it_is(value: Any) -> None:
    base = Net(lambda c: c["text"])
    x, y = inputs()
    routed = pack_experts(base, GROUPS, per_sample=("cond.text",))
    torch.testing.assert_close(routed(x, T, {"text": y, "other": value}), base(x, T, {"text": y}))
    for named in (("cond",), ("cond.other",)):
        with pytest.raises(ValueError, match="^cond.other: got"):
            pack_experts(base, GROUPS, per_sample=named)(x, T, {"text": y, "other": value})


def test_what_all_samples_share_is_passed_on() -> None:
    routed = pack_experts(Net(lambda c: torch.zeros(BATCH)), GROUPS)
    tensors = (torch.zeros(1, 2), np.zeros(3), nn.Linear(2, 2))
    for value in (None, 3, "text", ["text"], [3], (8,) * BATCH, torch.Size([BATCH, 2]), *tensors):
        routed(inputs()[0], T, value)


@pytest.mark.parametrize("named", ["y", ("y",), (1,)])
def test_per_sample_names_arguments_of_the_model(named: Any) -> None:
    with pytest.raises(ValueError, match="per_sample"):
        pack_experts(Net(None), GROUPS, per_sample=named)


def test_nested_arguments_compile_into_one_graph() -> None:
    torch._dynamo.reset()
    base = Net(lambda c: c["a"][0])
    routed = pack_experts(base, GROUPS)
    x, y = inputs()
    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, T, cond={"a": [y]}), base(x, T, {"a": [y]}))
    torch.testing.assert_close(compiled(x, T, {"a": (y,)}), base(x, T, {"a": (y,)}))
    torch._dynamo.reset()

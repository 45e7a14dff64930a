"""A packed model takes timesteps as its dense experts do, in any of the usual forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdc_fast import TimestepGroups, pack_experts

GROUPS = TimestepGroups.uniform(100, 4)
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Depends on the timestep and on its expert's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x) + t.to(x.dtype)[:, None, None, None]
        return y if scale is None else y * scale[:, None, None, None]


class Further(Net):
    """Takes the timestep third, as transformers of diffusers do."""

    def forward(self, x: Tensor, scale: Tensor | None = None, timestep: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, timestep, scale)


class Shifted(Further):
    """Has a parameter of its own, so it is run once per group."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor, scale: Tensor | None = None, timestep: Any = None) -> Tensor:  # type: ignore[override]
        return self.shift + super().forward(x, scale, timestep)


def experts(kind: type[Net] = Net) -> list[Net]:
    torch.manual_seed(1)
    return [kind() for _ in range(4)]


@pytest.mark.parametrize(
    "t", [60, 60.0, np.int64(60), torch.tensor(60), torch.tensor(60.0), torch.tensor([60])], ids=lambda t: repr(t)
)
def test_one_timestep_is_that_of_all_samples(t: Any) -> None:
    dense = experts()
    found = pack_experts(dense, GROUPS)(X, t)
    torch.testing.assert_close(found, dense[2](X, torch.full((3,), 60)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64, torch.bfloat16])
def test_timesteps_that_are_whole_numbers_reach_the_model_in_their_own_dtype(dtype: torch.dtype) -> None:
    dense, t = experts(), torch.tensor([0, 60, 80], dtype=dtype)
    expected = torch.cat([dense[g](X[i, None], t[i, None]) for i, g in enumerate((0, 2, 3))])
    torch.testing.assert_close(pack_experts(dense, GROUPS)(X, t), expected)


@pytest.mark.parametrize("kind", [Further, Shifted])
def test_timesteps_are_passed_where_the_model_takes_them(kind: type[Net]) -> None:
    dense, t, scale = experts(kind), torch.tensor([99, 0, 30]), torch.tensor([1.0, 2.0, 3.0])
    routed = pack_experts(dense, GROUPS)
    for arguments, keywords in (((), {}), ((scale,), {}), ((), {"scale": scale})):
        used = scale if arguments or keywords else None
        expected = torch.cat(
            [
                dense[g](X[i, None], None if used is None else used[i, None], timestep=t[i, None])
                for i, g in enumerate((3, 0, 1))
            ]
        )
        torch.testing.assert_close(routed(X, t, *arguments, **keywords), expected)
    with pytest.raises(ValueError, match=r"per_sample: got 'timestep'; expected one of \['scale', 'return'\]"):
        pack_experts(dense, GROUPS, per_sample=("timestep",))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0.0, 59.5, 3.0]), "t: got 59.5; expected original timesteps, whole numbers"),
        (0.5, "t: got 0.5"),
        (torch.tensor([1, 2]), r"t: got \(2,\); expected one timestep for each of the 3 samples, or one for all"),
        (torch.tensor([True, False, True]), "t: got torch.bool"),
        (True, "t: got True"),
        (float("inf"), "t: got inf; expected a timestep, a finite number"),
        (2**70, "t: got 1180591620717411303424; expected a timestep"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "t: got torch.float8_e4m3fn; expected timesteps"),
        ([1, 2, 3], r"t: got \[1, 2, 3\]"),
        (100, "t: got 100; expected timesteps in"),
    ],
)
def test_what_is_no_timestep_is_refused(t: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_experts(experts(), GROUPS)(X, t)


def test_expert_ids_route_fractions_of_timesteps() -> None:
    dense, t = experts(), torch.tensor([24.5, 60.0, 99.9])
    expected = torch.cat([dense[g](X[i, None], t[i, None]) for i, g in enumerate((1, 2, 3))])
    torch.testing.assert_close(pack_experts(dense, GROUPS)(X, t, expert_ids=[1, 2, 3]), expected)


def test_a_number_as_timestep_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    routed = pack_experts(experts(), GROUPS)
    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
    t = torch.tensor(60.0)
    torch.testing.assert_close(compiled(X, t), routed(X, t))
    torch._dynamo.reset()

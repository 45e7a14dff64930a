"""Route a module of your own: several experts in one model, one launch per layer.

Any module can be packed whose forward takes (x, t) and treats every sample of the batch on its own. Conv2d, 1x1 Conv1d,
Linear, GroupNorm, LayerNorm, Embedding and MultiheadAttention layers are computed for all samples at once; every other
module with parameters runs once per group.

    python examples/route_your_own_module.py
"""

import torch
from torch import Tensor, nn

from tdc_fast import RoutedModel, TimestepGroups, pack_experts


class SmallDenoiser(nn.Module):
    """Two convolutions with a group norm, shifted by an embedding of the timestep."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels)
        self.time = nn.Linear(1, channels)
        self.leave = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x (B, 3, H, W) at timesteps t (B,)."""
        h = self.norm(self.enter(x)) + self.time(t[:, None].float() / 1000)[:, :, None, None]
        return self.leave(nn.functional.silu(h))


def one_by_one(experts: list[SmallDenoiser], groups: TimestepGroups, x: Tensor, t: Tensor) -> Tensor:
    """The same result without routing: every expert runs on the samples of its group, one expert after the other."""
    out = torch.empty_like(x)
    group = groups.group_of(t)
    for index, expert in enumerate(experts):
        out[group == index] = expert(x[group == index], t[group == index])
    return out


def main() -> None:
    """Compare the routed model with its experts, run backward, and take one expert out."""
    torch.manual_seed(0)
    groups = TimestepGroups.uniform(num_timesteps=1000, num_groups=4)
    experts = [SmallDenoiser() for _ in range(groups.num_groups)]
    model: RoutedModel = pack_experts(experts, groups)  # pack_experts(base, groups) starts all experts from one base

    x, t = torch.randn(16, 3, 16, 16), torch.randint(0, 1000, (16,))
    print("group of each sample:", groups.group_of(t).tolist())
    difference = (model(x, t) - one_by_one(experts, groups, x, t)).abs().max().item()
    print(f"largest difference from one expert after the other: {difference:.1e}")

    model(x, t).square().mean().backward()
    gradient = model.get_parameter("model.enter.weight").grad
    print("gradient of the first layer, one slice per expert:", tuple(gradient.shape))

    expert = model.expert(0)  # an ordinary SmallDenoiser with its own weights
    print("expert 0:", type(expert).__name__, "with", sum(p.numel() for p in expert.parameters()), "parameters")


if __name__ == "__main__":
    main()

"""Sample one batch of images at different timesteps, as a server does for requests that arrive one by one.

Every function of `tdc_fast.diffusion` takes a timestep per sample, and a routed model runs each sample through the
expert of its own timestep. So requests that began at different times share one batch, and do not change each other's
images.

    python examples/sample_a_mixed_batch.py
"""

import torch
from torch import Tensor

from tdc_fast import TimestepGroups, WidthPlan, pack_experts
from tdc_fast.diffusion import create_diffusion, ddim_step
from tdc_fast.models.iddpm import UNet

STEPS = list(range(190, -1, -10)) + [-1]  # the timesteps that every request visits; -1 is the finished image


def main() -> None:
    """Serve six requests that arrive at different ticks, then check one of them on its own."""
    torch.manual_seed(0)
    base = UNet(image_size=8, in_channels=1, model_channels=16, out_channels=1, num_res_blocks=1,
                attention_resolutions=(), channel_mult=(1, 2), num_heads=1, use_scale_shift_norm=True)  # fmt: skip
    for parameter in base.parameters():  # replaces training; a fresh UNet ends in a layer of zeros
        torch.nn.init.normal_(parameter, std=0.05)
    diffusion = create_diffusion(diffusion_steps=200, noise_schedule="cosine")
    groups = TimestepGroups.snr(diffusion, num_groups=4)
    model = pack_experts(base, groups, WidthPlan.uniform(base, groups.boundaries, 0.5)).eval()

    def advance(x: Tensor, position: Tensor) -> Tensor:
        """One DDIM step of every sample, each from its own timestep to its own next one."""
        steps = torch.tensor(STEPS)
        return ddim_step(diffusion, model, x, steps[position], steps[position + 1])

    arrivals = [0, 0, 3, 7, 7, 12]  # tick at which each request arrives
    noise = torch.randn(len(arrivals), 1, 8, 8)
    images: dict[int, Tensor] = {}
    running: list[int] = []
    x, position, tick = noise[:0], torch.zeros(0, dtype=torch.int64), 0
    while len(images) < len(arrivals):
        new = [request for request, arrival in enumerate(arrivals) if arrival == tick]
        running += new
        x, position = torch.cat([x, noise[new]]), torch.cat([position, torch.zeros(len(new), dtype=torch.int64)])
        if tick in (0, 8, 15):
            print(f"tick {tick:2}: timesteps of the batch: {[STEPS[p] for p in position.tolist()]}")
        x, position, tick = advance(x, position), position + 1, tick + 1
        finished = position == len(STEPS) - 1
        images |= {running[i]: x[i] for i in finished.nonzero().flatten().tolist()}
        running = [request for request, done in zip(running, finished.tolist(), strict=True) if not done]
        x, position = x[~finished], position[~finished]

    alone = noise[2:3]
    for start in range(len(STEPS) - 1):
        alone = advance(alone, torch.tensor([start]))
    print(f"finished {len(images)} images in {tick} ticks")
    difference = (alone[0] - images[2]).abs().max().item()
    print(f"largest difference of request 2 from the same image sampled alone: {difference:.0e}")


if __name__ == "__main__":
    main()

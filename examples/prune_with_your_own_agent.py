"""Search the widths of experts with an agent of your own.

An agent is any object with a name and a method `propose`. It keeps no state: what was tried is in `task.memory`, and
random numbers come from `task.rng()`, so a search repeats exactly and continues after an interruption.

    python examples/prune_with_your_own_agent.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch

from tdc_fast import TimestepGroups, pack_experts
from tdc_fast.diffusion import create_diffusion
from tdc_fast.models.iddpm import UNet
from tdc_fast.pruning import Proposal, Task, plan_pruning


class Exchange:
    """Widens one unit of the best candidate so far and narrows another."""

    name = "exchange"

    def propose(self, task: Task, count: int) -> list[Proposal]:
        """The best widths so far, and `count` - 1 variations of them."""
        best = task.best()  # None in the first round, when nothing has a score
        widths = best.widths if best else task.most_important().widths
        rng, units = task.rng(), {unit.name: unit for unit in task.units}
        proposals = [Proposal(dict(widths), "the best so far")]
        while len(proposals) < count:
            wider, narrower = map(str, rng.choice(list(units), size=2, replace=False))
            moved = dict(widths)
            moved[wider] = min(moved[wider] + units[wider].step, units[wider].channels)
            moved[narrower] = max(moved[narrower] - units[narrower].step, 0)
            proposals.append(Proposal(moved, f"{wider} wider, {narrower} narrower"))
        return proposals  # their MACs need not fit: the search moves each proposal onto the budget


def main(folder: Path) -> None:
    """Search widths for three groups, save them and the memory of the search, and pack the pruned experts."""
    torch.manual_seed(0)
    base = UNet(image_size=8, in_channels=1, model_channels=16, out_channels=1, num_res_blocks=1,
                attention_resolutions=(), channel_mult=(1, 2), num_heads=1, use_scale_shift_norm=True)  # fmt: skip
    for parameter in base.parameters():  # replaces training; a fresh UNet ends in a layer of zeros
        torch.nn.init.normal_(parameter, std=0.1)
    diffusion = create_diffusion(diffusion_steps=1000, noise_schedule="cosine")
    groups = TimestepGroups.snr(diffusion, num_groups=3)
    batches = [torch.randn(16, 1, 8, 8).clamp(-1, 1) for _ in range(2)]  # calibration images in [-1, 1]

    memory = folder / "memory.jsonl"
    found = plan_pruning(
        base, groups, diffusion, batches, k=0.6, agent=Exchange(), rounds=3, candidates=4, memory_file=memory
    )
    for group, trials in enumerate(found.trials):
        share = found.plan.macs[group] / found.base_macs
        scores = [round(trial.score, 4) for trial in trials]
        print(f"group {group}: {share:.2f} of the base's MACs; scores of {len(trials)} candidates: {scores}")
    print("first and best score of the last group:", found.trials[-1][0].score, min(t.score for t in found.trials[-1]))

    found.plan.save(folder / "widths.json")
    model = pack_experts(base, groups, found.plan)
    print("output of a mixed batch:", tuple(model(torch.randn(4, 1, 8, 8), torch.tensor([5, 300, 600, 999])).shape))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))

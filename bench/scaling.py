"""What a run takes on 1, 8 and 64 GPUs, on paper: `python -m bench.scaling` prints the tables of docs/scaling.md.

The times of a step are from one NVIDIA H200 (bench/results/gpu-nvidia-h200-experiments.md); what they are extended by,
other networks and links between GPUs, are estimates and named so.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tdc_fast.nn.macs import measure_macs
from tdc_fast.pruning.budget import budget_law
from tdc_fast.runs.build import outline_unet
from tdc_fast.runs.config import TrainConfig

CONFIGS = {
    name: Path(__file__).parent / "paper" / "configs" / f"{name}.yaml" for name in ("cifar10", "imagenet64", "ffhq_ldm")
}
NAMES = {"cifar10": "CIFAR-10", "imagenet64": "ImageNet64", "ffhq_ldm": "FFHQ-LDM"}
GPUS = (1, 8, 64)
PER_MACHINE = 8

# Measured: CIFAR-10's UNet, N = 8 routed experts, bf16, whole steps in a CUDA graph, milliseconds.
STEP_64, STEP_128 = 26.6, 38.5
FORWARD_BACKWARD_64 = 17.956
EXPERTS = 8
# Assumed: GB/s of one GPU to the others in its machine (NVLink of an H200, data sheet, one direction), and of one GPU
# to other machines (an adapter of 400 Gbit/s for each GPU).
WITHIN, BETWEEN = 450.0, 50.0


@dataclass(frozen=True)
class Network:
    """What decides the time of a step.

    Attributes:
        parameters: of one model.
        macs: of one sample's forward.
    """

    parameters: int
    macs: int


def network_of(config: TrainConfig) -> Network:
    """The UNet of a configuration, counted without memory for its weights."""
    model = outline_unet(config, 3)
    with torch.device("meta"):
        x = torch.zeros(1, 3, config.image_size, config.image_size)
        macs = measure_macs(model, x, torch.zeros(1, dtype=torch.int64))
    return Network(sum(parameter.numel() for parameter in model.parameters()), macs)


@dataclass(frozen=True)
class StepTimes:
    """The time of a step in milliseconds: `fixed + per_image * b + per_model * e` for b images and e models on a GPU.

    From two measured batch sizes and the measured part without optimizer and averages. Of another network the second
    term is taken in proportion to its MACs and the third to its parameters: an estimate.
    """

    fixed: float
    per_image: float
    per_model: float

    @classmethod
    def of(cls, network: Network, measured: Network) -> StepTimes:
        """Those of a network, from those measured on another one."""
        per_image = (STEP_128 - STEP_64) / 64
        fixed = FORWARD_BACKWARD_64 - 64 * per_image
        per_model = (STEP_64 - FORWARD_BACKWARD_64) / EXPERTS
        return cls(
            fixed, per_image * network.macs / measured.macs, per_model * network.parameters / measured.parameters
        )

    def computing(self, images: float, models: int = 1) -> float:
        """Milliseconds without communication."""
        return self.fixed + self.per_image * images + self.per_model * models

    def hidden(self, images: float) -> float:
        """Milliseconds of the backward, two thirds of forward and backward, beside which gradients are sent."""
        return 2 / 3 * (self.fixed + self.per_image * images)


def all_reduce(parameters: int, gpus: int) -> float:
    """Milliseconds in which a ring adds up fp32 gradients: each GPU sends 2 (G - 1) / G times their bytes."""
    if gpus == 1:
        return 0.0
    sent = 2 * (gpus - 1) / gpus * 4 * parameters
    return sent / (WITHIN if gpus <= PER_MACHINE else BETWEEN) / 1e6


@dataclass(frozen=True)
class Step:
    """A step of a stage.

    Attributes:
        milliseconds: its time.
        exposed: the part of it that waits for gradients.
        megabytes: gradients that a GPU sends.
    """

    milliseconds: float
    exposed: float
    megabytes: float


def stage1(times: StepTimes, network: Network, batch: float, gpus: int) -> Step:
    """Data parallel: each GPU has batch / gpus images, and all add up their gradients."""
    images, sending = batch / gpus, all_reduce(network.parameters, gpus)
    exposed = max(0.0, sending - times.hidden(images))
    sent = 2 * (gpus - 1) / gpus * 4 * network.parameters
    return Step(times.computing(images) + exposed, exposed, sent / 1e6)


def stage2(times: StepTimes, network: Network, batch: float, gpus: int, experts: int) -> Step:
    """Expert parallel at full widths, experts of equal cost: nothing is sent up to one GPU for each expert.

    With more, the GPUs of an expert add up its gradients; the largest and the smallest team differ by one GPU.
    """
    if gpus <= experts:
        own = -(-experts // gpus)
        return Step(times.computing(batch * own / experts, own), 0.0, 0.0)
    members = gpus // experts
    team = stage1(times, network, batch / experts, members)
    crosses = all_reduce(network.parameters, members)
    return Step(team.milliseconds, team.exposed, team.megabytes if crosses else 0.0)


def table(per_gpu: int = 0, names: Sequence[str] = tuple(CONFIGS)) -> str:
    """Both stages of some configurations, in Markdown.

    Args:
        per_gpu: images per GPU and step; 0 divides the batch of the configuration.
        names: keys of `CONFIGS`, "cifar10" among them.
    """
    configs = {name: TrainConfig.from_file(CONFIGS[name]) for name in names}
    networks = {name: network_of(config) for name, config in configs.items()}
    rows = ["| | GPUs | images per step | stage 1 ms | waiting | MB sent | stage 2 ms | waiting | MB sent |{}"]
    rows[0] = rows[0].format(" images/s, stage 1 | stage 2 |" if per_gpu else " stage 1 hours | stage 2 hours |")
    rows.append("|---|" + "---|" * (rows[0].count("|") - 2))
    for name, config in configs.items():
        network, times = networks[name], StepTimes.of(networks[name], networks["cifar10"])
        for gpus in GPUS:
            batch = per_gpu * gpus or config.batch_size
            first = stage1(times, network, batch, gpus)
            second = stage2(times, network, batch, gpus, config.groups)
            steps = (config.stage1_share * config.baseline_steps, stage2_steps(config))
            if per_gpu:
                last = [f"{1000 * batch / step.milliseconds:,.0f}" for step in (first, second)]
            else:
                last = [f"{n * s.milliseconds / 3.6e6:,.1f}" for n, s in zip(steps, (first, second), strict=True)]
            cells = [
                NAMES[name],
                gpus,
                batch,
                *(
                    f"{value:,.{places}f}"
                    for step in (first, second)
                    for value, places in ((step.milliseconds, 1), (step.exposed, 1), (step.megabytes, 0))
                ),
                *last,
            ]
            rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def stage2_steps(config: TrainConfig) -> float:
    """The steps that --total_share leaves for stage 2, at the mean of the budgets."""
    budgets = budget_law(config.groups, config.k)
    return (config.total_share - config.stage1_share) * config.baseline_steps / (sum(budgets) / len(budgets))


def main() -> None:
    """Print the tables."""
    sys.stdout.write(f"The batch of the configuration:\n\n{table()}\n\n64 images per GPU:\n\n{table(64)}\n")


if __name__ == "__main__":
    main()

r"""Train a UNet of diffusers on images of your own, then experts for groups of timesteps, each pruned to its budget.

    accelerate launch examples/train_diffusers.py --train_data_dir images/ --output_dir out --groups 4 --k 0.6

A first try, small enough for a CPU:

    python examples/train_diffusers.py --train_data_dir digits --output_dir out --resolution 8 --groups 2 \
        --block_out_channels 16 32 --base_steps 20 --expert_steps 20 --ddpm_num_inference_steps 10

It has the shape of diffusers' script for unconditional training (accelerate, EMA, checkpoints, samples to TensorBoard)
with a second stage: the base is pruned per group of timesteps, and all experts train in one model, a `TDCModel`. The
same command continues from the latest checkpoint with `--resume_from_checkpoint latest`. `out/` then holds the base
(`base/`), the experts as one model (`tdc/`, for any pipeline) and one by one for plain diffusers (`expert_0/` ...).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from tdc_fast import TimestepGroups, pack_experts
from tdc_fast.data.dataset import load_dataset
from tdc_fast.data.fitting import fit_image
from tdc_fast.data.pixels import to_unit_range
from tdc_fast.diffusers_models import TDCModel, save_expert
from tdc_fast.diffusion import Diffusion
from tdc_fast.pruning import plan_pruning


def parse(argv):
    """The flags; those that diffusers' script has keep their names."""
    parser = argparse.ArgumentParser(description="Experts per group of timesteps for a UNet of diffusers")
    add = parser.add_argument
    add("--train_data_dir", default="", help="folder of images, an .npz or .npy file, or digits")
    add(
        "--dataset_name",
        default="",
        help="instead: a data set of the hub or a local folder, read by the package datasets",
    )
    add("--dataset_config_name", default=None, help="which configuration of it")
    add("--output_dir", type=Path, required=True)
    add("--resolution", type=int, default=64)
    add("--in_channels", type=int, default=3)
    add("--block_out_channels", type=int, nargs="+", default=[64, 128, 128])
    add("--train_batch_size", type=int, default=16)
    add("--base_steps", type=int, default=10000)
    add("--expert_steps", type=int, default=6000)
    add("--groups", type=int, default=4)
    add("--k", type=float, default=0.6, help="lower bound of the shares of the base's MACs that experts keep")
    add("--learning_rate", type=float, default=1e-4)
    add("--lr_warmup_steps", type=int, default=100)
    add("--ema_max_decay", type=float, default=0.9999)
    add("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    add("--prediction_type", default="epsilon", choices=["epsilon", "sample", "v_prediction"])
    add("--ddpm_num_steps", type=int, default=1000)
    add("--ddpm_num_inference_steps", type=int, default=50)
    add("--save_images_steps", type=int, default=1000)
    add("--eval_batch_size", type=int, default=16)
    add("--checkpointing_steps", type=int, default=500)
    add("--resume_from_checkpoint", default="", choices=["", "latest"])
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if bool(options.train_data_dir) == bool(options.dataset_name):
        parser.error("give either --train_data_dir or --dataset_name")
    return options


class HubImages:
    """The images of a data set that the package datasets reads, decoded when they are drawn."""

    def __init__(self, options):
        try:
            import datasets
        except ImportError as error:
            raise SystemExit(f"--dataset_name needs a package: pip install datasets ({error})") from error
        self.rows = datasets.load_dataset(options.dataset_name, options.dataset_config_name, split="train")
        self.column = next((name for name in ("image", "img") if name in self.rows.column_names), None)
        if self.column is None:
            raise SystemExit(
                f"--dataset_name {options.dataset_name}: no column image or img in {self.rows.column_names}"
            )
        self.size, self.mode = options.resolution, "L" if options.in_channels == 1 else "RGB"

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        """Images (B, C, H, W) in [-1, 1], scaled and cropped as `load_dataset` does; no labels."""
        images = [self.rows[int(index)][self.column].convert(self.mode) for index in indices]
        pixels = np.stack([fit_image(image, self.size) for image in images])
        return torch.from_numpy(to_unit_range(pixels)).permute(0, 3, 1, 2), {}


def read_images(options):
    """What to draw from: `batch(indices)` gives images (B, C, H, W) in [-1, 1]."""
    if options.dataset_name:
        return HubImages(options)
    name = options.train_data_dir
    size = {} if name == "digits" else {"image_size": options.resolution, "in_channels": options.in_channels}
    return load_dataset(name, **size)


def batches(images, count):
    """Endless random batches; every process draws its own, from the state that checkpoints restore."""
    while True:
        yield images.batch(torch.randint(len(images), (count,)).numpy())[0]


def stage(name, model, timesteps, steps, options, accelerator, scheduler, data):
    """Train a model, its average and its checkpoints; returns the averaged model. A finished stage is only loaded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    turns = accelerator.num_processes  # of the rate in a step
    warmup = options.lr_warmup_steps * turns
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=steps * turns)
    ema = EMAModel(model.parameters(), decay=options.ema_max_decay, use_ema_warmup=True)
    model, optimizer, rate = accelerator.prepare(model, optimizer, rate)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    plain, folder, start = accelerator.unwrap_model(model), options.output_dir / "checkpoints" / name, 0
    saved = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:])) if folder.is_dir() else []
    if options.resume_from_checkpoint == "latest" and saved:
        accelerator.load_state(str(saved[-1]))
        start = int(saved[-1].name[5:])
        accelerator.print(f"{name}: continues from step {start}")

    for step in range(start + 1, steps + 1):
        clean = next(data).to(accelerator.device)
        noise, t = torch.randn_like(clean), timesteps(len(clean)).to(accelerator.device)
        with accelerator.autocast():
            predicted = model(scheduler.add_noise(clean, noise, t), t).sample
        kinds = {"epsilon": noise, "sample": clean}
        target = kinds.get(options.prediction_type, scheduler.get_velocity(clean, noise, t))
        loss = F.mse_loss(predicted.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(plain.parameters())
        accelerator.log({f"{name}/loss": loss.item()}, step=step)
        if step % options.checkpointing_steps == 0 or step == steps:
            save(folder, step, accelerator)
        if accelerator.is_main_process and (step % options.save_images_steps == 0 or step == steps):
            ema.store(plain.parameters())
            ema.copy_to(plain.parameters())
            draw(name, plain, step, options, accelerator, scheduler)
            ema.restore(plain.parameters())
    ema.copy_to(plain.parameters())
    accelerator._custom_objects.clear()  # the next stage has an average of its own
    accelerator.free_memory()
    return plain


def save(folder, step, accelerator):
    """A checkpoint, which gets its name when every process has written its part."""
    unfinished = folder / "unfinished"
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(folder / f"step-{step}")
    accelerator.wait_for_everyone()


def draw(name, model, step, options, accelerator, scheduler):
    """Samples to TensorBoard."""
    pipeline = DDPMPipeline(model, DDPMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(accelerator.device).manual_seed(0)
    steps, count = options.ddpm_num_inference_steps, options.eval_batch_size
    images = pipeline(count, generator, num_inference_steps=steps, output_type="np").images
    accelerator.get_tracker("tensorboard", unwrap=True).add_images(f"{name}/samples", images, step, dataformats="NHWC")
    model.train()


def main(argv=None):
    """Both stages."""
    options = parse(argv)
    project = ProjectConfiguration(project_dir=str(options.output_dir), logging_dir=str(options.output_dir / "logs"))
    accelerator = Accelerator(mixed_precision=options.mixed_precision, log_with="tensorboard", project_config=project)
    set_seed(options.seed, device_specific=True)
    accelerator.init_trackers("train_diffusers")
    with accelerator.main_process_first():  # it downloads and prepares, the others find it done
        images = read_images(options)
    data = batches(images, options.train_batch_size)
    scheduler = DDPMScheduler(options.ddpm_num_steps, prediction_type=options.prediction_type)
    channels, levels = next(data).shape[1], len(options.block_out_channels)
    base = UNet2DModel(
        sample_size=options.resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=options.block_out_channels,
        layers_per_block=2,
        down_block_types=["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
        norm_num_groups=min(32, options.block_out_channels[0] // 4),
    )
    common = (options, accelerator, scheduler, data)
    T = options.ddpm_num_steps
    base = stage("base", base, lambda count: torch.randint(0, T, (count,)), options.base_steps, *common)
    if accelerator.is_main_process:
        base.save_pretrained(options.output_dir / "base")

    kinds = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
    diffusion = Diffusion(scheduler.betas.numpy(), prediction=kinds[options.prediction_type])
    groups = TimestepGroups.snr(diffusion, options.groups)
    torch.manual_seed(options.seed)  # every process finds the same widths
    measured = next(batches(images, 32))
    plan = plan_pruning(base.cpu().eval(), groups, diffusion, [measured], k=options.k).plan
    accelerator.print(plan)
    set_seed(options.seed + 1, device_specific=True)
    model = TDCModel.from_routed(pack_experts(base, groups, plan)).train()

    def in_every_group(count):
        """Timesteps of which every group has its share."""
        group = (torch.arange(count) + torch.randint(0, options.groups, ())) % options.groups
        bounds = torch.tensor(groups.boundaries)
        return bounds[group] + (torch.rand(count) * (bounds[group + 1] - bounds[group])).long()

    model = stage("experts", model, in_every_group, options.expert_steps, *common)
    if accelerator.is_main_process:
        model.save_pretrained(options.output_dir / "tdc")
        for index in range(options.groups):
            save_expert(model.routed, index, options.output_dir / f"expert_{index}")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])

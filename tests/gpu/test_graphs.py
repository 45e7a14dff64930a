"""CUDA graphs of functions on a GPU: the same values, the same random numbers, and a GPU that works after a failure."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tdc_fast.diffusion import GuidedDenoiser, LossSecondMomentSampler, SamplingLoop, create_diffusion
from tdc_fast.graphs import CudaCapture, Graphed, use_capture
from tdc_fast.routing import TimestepGroups
from tdc_fast.train import main, train
from tdc_fast.training.ema import WeightAverages
from tests.gpu.networks import NUM_TIMESTEPS, batch_for, routed_unet
from tests.training.small_run import TWO_STAGES, differences, rows, small_config

pytestmark = pytest.mark.gpu


def test_replays_have_the_values_and_the_random_numbers_of_the_function() -> None:
    own, twin = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).cuda()

    def function(x: torch.Tensor, own: torch.Generator = own) -> torch.Tensor:
        return model(x) + torch.rand(8, device="cuda") + torch.rand(8, device="cuda", generator=own)

    inputs = [torch.randn(4, 8, device="cuda") for _ in range(6)]
    with torch.no_grad():
        torch.cuda.manual_seed(1)
        step = Graphed(function, "cuda", modules=[model], generators=[own])
        drawn = [step(x) for x in inputs]
        after = torch.rand(2, device="cuda")
        torch.cuda.manual_seed(1)
        expected = [function(x, twin) for x in inputs]
        assert torch.equal(after, torch.rand(2, device="cuda"))
    assert step.num_graphs == 1 and not step.why_not
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_a_state_saved_between_replays_continues_without_a_graph() -> None:
    step = Graphed(lambda: torch.rand(3, device="cuda"), "cuda")
    for _ in range(4):
        step()
    state = torch.cuda.get_rng_state()
    expected = [step() for _ in range(2)]
    torch.cuda.set_rng_state(state)
    assert all(torch.equal(torch.rand(3, device="cuda"), value) for value in expected)


def test_waiting_for_the_device_is_noticed_before_a_capture_is_tried() -> None:
    step = Graphed(lambda x: x * x.sum().item(), "cuda", name="step")
    for _ in range(4):
        assert step(torch.ones(2, device="cuda")).tolist() == [2, 2]
    assert "it waits for the device" in step.why_not and "test_graphs.py" in step.why_not


def test_after_a_failed_capture_the_gpu_works_and_random_numbers_go_on() -> None:
    def fails_while_captured(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return x + torch.rand(2, device="cuda")

    torch.cuda.manual_seed(1)
    step = Graphed(fails_while_captured, "cuda")
    drawn = [step(torch.zeros(2, device="cuda")) for _ in range(5)]
    assert "the capture failed" in step.why_not
    torch.cuda.manual_seed(1)
    assert all(torch.equal(value, torch.rand(2, device="cuda")) for value in drawn)
    working = Graphed(lambda x: x + 1, "cuda")
    assert [working(torch.full((1,), float(i), device="cuda")).item() for i in range(5)] == [1, 2, 3, 4, 5]
    assert working.num_graphs == 1


def test_a_graph_holds_the_memory_of_losses_and_nothing_waits_for_the_gpu() -> None:
    def step(sampler: LossSecondMomentSampler):
        def run(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            t, weights, _ = sampler.draw(5, {}, device="cuda")
            sampler.update(t, scale * (t + 1) ** 2)
            return t, weights

        return run

    plain, held = (LossSecondMomentSampler(4, history_per_term=3) for _ in range(2))
    captured, scales, drawn = Graphed(step(held), "cuda"), torch.arange(1.0, 13.0, device="cuda").unbind(), []
    for run in (step(plain), captured):
        torch.cuda.manual_seed(1)
        drawn.append([run(scale) for scale in scales])
    assert captured.num_graphs == 1 and not captured.why_not
    for (t, weights), (again, weights_again) in zip(*drawn, strict=True):
        assert torch.equal(t, again) and torch.equal(weights, weights_again)
    assert (drawn[0][2][1] == 1).all() and not (drawn[0][-1][1] == 1).any()  # the uniform start ends in a replay
    assert all(torch.equal(value, held.state_dict()[name]) for name, value in plain.state_dict().items())
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(plain)(scales[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A run of both stages from graphs, in bf16, with everything random in it."""
    folder = tmp_path_factory.mktemp("graphs")
    options = {
        **TWO_STAGES,
        "schedule_sampler": "loss-second-moment",
        "num_channels": 32,
        "dropout": 0.1,
        "grad_clip": 1.0,
        "ema_ramp": True,
        "batch_size": 12,
        "class_cond": True,
        "label_dropout": 0.3,
        "distillation_weight": 0.5,
    }
    config = small_config(folder, "graphs", precision="bf16", cuda_graph="on", device="cuda", **options)
    train(config)
    return folder, config


def test_training_from_graphs_has_the_losses_of_the_steps_as_they_are(trained) -> None:
    folder, config = trained
    train(config.replace(run_dir=str(folder / "plain"), cuda_graph="off"))
    for stage in ("base", "experts"):
        ours, plain = (rows(folder / name / stage / "progress.csv") for name in ("graphs", "plain"))
        assert [float(row["loss"]) for row in ours] == pytest.approx([float(row["loss"]) for row in plain], rel=2e-2)


def test_training_from_graphs_resumes_bit_for_bit(trained) -> None:
    folder, _ = trained
    shutil.copytree(folder / "graphs", folder / "again")
    for path in (folder / "again" / "experts").glob("*000010.*"):
        path.unlink()
    assert main(["--resume", str(folder / "again")]) == 0
    assert [name for name in differences(folder / "graphs", folder / "again") if name.endswith(".pt")] == []


def test_guidance_by_group_has_a_graph_with_the_second_prediction_and_one_without() -> None:
    class ByLabel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.label = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(4, 1)
            self.sizes: list[int] = []

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(x))
            return self.convolution(x) * self.label(y).view(-1, 1, 1, 1)

    torch.manual_seed(0)
    model, groups = ByLabel().cuda(), TimestepGroups([0, 15, 25, 40])
    guided = GuidedDenoiser(model, (1.0, 4.0, 1.0), 3, groups)
    diffusion, y = create_diffusion(40, noise_schedule="cosine"), torch.tensor([0, 1, 2], device="cuda")

    def draw(loop: SamplingLoop) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return loop.draw((3, 1, 8, 8), generator=generator, model_kwargs={"y": y}, device="cuda")

    loop = SamplingLoop(diffusion, guided, steps=20)
    images = draw(loop)
    assert set(model.sizes) == {3, 6} and loop._steps[y.device].num_graphs == 2
    ran = len(model.sizes)
    again = draw(loop)
    assert len(model.sizes) == ran  # everything was replayed
    always = draw(SamplingLoop(diffusion, lambda x, t, y: guided(x, t, y), steps=20))
    torch.testing.assert_close(again, images, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(always, images, rtol=1e-3, atol=1e-3)


def test_averages_with_a_ramp_take_few_launches_and_are_those_of_the_cpu() -> None:
    averages = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Conv2d(9, 5, 3) for _ in range(100)))
        model.to(device, memory_format=torch.channels_last)
        averages[device] = WeightAverages(model, ("0.9",), ramp=True)
        for n in range(1, 12):
            for parameter in model.parameters():
                parameter.data.mul_(1.1)
            step = torch.tensor(float(n), dtype=torch.float64, device=device)
            with torch.profiler.profile() as profile:
                averages[device].update(step)
    launches = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launches) < 20
    moved = [value.cpu() for value in averages["cuda"].averages["0.9"]]
    torch.testing.assert_close(moved, averages["cpu"].averages["0.9"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_samples_from_graphs_are_those_of_the_steps_as_they_are(sampler) -> None:
    model, diffusion = routed_unet("cuda", torch.float32, pruned=True).eval(), create_diffusion(NUM_TIMESTEPS)

    def draw() -> torch.Tensor:
        loop = SamplingLoop(diffusion, model, sampler=sampler, steps=10)
        generator = torch.Generator().manual_seed(2)
        shape = (4, *batch_for(model, seed=0)[0].shape[1:])
        return torch.cat([loop.draw(shape, generator=generator, device="cuda") for _ in range(2)])

    with sdpa_kernel(SDPBackend.MATH):
        replayed = draw()
        with use_capture(NoCapture()):
            plain = draw()
    torch.testing.assert_close(replayed, plain)


class NoCapture(CudaCapture):
    """Finds no device to capture on."""

    def serves(self, device: torch.device) -> bool:
        return False

"""The training step, captured and replayed: the same run, bit for bit, as with the step that runs as it is."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tdc_fast.data.image_sources import ArraySource
from tdc_fast.diffusion.timestep_samplers import UniformSampler
from tdc_fast.graphs import use_capture
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nn.packing import pack_experts
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.build import build_diffusion
from tdc_fast.train import main, train
from tdc_fast.training.optimization import LearningRate
from tdc_fast.training.stage import Stage
from tdc_fast.training.step import TrainingStep
from tests.graphs.tape import TapeCapture
from tests.operators import Recorded
from tests.training.small_run import STAGE2_OPTIONS, TWO_STAGES, differences, flags, rows, small_config

STAGES = {**TWO_STAGES, "stage1_steps": 5, "stage2_steps": 6}
RUNS = {
    "everything that changes from step to step": {
        **STAGES, "ema_ramp": True, "warmup_steps": 3, "grad_clip": 1.0, "microbatch": 4, "weight_decay": 0.1,
        "stage2_slope_windows": 8,
    },
    "random parts, losses that a sampler reads, soft boundaries, experts that share and differ in rates": {
        **STAGES, **STAGE2_OPTIONS, "stage2_slope_windows": 0, "dropout": 0.2, "diffusion_steps": 8,
        "schedule_sampler": "loss-second-moment", "overlap": 0.3, "batch_size": 7, "class_cond": True,
        "label_dropout": 0.3,
    },
    "bf16, a learned variance, activations computed again": {
        "lr_anneal_steps": 6, "precision": "bf16", "learn_sigma": True, "use_checkpoint": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def attention_of_a_gpu(monkeypatch):
    """All heads of pruned experts are computed: which ones are live is read on the CPU alone."""
    monkeypatch.setattr("tdc_fast.models.blocks.picks_heads", lambda device: False)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_graphs_is_the_run_without_them(tmp_path, name):
    plain, tape = small_config(tmp_path, "plain", **RUNS[name]), TapeCapture()
    train(plain)
    with use_capture(tape):
        train(plain.replace(run_dir=str(tmp_path / "graphs")))
    steps = [5, 6] if plain.groups else [6]
    assert [one.replays for one in tape.tapes] == [count - 2 for count in steps]  # the first two run as they are
    assert differences(tmp_path / "plain", tmp_path / "graphs") == []


def test_a_base_on_the_routed_kernels_trains_as_the_dense_one_and_is_stored_as_one(tmp_path, monkeypatch):
    config = small_config(tmp_path, "dense", lr_anneal_steps=6, precision="bf16")
    train(config)
    tape = TapeCapture()
    monkeypatch.setattr("tdc_fast.nn.inference.kernels_serve", lambda device, dtype: True)
    train(config.replace(run_dir=str(tmp_path / "plain")))
    with use_capture(tape):
        train(config.replace(run_dir=str(tmp_path / "graphs")))
    assert tape.replays == 4 and differences(tmp_path / "plain", tmp_path / "graphs") == []
    dense, routed = (rows(tmp_path / name / "progress.csv") for name in ("dense", "plain"))
    assert [float(row["loss"]) for row in routed] == pytest.approx([float(row["loss"]) for row in dense], rel=1e-2)
    states = [torch.load(tmp_path / name / "model000006.pt", weights_only=True) for name in ("dense", "plain")]
    assert {n: v.shape for n, v in states[0].items()} == {n: v.shape for n, v in states[1].items()}
    assert states[0].keys() == states[1].keys() and not all(map(torch.equal, states[0].values(), states[1].values()))


def test_a_run_that_is_resumed_captures_again_and_goes_on_bit_for_bit(tmp_path):
    config = small_config(tmp_path, lr_anneal_steps=10, dropout=0.2, ema_ramp=True)
    with use_capture(TapeCapture()):
        run = train(config)
        shutil.copytree(run.path, tmp_path / "again")
        for path in (tmp_path / "again").glob("*000010.*"):
            path.unlink()
        for path in (tmp_path / "again").glob("*000008.*"):
            path.unlink()
        tape = TapeCapture()
        with use_capture(tape):
            assert main(["--resume", str(tmp_path / "again")]) == 0
    assert tape.warm_ups == 2 and tape.replays == 4
    assert differences(run.path, tmp_path / "again") == []


def test_a_run_is_the_same_however_its_batches_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(ArraySource, "slow", True)
    submitted, submit = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *a: submitted.append(1) or submit(*a))
    for name, workers in (("inline", 0), ("ahead", 3)):
        train(small_config(tmp_path, name, lr_anneal_steps=6, workers=workers, class_cond=True))
    assert differences(tmp_path / "inline", tmp_path / "ahead") == []
    assert len(submitted) == 6 + 4  # six steps, and what was loaded for steps that did not come


def test_microbatches_of_a_step_share_one_cast_of_the_experts_weights(tmp_path):
    config, groups = small_config(tmp_path, microbatch=4, precision="bf16"), TimestepGroups.uniform(60, 3)
    model = pack_experts(create_unet(image_size=8, num_channels=8, in_channels=1, attention_resolutions=""), groups)
    stage = Stage(
        name="experts", steps=3, batch_size=6, learning_rate=LearningRate(1e-3), macs_per_sample=[1] * 3, origin={}
    )
    sampler = UniformSampler(60)
    step = TrainingStep(config, stage, model, build_diffusion(config), sampler, groups)
    rate, number = torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    with Recorded() as called:
        for _ in range(3):
            step(torch.zeros(6, 1, 8, 8), {}, sampler.prepare(6), rate, number)
    assert called["_foreach_copy_"] == 3 * (1 + 2)  # weights once a step, gradients once a microbatch


def test_graphs_can_be_switched_off(tmp_path):
    tape = TapeCapture()
    with use_capture(tape):
        train(small_config(tmp_path, lr_anneal_steps=4, cuda_graph="off"))
    assert tape.warm_ups == 0


def test_a_graph_is_not_promised_where_there_is_none(tmp_path, capsys):
    config = small_config(tmp_path, lr_anneal_steps=4, cuda_graph="on", device="cpu")
    assert main(flags(config)) == 2
    assert "cuda_graph: got 'on'; expected auto or off, as the device is cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dropout_that_is_computed_again_runs_without_a_graph_and_the_log_says_so(tmp_path, caplog):
    with use_capture(TapeCapture()):
        train(small_config(tmp_path, lr_anneal_steps=4, dropout=0.1, use_checkpoint=True))
    (record,) = [record for record in caplog.records if record.name == "tdc_fast.graphs"]
    assert record.message.startswith("the step of stage base runs without a CUDA graph: the capture failed: ")


def test_a_graph_that_must_be_and_cannot_be_is_an_error(tmp_path, monkeypatch, capsys):
    from tdc_fast.models.iddpm import UNet

    built = UNet.__init__

    def with_a_hook(self, *arguments, **options):
        built(self, *arguments, **options)
        self.out[0].register_forward_hook(lambda *_: None)

    monkeypatch.setattr(UNet, "__init__", with_a_hook)
    with use_capture(TapeCapture()):
        assert main(flags(small_config(tmp_path, lr_anneal_steps=4, cuda_graph="on", device="cpu"))) == 2
    said = capsys.readouterr().err
    assert "cuda_graph: got 'on'; expected auto or off: the step of stage base cannot run" in said
    assert "module out.0 has hooks" in said

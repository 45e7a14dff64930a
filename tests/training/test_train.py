"""Whole runs at the smallest scale: what they write, what they cost, and what they accept as a base."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast.data import dataset as data
from tdc_fast.diffusion import Diffusion
from tdc_fast.distributed.world import World, as_world
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs import build
from tdc_fast.runs.build import build_unet
from tdc_fast.runs.opening import open_run
from tdc_fast.runs.unet_flags import flags_of
from tdc_fast.runs.weights import load_tensors
from tdc_fast.train import main, train
from tdc_fast.training import load_run, prune_base, train_base, train_experts
from tdc_fast.training.messages import describe_plan
from tdc_fast.training.phase import build_base
from tdc_fast.training.stored_state import MOMENTS, read_moments
from tests.training.small_run import TWO_STAGES, differences, flags, rows, small_config, write_images

STAGES = ("base", "experts")
IMAGES = data.ImageDataset.from_array(np.zeros((1, 8, 8, 1), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def two_stages(folder):
    return train(small_config(folder, "two_stages", preview=2, **TWO_STAGES))


@pytest.fixture(scope="module")
def plain(folder):
    return train(small_config(folder, "plain", lr_anneal_steps=8, learn_sigma=True))


def test_plain_training_writes_improved_diffusions_files_and_columns(plain):
    names = {path.name for path in plain.path.iterdir()}
    for step in ("000004", "000008"):
        assert {f"model{step}.pt", f"ema_0.9_{step}.pt", f"ema_0.99_{step}.pt", f"opt{step}.pt"} <= names
    assert {"progress.csv", "log.txt", "config.json"} <= names
    columns = set(rows(plain.path / "progress.csv")[0])
    terms = {f"{term}{suffix}" for term in ("loss", "mse", "vb") for suffix in ("", "_q0", "_q1", "_q2", "_q3")}
    assert {"step", "samples", "grad_norm", *terms} <= columns
    assert [(row["step"], row["samples"]) for row in rows(plain.path / "progress.csv")] == [
        ("3", "18"),
        ("6", "36"),
        ("8", "48"),
    ]


def test_the_plan_says_that_several_processes_share_a_batch(plain):
    """improved-diffusion's --batch_size is that of each process."""
    assert "train:   8 steps of 6 images\n" in describe_plan(plain, IMAGES)
    with as_world(World(rank=0, size=8)):
        assert "train:   8 steps of 6 images, of all 8 processes together\n" in describe_plan(plain, IMAGES)


def test_weight_files_are_plain_fp32_state_dicts_of_the_flags_model(plain):
    model = build_unet(plain.config, 1)
    for name in ("model000008.pt", "ema_0.9_000008.pt"):
        state = torch.load(plain.path / name, weights_only=True)
        assert {value.dtype for value in state.values()} == {torch.float32}
        model.load_state_dict(state, strict=True)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(torch.load(plain.path / "opt000008.pt", weights_only=True))


def test_every_checkpoint_has_its_configuration_beside_it(two_stages):
    for path in two_stages.path.rglob("*.pt"):
        description = json.loads(path.with_suffix(".json").read_text())
        assert description["config"] == two_stages.config.to_dict()
        assert description["file"] == path.name and description["bytes"] == path.stat().st_size


def test_logs_go_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blobs"))
    monkeypatch.setenv("OPENAI_LOGDIR", "logs")
    monkeypatch.chdir(tmp_path)
    run = train(small_config(folder, lr_anneal_steps=2).replace(run_dir=""))
    assert json.loads((run.path / "run.json").read_text())["logs"] == str(tmp_path / "logs")
    assert run.path == tmp_path / "blobs"
    assert (tmp_path / "blobs" / "ema_0.9_000002.pt").exists()
    log = (tmp_path / "logs" / "progress.csv").read_text()
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "others"))
    with pytest.raises(ValueError, match="OPENAI_LOGDIR: got .*logs"):
        train(small_config(folder, lr_anneal_steps=1).replace(run_dir=""))
    assert (tmp_path / "logs" / "progress.csv").read_text() == log


def test_each_stage_has_a_log_of_its_own_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blobs"))
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    train(small_config(folder, ema_ramp=True, groups=1, k=1, stage1_steps=6, stage2_steps=3).replace(run_dir=""))
    steps = {stage: [row["step"] for row in rows(tmp_path / "logs" / stage / "progress.csv")] for stage in STAGES}
    assert steps == {"base": ["3", "6"], "experts": ["3"]}


def test_a_two_stage_run_is_complete(two_stages):
    names = {str(path.relative_to(two_stages.path)) for path in two_stages.path.rglob("*")}
    assert {
        "config.json",
        "groups.json",
        "widths.json",
        "macs.json",
        "base/ema_0.9_000010.pt",
        "experts/ema_0.9_000010.pt",
        "base/progress.csv",
        "experts/progress.csv",
        "samples/base_000010.png",
        "samples/experts_000010.png",
    } <= names
    for stage in STAGES:
        assert {"loss_g0", "loss_g1", "loss_g2", "macs"} <= set(rows(two_stages.path / stage / "progress.csv")[0])


def test_a_run_is_read_back_as_models(two_stages):
    run = load_run(two_stages.path)
    assert run.groups == TimestepGroups.uniform(60, 3)
    x, t = torch.randn(6, 1, 8, 8), torch.tensor([0, 19, 20, 39, 40, 59])
    experts = run.experts()
    with torch.no_grad():
        mixed = experts(x, t)
        for group in range(3):
            alone = experts.expert(group).eval()(x, t)
            torch.testing.assert_close(mixed[2 * group : 2 * group + 2], alone[2 * group : 2 * group + 2])
        assert not torch.equal(mixed, run.base()(x, t))
        assert not torch.equal(mixed, run.experts(ema=False)(x, t))
    assert run.widths.expert_widths(0) != run.widths.expert_widths(2)


def test_costs_are_what_the_counter_counts(two_stages):
    run = load_run(two_stages.path)
    model, diffusion = run.base(), run.diffusion
    with FlopCounterMode(display=False) as counter:
        diffusion.training_losses(model, torch.zeros(6, 1, 8, 8), torch.zeros(6).long())["loss"].mean().backward()
    step = counter.get_total_flops() // 2
    phases = run.macs["phases"]
    assert phases["stage1"]["macs"] == 10 * step
    experts = run.experts()
    t = torch.tensor([0, 0, 20, 20, 40, 40])
    with FlopCounterMode(display=False) as counter:
        diffusion.training_losses(experts, torch.zeros(6, 1, 8, 8), t)["loss"].mean().backward()
    assert phases["stage2"]["macs"] == 10 * (counter.get_total_flops() // 2)
    assert phases["pruning"]["macs"] > 0
    total = sum(phase["macs"] for phase in phases.values())
    assert run.macs["total"] == total == int(rows(two_stages.path / "experts" / "progress.csv")[-1]["macs"])


def test_a_budget_in_shares_of_the_baseline_is_met_in_measured_macs(folder):
    run = train(
        small_config(
            folder,
            "budget",
            groups=2,
            baseline_steps=40,
            stage1_share=0.5,
            total_share=0.8,
            k=0.7,
            calibration_batches=1,
        )
    )
    macs = load_run(run.path).macs
    assert macs["phases"]["stage1"]["steps"] == 20
    one_step = macs["phases"]["stage2"]["macs"] / macs["phases"]["stage2"]["steps"] / macs["baseline"]["macs"]
    assert 0.8 - one_step < macs["total_over_baseline"] <= 0.8


def test_a_budget_that_stage_1_has_used_up_is_refused(folder):
    config = small_config(folder, "overspent", groups=2, baseline_steps=10, stage1_share=0.5, total_share=0.4, k=1)
    with pytest.raises(ValueError, match="total_share: got 0.4"):
        train(config)


def test_experts_start_from_the_bases_averaged_weights_unpruned_at_k_1(folder):
    run = open_run(small_config(folder, "start", groups=2, stage1_steps=3, stage2_steps=1, lr=0.0, k=1.0), IMAGES)
    base = train_base(run)
    assert prune_base(run, base) is None
    experts = train_experts(run, base, None)
    torch.testing.assert_close(experts.expert_state(1)["out.2.weight"], base["out.2.weight"])
    assert torch.equal(base["out.2.weight"], load_tensors(run.path / "base" / "ema_0.9_000003.pt")["out.2.weight"])


def test_an_experts_gradient_is_that_of_the_mean_loss_over_its_own_samples(folder, monkeypatch):
    """So that clipping, and the optimizer's epsilon, mean the same as in training that expert alone."""
    config = small_config(folder, "alone", groups=2, stage1_steps=2, stage2_steps=1, stage2_shares="1,2", k=1.0)
    run = open_run(config, IMAGES)
    base = train_base(run)
    seen: list = []
    training_losses = Diffusion.training_losses

    def recorded(self, model, x0, t, noise=None, model_kwargs=None):
        seen.append((x0, t, noise))
        return training_losses(self, model, x0, t, noise, model_kwargs)

    monkeypatch.setattr(Diffusion, "training_losses", recorded)
    experts = train_experts(run, base, None)
    x0, t, noise = seen[-1]
    assert sorted((t >= 30).tolist()) == [False] * 2 + [True] * 4
    dense, diffusion = build_base(run, base).train(), load_run(run.path).diffusion
    training_losses(diffusion, dense, x0[t >= 30], t[t >= 30], noise[t >= 30])["loss"].mean().backward()
    names = [name for name, _ in experts.named_parameters()]
    moments = load_tensors(run.path / "experts" / "opt000001.pt")["state"]
    for name in ("out.2.bias", "out.2.weight", "middle_block.0.out_layers.3.bias"):
        first_moment = moments[names.index(f"model.{name}")]["exp_avg"][1]  # a tenth of the gradient
        expected = dense.get_parameter(name).grad / 10
        torch.testing.assert_close(first_moment.reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


def test_microbatches_give_the_gradient_of_the_whole_batch(folder):
    runs = [train(small_config(folder, f"pieces_of_{n}", lr_anneal_steps=1, microbatch=n)) for n in (-1, 4)]
    # After one step the first moment is a tenth of the gradient.
    one, other = (load_tensors(run.path / "opt000001.pt")["state"] for run in runs)
    for index in one:
        torch.testing.assert_close(one[index]["exp_avg"], other[index]["exp_avg"], rtol=1e-4, atol=1e-6)
    assert rows(runs[1].path / "progress.csv")[0]["samples"] == "6"


@pytest.fixture(scope="module")
def conditional_bf16(folder):
    options = {"class_cond": True, "num_classes": 4, "dropout": 0.1, "use_fp16": True, "progress": "always"}
    return train(small_config(folder, "conditional", **options, **TWO_STAGES))


def test_mixed_precision_keeps_fp32_files_and_says_that_nothing_is_scaled(conditional_bf16):
    for stage in ("base", "experts"):
        assert rows(conditional_bf16.path / stage / "progress.csv")[-1]["lg_loss_scale"] == "0"
        state = load_tensors(conditional_bf16.path / stage / "ema_0.9_000010.pt")
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


def test_class_conditional_training_through_both_stages(folder, conditional_bf16):
    y = torch.tensor([0, 3])
    out = load_run(conditional_bf16.path).experts()(torch.randn(2, 1, 8, 8), torch.tensor([3, 50]), y=y)
    assert out.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="num_classes: got 2"):
        train(small_config(folder, "too_few", class_cond=True, num_classes=2, lr_anneal_steps=1))


def test_a_progress_bar_takes_the_place_of_printed_rows(folder, capsys):
    train(small_config(folder, "bar", lr_anneal_steps=3, progress="always"))
    shown = capsys.readouterr()
    assert "training base: 100%" in shown.err and "loss=" in shown.err
    assert "grad_norm" not in shown.out


def test_a_weight_file_and_its_flags_stand_in_for_stage_1(folder, tmp_path):
    """As from improved-diffusion: a state dict without anything beside it."""
    config = small_config(folder, "from_file", base=str(tmp_path / "ema_0.9999_500000.pt"), **TWO_STAGES)
    torch.manual_seed(3)
    model = build_unet(config, 1)
    torch.save(model.state_dict(), tmp_path / "ema_0.9999_500000.pt")
    run = train(config)
    (tmp_path / "ema_0.9999_500000.pt").unlink()  # the run has its own copy
    assert torch.equal(load_run(run.path).experts(ema=False).groups.group_of(torch.tensor([59])), torch.tensor([2]))
    assert torch.equal(load_run(run.path).base().state_dict()["out.0.weight"], model.state_dict()["out.0.weight"])
    assert load_run(run.path).macs["phases"]["stage1"]["macs"] is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_channels": 16}, "--num_channels 16"),
        ({"learn_sigma": True}, "--learn_sigma True"),
        ({"use_scale_shift_norm": False}, "--use_scale_shift_norm False"),
        ({"class_cond": True, "num_classes": 4}, "--class_cond True"),
        ({"num_res_blocks": 2}, "--num_res_blocks 2"),
        ({"channel_mult": "1,2,3", "attention_resolutions": "4"}, "--channel_mult 1,2,3"),
        ({"attention_resolutions": "8,4"}, "--attention_resolutions 8,4"),
    ],
)
def test_a_base_made_with_other_flags_is_refused_with_the_flags_that_fit(folder, tmp_path, changed, said):
    config = small_config(folder, f"refused{abs(hash(said))}", base=str(tmp_path / "ema.pt"), **TWO_STAGES)
    state = build_unet(config.replace(**changed), 1).state_dict()
    torch.save(state, tmp_path / "ema.pt")
    with pytest.raises(ValueError) as refused:
        train(config)
    assert said in str(refused.value) and "ema.pt" in str(refused.value)
    assert flags_of(state, 8)["num_res_blocks"] == config.replace(**changed).num_res_blocks


def test_a_base_that_diverged_is_refused_by_the_weights_that_tell(folder, tmp_path):
    config = small_config(folder, "diverged", base=str(tmp_path / "ema.pt"), **TWO_STAGES)
    state = build_unet(config, 1).state_dict()
    state["out.2.bias"][0] = float("nan")
    torch.save(state, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=r"base: got '.*ema\.pt'; expected finite weights; out\.2\.bias holds"):
        train(config)


def test_a_run_of_ours_stands_in_for_stage_1_and_brings_its_cost(folder, two_stages):
    run = train(small_config(folder, "shared", base=str(two_stages.path), **{**TWO_STAGES, "k": 1.0}))
    assert (
        load_run(run.path).macs["phases"]["stage1"]["macs"]
        == load_run(two_stages.path).macs["phases"]["stage1"]["macs"]
    )
    other = small_config(folder, "other_noise", base=str(two_stages.path), **{**TWO_STAGES, "noise_schedule": "linear"})
    with pytest.raises(ValueError, match="noise_schedule: got 'linear'; expected 'cosine'"):
        train(other)


def test_a_damaged_copy_of_the_base_is_refused_with_how_to_take_it_anew(folder, two_stages):
    run = train(small_config(folder, "copied", base=str(two_stages.path), **TWO_STAGES))
    before = (run.path / "experts" / "model000010.pt").read_bytes()
    (run.path / "base" / "ema_0.9_000010.pt").write_bytes(b"")
    again = run.config.replace(resume=str(run.path))
    with pytest.raises(ValueError, match=f"ema_0.9_000010.pt is damaged.*remove {run.path / 'base'}"):
        train(again)
    shutil.rmtree(run.path / "base")
    assert load_run(train(again).path).base() is not None
    assert (run.path / "experts" / "model000010.pt").read_bytes() == before


def test_images_that_are_no_dataset_are_refused_with_how_to_make_one(folder):
    with pytest.raises(ValueError, match="dataset: got 'ndarray'; expected .*ImageDataset.from_array"):
        train(small_config(folder, "array"), np.zeros((4, 8, 8, 1), np.uint8))


def test_resume_checkpoint_goes_on_with_optimizer_and_averages(folder, plain):
    going = small_config(folder, "going", lr_anneal_steps=8, learn_sigma=True)
    run = train(going.replace(resume_checkpoint=str(plain.path / "model000004.pt")))
    for name in ("model000008.pt", "ema_0.99_000008.pt", "opt000008.pt"):
        assert (run.path / name).read_bytes() == (plain.path / name).read_bytes()


def test_resume_checkpoint_in_its_own_directory_goes_on_there(folder, plain, monkeypatch, capsys):
    """As improved-diffusion is resumed: the same command line and logs, and the checkpoint to go on from."""
    config = small_config(folder, "same", lr_anneal_steps=8, learn_sigma=True).replace(run_dir="")
    monkeypatch.setenv("OPENAI_LOGDIR", str(folder / "same"))
    assert main(flags(config)) == 0
    (folder / "same" / "model000008.pt").unlink()
    assert main([*flags(config), "--resume_checkpoint", str(folder / "same" / "model000004.pt")]) == 0
    assert differences(plain.path, folder / "same") == []
    assert main([*flags(config), "--lr", "0.5", "--resume_checkpoint", str(folder / "same" / "model000004.pt")]) == 2
    assert "lr: got 0.5" in capsys.readouterr().err


def test_resume_checkpoint_never_restarts_in_silence(folder, plain, tmp_path, capsys):
    config = small_config(folder, "refusing", lr_anneal_steps=8, learn_sigma=True)
    for name in ("model000004.pt", "opt000004.pt", "ema_0.9_000004.pt"):
        (tmp_path / name).write_bytes((plain.path / name).read_bytes())
    (tmp_path / "latest.pt").write_bytes((plain.path / "model000004.pt").read_bytes())
    for name, said in (("model000004.pt", "ema_0.99_000004.pt"), ("latest.pt", "latest.pt")):
        argv = flags(config.replace(run_dir=str(tmp_path / f"run_{name}"), resume_checkpoint=str(tmp_path / name)))
        assert main(argv) == 2
        assert said in capsys.readouterr().err


def test_a_run_refused_at_its_start_can_be_begun_again_in_the_same_place(folder):
    config = small_config(folder, "again", **{**TWO_STAGES, "stage1_steps": 1, "stage2_steps": 1, "k": 1.0})
    with pytest.raises(ValueError, match="base: got 'nowhere.pt'"):
        train(config.replace(base="nowhere.pt"))
    with pytest.raises(ValueError, match="shared_layers: got 'heads'; expected a name out of convolutions, attention"):
        train(config.replace(run_dir=str(folder / "of_heads"), shared_layers="norms,heads"))
    assert not (folder / "of_heads").exists()
    train(config)
    with pytest.raises(ValueError, match="--resume"):
        train(config)


@pytest.mark.parametrize("cache_bytes", [2**20, 0])
def test_corrupt_images_stop_the_run_or_are_left_out_and_counted(cache_bytes, tmp_path, capsys, monkeypatch):
    """Whether the folder fits the memory and is read at once, or is read as training goes."""
    opened = partial(data.load_dataset, cache_bytes=cache_bytes)
    monkeypatch.setattr(build, "load_dataset", opened)
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "9.png").write_bytes(b"no image")
    changes = {"data_dir": str(tmp_path / "images"), "lr_anneal_steps": 1}
    assert main(flags(small_config(tmp_path, "error", **changes))) == 2
    assert "9.png" in capsys.readouterr().err
    assert main(flags(small_config(tmp_path, "skip", on_corrupt="skip", **changes))) == 0
    assert "left out 1 corrupt image\n" in capsys.readouterr().out


def test_a_given_dataset_has_to_fit_the_configuration(folder):
    images = data.load_dataset(str(small_config(folder).data_dir), image_size=8)
    labelled = data.load_dataset(str(small_config(folder).data_dir), image_size=8, class_cond=True)
    for given, changes, said in (
        (images, {"image_size": 16}, "image_size: got 16; expected 8"),
        (images, {"class_cond": True}, "class_cond: got True; expected False"),
        (images, {"in_channels": 3}, "in_channels: got 3; expected 1"),
        (labelled, {}, "class_cond: got False; expected True, as dataset has labels"),
    ):
        with pytest.raises(ValueError, match=said):
            train(small_config(folder, "given", **changes), given)


def test_a_run_directory_that_cannot_be_made_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="run_dir: got .*images.npz"):
        train(small_config(folder, "images.npz"))


def test_training_without_data_says_what_to_give(tmp_path, capsys):
    assert main(["--run_dir", str(tmp_path / "run")]) == 2
    assert "data_dir" in capsys.readouterr().err


def test_held_out_images_are_not_trained_on(tmp_path):
    from tdc_fast.runs.build import split_data

    write_images(tmp_path)
    training, heldout = split_data(small_config(tmp_path, heldout=0.25))
    assert (len(training), len(heldout)) == (15, 5)
    assert not set(training.indices) & set(heldout.indices)


def test_a_loss_that_is_not_finite_stops_the_run(folder, capsys):
    config = small_config(folder, "diverged", lr_anneal_steps=60, lr=1e30)
    assert main(flags(config)) == 2
    said = capsys.readouterr().err
    assert "the loss of stage base is" in said
    last = (folder / "diverged" / "log.txt").read_text().splitlines()[-1]
    assert last.startswith("the loss of stage base is") and last in said


def test_the_callers_random_numbers_are_left_alone(folder):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    train(small_config(folder, "quiet", lr_anneal_steps=1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_improved_diffusions_own_checkpoint_goes_on(folder, tmp_path, plain, use_fp16):
    """Its files have nothing beside them, and its optimizer's file has an older torch's layout; in fp16 one tensor."""
    for name in ("model000004.pt", "ema_0.9_000004.pt", "ema_0.99_000004.pt"):
        (tmp_path / name).write_bytes((plain.path / name).read_bytes())
    optimizer = load_tensors(plain.path / "opt000004.pt")
    kept = ("lr", "betas", "eps", "weight_decay", "amsgrad", "params")
    optimizer["param_groups"] = [{key: group[key] for key in kept} for group in optimizer["param_groups"]]
    for state in optimizer["state"].values():
        state["step"] = int(state["step"])
    whole = optimizer["state"]
    if use_fp16:
        flat = {name: torch.cat([state[name].flatten() for state in whole.values()]) for name in MOMENTS}
        optimizer["state"] = {0: {"step": torch.tensor(4.0), **flat}}
    torch.save(optimizer, tmp_path / "opt000004.pt")
    config = small_config(folder, f"theirs_{use_fp16}", lr_anneal_steps=5, learn_sigma=True)
    run = train(config.replace(resume_checkpoint=str(tmp_path / "model000004.pt")))
    assert load_run(run.path).steps("base") == [5]
    state = load_tensors(run.path / "opt000005.pt")["state"]
    assert {int(entry["step"]) for entry in state.values()} == {5}
    read = read_moments(tmp_path / "opt000004.pt", dict(build_unet(config, 1).named_parameters()))
    assert all(torch.equal(read[number][name], entry[name]) for number, entry in whole.items() for name in MOMENTS)


def test_another_programs_log_is_never_overwritten(folder, tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="progress.csv"):
        train(small_config(folder, lr_anneal_steps=1).replace(run_dir=str(tmp_path)))
    assert (tmp_path / "progress.csv").read_text() == "step,loss\n1,2\n"


@pytest.mark.parametrize("name", ["progress.json", "config.json"])
def test_a_file_of_another_program_is_never_overwritten(folder, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=name):
        train(small_config(folder, lr_anneal_steps=1).replace(run_dir=str(tmp_path)))
    assert (tmp_path / name).read_text() == "{}"

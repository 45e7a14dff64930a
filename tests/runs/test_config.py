"""One configuration: from Python, a mapping, a file or the command line, with every flag of improved-diffusion."""

from __future__ import annotations

import hashlib
import json

import pytest

from tdc_fast.runs.config import ADDED, MAY_CHANGE_ON_RESUME
from tdc_fast.train import parse_command_line, train
from tdc_fast.training import TrainConfig

TWO = {"groups": 2, "stage1_steps": 5, "stage2_steps": 5}
# Flags of improved-diffusion's image_train.py with their defaults: data and training, then model and diffusion.
IMAGE_TRAIN = {
    "data_dir": "",
    "schedule_sampler": "uniform",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "lr_anneal_steps": 0,
    "batch_size": 1,
    "microbatch": -1,
    "ema_rate": "0.9999",
    "log_interval": 10,
    "save_interval": 10000,
    "resume_checkpoint": "",
    "use_fp16": False,
    "fp16_scale_growth": 1e-3,
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "learn_sigma": False,
    "sigma_small": False,
    "class_cond": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": True,
    "rescale_learned_sigmas": True,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
}


def test_every_flag_of_image_train_is_there_with_its_default():
    config = TrainConfig()
    values = {**config.to_dict(), "ema_rate": ",".join(config.ema_rates)}  # empty until a run decides
    assert {name: values.get(name) for name in IMAGE_TRAIN} == IMAGE_TRAIN


def test_a_published_command_line_parses_to_what_it_says():
    line = (
        "--data_dir /data/cifar_train --image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
        "--dropout 0.3 --diffusion_steps 4000 --noise_schedule cosine --lr 1e-4 --batch_size 128 --use_kl True "
        "--schedule_sampler loss-second-moment --class_cond False --attention_resolutions 16,8 --microbatch -1"
    )
    config = parse_command_line([*line.split(), "--ema_rate", "0.9999,0.999"])
    assert config.ema_rates == ("0.9999", "0.999")
    assert config.replace(ema_rate=".9999, 0.9990,1e-5").ema_rates == ("0.9999", "0.999", "1e-05")  # as in its files
    assert (config.learn_sigma, config.use_kl, config.class_cond, config.microbatch) == (True, True, False, -1)
    assert (config.lr, config.schedule_sampler, config.data_dir) == (1e-4, "loss-second-moment", "/data/cifar_train")
    assert config.groups == 0


@pytest.mark.parametrize("text", ["True", "true", "yes", "1", "t"])
def test_booleans_are_values_in_all_of_improved_diffusions_spellings(text):
    assert parse_command_line(["--learn_sigma", text]).learn_sigma is True
    assert parse_command_line([f"--learn-sigma={text}"]).learn_sigma is True


def test_values_that_begin_with_a_minus_are_values():
    assert parse_command_line(["--snr_range=-10,10"]).snr_range == "-10,10"
    assert parse_command_line(["--snr_range", "-10,10"]).snr_range == "-10,10"


def test_a_yaml_file_fills_in_what_the_command_line_leaves_out(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 3e-4\nbatch_size: 32\nema_rate: [0.9, 0.99]\nlearn_sigma: true\n")
    config = parse_command_line(["--config", str(path), "--batch_size", "8"])
    assert (config.lr, config.batch_size, config.ema_rate, config.learn_sigma) == (3e-4, 8, "0.9,0.99", True)
    assert TrainConfig.from_file(path) == config.replace(batch_size=32)


def test_paths_in_a_yaml_file_may_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: ~/x\nresume_checkpoint: plain/~/y\ndata_dir: ~/images\n")
    config = parse_command_line(["--config", str(path)])
    paths = config.run_dir, config.data_dir, config.resume_checkpoint
    assert paths == ("/home/someone/x", "/home/someone/images", "plain/~/y")
    path.with_suffix(".json").write_text(json.dumps({"run_dir": "~/x"}))
    assert TrainConfig.from_file(path.with_suffix(".json")).run_dir == "~/x"


def test_a_configuration_survives_json():
    config = TrainConfig(groups=3, stage1_steps=5, stage2_steps=6, k=0.5)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batchsize": 3}, "batchsize: got 3; expected a known flag; did you mean 'batch_size'"),
        ({"large_size": 256}, "large_size: got 256; expected no such flag: super-resolution is not supported"),
        ({"batch_size": "many"}, "batch_size: got 'many'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 2.5}, "batch_size: got 2.5; expected a whole number"),
        ({"batch_size": True}, "batch_size: got True"),
        ({"learn_sigma": "yes please"}, "learn_sigma: got 'yes please'; expected True or False"),
        ({"noise_schedule": "quadratic"}, "noise_schedule: got 'quadratic'; expected one of linear, cosine"),
        ({"ema_rate": "0.9,x"}, "ema_rate"),
        ({"ema_rate": "1.5"}, "ema_rate: got '1.5'"),
        ({"ema_rate": "0.9,0.9"}, "ema_rate"),
        ({"ema_rate": "0.9,.9"}, "ema_rate: got '0.9,.9'; expected every rate once"),
        ({"microbatch": -2}, "microbatch"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"lr": "nan"}, "lr: got nan"),
        ({"grad_clip": "inf"}, "grad_clip: got inf"),
        ({"groups": 4, "stage2_steps": 5}, "stage1_steps"),
        ({"groups": 4, "stage1_steps": 5}, "stage2_steps"),
        ({"groups": 2, "stage1_steps": 5, "stage2_steps": 5, "k": 0.0}, "k: got 0.0"),
        ({"groups": 2, "stage1_steps": 5, "stage2_steps": 5, "k": 1.5}, "k: got 1.5"),
        ({"groups": 2, "stage1_steps": 5, "stage2_steps": 5, "boundaries": "0,1000"}, "boundaries"),
        ({"groups": 2, "stage1_steps": 5, "stage2_steps": 5, "stage2_shares": "1,2,3"}, "stage2_shares"),
        ({"groups": 2, "stage1_steps": 5, "stage2_steps": 5, "timestep_respacing": "25"}, "timestep_respacing"),
        ({**TWO, "stage2_lr_factors": "1"}, "stage2_lr_factors: got '1'; expected 2 factors above 0 and at most 1"),
        ({**TWO, "stage2_lr_factors": "1,0"}, "stage2_lr_factors: got '1,0'"),
        ({**TWO, "stage2_lr_factors": "1,1.5"}, "stage2_lr_factors: got '1,1.5'"),
        ({**TWO, "stage2_ema_factors": "1,-1"}, "stage2_ema_factors: got '1,-1'; expected 2 factors above 0, one"),
        ({**TWO, "ema_rate": "0.999,0.9", "stage2_ema_factors": "1,0.05"}, "expected factors of at least 0.1"),
        ({**TWO, "groups": -1, "grouping": "difficulty", "stage2_lr_factors": "1,1"}, "stage2_lr_factors"),
        ({**TWO, "stage2_slope_windows": 7}, "stage2_slope_windows: got 7; expected 0 for none, or at least 8"),
        (
            {**TWO, "stage2_slope_windows": 9, "overlap": 0.1},
            "got 9; expected none with --overlap",
        ),
        ({"shared_layers": "convolutions"}, "shared_layers: got 'convolutions'; expected --groups N"),
        ({"base": "model.pt"}, "base: got 'model.pt'; expected --groups N"),
        ({"k": 0.5}, "k: got 0.5; expected --groups N"),
    ],
)
def test_what_cannot_be_is_refused_by_name_with_a_remedy(values, said):
    with pytest.raises(ValueError) as refused:
        TrainConfig.from_dict(values)
    assert said in str(refused.value)


def test_the_command_line_refuses_too():
    for argv in (["--batchsize", "3"], ["--batch_size", "x"], ["--noise_schedule", "foo"]):
        with pytest.raises(ValueError, match=argv[0]):
            parse_command_line(argv)
    with pytest.raises(ValueError, match="--learn_sigma: got 'maybe'"):
        parse_command_line(["--learn_sigma", "maybe"])


def test_help_explains_every_flag_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    text = capsys.readouterr().out
    for name in TrainConfig().to_dict():
        assert f"--{name} " in text, name
    for section in (
        "data options",
        "model options",
        "diffusion options",
        "optimizer options",
        "tdc options",
        "run options",
    ):
        assert section in text
    assert "--config" in text


def test_identity_is_that_of_the_numbers_not_of_the_place():
    config = TrainConfig(batch_size=4)
    assert config.identity == config.replace(run_dir="/elsewhere", log_interval=1).identity
    assert config.identity != config.replace(seed=1).identity
    assert set(config.to_dict()) > MAY_CHANGE_ON_RESUME


def test_an_option_that_was_added_leaves_the_identity_of_earlier_runs() -> None:
    config = TrainConfig.from_dict({"data_dir": "digits"})
    before = {name: value for name, value in config.to_dict().items() if name not in MAY_CHANGE_ON_RESUME | ADDED}
    assert config.identity == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert config.replace(background="black").identity != config.identity
    assert config.replace(calibration_dtype="bfloat16").identity != config.identity


def test_a_precision_that_the_device_lacks_is_refused_before_a_run_begins(tmp_path) -> None:
    config = TrainConfig(data_dir="digits", image_size=8, device="cpu", run_dir=str(tmp_path / "run"), stage1_steps=1)
    with pytest.raises(ValueError, match="^calibration_dtype: got 'float16'; expected float32 or bfloat16 on the CPU"):
        train(config.replace(calibration_dtype="float16"))
    assert not (tmp_path / "run").exists()

"""Option values that nobody means: refused under the name of the option, before anything is allocated."""

from __future__ import annotations

import dataclasses
import itertools
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_fast import evaluate, merge, nll, prune, sample, serve, train
from tdc_fast.data.dataset import load_dataset
from tdc_fast.evaluation.options import EvaluateOptions
from tdc_fast.experiments.demo import DemoOptions
from tdc_fast.merge import MergeOptions
from tdc_fast.models.iddpm import create_unet
from tdc_fast.nll import NllOptions
from tdc_fast.routing import TimestepGroups
from tdc_fast.runs.config import TrainConfig
from tdc_fast.runs.limits import check_limits
from tdc_fast.runs.options import (
    DataOptions,
    DiffusionOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    SearchOptions,
    TdcOptions,
)
from tdc_fast.sample import SampleOptions
from tdc_fast.serve import ServeOptions
from tests.generated import examples

HUGE = 99999999999999999999
OPTIONS = [SampleOptions, ServeOptions, NllOptions, EvaluateOptions, MergeOptions, DemoOptions, TrainConfig]
LONG = "x" * 300


def numeric(options: type) -> list[str]:
    return [name for name, kind in typing.get_type_hints(options).items() if kind in (int, float)]


def texts(options: type) -> list[str]:
    return [name for name, kind in typing.get_type_hints(options).items() if kind is str]


INTEGERS = [name for name, kind in typing.get_type_hints(TrainConfig).items() if kind is int]


ABSURD = [HUGE, -HUGE, 10**400, str(HUGE), f"{HUGE}.0", 1e300]
NO_NUMBERS = [10**400, "1e400", float("nan"), "-inf", -1e300]


@pytest.mark.parametrize("value", ABSURD, ids=range(len(ABSURD)))
def test_an_absurd_integer_is_refused_under_its_name(value):
    for name in INTEGERS:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            TrainConfig.from_dict({name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_a_number_that_is_none_is_refused_under_its_name(value):
    for name in numeric(TrainConfig):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            TrainConfig.from_dict({"groups": 2, "stage1_steps": 1, "stage2_steps": 1, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diffusion_steps", 10_000_000_000),
        ("num_channels", 1_000_000),
        ("num_threads", 100_000_000),
        ("preview", 1_000_000_000),
        ("channel_mult", "1,1000000"),
        ("channel_mult", "1,65"),
        ("channel_mult", "0"),
        ("channel_mult", ",".join(["1"] * 100)),
        ("attention_resolutions", "0"),
        ("attention_resolutions", "-16"),
        ("num_heads_upsample", 0),
        ("seed", -1),
        ("heldout_seed", -1),
    ],
)
def test_what_no_machine_can_do_is_refused_under_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        TrainConfig.from_dict({name: value})


@pytest.mark.parametrize(
    "options", [SampleOptions, ServeOptions, NllOptions, EvaluateOptions, MergeOptions, DemoOptions, TrainConfig]
)
def test_every_integer_of_every_command_has_a_range(options):
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    check_limits(options, defaults)
    for name, kind in typing.get_type_hints(options).items():
        if kind is int:
            for value in (HUGE, -HUGE):
                with pytest.raises(ValueError, match=f"^{name}: got"):
                    check_limits(options, {**defaults, name: value})


@pytest.mark.parametrize("name", ["snr_range", "budgets", "stage2_shares"])
@pytest.mark.parametrize("value", ["nan,1", "1,inf", "nan,nan"])
def test_a_list_with_what_is_no_number_is_refused_under_its_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        TrainConfig.from_dict({"groups": 2, "stage1_steps": 1, "stage2_steps": 1, name: value})


WRONG = {int: "-7", float: "nan", str: "\0"}
SECTIONS_OF = {
    train: [DataOptions, OptimizerOptions, TdcOptions, RunOptions],
    sample: [SampleOptions, ModelOptions, DiffusionOptions],
    serve: [ServeOptions],
    nll: [NllOptions],
    evaluate: [EvaluateOptions],
    prune: [SearchOptions],
    merge: [MergeOptions],
}


@pytest.mark.parametrize("command", SECTIONS_OF, ids=lambda command: command.__name__)
def test_a_wrong_value_of_any_flag_is_refused_under_its_name(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {evaluate: ["digits", "digits"], train: ["--groups", "2", "--stage1_steps", "1", "--stage2_steps", "1"]}
    for section in SECTIONS_OF[command]:
        for name, kind in typing.get_type_hints(section).items():
            if section is ModelOptions and kind is float:
                continue  # checked once the denoiser that it describes is read
            assert command.main([*given.get(command, []), f"--{name}", WRONG.get(kind, "maybe")]) == 2
            assert name in capsys.readouterr().err, name


@pytest.mark.parametrize(
    "options", [SampleOptions, ServeOptions, NllOptions, EvaluateOptions, MergeOptions, DemoOptions, TrainConfig]
)
def test_a_path_with_a_nul_is_refused_under_its_name(options):
    for name in texts(options):
        for value in ("runs/\0", "x" * 10**6):
            with pytest.raises(ValueError, match=f"^{name}: got"):
                check_limits(options, {name: value})


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        (train, ["--image_size", str(HUGE)], "image_size"),
        (train, ["--run_dir", "a\0b"], "run_dir"),
        (train, ["--run_dir", "\ud800"], "run_dir"),
        (train, ["--config", "a\0b"], "config"),
        (train, ["--resume", "a\0b"], "resume"),
        (sample, ["--run", "a\0b"], "run"),
        (sample, ["--model_path", "a\0b"], "model_path"),
        (nll, ["--run", "a\0b"], "run"),
        (merge, ["--run", "a\0b", "--out", "m.pt"], "run"),
        (merge, ["--run", LONG, "--out", "m.pt"], "run"),
        (merge, ["a\0b", "--out", "m.pt"], "experts"),
        (merge, [LONG, "--out", "m.pt"], "experts"),
        (merge, [__file__, "--out", f"{LONG}.pt"], "out"),
        (evaluate, ["a\0b", "digits"], "set of images"),
        (evaluate, ["digits", "digits", "--out", f"{LONG}/a.json"], "out"),
        (evaluate, [LONG, "digits"], "set of images"),
        (evaluate, ["nowhere", "digits"], "A"),
        (evaluate, ["digits", __file__], "B"),
        (train, ["--data_dir", LONG], "data_dir"),
        (train, ["--resume", LONG], "resume"),
        (train, ["--config", LONG], "config"),
        (train, ["--data_dir", "digits", "--image_size", "8", "--heldout", "0.9999"], "heldout"),
        (train, ["--image_size", "8", "--channel_mult", "1,2,2,2,2"], "channel_mult"),
        (prune, ["--run", LONG], "run"),
        (sample, ["--run", LONG], "run"),
        (sample, ["--model_path", LONG], "model_path"),
        (sample, ["--model_path", "nowhere.pt"], "model_path"),
        (nll, ["--model_path", __file__], "model_path"),
        (evaluate, ["digits", "digits", "--out", "a\0b"], "out"),
        (evaluate, ["digits", "digits", "--num_samples", str(HUGE)], "num_samples"),
        (evaluate, ["digits", "digits", "--image_size", "16000"], "image_size"),
    ],
)
def test_a_command_refuses_it_with_status_2(command, arguments, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: got ") and len(error) < 1000
    assert not list(tmp_path.iterdir())


SEARCH = {"groups": 2, "stage1_steps": 1, "stage2_steps": 1}


@pytest.mark.parametrize(
    "url",
    ["http://", "http://[::1", "http:", "localhost:8000", "ftp://host/v1", "http://host:port", "http://h:99999999"],
)
def test_an_unfinished_url_is_refused_under_its_name(url):
    with pytest.raises(ValueError, match="^llm_url: got"):
        TrainConfig.from_dict({**SEARCH, "llm_url": url})


def test_a_whole_url_is_taken():
    for url in ("http://127.0.0.1:8000/v1", "https://api.example.org/v1", "http://[::1]:8000"):
        assert TrainConfig.from_dict({**SEARCH, "llm_url": url}).llm_url == url


def test_a_number_in_text_keeps_all_its_digits():
    assert TrainConfig.from_dict({"seed": "9007199254740993"}).seed == 9007199254740993
    assert TrainConfig.from_dict({"lr": "1e-4", "batch_size": "2e1"}).batch_size == 20


@examples(200)
@given(
    name=st.sampled_from(sorted(TrainConfig().to_dict())),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers() | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
def test_any_value_of_any_option_is_taken_or_refused_by_name(name, value):
    try:
        config = TrainConfig.from_dict({name: value})
    except ValueError as refused:
        assert ": got " in str(refused)
    else:
        assert TrainConfig.from_dict(config.to_dict()) == config


COMMANDS = {  # each with what makes it end before it does any work
    train: (TrainConfig, ["--resume", "missing"]),
    sample: (SampleOptions, ["--run", "missing"]),
    serve: (ServeOptions, ["--run", "missing"]),
    nll: (NllOptions, ["--run", "missing"]),
    evaluate: (EvaluateOptions, ["missing", "missing"]),
}
NAMED = [(command, name) for command, (options, _) in COMMANDS.items() for name in typing.get_type_hints(options)]
words = st.sampled_from(
    ["", " ", "-1", "1e400", "nan", "\ud800", "../x", "True", "None", "[1]", "1,2,", "-", "--", "٣"]
)


@examples(60)
@given(option=st.sampled_from(NAMED), value=words | st.text(max_size=5) | st.integers().map(str))
def test_a_command_with_any_value_of_any_option_ends_with_an_error_and_leaves_nothing(
    tmp_path_factory, monkeypatch, capsys, option, value
):
    (command, name), folder = option, tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(folder)
    code = command.main([*COMMANDS[command][1], f"--{name}={value}"])
    error = capsys.readouterr().err
    assert code == 2 and len(error) < 5000
    assert "missing" in error or name in error
    assert not list(folder.iterdir())


class Counted(int):
    """An integer that refuses to be multiplied once for each of many groups."""

    left = 2**17

    def __mul__(self, other):
        self.left -= 1
        assert self.left, "a boundary is computed for every group"
        return int(self) * other


def counted(numbers):
    """Numbers of which no more are read than there may be boundaries."""
    for place, number in enumerate(numbers):
        assert place < 2**17, "boundaries are read without end"
        yield number


@pytest.mark.parametrize(
    "make",
    [
        lambda: TimestepGroups.uniform(Counted(2**31 - 1), 2**31 - 1),
        lambda: TimestepGroups.uniform(2**80, 4),
        lambda: TimestepGroups(counted(range(2**31))),
        lambda: TimestepGroups(counted(itertools.count())),
        lambda: TimestepGroups([0, 2**80]),
    ],
)
def test_more_groups_than_anyone_can_use_are_refused_without_counting_them(make):
    with pytest.raises(ValueError, match="^num_groups|^num_timesteps|^boundaries"):
        make()


def test_few_groups_of_many_timesteps_are_made_without_counting_timesteps():
    assert TimestepGroups.uniform(Counted(2**31 - 1), 8).num_groups == 8


def test_images_that_do_not_fit_the_memory_are_refused_by_name():
    with pytest.raises(ValueError, match="^image_size: got"):
        load_dataset("digits", image_size=10**6)


def test_heads_that_do_not_divide_the_channels_are_refused_under_the_flag_that_was_set():
    def make(**heads):
        return create_unet(image_size=8, num_channels=8, num_res_blocks=1, attention_resolutions="8", **heads)

    for value in (0, 3, -2):
        with pytest.raises(ValueError, match="^num_heads_upsample: got"):
            make(num_heads=2, num_heads_upsample=value)
        with pytest.raises(ValueError, match="^num_heads: got"):
            make(num_heads=value)
        with pytest.raises(ValueError, match="^num_heads: got"):
            make(num_heads=value, num_heads_upsample=2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"num_channels": 31},
            "num_channels: got 31; expected a multiple of 4, as 4 attention heads share 31 c",
        ),
        ({"num_channels": 31, "channel_mult": "1,2"}, "num_channels: got 31.* share 62 channels; or num_heads 1"),
        ({"num_channels": 31, "num_heads": 2}, "num_heads: got 2; expected a divisor of the 31 channels"),
        ({"num_channels": 31, "num_heads_upsample": 31}, "num_channels: got 31"),
    ],
)
def test_channels_that_the_default_heads_cannot_share_are_refused_by_their_own_name(flags, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        create_unet(image_size=8, num_res_blocks=1, attention_resolutions="", **{"channel_mult": "1", **flags})


def test_channels_that_only_levels_without_attention_have_need_not_divide_by_the_heads():
    create_unet(image_size=8, num_channels=6, num_res_blocks=1, attention_resolutions="4", channel_mult="1,2")

"""TrainConfig: one flat, typed, checked description of a run, from Python, a mapping, a YAML or a JSON file."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tdc_fast.errors import invalid
from tdc_fast.runs.limits import check_limits, comma_numbers, path_options
from tdc_fast.runs.options import (
    SECTIONS,
    DataOptions,
    DiffusionOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    SearchOptions,
    TdcOptions,
)
from tdc_fast.runs.stage2_options import check_stage2_options
from tdc_fast.text_files import read_json, read_yaml

SUPER_RESOLUTION = ("large_size", "small_size", "base_samples")
"""Flags of improved-diffusion's super_res_train.py and super_res_sample.py."""
NO_SUPER_RESOLUTION = "no such flag: super-resolution is not supported"
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "run_dir",
        "resume",
        "resume_step",
        "override",
        "stop_after",
        "log_interval",
        "save_interval",
        "tensorboard",
        "progress",
        "preview",
        "num_threads",
        "device",
        "cuda_graph",
        "workers",
    }
)
"""Options that may change when a run is resumed, since the weights do not depend on them.

(log_interval decides which rows progress.csv has.)
"""

ADDED = frozenset(
    {
        "background",
        "budget_in",
        "calibration_dtype",
        "distillation_weight",
        "label_dropout",
        "latency_table",
        "latents",
        "predict_v",
        "shared_layers",
        "stage2_ema_factors",
        "stage2_lr_factors",
        "stage2_slope_windows",
        "width_step",
    }
)
"""Options that runs made before they existed do not have."""

MOVES = ("data_dir", "latents")
"""Options that --override may change where the data of a run are at another place than when it began."""

MAY_BE_OVERRIDDEN = frozenset(
    {
        *MOVES,
        "on_corrupt",
        "lr",
        "weight_decay",
        "batch_size",
        "microbatch",
        "lr_anneal_steps",
        "lr_anneal_start",
        "warmup_steps",
        "grad_clip",
        "ema_ramp",
        "precision",
        "stage1_steps",
        "stage2_steps",
        "stage2_batch",
        "stage2_lr",
        "stage2_anneal",
    }
)
"""Options that --override may change when a run is resumed: the weights depend on them, but no file's shape does."""

IMPROVED_DIFFUSION_CLASSES = 1000
"""Rows of the label embedding in every class-conditional model of improved-diffusion."""
IMPROVED_DIFFUSION_EMA_RATE = "0.9999"
"""The rate of the averages where none is given."""
LEFT_OPEN = {"num_classes": 0, "ema_rate": "", "ema_ramp": None}
"""Options that a new run decides where they have this value, and records; one that is resumed keeps what it decided."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataOptions, ModelOptions, DiffusionOptions, OptimizerOptions, TdcOptions, SearchOptions, RunOptions):
    """Everything that defines a training run; `tdc_fast.runs.options` documents every field.

    `TrainConfig(data_dir="digits", image_size=8, groups=4)` is the same run as ``--data_dir digits --image_size 8
    --groups 4``. Values are checked at once.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            object.__setattr__(self, name, _checked_type(name, value))
        if self.boundaries and self.groups == 0:  # a list of N + 1 boundaries says how many groups there are
            object.__setattr__(self, "groups", self.boundaries.count(","))
        _check_ranges(self)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-compatible values, in the order of `--help`."""
        fields = (field for section in SECTIONS.values() for field in dataclasses.fields(section))
        return {field.name: getattr(self, field.name) for field in fields}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a mapping; missing keys take their defaults. Unknown keys: ValueError."""
        known = _field_types()
        for name, value in values.items():
            if name not in known:
                raise invalid(str(name), value, _unknown_remedy(str(name)))
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Read a YAML (.yaml, .yml) or JSON file of flag names and values."""
        return cls.from_dict(read_options(path))

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed and checked again."""
        return TrainConfig.from_dict({**self.to_dict(), **changes})

    @property
    def ema_rates(self) -> tuple[str, ...]:
        """The rates as text, as in file names: `ema_0.9999_000100.pt`, also for `--ema_rate .9999`.

        As in improved-diffusion, it is Python's text of the number and not the one that was written.
        """
        return tuple(map(_text_of_number, (self.ema_rate or IMPROVED_DIFFUSION_EMA_RATE).split(",")))

    @property
    def label_rows(self) -> int:
        """Rows of the label embedding of a class-conditional model."""
        return self.num_classes or IMPROVED_DIFFUSION_CLASSES

    @property
    def null_class(self) -> int | None:
        """The label for no class, the last row of the embedding; None without --label_dropout."""
        return self.label_rows - 1 if self.label_dropout else None

    def label_rows_for(self, classes: int) -> int:
        """Rows that the label embedding needs for classes numbered from 0 to `classes` - 1."""
        return classes + 1 if self.label_dropout else classes

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that `override` changes, with their new values.

        Raises:
            ValueError: an entry is no `name=value`, is of an option that has to stay, or of one named before.
        """
        changes: dict[str, Any] = {}
        for part in filter(None, self.override.split(",")):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name not in MAY_BE_OVERRIDDEN:
                names = ", ".join(sorted(MAY_BE_OVERRIDDEN))
                raise invalid("override", self.override, f"a comma list of name=value, with names out of: {names}")
            if name in changes:
                raise invalid("override", self.override, f"{name} once")
            words = {"true": True, "false": False} if _field_types()[name] in (bool, bool | None) else {}
            changes[name] = words.get(value.lower(), value)
        changed = self.replace(override="", **changes)
        return {name: getattr(changed, name) for name in changes}

    def with_moved_data(self) -> TrainConfig:
        """The configuration with what `override` says about the data: its place, and what to do with damaged images."""
        return self.replace(
            override="", **{name: value for name, value in self.overrides.items() if name in (*MOVES, "on_corrupt")}
        )

    @property
    def mixed_precision(self) -> bool:
        """Whether the model runs in bf16."""
        return self.use_fp16 or self.precision == "bf16"

    @property
    def identity(self) -> str:
        """sha256 over the fields that may not change when a run is resumed: equal identity, equal numbers.

        An option of `ADDED` at its default leaves the identity as it was before there was that option.
        """
        fixed = {name: value for name, value in self.to_dict().items() if name not in MAY_CHANGE_ON_RESUME}
        fixed = {name: value for name, value in fixed.items() if name not in ADDED or value != _default(name)}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def read_options(path: str | Path) -> dict[str, Any]:
    """The flag names and values in a YAML or JSON file, unchecked.

    In YAML, which people write, `~` at the start of a path is the home folder, as on a shell.

    Raises:
        ValueError: the file is missing, unreadable as its kind, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise invalid("config", str(path), "an existing .yaml, .yml or .json file")
    try:
        values = read_json(path) if path.suffix == ".json" else read_yaml(path)
    except (ValueError, OSError) as error:
        raise invalid("config", str(path), f"'flag: value' lines; it does not parse: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise invalid("config", str(path), "a mapping of flag names to values")
    if path.suffix == ".json":  # as a run's own config.json, whose paths are what the shell made of them
        return values
    texts = {name: values[name] for name in path_options(TrainConfig) if isinstance(values.get(name), str)}
    return values | {name: os.path.expanduser(text) for name, text in texts.items()}


def _text_of_number(text: str) -> str:
    """Python's text of a number; what is none is left for the check that names the option."""
    try:
        return str(float(text))
    except ValueError:
        return text.strip()


@functools.cache
def _field_types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(TrainConfig) if field.name == name)


def _unknown_remedy(name: str) -> str:
    if name in SUPER_RESOLUTION:
        return NO_SUPER_RESOLUTION
    close = difflib.get_close_matches(name[:100], _field_types(), n=1)
    return f"a known flag; did you mean {close[0]!r}?" if close else "a known flag; --help lists all of them"


def _checked_type(name: str, value: Any) -> Any:
    """The value in its field's type; whole floats and numeric text such as YAML's `1e-4` are converted."""
    wanted = _field_types()[name]
    if typing.get_origin(wanted) is typing.Literal:
        choices = typing.get_args(wanted)
        if value not in choices:
            raise invalid(name, value, f"one of {', '.join(choices)}")
        return value
    if wanted in (bool, bool | None):
        if not isinstance(value, bool) and (value is not None or wanted is bool):
            raise invalid(name, value, "True or False")
        return value
    if wanted is str:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (list, tuple)):
            return ",".join(str(item) for item in value)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise invalid(name, value, "text")
        return str(value)
    if isinstance(value, str):
        value = _number(name, value, wanted)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(name, value, f"a number ({wanted.__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise invalid(name, value, "a finite number")
    if isinstance(value, float) and wanted is int and not value.is_integer():
        raise invalid(name, value, "a whole number")
    try:
        return wanted(value)
    except OverflowError as error:
        raise invalid(name, value, "a number that fits a float") from error


def _number(name: str, text: str, wanted: type) -> float:
    """The number that a text says: an int where it is one, as a float may not hold all its digits."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise invalid(name, text, f"a number ({wanted.__name__})") from error


def _check_ranges(config: TrainConfig) -> None:
    values = config.to_dict()
    check_limits(TrainConfig, values)
    if config.override and not (config.resume or config.resume_checkpoint):
        raise invalid("override", config.override, "--resume RUN as well, whose options it changes")
    if config.latents and config.data_dir:
        raise invalid("latents", config.latents, "none together with --data_dir: one of them names the data")
    if config.latents and config.preview:
        raise invalid("preview", config.preview, "0 with --latents: tdc_fast.sample --vae DIR draws and decodes images")
    for name in ("heldout", "dropout", "label_dropout"):
        if not 0 <= values[name] < 1:
            raise invalid(name, values[name], "a share from 0 to below 1")
    if config.label_dropout and not config.class_cond:
        raise invalid("label_dropout", config.label_dropout, "--class_cond True as well, whose labels it drops")
    for rate in comma_numbers("ema_rate", ",".join(config.ema_rates), float) or [-1.0]:
        if not 0 <= rate < 1:
            raise invalid("ema_rate", config.ema_rate, "rates from 0 to below 1, such as 0.9999 or 0.999,0.9999")
    if len(set(config.ema_rates)) != len(config.ema_rates):
        raise invalid("ema_rate", config.ema_rate, "every rate once")
    for name, most in (("attention_resolutions", 2**14), ("channel_mult", 64)):
        numbers = comma_numbers(name, values[name], int)
        if len(numbers) > 16 or not all(1 <= number <= most for number in numbers):
            raise invalid(name, values[name], f"at most 16 numbers from 1 to {most}")
    halved = config.channel_mult.count(",")
    if config.image_size % 2**halved:
        raise invalid(
            "channel_mult", config.channel_mult, f"fewer levels: --image_size {config.image_size} is halved between"
        )
    widest = max(comma_numbers("channel_mult", config.channel_mult, int), default=1)
    if config.num_channels * widest > 2**13:
        raise invalid("channel_mult", config.channel_mult, f"at most {2**13} channels in a level")
    if config.num_heads_upsample == 0:
        raise invalid("num_heads_upsample", 0, "a number of heads, or -1 for that of --num_heads")
    if config.resume_step >= 0 and not config.resume:
        raise invalid("resume_step", config.resume_step, "--resume RUN as well, which it is a step of")
    if config.lr_anneal_start and config.lr_anneal_start >= config.lr_anneal_steps:
        raise invalid("lr_anneal_start", config.lr_anneal_start, "a step before the last one, --lr_anneal_steps")
    if config.groups:
        _check_tdc(config)
    else:
        for name in (
            "base",
            "boundaries",
            "budget_in",
            "budgets",
            "distillation_weight",
            "grouping",
            "k",
            "latency_table",
            "overlap",
            "shared_layers",
            "stage2_ema_factors",
            "stage2_lr_factors",
            "stage2_slope_windows",
            "stage2_steps",
            "stage2_shares",
            "stop_after",
            "width_step",
        ):
            if values[name] != _default(name):
                raise invalid(name, values[name], "--groups N as well, since it applies to experts")


def _check_chosen_groups(config: TrainConfig) -> None:
    """Check --groups -1: the number is measured, so nothing may be given per group."""
    if config.groups != -1:
        raise invalid("groups", config.groups, "a number of groups, 0 for none, or -1 for the elbow")
    if config.grouping not in ("similarity", "difficulty"):
        raise invalid("groups", config.groups, "--grouping similarity or difficulty as well, which have an elbow")
    for name in ("boundaries", "budgets", "stage2_ema_factors", "stage2_lr_factors", "stage2_shares"):
        if getattr(config, name):
            raise invalid(
                name, getattr(config, name), "a number of --groups as well: it is a list with one entry per group"
            )


def _check_search(config: TrainConfig) -> None:
    if config.agent == "taylor" and config.importance == "magnitude":
        raise invalid("agent", config.agent, "magnitude, or --importance taylor: one importance decides both")
    step = config.width_step
    if step != "auto" and not (step.isdecimal() and step.isascii() and len(step) < 5 and 1 <= int(step) <= 2**13):
        raise invalid("width_step", step, "a number of channels from 1 to 8192, or auto")
    if config.agent == "llm" and not config.llm_model:
        raise invalid("llm_model", config.llm_model, "the name of a model, which --agent llm asks")
    if "@" in config.llm_url:
        raise invalid("llm_url", "(not shown)", "a URL without a secret; the key belongs in OPENAI_API_KEY")
    if config.llm_url and not _is_url(config.llm_url):
        raise invalid("llm_url", config.llm_url, "a whole URL, such as http://127.0.0.1:8000/v1")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that urlsplit does not read
        return False


def _check_tdc(config: TrainConfig) -> None:
    _check_search(config)
    if not 0 < config.k <= 1:
        raise invalid("k", config.k, "a share of the base's MACs above 0 and at most 1")
    if config.groups < 0:
        _check_chosen_groups(config)
    if config.refine and not config.boundaries:
        raise invalid("refine", config.refine, "--boundaries as well, which it refines")
    if config.groups > config.diffusion_steps:
        raise invalid("groups", config.groups, f"at most one group per timestep ({config.diffusion_steps})")
    if config.boundaries:
        bounds = comma_numbers("boundaries", config.boundaries, int)
        if len(bounds) != config.groups + 1:
            raise invalid("boundaries", config.boundaries, f"{config.groups + 1} of them for --groups {config.groups}")
    if config.snr_range:
        lo_hi = comma_numbers("snr_range", config.snr_range, float)
        if len(lo_hi) != 2 or not lo_hi[0] < lo_hi[1]:
            raise invalid("snr_range", config.snr_range, "two decibel values, the lower first, such as=-20,20")
    if config.stage2_shares:
        shares = comma_numbers("stage2_shares", config.stage2_shares, float)
        if len(shares) != config.groups or min(shares) <= 0:
            raise invalid("stage2_shares", config.stage2_shares, f"{config.groups} numbers above 0, one per group")
    if config.budgets:
        budgets = comma_numbers("budgets", config.budgets, float)
        if len(budgets) != config.groups or not all(0 < share <= 1 for share in budgets):
            raise invalid("budgets", config.budgets, f"{config.groups} shares above 0 and at most 1, one per group")
    check_stage2_options(config, config.ema_rates)
    if config.timestep_respacing:
        raise invalid("timestep_respacing", config.timestep_respacing, "nothing, since groups divide all timesteps")
    for name in ("stage1_share", "total_share"):
        if getattr(config, name) <= 0:
            raise invalid(name, getattr(config, name), "a share above 0 of the baseline's cost")
    if not config.base and not (config.stage1_steps or config.lr_anneal_steps or config.baseline_steps):
        raise invalid("stage1_steps", 0, "--stage1_steps, or --baseline_steps to have it computed, or --base PATH")
    if not (config.stage2_steps or config.baseline_steps):
        raise invalid("stage2_steps", 0, "--stage2_steps, or --baseline_steps to have it computed")


def refuse_changed_options(run: TrainConfig, wanted: TrainConfig) -> None:
    """Refuse options that may not change when a run is resumed.

    Args:
        run: the run's own options.
        wanted: the options to resume it with.

    Raises:
        ValueError: naming the first option that differs.
    """
    for name, value in wanted.to_dict().items():
        if name not in MAY_CHANGE_ON_RESUME and getattr(run, name) != value:
            how = f"--override {name}={value} changes it" if name in MAY_BE_OVERRIDDEN else "a new run may differ"
            raise invalid(name, value, f"{getattr(run, name)!r} as the resumed run has it; {how}")


def keep_decisions(run: TrainConfig, wanted: TrainConfig) -> TrainConfig:
    """The options to resume a run with, where those of `LEFT_OPEN` that were left open are what the run decided.

    Args:
        run: the run's own options.
        wanted: the options to resume it with.
    """
    return wanted.replace(
        **{name: getattr(run, name) for name, value in LEFT_OPEN.items() if getattr(wanted, name) == value}
    )

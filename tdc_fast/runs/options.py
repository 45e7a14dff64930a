"""Every option of a training run, in the sections that `--help` shows.

Options that improved-diffusion's `image_train.py` also has keep its names, meaning, defaults and syntax; the others
are about groups, pruning, budgets and the run directory. The sections are joined into one flat dataclass,
`tdc_fast.runs.config.TrainConfig`.

The string under a field is its help text on the command line; the range of a number stands in its annotation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from tdc_fast.runs.limits import PathText, Within
from tdc_fast.runs.precision import DtypeName


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What to train on."""

    data_dir: PathText = ""
    """Folder of images (searched recursively; class = file name up to the first "_"), an .npz or .npy array, or the
    name of a built-in set: digits, photos."""
    latents: PathText = ""
    """Instead of --data_dir: folder of latents that tdc_fast.encode wrote. The default of --image_size is then the
    height and width of the latents."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What to do with an unreadable image: stop the run and name it, or take the next good one instead and count it."""
    background: Literal["white", "grey", "black"] = "white"
    """Colour behind the transparent pixels of a folder's images."""
    workers: Annotated[int, Within(0, 64)] = 1
    """Threads that load the next batches during a training step; 0 loads each batch when it is needed, as is always
    done on the CPU for images in memory."""
    heldout: float = 0.0
    """Share of the images (0 to below 1) kept from training for evaluation, chosen by --heldout_seed."""
    heldout_seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of the choice of held-out images, separate from --seed so that runs of several seeds share one split."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The denoiser: improved-diffusion's UNet."""

    image_size: Annotated[int, Within(1, 2**14)] = 64
    """Height and width of the images in pixels; it must be divisible by 2 once for each level of --channel_mult after
    the first."""
    in_channels: Annotated[int, Within(0, 2**10)] = 0
    """Channels of the images; 0 takes the number of the data (3 for folders). 1 reads a folder's images as grey."""
    num_channels: Annotated[int, Within(1, 2**13)] = 128
    """Channels of the first level."""
    channel_mult: str = ""
    """Comma list, one multiple of --num_channels per level; empty chooses by image size as improved-diffusion does."""
    num_res_blocks: Annotated[int, Within(1, 64)] = 2
    """Residual blocks per level."""
    num_heads: Annotated[int, Within(1, 2**10)] = 4
    """Attention heads per attention layer."""
    num_heads_upsample: Annotated[int, Within(-1, 2**10)] = -1
    """Attention heads in the upsampling half; -1 means --num_heads."""
    attention_resolutions: str = "16,8"
    """Comma list of the resolutions (pixels) whose levels have attention."""
    dropout: float = 0.0
    """Dropout probability inside the residual blocks."""
    class_cond: bool = False
    """Condition on the class label of each image."""
    num_classes: Annotated[int, Within(0, 10**7)] = 0
    """With --class_cond True: rows of the label embedding. 0 takes the number of classes of the data, one more with
    --label_dropout, and 1000 for files of improved-diffusion, which always have 1000."""
    use_checkpoint: bool = False
    """Recompute activations in the backward pass: less memory, more MACs (they are counted)."""
    use_scale_shift_norm: bool = True
    """Let the timestep embedding scale and shift the normalised activations instead of being added."""


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    """The diffusion process and its loss."""

    diffusion_steps: Annotated[int, Within(1, 10**6)] = 1000
    """T, the number of timesteps."""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """How alpha_bar decreases with the timestep."""
    timestep_respacing: str = ""
    """Train on a subset of the timesteps: a count, a comma list of counts per section, or "ddimN"; empty means all."""
    learn_sigma: bool = False
    """Let the model predict the variance too (range between the two fixed ones); doubles its output channels."""
    sigma_small: bool = False
    """With a fixed variance: the posterior's (True) or beta_t (False)."""
    use_kl: bool = False
    """Train on the variational bound alone instead of the mean squared error."""
    predict_xstart: bool = False
    """Predict the clean image instead of the noise."""
    predict_v: bool = False
    """Predict v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) image instead of the noise."""
    rescale_timesteps: bool = True
    """Feed the timestep embedding t * 1000 / T, so that models of different T are comparable."""
    rescale_learned_sigmas: bool = True
    """With --learn_sigma True: scale the mean squared error and the variance term as improved-diffusion does."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer, learning rate, averaging and precision."""

    batch_size: Annotated[int, Within(1, 2**20)] = 1
    """Images per step, of all processes together; improved-diffusion's is that of each process."""
    microbatch: Annotated[int, Within(-1, 2**20)] = -1
    """Split each step's batch into pieces of this many images to save memory; -1 or 0 does not split."""
    lr: Annotated[float, Within(0)] = 1e-4
    """Learning rate of AdamW."""
    weight_decay: Annotated[float, Within(0)] = 0.0
    """Decoupled weight decay of AdamW."""
    lr_anneal_steps: Annotated[int, Within(0, 10**12)] = 0
    """Train for this many steps while the learning rate falls linearly to 0; 0 trains without end (or to
    --stage1_steps) at a constant rate. Applies to stage 1; see --stage2_anneal."""
    lr_anneal_start: Annotated[int, Within(0, 10**12)] = 0
    """With --lr_anneal_steps: step at which the learning rate begins to fall; it is constant before. 0 is
    improved-diffusion's behaviour."""
    warmup_steps: Annotated[int, Within(0, 10**12)] = 0
    """Steps over which the learning rate rises linearly from 0 at the start of each stage."""
    grad_clip: Annotated[float, Within(0)] = 0.0
    """Largest gradient norm; 0 does not clip. In stage 2 every expert is clipped by its own norm, so that experts stay
    independent."""
    ema_rate: str = ""
    """Comma list of rates of the exponential moving averages of the weights; the first is used for sampling and for
    splitting the base into experts. Empty is improved-diffusion's 0.9999."""
    ema_ramp: bool | None = None
    """Limit the rate after n steps to (1 + n) / (10 + n), so that the average of a short run forgets the initial
    weights; False is improved-diffusion's plain average. Without the flag: True, but False with --ema_rate, and with
    --resume_checkpoint as in that checkpoint."""
    schedule_sampler: Literal["uniform", "loss-second-moment"] = "uniform"
    """How stage 1 draws timesteps."""
    label_dropout: float = 0.0
    """With --class_cond True: share (0 to below 1) of the labels that both stages replace by the label for no class,
    for classifier-free guidance. That label is the last row of the embedding, which no class of the data may have."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the model under autocast with fp32 weights, optimizer and averages."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Run the whole training step from a CUDA graph, so that the GPU does not wait for Python. auto: on a GPU, with a
    printed line if the step cannot be captured; on: the same, but that is an error; off: never."""
    use_fp16: bool = False
    """improved-diffusion's switch for mixed precision; here it means --precision bf16, whose range needs no loss
    scaling, so lg_loss_scale is always 0."""
    fp16_scale_growth: Annotated[float, Within(0)] = 1e-3
    """Accepted so that improved-diffusion's command lines run; without loss scaling it has no effect."""


@dataclass(frozen=True, kw_only=True)
class TdcOptions:
    """TDC: groups, pruning, experts and their budgets. None of it applies without --groups."""

    groups: Annotated[int, Within(-1, 2**12)] = 0
    """Number N of timestep groups and of experts; 0 is plain improved-diffusion training without a second stage; -1
    chooses the number by the elbow method, with --grouping similarity or difficulty, at most --max_groups."""
    grouping: Literal["uniform", "snr", "difficulty", "similarity"] = "uniform"
    """Groups of equal width in timesteps or in decibels of the signal-to-noise ratio; or measured on the trained base:
    timesteps of similar difficulty (see --difficulty), or with similar loss gradients."""
    max_groups: Annotated[int, Within(1, 2**12)] = 10
    """With --groups -1: the largest number that may be chosen."""
    probes: Annotated[int, Within(1, 2**12)] = 50
    """Intervals of timesteps at which the base is measured for --grouping similarity and difficulty; boundaries lie
    between them."""
    snr_range: str = "-20,20"
    """With --grouping snr: "lo,hi" in decibels; timesteps outside it belong to the first or last group. Empty divides
    the whole range of the schedule."""
    boundaries: str = ""
    """Comma list of the N + 1 boundaries from 0 to the number of timesteps, instead of --grouping; --groups may then be
    left out."""
    refine: Annotated[int, Within(0, 10**6)] = 0
    """With --boundaries: let every inner boundary move by up to this many timesteps to where gradients are most similar
    inside the groups."""
    overlap: Annotated[float, Within(0, 1)] = 0.0
    """Soft boundaries: in stage 2 each expert also trains on this share (0 to 1) of each neighbour's timesteps, the
    nearest ones."""
    difficulty: Literal["snr", "snr-reversed", "loss", "loss-reversed"] = "snr"
    """Which groups count as hard and keep more of the base: those of high SNR or of high measured loss; with -reversed,
    those of low SNR or loss. --grouping difficulty uses the same measure."""
    k: float = 0.6
    """Lower bound of the budgets as a share of the base's MACs (see --budget_in), 0 < k <= 1; group i of N from easy to
    hard gets i/N + (N - i)/N * k. 1 does not prune."""
    budgets: str = ""
    """Comma list of N shares of the base's MACs, one per group from low to high timesteps, instead of --k."""
    importance: Literal["taylor", "magnitude"] = "taylor"
    """What decides which channels are kept: first-order change of the loss on the group's own timesteps (taylor), or
    the norm of the weights (magnitude)."""
    calibration_batches: Annotated[int, Within(1, 10**6)] = 4
    """Batches of --batch_size images on which importance is measured, for each group."""
    base: PathText = ""
    """Weights (.pt) to use instead of stage 1, or a run directory whose base is used; the model flags must describe
    them."""
    stage1_steps: Annotated[int, Within(0, 10**12)] = 0
    """Steps of stage 1; 0 computes it from --baseline_steps, else takes --lr_anneal_steps."""
    stage2_steps: Annotated[int, Within(0, 10**12)] = 0
    """Steps of stage 2; 0 computes it from --baseline_steps."""
    baseline_steps: Annotated[int, Within(0, 10**12)] = 0
    """Steps of the uniform baseline (same model and --batch_size), to whose cost the shares below refer."""
    stage1_share: float = 0.5
    """Cost of stage 1 as a share of the baseline's cost."""
    total_share: float = 1.0
    """Cost of stage 1 + pruning + stage 2 as a share of the baseline's cost, in measured MACs."""
    stage2_batch: Annotated[int, Within(0, 2**20)] = 0
    """Images per step of stage 2, over all experts together; 0 means --batch_size."""
    stage2_shares: str = ""
    """Comma list of N weights: how much of each stage-2 batch each group gets; empty is equal shares."""
    stage2_lr: Annotated[float, Within(0)] = 0.0
    """Learning rate of stage 2; 0 means --lr."""
    stage2_lr_factors: str = ""
    """Comma list of N factors above 0 and at most 1, one per group from low to high timesteps: each group's learning
    rate as a share of --stage2_lr. Empty is 1 for all."""
    stage2_slope_windows: Annotated[int, Within(0, 10**6)] = 0
    """Divide stage 2 into this many windows, at least 8. After each window, shares of the batch move to the groups
    whose loss still falls, between half and twice their --stage2_shares; progress.csv has the shares. 0 keeps the
    shares constant."""
    stage2_ema_factors: str = ""
    """Comma list of N factors above 0, one per group from low to high timesteps. In stage 2 they multiply the length 1
    / (1 - rate) of the averages of --ema_rate: a factor of 2 turns rate 0.999 into 0.9995. They also multiply the
    length that --ema_ramp allows. Empty is 1 for all."""
    shared_layers: str = ""
    """Layers whose weights the groups share in stage 2, so that these weights learn from the samples of all groups:
    comma list of convolutions, attention, norms, embeddings, level0 (the images' resolution), level1, ..., middle, or
    patterns of layer names such as input_blocks.*. With NAME:K, sets of K neighbouring groups share instead of all
    groups; NAME:1 makes an exception to earlier terms. For all but norms and embeddings: convolutions,attention. Empty
    shares nothing."""
    distillation_weight: Annotated[float, Within(0)] = 0.0
    """Weight of a term in the loss of stage 2: the squared difference between the predictions of an expert and of the
    frozen base (the averaged weights that the experts start from) for the same noisy image. The base's forward pass
    counts as training cost. 0 omits the term."""
    stage2_anneal: bool = True
    """Let the learning rate of stage 2 fall linearly to 0."""


@dataclass(frozen=True, kw_only=True)
class TimeOptions:
    """What the experts' budgets count, and in what steps their widths go."""

    budget_in: Literal["macs", "latency"] = "macs"
    """What budgets are shares of: the base's MACs, or its estimated time on this device, so that experts get widths
    that run faster there."""
    latency_table: PathText = ""
    """File of times that python -m tdc_fast.latency measured on this device, for --budget_in latency. Empty estimates
    times from MACs and bytes. With budgets in MACs, it only adds estimated times to the plan."""
    width_step: str = "1"
    """Widths of convolutions are multiples of this many channels where possible; auto takes the step of this device's
    kernels. Widths are always whole normalisation groups, and multiples of 8 channels where possible."""


def time_options(options: TimeOptions) -> dict[str, str]:
    """The options of `TimeOptions` alone, of options that have others too."""
    return {field.name: getattr(options, field.name) for field in fields(TimeOptions)}


@dataclass(frozen=True, kw_only=True)
class SearchOptions(TimeOptions):
    """The search for every expert's widths within its budget (proxy-based pruning)."""

    agent: Literal["auto", "taylor", "magnitude", "random", "greedy", "evolution", "tpe", "llm"] = "auto"
    """How widths are proposed. taylor and magnitude propose once: the widths that keep the most of that importance. The
    others search with scored candidates: random widths, by loss per MAC (greedy), by evolution, by optuna's estimator
    (tpe), or by a language model (llm). auto is --importance for one round, and tpe for more."""
    rounds: Annotated[int, Within(1, 10**6)] = 1
    """Rounds of proposing and scoring, for each group."""
    candidates: Annotated[int, Within(1, 2**12)] = 8
    """Candidates per round; they are scored in one routed batch."""
    memory: bool = True
    """Give the agent the results of earlier candidates, of this group and of earlier ones. memory.jsonl is written in
    both cases."""
    calibration_dtype: DtypeName = "auto"
    """Precision in which the base is measured: importance, scores of candidates, losses and gradients by timestep.
    float32, bfloat16 or float16 (on a GPU); auto is the precision of training on a GPU, and float32 on the CPU."""
    score_samples: Annotated[int, Within(1, 2**20)] = 1024
    """Samples in one pass of scoring, over all candidates together; limits its memory."""
    llm_model: str = ""
    """With --agent llm: name of the model. The key is read from the environment, OPENAI_API_KEY, and never stored."""
    llm_url: str = ""
    """Base URL of an OpenAI-compatible service, such as http://127.0.0.1:8000/v1; empty takes OPENAI_BASE_URL, else
    OpenAI's."""
    llm_timeout: Annotated[float, Within(0.001, 10**6)] = 60.0
    """Seconds after which a call counts as failed."""
    llm_retries: Annotated[int, Within(0, 1000)] = 3
    """Retries after a failed call or an unusable answer, per round."""
    llm_calls: Annotated[int, Within(1, 10**9)] = 100
    """Calls allowed in the whole search; after that, --llm_fallback proposes."""
    llm_fallback: Literal["random", "greedy", "evolution", "tpe"] = "evolution"
    """Agent for the rounds in which the language model has no usable answer."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run is stored, what it records and how it is resumed."""

    run_dir: PathText = ""
    """Directory of the run; empty takes DIFFUSION_BLOB_LOGDIR, then OPENAI_LOGDIR, then a new temporary directory."""
    resume: PathText = ""
    """Continue the run in this directory bit for bit. Without a value: the run in --run_dir. All other flags may be
    omitted."""
    resume_step: Annotated[int, Within(-1, 10**12)] = -1
    """With --resume: the checkpoint of the interrupted stage to continue from; -1 is the latest."""
    override: str = ""
    """With --resume: comma list of optimizer settings to change, such as lr=5e-5,batch_size=16. They are recorded in
    run.json and apply to the rest of the run. data_dir=DIR gives the new place of the images, if they were moved."""
    resume_checkpoint: PathText = ""
    """improved-diffusion's flag: continue from model{step}.pt, with the optimizer and the averages beside it."""
    stop_after: Literal["never", "stage1", "pruning"] = "never"
    """Stop before the experts are trained: after stage 1 (python -m tdc_fast.prune can then search widths) or after the
    search for widths. --resume continues."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Seed of weights, data order, timesteps, noise and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    num_threads: Annotated[int, Within(0, 2**10)] = 0
    """CPU threads of torch and of the native kernels; 0 leaves the setting of the process."""
    log_interval: Annotated[int, Within(1, 10**12)] = 10
    """Steps between two rows of progress.csv; the values are means over those steps."""
    save_interval: Annotated[int, Within(1, 10**12)] = 10000
    """Steps between two checkpoints; the last step of a stage is always saved."""
    tensorboard: bool = True
    """Write TensorBoard event files when the tensorboard package is installed."""
    progress: Literal["auto", "always", "never"] = "auto"
    """Progress bars with time left; auto shows them where all output goes to a terminal, and prints rows elsewhere."""
    preview: Annotated[int, Within(0, 10**5)] = 0
    """Images sampled at the end of each stage into samples/; 0 samples none."""


SECTIONS: dict[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "diffusion": DiffusionOptions,
    "optimizer": OptimizerOptions,
    "tdc": TdcOptions,
    "search": SearchOptions,
    "run": RunOptions,
}
"""Section title on the command line -> its dataclass, in the order of `--help`."""

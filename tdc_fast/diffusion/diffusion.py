"""The Gaussian diffusion process: forward marginals, posterior, and the reverse step a denoiser's output implies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tdc_fast.diffusion.gaussian import (
    Gaussian,
    arithmetic_dtype,
    broadcast_to_samples,
    discretized_gaussian_log_likelihood,
    interpolated_log_variance,
    mean_flat,
    normal_kl,
)
from tdc_fast.diffusion.protocols import Denoiser, prediction_of
from tdc_fast.diffusion.respacing import Spacing, respaced_betas, spaced_timesteps
from tdc_fast.errors import invalid
from tdc_fast.routing import TimestepGroups

Prediction = Literal["epsilon", "x0", "v"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]


@dataclass(frozen=True)
class ReverseStep(Gaussian):
    """p(x_{t-1} | x_t).

    Attributes:
        x0: the predicted clean sample (B, C, ...) that it was computed from.
    """

    x0: Tensor


class Diffusion:
    """A forward process of T steps and how to read a denoiser's output (Ho et al. 2020; Nichol and Dhariwal 2021).

    Timesteps `t` are int64 (B,) indices into *this* process's T steps, one per sample. The denoiser gets
    `timestep_map[t]`, the index in the process it was trained on; the two differ after `respaced`.

    Tables (`betas`, `alphas_cumprod`, `posterior_variance` and so on) are float64 numpy arrays (T,). Arithmetic on
    tensors is float64 for float64 inputs and float32 otherwise, whatever the dtype of the denoiser's output.

    Attributes:
        num_timesteps: T.
        original_num_timesteps: length of the process that `timestep_map` points into.
        timestep_map: T increasing original indices.
        timestep_scale: the factor that the denoiser applies to timesteps before embedding them: 1000 / original T when
            timesteps are rescaled, else 1. Never applied here.
        prediction: what the denoiser predicts, "epsilon" (the noise), "x0" or "v" (see `velocity`).
        variance: "fixed_small", "fixed_large" or "learned_range".
        loss: which loss `training_losses` returns.
    """

    def __init__(
        self,
        betas: np.ndarray,
        *,
        prediction: Prediction = "epsilon",
        variance: Variance = "fixed_small",
        loss: Loss = "mse",
        timestep_map: tuple[int, ...] | None = None,
        original_num_timesteps: int | None = None,
        timestep_scale: float = 1.0,
    ) -> None:
        """Build the tables.

        Args:
            betas: the variance added at each step, (T,).
            prediction: what the denoiser predicts, "epsilon" (the noise), "x0" or "v" (see `velocity`).
            variance: "fixed_small" (that of the posterior), "fixed_large" (beta) or "learned_range".
            loss: "mse", "rescaled_mse", "kl" or "rescaled_kl" (see `training_losses`).
            timestep_map: T original timesteps; None for 0 to T - 1.
            original_num_timesteps: length of the original process; None takes the last mapped timestep plus 1.
            timestep_scale: the factor that the denoiser applies to timesteps.

        Raises:
            ValueError: for betas outside (0, 1], an unknown option, a map of another length or one that does not
                increase, or a scale that is not a number above 0.
        """
        try:
            betas = np.array(betas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise invalid("betas", betas, "numbers, one per timestep") from error
        if betas.ndim != 1 or betas.size == 0:
            raise invalid("betas", f"shape {betas.shape}", "a non-empty one-dimensional array")
        if not ((betas > 0) & (betas <= 1)).all():
            raise invalid(
                "betas",
                f"range {betas.min()} to {betas.max()}",
                "every beta within (0, 1]; a linear schedule needs 20 steps or more",
            )
        _check_option("prediction", prediction, Prediction)
        _check_option("variance", variance, Variance)
        _check_option("loss", loss, Loss)
        self.prediction, self.variance, self.loss = prediction, variance, loss
        self.timestep_scale = timestep_scale
        self.num_timesteps = len(betas)
        self.timestep_map = tuple(range(len(betas))) if timestep_map is None else tuple(timestep_map)
        if len(self.timestep_map) != self.num_timesteps:
            raise invalid("timestep_map", f"{len(self.timestep_map)} entries", f"one per beta ({self.num_timesteps})")
        if self.timestep_map[0] < 0 or any(a >= b for a, b in itertools.pairwise(self.timestep_map)):
            raise invalid("timestep_map", self.timestep_map, "increasing original timesteps, from 0 on")
        self.original_num_timesteps = original_num_timesteps or self.timestep_map[-1] + 1
        if self.original_num_timesteps <= self.timestep_map[-1]:
            remedy = f"more than the last mapped timestep, {self.timestep_map[-1]}"
            raise invalid("original_num_timesteps", original_num_timesteps, remedy)
        if not 0 < timestep_scale < math.inf:
            raise invalid("timestep_scale", timestep_scale, "a finite number above 0")
        self._build_tables(betas)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _build_tables(self, betas: np.ndarray) -> None:
        alphas = 1.0 - betas
        self.betas = betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):  # infinite after a beta of 1
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)
        remaining = 1.0 - self.alphas_cumprod
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / remaining
        # The variance at t = 0 is zero; its logarithm takes the value at t = 1.
        self.posterior_log_variance_clipped = np.log(_first_replaced(self.posterior_variance))
        self.posterior_mean_coef_x0 = betas * np.sqrt(self.alphas_cumprod_prev) / remaining
        self.posterior_mean_coef_xt = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / remaining
        self.log_betas = np.log(betas)
        self.large_variance = np.append(_first_replaced(self.posterior_variance)[0], betas[1:])
        self.large_log_variance = np.log(self.large_variance)

    @cached_property
    def _original_timesteps(self) -> np.ndarray:
        return np.asarray(self.timestep_map, dtype=np.int64)

    @cached_property
    def alphas_cumprod_from_clean(self) -> np.ndarray:
        """alpha_bar at index t + 1, float64 (T + 1,); index 0 is the clean sample, t = -1."""
        return np.append(1.0, self.alphas_cumprod)

    def __repr__(self) -> str:
        return (
            f"Diffusion({self.num_timesteps} of {self.original_num_timesteps} steps, prediction={self.prediction!r}, "
            f"variance={self.variance!r}, loss={self.loss!r})"
        )

    @property
    def learns_variance(self) -> bool:
        """Whether the denoiser's output has 2C channels, of which the second C interpolate the log variance."""
        return self.variance == "learned_range"

    def snr_db(self) -> np.ndarray:
        """Signal-to-noise ratio 10 * log10(alpha_bar / (1 - alpha_bar)) in decibels, float64 (T,)."""
        with np.errstate(divide="ignore"):
            return 10.0 * (np.log10(self.alphas_cumprod) - np.log10(1.0 - self.alphas_cumprod))

    def respaced(self, spacing: Spacing) -> Diffusion:
        """The process of only some of these steps; see `respacing.spaced_timesteps` for `spacing`."""
        return self.with_timesteps(spaced_timesteps(self.num_timesteps, spacing))

    def with_timesteps(self, kept: tuple[int, ...]) -> Diffusion:
        """The process of only the steps `kept`, increasing indices of this one, with the same marginals there."""
        if not kept or any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
            raise invalid("kept", kept, "increasing timesteps")
        if kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise invalid("kept", kept, f"timesteps within 0..{self.num_timesteps - 1}")
        return Diffusion(
            respaced_betas(self.alphas_cumprod, kept),
            prediction=self.prediction,
            variance=self.variance,
            loss=self.loss,
            timestep_map=tuple(self.timestep_map[t] for t in kept),
            original_num_timesteps=self.original_num_timesteps,
            timestep_scale=self.timestep_scale,
        )

    def table(self, name: str, t: Tensor) -> Tensor:
        """Entries (B,) of the table `name` at `t` (B,), on t's device; float64, int64 for the timestep map."""
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(getattr(self, name)).to(t.device)
        return self._on_device[key][t]

    def coefficient(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """`table(name, t)` in x's arithmetic dtype, shaped (B, 1, ..., 1) to broadcast against x (B, C, ...)."""
        return broadcast_to_samples(self.table(name, t), x)

    def original_timesteps(self, t: Tensor) -> Tensor:
        """The integer timesteps (B,) that the denoiser gets for steps `t` (B,)."""
        return self.table("_original_timesteps", t)

    def check_groups(self, model: Denoiser) -> None:
        """ValueError for a packed model whose groups divide another number of timesteps than this process has."""
        groups = getattr(model, "groups", None)
        if isinstance(groups, TimestepGroups) and groups.num_timesteps != self.original_num_timesteps:
            remedy = f"groups of the process's {self.original_num_timesteps} timesteps (diffusion_steps)"
            raise invalid("model", f"one whose groups divide {groups.num_timesteps} timesteps", remedy)

    def check_x0_is_defined(self, argument: str) -> None:
        """ValueError where the denoiser predicts the noise at a timestep at which nothing of x0 is left in x_t.

        Args:
            argument: what the caller calls the choice of timesteps.
        """
        if self.prediction == "epsilon" and self.alphas_cumprod[-1] == 0:
            remedy = (
                "a model that predicts x0 or v, a schedule that keeps something of x0 there, or steps that leave it out"
            )
            raise invalid(argument, f"timestep {self.timestep_map[-1]}, where alpha_bar is 0", remedy)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 noised to step t: a draw of q(x_t | x0) = N(sqrt(alpha_bar) x0, 1 - alpha_bar), like x0.

        Source: Ho et al. 2020, equation 4.

        Args:
            x0: clean samples (B, C, ...).
            t: timesteps (B,).
            noise: standard normal noise like x0.

        Raises:
            ValueError: for wrong timesteps or a wrong shape.
        """
        check_timesteps(t, x0, self.num_timesteps)
        if noise.shape != x0.shape:
            raise invalid("noise", f"shape {tuple(noise.shape)}", f"the shape of x0, {tuple(x0.shape)}")
        return (
            self.coefficient("sqrt_alphas_cumprod", t, x0) * x0
            + self.coefficient("sqrt_one_minus_alphas_cumprod", t, x0) * noise
        )

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """The posterior q(x_{t-1} | x_t, x0) (Ho et al. 2020, equations 6 and 7); log variance clipped at t = 0."""
        check_timesteps(t, x_t, self.num_timesteps)
        if x0.shape != x_t.shape:
            raise invalid("x0", f"shape {tuple(x0.shape)}", f"the shape of x_t, {tuple(x_t.shape)}")
        return Gaussian(
            mean=self.coefficient("posterior_mean_coef_x0", t, x_t) * x0
            + self.coefficient("posterior_mean_coef_xt", t, x_t) * x_t,
            variance=self.coefficient("posterior_variance", t, x_t),
            log_variance=self.coefficient("posterior_log_variance_clipped", t, x_t),
        )

    def x0_from_epsilon(self, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """The clean sample when `epsilon` is the noise in `x_t`."""
        return (
            self.coefficient("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self.coefficient("sqrt_recipm1_alphas_cumprod", t, x_t) * epsilon
        )

    def epsilon_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise in `x_t` when `x0` is the clean sample."""
        # Not from the reciprocals of alpha_bar, which may be 0 at the last step.
        signal = self.coefficient("sqrt_alphas_cumprod", t, x_t) * x0
        return (x_t - signal) / self.coefficient("sqrt_one_minus_alphas_cumprod", t, x_t)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise turned towards x0: sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, section 4)."""
        return (
            self.coefficient("sqrt_alphas_cumprod", t, x0) * noise
            - self.coefficient("sqrt_one_minus_alphas_cumprod", t, x0) * x0
        )

    def x0_from_prediction(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The clean sample that the denoiser's prediction at `x_t` stands for."""
        if self.prediction == "x0":
            return prediction
        if self.prediction == "epsilon":
            return self.x0_from_epsilon(x_t, t, prediction)
        return (
            self.coefficient("sqrt_alphas_cumprod", t, x_t) * x_t
            - self.coefficient("sqrt_one_minus_alphas_cumprod", t, x_t) * prediction
        )

    def split_output(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The denoiser's prediction and, when the variance is learned, its variance values, each like x.

        Raises:
            ValueError: when the output does not have the shape that `variance` requires.
        """
        channels = x.shape[1] * (2 if self.learns_variance else 1)
        expected = (x.shape[0], channels, *x.shape[2:])
        if tuple(model_output.shape) != expected:
            remedy = f"shape {expected} from a denoiser with variance={self.variance!r}"
            raise invalid("model_output", f"shape {tuple(model_output.shape)}", remedy)
        model_output = model_output.to(arithmetic_dtype(x))
        if not self.learns_variance:
            return model_output, None
        prediction, values = model_output.split(x.shape[1], dim=1)
        return prediction, values

    def p_mean_variance(self, model_output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool = True) -> ReverseStep:
        """p(x_{t-1} | x_t) and the predicted x0, from the denoiser's output.

        A learned variance interpolates between the posterior variance and beta in the log domain (Nichol and Dhariwal
        2021, equation 15).

        Args:
            model_output: the denoiser's output (B, C, ...), or (B, 2C, ...) when the variance is learned.
            x: noisy samples x_t (B, C, ...).
            t: timesteps (B,).
            clip_denoised: limit the predicted x0 to [-1, 1].

        Raises:
            ValueError: for wrong timesteps or a wrong shape.
        """
        check_timesteps(t, x, self.num_timesteps)
        prediction, values = self.split_output(model_output, x)
        x = x.to(arithmetic_dtype(x))
        if values is not None:
            lowest = self.coefficient("posterior_log_variance_clipped", t, x)
            highest = self.coefficient("log_betas", t, x)
            log_variance = interpolated_log_variance(values, lowest, highest)
            variance = torch.exp(log_variance)
        elif self.variance == "fixed_large":
            variance = self.coefficient("large_variance", t, x)
            log_variance = self.coefficient("large_log_variance", t, x)
        else:
            variance = self.coefficient("posterior_variance", t, x)
            log_variance = self.coefficient("posterior_log_variance_clipped", t, x)
        x0 = self.x0_from_prediction(x, t, prediction)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean = self.q_posterior(x0, x, t).mean
        return ReverseStep(mean=mean, variance=variance, log_variance=log_variance, x0=x0)

    def training_losses(
        self,
        model: Denoiser,
        x0: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Losses per sample, differentiable in the model's parameters.

        With the mse losses a learned variance adds vb to mse, the hybrid loss of Nichol and Dhariwal (2021, section
        3.1): there the bound trains the variance only, since its mean is detached.

        Args:
            model: the denoiser.
            x0: clean samples (B, C, ...).
            t: timesteps (B,).
            noise: noise like x0; drawn when None.
            model_kwargs: further arguments of the model.

        Returns:
            "loss" (B,), and for the mse losses "mse" (B,) and, when the variance is learned, "vb" (B,). By `loss`:
            mse, rescaled_mse: mean squared error of the predicted noise (or x0, or v); rescaled_mse multiplies vb by
            T / 1000. kl, rescaled_kl: the bound's term in bits per dimension; rescaled_kl multiplies it by T, which
            estimates the whole bound.

        Raises:
            ValueError: for wrong timesteps or a wrong shape, or a packed model whose groups have other timesteps.
        """
        self.check_groups(model)
        if noise is None:
            noise = torch.randn_like(x0)
        x_t = self.q_sample(x0, t, noise)
        output = prediction_of(model(x_t, self.original_timesteps(t), **(model_kwargs or {})))
        return self.losses_of_output(output, x0, x_t, t, noise)

    def losses_of_output(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What `training_losses` returns, from the denoiser's output at x_t = q_sample(x0, t, noise)."""
        if self.loss in ("kl", "rescaled_kl"):
            loss = self.vb_terms(output, x0, x_t, t, clip_denoised=False)
            return {"loss": loss * self.num_timesteps if self.loss == "rescaled_kl" else loss}

        prediction, values = self.split_output(output, x_t)
        target = {"epsilon": noise, "x0": x0}.get(self.prediction)
        if target is None:
            target = self.velocity(x0, noise, t)
        mse = mean_flat((target - prediction) ** 2)
        if values is None:
            return {"loss": mse, "mse": mse}
        frozen_mean = torch.cat([prediction.detach(), values], dim=1)
        vb = self.vb_terms(frozen_mean, x0, x_t, t, clip_denoised=False)
        if self.loss == "rescaled_mse":
            # T times the term estimates the whole bound; a thousandth of that does not outweigh mse.
            vb = vb * (self.num_timesteps / 1000.0)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def vb_terms(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip_denoised: bool = True) -> Tensor:
        """The variational bound's term of each sample's step, in bits per dimension (B,).

        KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0; the negative log likelihood of the 8-bit pixels for
        t = 0 (Ho et al. 2020, equation 5).

        Args:
            model_output: the denoiser's output at x_t.
            x0: clean samples (B, C, ...).
            x_t: noisy samples like x0.
            t: timesteps (B,).
            clip_denoised: limit the predicted x0 to [-1, 1].
        """
        truth = self.q_posterior(x0, x_t, t)
        step = self.p_mean_variance(model_output, x_t, t, clip_denoised)
        kl = mean_flat(normal_kl(truth.mean, truth.log_variance, step.mean, step.log_variance))
        log_scale = (0.5 * step.log_variance).expand_as(step.mean)
        decoder = -mean_flat(discretized_gaussian_log_likelihood(x0, step.mean, log_scale))
        return torch.where(t == 0, decoder, kl) / math.log(2.0)

    def prior_bpd(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x0) || N(0, 1)) in bits per dimension (B,); it does not depend on the denoiser."""
        last = torch.full((x0.shape[0],), self.num_timesteps - 1, device=x0.device, dtype=torch.int64)
        mean = self.coefficient("sqrt_alphas_cumprod", last, x0) * x0
        log_variance = torch.log(self.coefficient("sqrt_one_minus_alphas_cumprod", last, x0) ** 2)
        zero = torch.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


def check_timesteps(t: Tensor, x: Tensor, num_timesteps: int, lowest: int = 0) -> None:
    """Check timesteps.

    Args:
        t: timesteps; their values are checked on the CPU only, so that no device has to wait.
        x: samples (B, C, ...).
        num_timesteps: T; every timestep must be below it.
        lowest: the lowest timestep allowed.

    Raises:
        ValueError: unless t is integer (B,), with one entry per sample, in range.
    """
    if t.dtype not in (torch.int64, torch.int32):
        raise invalid("t", f"dtype {t.dtype}", "int64 timesteps")
    if t.dim() != 1 or t.shape[0] != x.shape[0]:
        raise invalid("t", f"shape {tuple(t.shape)}", f"one timestep per sample, shape ({x.shape[0]},)")
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        low, high = int(t.min()), int(t.max())
        if low < lowest or high >= num_timesteps:
            raise invalid("t", f"range {low}..{high}", f"timesteps within {lowest}..{num_timesteps - 1}")


def _check_option(argument: str, value: str, options: Any) -> None:
    if value not in get_args(options):
        raise invalid(argument, value, "one of " + ", ".join(get_args(options)))


def _first_replaced(table: np.ndarray) -> np.ndarray:
    """The table with entry 0 replaced by entry 1, or by a tiny positive value when there is only one."""
    return np.append(table[1] if len(table) > 1 else 1e-20, table[1:])

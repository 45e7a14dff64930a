"""What a caller asks of an engine, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tdc_fast.data.pixels import to_uint8
from tdc_fast.diffusion.samplers import SamplerName
from tdc_fast.errors import is_integer


@dataclass(frozen=True, kw_only=True)
class Request:
    """Images to draw. All images of a request are at the same step of the same sampler.

    Attributes:
        num_images: how many.
        seed: of the noise, and of the classes where `label` is None.
        steps: sampling steps, 1 to T.
        sampler: "ddim", "ddpm" or "dpm++2m".
        eta: noise of DDIM, 0 for none, at most 1000; the other samplers take only 0.
        label: the class of all images; None draws one for each image, of a class-conditional model.
        guidance_scale: of classifier-free guidance, or one for each group of timesteps, from low to high; 1 for none.
            In steps with another scale an image takes the place of two in a batch.
        preview_every: steps between two previews; 0 for none.
        timeout: seconds from now in which the images must be done; None for no limit.
    """

    num_images: int = 1
    seed: int = 0
    steps: int = 50
    sampler: SamplerName = "ddim"
    eta: float = 0.0
    label: int | None = None
    guidance_scale: float | Sequence[float] = 1.0
    preview_every: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Makes numpy's integers Python's; what else may be wrong is told when the request is submitted."""
        for name, value in vars(self).items():
            if is_integer(value):
                object.__setattr__(self, name, int(value))


@dataclass(frozen=True)
class Preview:
    """The final images, as they are predicted at this step.

    Attributes:
        step: how many steps are done.
        steps: how many there are.
        images: the predicted clean images, uint8 (M, C, H, W) on the CPU.
    """

    step: int
    steps: int
    images: Tensor


@dataclass(frozen=True)
class Result:
    """The images of a request.

    Attributes:
        samples: float32 (M, C, H, W) on the CPU, as the sampler left them, or of latents as they were decoded.
        labels: the classes, int64 (M,); None for an unconditional model.
        waited: seconds until the first step began.
        took: seconds from `submit` to the last step.
    """

    samples: Tensor
    labels: Tensor | None
    waited: float
    took: float

    @property
    def images(self) -> Tensor:
        """The images as uint8 (M, C, H, W)."""
        return to_uint8(self.samples)

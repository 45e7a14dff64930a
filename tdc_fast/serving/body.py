"""What `POST /generate` takes: its JSON fields, their limits, and errors that name the field and the remedy."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tdc_fast.diffusion.samplers import SamplerName
from tdc_fast.errors import invalid
from tdc_fast.serving.request import Request

Format = Literal["png", "npz", "json", "events"]
_LARGEST = 2**53
"""The largest integer that every JSON parser keeps exact."""
_Scale = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Limits:
    """What the server allows one request, besides what the engine does.

    Attributes:
        images: images.
        steps: sampling steps.
        seconds: from its arrival to its images.
        body: bytes of its body.
        body_seconds: for sending the body.
    """

    images: int = 16
    steps: int = 1000
    seconds: float = 60.0
    body: int = 2**16
    body_seconds: float = 10.0


class GenerateBody(BaseModel):
    """Images to draw."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_images: Annotated[int, Field(ge=1, le=_LARGEST, description="how many images")] = 1
    seed: Annotated[int | None, Field(ge=0, le=_LARGEST, description="seed of noise and classes; none for any")] = None
    steps: Annotated[int | None, Field(ge=1, le=_LARGEST, description="sampling steps; none for 50")] = None
    sampler: SamplerName = "ddim"
    eta: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False, description="noise of ddim alone")] = 0.0
    label: Annotated[int | None, Field(ge=0, le=_LARGEST, description="class; none draws one per image")] = None
    guidance_scale: Annotated[_Scale | list[_Scale], Field(description="one, or one per group; 1 for none")] = 1.0
    preview_every: Annotated[int, Field(ge=0, le=_LARGEST, description="steps between previews; events only")] = 0
    timeout: Annotated[float | None, Field(gt=0, allow_inf_nan=False, description="seconds; none for the limit")] = None
    format: Annotated[Format, Field(description="events are server-sent events with previews and the result")] = "png"


def read_body(body: bytes, limits: Limits, num_timesteps: int) -> tuple[Request, Format]:
    """The request in a body, and the format of its answer.

    Args:
        body: JSON.
        limits: what the server allows.
        num_timesteps: T of the model's process.

    Raises:
        ValueError: naming the first field that is wrong, and the remedy.
    """
    try:
        fields = GenerateBody.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise _explained(error.errors()[0]) from None
    steps = min(50, num_timesteps, limits.steps) if fields.steps is None else fields.steps
    timeout = limits.seconds if fields.timeout is None else fields.timeout
    for name, value, most in (
        ("num_images", fields.num_images, limits.images),
        ("steps", steps, min(limits.steps, num_timesteps)),
        ("timeout", timeout, limits.seconds),
    ):
        if value > most:
            raise invalid(name, value, f"at most {most:g}, a limit of this server")
    if fields.preview_every and fields.format != "events":
        raise invalid("preview_every", fields.preview_every, 'format "events", or 0: only events have previews')
    request = Request(
        num_images=fields.num_images,
        seed=secrets.randbelow(2**31) if fields.seed is None else fields.seed,
        steps=steps,
        sampler=fields.sampler,
        eta=fields.eta,
        label=fields.label,
        guidance_scale=fields.guidance_scale,
        preview_every=fields.preview_every,
        timeout=timeout,
    )
    return request, fields.format


def _explained(error: Any) -> ValueError:
    """What pydantic found, in the words of this package."""
    if error["type"] == "extra_forbidden":
        return invalid("body", error["loc"][0], "one of the fields " + ", ".join(GenerateBody.model_fields))
    if error["type"] == "json_invalid":
        return ValueError(f"body: it is no JSON ({error['ctx']['error']}); expected an object of fields")
    remedy = error["msg"].removeprefix("Input should be ").replace("'", '"')
    return invalid(str(error["loc"][0]) if error["loc"] else "body", error["input"], remedy)

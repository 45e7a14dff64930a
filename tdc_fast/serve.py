"""Serve images from a trained model over HTTP: `python -m tdc_fast.serve --run DIR`."""

from __future__ import annotations

if __name__ == "__main__":
    from tdc_fast.entry import start

    raise SystemExit(start("serve"))

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tdc_fast.command_line import load_denoiser, parse_denoiser_flags, run_command, use_threads
from tdc_fast.entry import STOPPED
from tdc_fast.errors import invalid, require
from tdc_fast.evaluation.samples import load_decoder
from tdc_fast.runs.build import named_device
from tdc_fast.runs.denoisers import Which, placed
from tdc_fast.runs.limits import PathText, Within, comma_numbers
from tdc_fast.runs.precision import DtypeName
from tdc_fast.serving import Engine, Policy
from tdc_fast.serving.admission import bytes_per_image
from tdc_fast.serving.pauses import short_pauses
from tdc_fast.serving.policy import PolicyName

__all__ = ["ServeOptions", "main"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Which model to serve, on which address, and limits."""

    run: PathText = ""
    """Run directory to serve."""
    which: Which = "auto"
    """Which model of --run: its experts, its base, or (auto) the experts if there are any."""
    model_path: PathText = ""
    """Instead of --run: a weight file of tdc_fast or improved-diffusion, with the flags of the model as in sampling."""
    vae: PathText = ""
    """For a model of latents: folder of the autoencoder of diffusers with which they were encoded; it decodes the
    images."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all. There is no authentication."""
    port: Annotated[int, Within(0, 65535)] = 8000
    """Port; 0 takes a free one and prints it."""
    max_batch: Annotated[int, Within(1, 2**16)] = 32
    """Maximum number of images in one step of the model; an image with guidance counts twice."""
    sizes: str = ""
    """Comma list of batch sizes; a batch is padded to the next one. Empty takes every size on the CPU, and 1, 2,
    3, 4, 6, 8, 12, 16, 24 and so on on a GPU, where each size is a CUDA graph."""
    policy: PolicyName = "slack"
    """Which request goes first when not all fit into the batch: the first to arrive (fifo), the same where a request
    counts as one step older for each of its steps (slack), or the one with the fewest remaining steps (shortest)."""
    patience: Annotated[float, Within(0.001, 10**9)] = 4.0
    """With --policy shortest: so many steps of waiting count as one remaining step less."""
    max_queue: Annotated[int, Within(1, 10**6)] = 256
    """Maximum number of waiting requests; more get 503 with Retry-After."""
    max_memory: Annotated[int, Within(1, 2**20)] = 1024
    """Maximum memory of the images of all requests in MiB, in addition to the model."""
    max_images: Annotated[int, Within(0, 2**16)] = 0
    """Maximum number of images in one request; 0 takes 16, or --max_batch if that is less."""
    max_steps: Annotated[int, Within(1, 10**6)] = 1000
    """Maximum number of sampling steps in one request."""
    max_seconds: Annotated[float, Within(0.001, 10**6)] = 60.0
    """Maximum time of one request, after which it fails with 504."""
    max_body: Annotated[int, Within(16, 2**30)] = 2**16
    """Maximum number of bytes in a request's body."""
    grace: Annotated[float, Within(0, 10**6)] = 30.0
    """Seconds that current requests have to finish after SIGTERM; then they get 503."""
    null_class: Annotated[int, Within(-1, 10**7)] = -1
    """The label for no class that the model was trained with, for requests with guidance; -1 is that of a run with
    --label_dropout. Requests cannot ask for it."""
    deterministic: bool = True
    """Run a single denoiser on the routed kernels, so that on the CPU its images do not depend on other requests (those
    of experts never do)."""
    clip_denoised: bool = True
    """Clip every predicted image to [-1, 1]; latents are never clipped."""
    dtype: DtypeName = "auto"
    """Precision of the model: float32, bfloat16 or float16; auto is the precision of training on a GPU, and float32 on
    the CPU."""
    num_threads: Annotated[int, Within(0, 2**10)] = 0
    """CPU threads; 0 keeps the default of torch."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""


def _serve(arguments: list[str]) -> None:
    options = parse_denoiser_flags(
        "serving",
        ServeOptions,
        arguments,
        prog="python -m tdc_fast.serve",
        description="Serve images from a run directory or from a file of weights over HTTP.",
    )
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    from tdc_fast.serving.body import Limits
    from tdc_fast.serving.server import Server, create_app

    device = named_device(options["device"])
    images = options["max_images"] or min(Limits.images, options["max_batch"])
    if images > options["max_batch"]:
        raise invalid("max_images", images, f"at most --max_batch, {options['max_batch']}")
    use_threads(options["num_threads"])
    denoiser = load_denoiser(options)
    if options["deterministic"]:
        denoiser = denoiser.batch_invariant()
    decoder = load_decoder(denoiser, options["vae"], device)
    denoiser = placed(denoiser, device, options["dtype"])
    least = math.ceil(bytes_per_image(denoiser.image_shape) / 2**20)
    if options["max_memory"] < least:
        raise invalid("max_memory", options["max_memory"], f"at least {least} MiB, for one image")
    engine = Engine.of(
        denoiser,
        max_batch=options["max_batch"],
        sizes=comma_numbers("sizes", options["sizes"], int),
        policy=Policy(options["policy"], options["patience"]),
        max_queue=options["max_queue"],
        max_memory=options["max_memory"] * 2**20,
        null_class=None if options["null_class"] < 0 else options["null_class"],
        deterministic=options["deterministic"],
        clip_denoised=options["clip_denoised"],
        decoder=decoder,
    )
    limits = Limits(images, options["max_steps"], options["max_seconds"], options["max_body"])
    app = create_app(engine, limits=limits, name=denoiser.name)
    with _listener(options["host"], options["port"]) as listener:
        engine.start()
        host, port = listener.getsockname()[:2]
        greeting = f"serving {denoiser.name} on http://{f'[{host}]' if ':' in host else host}:{port}"
        with short_pauses():
            Server(app, engine, options["grace"], greeting).serve_on(listener)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(engine.statistics.outcomes.items()))
    print(f"stopped; requests: {outcomes or 'none'}")


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        ValueError: there is no such address here, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise invalid("port", port, f"a port that is free at --host {host} ({what}); 0 takes any") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, serve until SIGTERM or Ctrl-C, print; returns the exit status (0, or 2 for a refusal)."""
    return run_command(_serve, argv, stopped=STOPPED["serve"])

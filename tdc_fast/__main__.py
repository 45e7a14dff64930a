"""`python -m tdc_fast` lists the commands."""

from __future__ import annotations

import sys

COMMANDS = {
    "train": "train a denoiser, or base and experts with --groups N",
    "prune": "search the widths of a run's experts",
    "sample": "draw images from a run or from a file of weights",
    "serve": "serve images from a run or a file of weights over HTTP",
    "nll": "measure the variational bound in bits per dimension",
    "evaluate": "compare two sets of images, or a run with images",
    "encode": "encode images into latents for train --latents",
    "latency": "measure how long a model's layers take at each width, for budgets in time",
    "convert": "convert weights of diffusers or guided-diffusion to this library, and back to diffusers",
    "merge": "merge experts into one dense model",
    "demo": "train, compare and write a report on scikit-learn's digits",
}


def main() -> int:
    """Print the commands; returns 0 without arguments or with --help, else 2."""
    print("tdc_fast is a set of commands; each explains its flags with --help:\n")
    for name, does in COMMANDS.items():
        print(f"    python -m tdc_fast.{name:<9} {does}")
    arguments = sys.argv[1:]
    if not arguments or arguments in (["-h"], ["--help"]):
        return 0
    if arguments[0] in COMMANDS:
        print(f"\nerror: write python -m tdc_fast.{arguments[0]}, with a dot", file=sys.stderr)
    else:
        print(f"\nerror: {arguments[0]!r} is no command", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

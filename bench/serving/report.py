"""The table and the picture of a measurement of serving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.files import markdown_rows


def as_markdown(results: dict[str, Any]) -> str:
    """The Markdown file: conditions, what came of the goals, and two tables."""
    machine, settings = results["machine"], results["settings"]
    lines = [
        f"# Serving on {machine['name']}, {machine['threads']} threads",
        "",
        f"{results['date']}, `{results['command']}`, {results['minutes']} minutes; "
        f"torch {results['versions']['torch']}, Python {results['versions']['python']}. {results['note']}".rstrip(),
        "",
        f"Model `{settings['model']}` with random weights, N = {settings['experts']} experts, at most "
        f"{settings['max_batch']} images in a batch, {settings['dtype']}. Every request asks for one image by DDIM in "
        "10, 25 or 50 steps. Real forwards in real time. *engine*: step-level batches, one routed forward. *request "
        "level*: the same model, whole requests of the same steps in a batch. *expert by expert*: step-level batches, "
        "one forward per expert. *dense*: step-level batches of one dense model.",
        "",
        "| goal | measured |",
        "|---|---|",
        *(f"| {goal} | {measured} |" for goal, measured in goals(results)),
        "",
        f"## Closed loop: {results['clients']} clients",
        "",
    ]
    header = ["contestant", "images/s", "p50 ms", "p99 ms"]
    rows = [[name, f"{row['images_per_second']:.1f}", *_latency(row)] for name, row in results["closed"].items()]
    lines += markdown_rows(header, rows)
    capacity = results["capacity"]
    share = f"a share of {capacity:.1f} images/s, the lower of engine and request level"
    lines += ["", f"## Open loop: load as {share}", ""]
    header = ["load", "contestant", "images/s", "p50 ms", "p99 ms", "requests", "unfinished"]
    rows = [
        [
            f"{row['load']:.0%}", row["contestant"], f"{row['images_per_second']:.1f}", *_latency(row),
            str(row["requests"]), str(row["unfinished"]),
        ]
        for row in results["open"]
    ]  # fmt: skip
    return "\n".join([*lines, *markdown_rows(header, rows)]) + "\n"


def goals(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Each goal and what was measured of it."""
    found = []
    at = {(row["contestant"], row["load"]): row for row in results["open"]}
    if ("engine", 0.8) in at and ("request level", 0.8) in at:
        ratio = at["engine", 0.8]["p99"] / at["request level", 0.8]["p99"]
        found.append(("p99 at 80 % load at most 0.5x that of request-level batches", f"{ratio:.2f}x"))
    closed = results["closed"]
    ratio = closed["engine"]["images_per_second"] / closed["expert by expert"]["images_per_second"]
    experts = results["settings"]["experts"]
    found.append((f"at least 2x the images/s of one batch per expert and step, N = {experts}", f"{ratio:.2f}x"))
    shares = ", ".join(f"{share:.1%} ({sampler})" for sampler, share in results["overhead"].items())
    found.append(("everything but the forward at most 5 % of it, at batch 8", shares))
    return found


def _latency(row: dict[str, Any]) -> list[str]:
    return [f"{row[name] * 1e3:.0f}" if math.isfinite(row[name]) else "-" for name in ("p50", "p99")]


def draw_picture(results: dict[str, Any], path: Path) -> None:
    """Latency against load, median and 99th percentile, of everyone who got requests at random times."""
    from matplotlib.ticker import LogLocator

    from tdc_fast.figures import INK, MEASURED, MUTED, new_figure

    figure, axes = new_figure(6.4, 3.4)
    axis = axes[0, 0]
    colours = {"engine": MEASURED, "request level": INK, "dense": MUTED}
    for name, colour in colours.items():
        rows = [row for row in results["open"] if row["contestant"] == name]
        load = [100 * row["load"] for row in rows]
        axis.plot(load, [row["p99"] for row in rows], color=colour, marker="o", label=f"{name}, p99")
        axis.plot(load, [row["p50"] for row in rows], color=colour, marker="o", linestyle=":", label=f"{name}, median")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel(f"load, % of {results['capacity']:.0f} images/s")
    axis.set_ylabel("latency, seconds")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})

"""The table, the picture and the README's sentences of a measurement of serving, all from its JSON file.

`python -m bench.serving.report FILE.json` writes them again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.files import ROOT, markdown_rows

PICTURE = ROOT / "docs" / "serving.svg"
README = ROOT / "README.md"
_MARKS = ("<!-- measured: serving -->", "<!-- end -->")


def capacity_of(closed: Iterable[dict[str, Any]]) -> float:
    """Images per second that both ways of batching serve in closed loops: the lower of the two medians."""
    typical = typical_rows(closed)
    return float(min(typical[name, None]["images_per_second"] for name in ("engine", "request level")))


def typical_rows(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, float | None], dict[str, Any]]:
    """Medians over the repeats by contestant and load, requests and unfinished ones summed."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["contestant"], row.get("load")), []).append(row)
    return {
        key: {name: statistics.median(row[name] for row in group) for name in ("images_per_second", "p50", "p99")}
        | {name: sum(row[name] for row in group) for name in ("requests", "unfinished")}
        for key, group in groups.items()
    }


def as_markdown(results: dict[str, Any]) -> str:
    """The Markdown file: conditions, what came of the goals, and two tables."""
    machine, settings = results["machine"], results["settings"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    lines = [
        f"# Serving on {machine['name']}, {threads}",
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
        f"{_times(settings['repeats'])}, the contestants taking turns, with the same requests at "
        "the same times for all. Numbers are medians of the repeats; requests are those of all repeats. "
        + _others(results),
        "",
        "| goal | measured |",
        "|---|---|",
        *(f"| {goal} | {measured} |" for goal, measured in goals(results)),
        "",
        f"## Closed loop: {results['clients']} clients",
        "",
    ]
    header = ["contestant", "images/s", "p50 ms", "p99 ms", "requests"]
    closed = typical_rows(results["closed"])
    rows = [
        [name, *_numbers(row), str(row["requests"])] for (name, _), row in sorted(closed.items(), key=_engine_first)
    ]
    lines += markdown_rows(header, rows)
    share = f"a share of {results['capacity']:.1f} images/s, the lower of engine and request level above"
    lines += ["", f"## Open loop: load as {share}", ""]
    header = ["load", *header, "unfinished"]
    opened = typical_rows(results["open"])
    rows = [
        [f"{load:.0%}", name, *_numbers(row), str(row["requests"]), str(row["unfinished"])]
        for (name, load), row in sorted(opened.items(), key=lambda item: (item[0][1], _engine_first(item)))
    ]
    return "\n".join([*lines, *markdown_rows(header, rows)]) + "\n"


def _times(repeats: int) -> str:
    return "Everything was measured once" if repeats == 1 else f"Everything was measured {repeats} times"


def _others(results: dict[str, Any]) -> str:
    """How much of the machine somebody else used meanwhile."""
    spent = [row["others"] for row in (*results["closed"], *results["open"]) if row.get("others") is not None]
    if not spent:  # the system does not tell
        return ""
    typical, worst = statistics.median(spent), max(spent)
    return f"Meanwhile other processes used {typical:.2f} processors ({worst:.2f} in the worst run)."


def _engine_first(item: tuple[tuple[str, float | None], Any]) -> int:
    return ("engine", "request level", "expert by expert", "dense").index(item[0][0])


def _numbers(row: dict[str, Any]) -> list[str]:
    latencies = (f"{row[name] * 1e3:.0f}" if math.isfinite(row[name]) else "-" for name in ("p50", "p99"))
    return [f"{row['images_per_second']:.1f}", *latencies]


def p99_ratios(results: dict[str, Any], load: float) -> list[float]:
    """The engine's 99th percentile over that of request-level batches, of every repeat."""
    at = {(row["contestant"], row["repeat"]): row["p99"] for row in results["open"] if row["load"] == load}
    repeats = sorted({repeat for _, repeat in at})
    return [at["engine", repeat] / at["request level", repeat] for repeat in repeats]


def goals(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Each goal and what was measured of it."""
    found = []
    if ratios := p99_ratios(results, 0.8):
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        found.append(("p99 at 80 % load at most 0.5x that of request-level batches", spread))
    closed = typical_rows(results["closed"])
    loop = closed["expert by expert", None]["images_per_second"]
    ratio = closed["engine", None]["images_per_second"] / loop if loop else math.inf
    experts = results["settings"]["experts"]
    found.append((f"at least 2x the images/s of one batch per expert and step, N = {experts}", f"{ratio:.2f}x"))
    shares = ", ".join(f"{share:.1%} ({sampler})" for sampler, share in results["overhead"].items())
    found.append(("everything but the forward at most 5 % of it, at batch 8", shares))
    return found


def draw_picture(results: dict[str, Any], path: Path) -> None:
    """Latency against load, median and 99th percentile, of everyone who got requests at random times."""
    from matplotlib.ticker import LogLocator

    from tdc_fast.figures import INK, MEASURED, MUTED, new_figure

    figure, axes = new_figure(6.4, 3.4)
    axis = axes[0, 0]
    opened = typical_rows(results["open"])
    for contestant, colour in {"engine": MEASURED, "request level": INK, "dense": MUTED}.items():
        rows = sorted((load, row) for (name, load), row in opened.items() if name == contestant and load is not None)
        load = [100 * load for load, _ in rows]
        for name, label, line in (("p99", "p99", "-"), ("p50", "median", ":")):
            latency = [row[name] for _, row in rows]
            axis.plot(load, latency, color=colour, marker="o", linestyle=line, label=f"{contestant}, {label}")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel(f"load, % of {results['capacity']:.0f} images/s")
    axis.set_ylabel("latency, seconds")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def in_words(results: dict[str, Any], table: str) -> str:
    """What the README says of a measurement; `table` is where its table is."""
    opened, closed = typical_rows(results["open"]), typical_rows(results["closed"])
    engine, whole = opened["engine", 0.8], opened["request level", 0.8]
    names = ("engine", "dense", "expert by expert")
    drawn = [f"{closed[name, None]['images_per_second']:.0f}" for name in names]
    machine = results["machine"]
    cores = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    ratio = statistics.median(p99_ratios(results, 0.8))
    text = (
        f"On {cores} of an {machine['name']} ({results['date']}), with the {results['settings']['model']} model and "
        f"N = {results['settings']['experts']} experts, 99 % of the requests were answered within "
        f"{engine['p99'] * 1e3:.0f} ms at 80 % load; with batches of whole requests it took "
        f"{whole['p99'] * 1e3:.0f} ms (ratio {ratio:.2f}, the median of the repeats; the goal is 0.5). With all "
        f"clients busy the engine drew {drawn[0]} images/s, one dense model {drawn[1]}, and a loop over the experts "
        f"{drawn[2]} ([table]({table}))."
    )
    if ("engine", 0.95) in opened:
        near, others = opened["engine", 0.95], opened["request level", 0.95]
        text += (
            f" At 95 % load the median time of a request was {near['p50'] * 1e3:.0f} ms with the engine, at "
            f"{near['images_per_second']:.0f} images/s, and {others['p50'] * 1e3:.0f} ms with batches of whole "
            f"requests, at {others['images_per_second']:.0f} images/s."
        )
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def publish(results: dict[str, Any], table: Path, *, picture: Path = PICTURE, readme: Path = README) -> None:
    """Draw the picture, and put the sentences into the README between their marks.

    Args:
        results: of a measurement with 80 % among its loads.
        table: its Markdown file.
        picture: where the picture goes.
        readme: the file with the marks.

    Raises:
        ValueError: the file has no such marks.
    """
    text = readme.read_text()
    pattern = re.compile(re.escape(_MARKS[0]) + ".*?" + re.escape(_MARKS[1]), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{readme}: expected {_MARKS[0]} and {_MARKS[1]} around what was measured")
    where = table.resolve().relative_to(readme.resolve().parent).as_posix()
    said = "\n".join([_MARKS[0], in_words(results, where), _MARKS[1]])
    draw_picture(results, picture)
    readme.write_text(pattern.sub(lambda _: said, text))


def main(argv: list[str] | None = None) -> int:
    """Write the table, the picture and the README's sentences again, from a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving.report", description=__doc__)
    parser.add_argument("file", type=Path, help="the JSON file of a measurement")
    path = parser.parse_args(argv).file
    results = json.loads(path.read_text())
    table = path.with_suffix(".md")
    table.write_text(as_markdown(results))
    publish(results, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

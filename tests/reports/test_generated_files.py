"""Good files with a few bytes changed: read as what they say, or refused by name; nothing else is written."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tdc_fast.data.dataset import load_dataset
from tdc_fast.grouping.probes import Probes
from tdc_fast.grouping.similarity import TaskSimilarity
from tdc_fast.nn.width_plan import ExpertUnit, WidthPlan
from tdc_fast.pruning.memory import Memory, Round
from tdc_fast.pruning.task import Proposal, Trial
from tdc_fast.routing import TimestepGroups
from tests.data.images import pixels
from tests.generated import examples, is_ours
from tests.reports.test_hostile_text import DOORS


def memory(path: Path) -> None:
    with Memory(path, {"seed": 0}) as search:
        search.add_round(Round(0, 0, "random", 1, (Proposal({"a": 8}, "why"),), ("a note",)))
        search.add_sensitivity(0, {"a": {0: 0.5, 8: 0.25}}, 100)
        values = dict.fromkeys((field for field in Trial.__dataclass_fields__), 0)
        widths = {"widths": {"a": 8}, "proposal": {"a": 8}, "agent": "random", "reason": "why", "score": 0.5}
        search.add_trial(Trial(**{**values, **widths}))


def similarity(path: Path) -> None:
    TaskSimilarity(Probes((0, 4, 10)), np.array([[1.0, 0.5], [0.5, 1.0]])).save(path)


def widths(path: Path) -> None:
    experts = [{"u": ExpertUnit((1, 0), 2)}, {"u": ExpertUnit((0, 1), 1)}]
    WidthPlan(base_hash="ab" * 32, boundaries=(0, 5, 9), experts=tuple(experts), macs=(3, 2.5)).save(path)


OPTIONS = {"lr": 1e-3, "groups": 2, "channel_mult": "1,2", "class_cond": False, "data_dir": "digits"}
WRITERS: dict[str, Callable[[Path], object]] = {
    "groups.json": lambda path: TimestepGroups.uniform(100, 4).save(path),
    "widths.json": widths,
    "similarity.json": similarity,
    "options.json": lambda path: path.write_text(json.dumps(OPTIONS)),
    "options.yaml": lambda path: path.write_text(yaml.safe_dump(OPTIONS)),
    "memory.jsonl": memory,
    "trials.jsonl": memory,
    "model000005.json": lambda path: path.write_text(json.dumps({"step": 5, "config": OPTIONS, "sha256": "ab" * 32})),
    "state.json": lambda path: path.write_text(json.dumps({"step": 5, "files": {"model000005.pt": "ab" * 32}})),
    "losses.jsonl": lambda path: path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'),
}

PIECES = [
    b"\xff", b"\xef\xbb\xbf", b"\0", b"[", b"{", b'"', b"]", b"}", b",", b"\n", b"NaN", b"-Infinity", b"1e999",
    b"9" * 400, b"9" * 5000, b"null", b"true", b"-1", b"0.5", b'""', b'"\\ud800"', b"[[[[", b"&a [*a]", b"!!python/x ",
    b"*a", b"- ", b"\t", b": ", b"..", b"/", b"7", b"[1]", b'{"a":1}',
]  # fmt: skip
Edits = list[tuple[float, int, bytes]]
edits = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from([0, 0, 1, 2, 5, 10**6]), st.sampled_from(PIECES) | st.binary(max_size=3)
    ),
    max_size=3,
)


def edited(content: bytes, changes: Edits) -> bytes:
    """At each place, some bytes are replaced by others; 10**6 bytes is all that follows."""
    for place, removed, added in changes:
        at = int(place * len(content))
        content = content[:at] + added + content[at + removed :]
    return content


def with_values_replaced(content: bytes, place: float, piece: bytes) -> bytes:
    """One of the values of a JSON text replaced by another."""
    ends = [index for index, byte in enumerate(content) if byte in b":,[" and index + 1 < len(content)]
    if not ends:
        return content
    start = ends[int(place * (len(ends) - 1))] + 1
    stop = start
    while stop < len(content) and content[stop] not in b",]}\n":
        stop += 1
    return content[:start] + piece + content[stop:]


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@examples(500)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    changes=edits,
    values=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(PIECES)), max_size=2),
)
def test_a_changed_text_file_is_read_or_refused_by_name(tmp_path_factory, name, changes, values):
    folder = tmp_path_factory.mktemp("text")
    path = folder / name
    WRITERS[name](path)
    content = path.read_bytes()
    for place, piece in values:
        content = with_values_replaced(content, place, piece)
    path.write_bytes(edited(content, changes))
    before = listing(folder)
    try:
        DOORS[name](path)
    except ValueError as refused:
        named = str(folder) in str(refused)
        assert named or (name.startswith("options") and is_ours(refused))  # the option's name is enough
        assert len(str(refused)) < 2000
    after = {entry.replace("state000005.json", "state.json") for entry in listing(folder)}
    assert after == before


def good_image(suffix: str) -> bytes:
    buffer = io.BytesIO()
    kinds = {"jpg": "JPEG", "tif": "TIFF"}
    Image.fromarray(pixels(6, 9, 3)).save(buffer, kinds.get(suffix, suffix.upper()))
    return buffer.getvalue()


IMAGES = {suffix: good_image(suffix) for suffix in ("png", "jpg", "gif", "webp", "bmp", "tif")}
NAMES = ["cat_1", "dog_2", ".hidden", "_", "a b", "ü", "x" * 200, "..x", "-", "1", "a/cat_3", ".d/e", "__MACOSX/f"]
KINDS = ["file", "file", "file", "empty", "pipe", "link", "loop", "broken link", "folder"]


@st.composite
def entries(draw: st.DrawFn) -> list[tuple[str, str, bytes]]:
    """Path, kind and content of what is in a folder."""
    found = []
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)):
        suffix = draw(st.sampled_from([*IMAGES, "PNG", "txt", ""]))
        content = IMAGES[draw(st.sampled_from(sorted(IMAGES)))] if suffix not in IMAGES else IMAGES[suffix]
        found.append((f"{name}.{suffix}", draw(st.sampled_from(KINDS)), edited(content, draw(edits))))
    return found


def put(path: Path, kind: str, content: bytes, folder: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("link", "loop", "broken link"):
        target = {"link": folder / "good.png", "loop": folder, "broken link": folder / "nothing"}[kind]
        path.symlink_to(target)
    else:
        path.write_bytes(content if kind == "file" else b"")


@examples(150)
@given(
    inside=entries(),
    size=st.sampled_from([1, 4, 16]),
    channels=st.sampled_from([None, 1, 3]),
    skip=st.booleans(),
    labels=st.booleans(),
    cache=st.sampled_from([0, 2**20]),
)
def test_a_folder_of_anything_gives_its_images_or_an_error_that_names_a_file(
    tmp_path_factory, inside, size, channels, skip, labels, cache
):
    folder = tmp_path_factory.mktemp("images")
    (folder / "good.png").write_bytes(IMAGES["png"])
    for name, kind, content in inside:
        put(folder / name, kind, content, folder)
    before = listing(folder)
    try:
        data = load_dataset(
            folder,
            image_size=size,
            class_cond=labels,
            on_corrupt="skip" if skip else "error",
            in_channels=channels,
            cache_bytes=cache,
        )
        shown = data.images()
    except ValueError as refused:
        assert not skip and str(folder) in str(refused), refused
    else:
        assert shown.shape[1:] == (channels or 3, size, size) and len(shown) >= 1
        assert bool((shown.abs() <= 1).all())
    assert listing(folder) == before


@examples(150)
@given(
    kind=st.sampled_from(["npz", "npy", "zip"]),
    shape=st.sampled_from([(3, 4, 4, 3), (3, 4, 4), (3, 4, 4, 5), (0, 4, 4, 3), (3, 4, 5, 3), (2,), (), (1, 1, 1, 1)]),
    dtype=st.sampled_from(["uint8", "float32", "float64", "int64", "bool", "complex64", "U3", "O", "datetime64[s]"]),
    labels=st.sampled_from([None, [0, 1, 2], [0, -1, 5], [0, 1], [[0], [1], [2]], [0.5, 1, 2], [2**62] * 3, "abc"]),
    changes=edits,
    size=st.sampled_from([None, 4, 2]),
)
def test_an_array_file_of_anything_gives_its_images_or_an_error_that_names_it(
    tmp_path_factory, kind, shape, dtype, labels, changes, size
):
    path = tmp_path_factory.mktemp("arrays") / f"data.{kind}"
    images = np.zeros(shape, dtype=dtype)
    if kind == "npy":
        np.save(path, images)
    elif kind == "npz":
        np.savez(path, arr_0=images, **({} if labels is None else {"arr_1": np.array(labels)}))
    else:
        path = path.with_suffix(".npz")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY")
    path.write_bytes(edited(path.read_bytes(), changes))
    try:
        data = load_dataset(path, image_size=size, class_cond=labels is not None)
        assert data.images().shape[0] == len(data) >= 1
        assert (data.labels is not None) == (labels is not None)
    except ValueError as refused:
        assert ": got " in str(refused), refused
    assert listing(path.parent) == {path.name}

"""What the site adds to docs/: pages from elsewhere in the repository, the examples, and a check of the API reference.

Links are written as they work in the repository (`../bench/results/x.md`) and are mapped to the site's pages here, so
a page works in both. A link that leads nowhere, a public name that the reference lacks, and a documented function or
class without a docstring are warnings, which a strict build turns into a failure.
"""

from __future__ import annotations

import logging
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "build" / "docs"
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")

log = logging.getLogger("mkdocs.tdc_fast")
anchors: set[str] = set()
"""The ids of all headings of the site; those of the reference are the names that it documents."""


def on_startup(**_: Any) -> None:
    """Lay the package out as it is installed, kernels/ inside tdc_fast/, where mkdocstrings reads it."""
    anchors.clear()
    shutil.rmtree(SOURCES, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "tdc_fast", SOURCES / "tdc_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", SOURCES / "tdc_fast" / "kernels", ignore=ignore)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside docs/, and a page for every example."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for path in [*pages, *ROOT.glob("bench/results/**/*.md"), *ROOT.glob("examples/*.py")]:
        name, content = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            content = f"# {path.stem.replace('_', ' ').capitalize()}\n\n`{name}`\n\n```python\n{content}```\n"
        files.append(File.generated(config, site_path(name), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository at the site's pages; what is no page of it keeps its text alone."""
    src_uri = page.file.src_uri
    in_docs = f"docs/{src_uri}"
    here = "README.md" if src_uri == "index.md" else in_docs if (ROOT / in_docs).exists() else src_uri

    def mapped(link: re.Match[str]) -> str:
        if "://" in link["target"]:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link["target"]))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", here, link["target"])
        if files.get_file_from_path(site_path(path)) is None:
            return link["text"]
        url = posixpath.relpath(site_path(path), posixpath.dirname(src_uri) or ".")
        return f"{link['bang']}[{link['text']}]({url}{link['anchor'] or ''})"

    return LINK.sub(mapped, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Collect the names that the reference documents."""
    if page.file.src_uri.startswith("api/"):
        anchors.update(re.findall(r'<h\d id="(tdc_fast(?:\.\w+)*)"', html))


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of public names that the reference lacks, and of documented ones without a docstring."""
    package = griffe.load("tdc_fast", search_paths=[str(SOURCES)], try_relative_path=False)
    for module in _packages(package):
        public = module.exports if module.exports is not None else []
        for name in [module.path, *(f"{module.path}.{export}" for export in public)]:
            if name not in anchors:
                log.warning("the API reference (docs/api) lacks %s", name)
    for name in sorted(anchors):
        found = package.modules_collection[name]
        if (found.is_class or found.is_function or found.is_module) and not found.has_docstring:
            log.warning("%s is in the API reference and has no docstring", name)


def site_path(path: str) -> str:
    """Where a file of the repository stands in the site."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/").removesuffix(".py") + (".md" if path.endswith(".py") else "")


def _packages(module: Any) -> Iterator[Any]:
    """The package and all packages in it."""
    if module.is_package or module.is_subpackage:
        yield module
        for child in module.modules.values():
            yield from _packages(child)

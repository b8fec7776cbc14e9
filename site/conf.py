"""The documentation as a web site, by Sphinx: make site. A warning, such as a broken link, is an error."""

import posixpath
import re
from pathlib import Path

import lrnn_lm

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(([^):#\s]+)((?:#[^)\s]*)?)\)")

project = "lrnn-lm"
release = lrnn_lm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"lrnn-lm {release}"
myst_heading_anchors = 3  # headings of pages can be linked to, as on code hosts
autodoc_typehints = "none"  # signatures have them


def adapt(app, docname: str, source: list[str]) -> None:
    """README.md becomes the first page; links to files outside docs/ become downloads, folders plain text."""
    folder = posixpath.dirname(f"docs/{docname}")
    if docname == "index":
        folder, source[0] = "", (ROOT / "README.md").read_text(encoding="utf-8") + source[0]

    def link(match: re.Match) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if (ROOT / path).is_dir():
            return text
        shown = posixpath.relpath(path, posixpath.dirname(f"docs/{docname}"))
        if path.startswith("docs/"):
            return f"[{text}]({shown}{anchor})"
        return f"[{text}](path:{shown})"

    source[0] = LINK.sub(link, source[0])


def setup(app) -> None:
    app.connect("source-read", adapt)

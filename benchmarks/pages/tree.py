"""Makes the list of modules in docs/tour.md from the first sentence of each module's docstring.

python -m benchmarks.pages.tree            print it
python -m benchmarks.pages.tree --write    put it into docs/tour.md
"""

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tour.md"
PACKAGES = ("lrnn_lm", "benchmarks", "studies")
OPEN, CLOSE = "<!-- tree -->\n", "<!-- /tree -->"


def first_sentence(module: Path) -> str:
    """The first sentence of a module's docstring. ValueError if it has none."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{module}: a module begins with a docstring that says what it does")
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[^.]\.)\s", paragraph)[0]  # not after `..`


def section(folder: Path) -> list[str]:
    """A folder as a heading and a table of its modules."""
    modules = sorted(p for p in folder.glob("*.py") if p.name not in ("__init__.py", "__main__.py"))
    init = folder / "__init__.py"
    lines = [
        f"**`{folder.relative_to(ROOT)}/`** {first_sentence(init)}",
        "",
        "| file | what it does |",
        "|---|---|",
    ]
    lines += [f"| [{p.name}](../{p.relative_to(ROOT)}) | {first_sentence(p)} |" for p in modules]
    return [*lines, ""]


def tree() -> str:
    """Every folder with modules, the trunk's first."""
    lines = []
    for package in PACKAGES:
        for init in sorted((ROOT / package).rglob("__init__.py")):
            lines += section(init.parent)
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with the list between its marks."""
    before, rest = page.split(OPEN)
    return before + OPEN + "\n" + tree() + "\n" + CLOSE + rest.split(CLOSE)[1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--write", action="store_true")
    if not options.parse_args().write:
        print(tree())
        return
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

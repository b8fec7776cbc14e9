"""The documentation as a web site: it builds without a warning, and what pages link to is there."""

from pathlib import Path

import yaml
from forks import run_code

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path):
    code = "import sys; from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))"
    words = ("-q", "-W", "-c", "site", "-d", tmp_path / "trees", "docs", tmp_path / "site")
    built = run_code(code, *words, cwd=ROOT)
    assert built.returncode == 0, built.stderr[-3000:]
    first = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert 'href="training.html"' in first  # of README.md, whose links begin with docs/
    assert "lrnn_lm.mixers.BlockDiagonalLRU" in (tmp_path / "site/reference.html").read_text(encoding="utf-8")
    pictures = {path.name for path in (tmp_path / "site/_images").iterdir()}
    assert {"lm.png", "decode-h100.png"} <= pictures
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.stem for path in (tmp_path / "site").glob("*.html")} - {"genindex", "search"}


def test_the_hosted_ci_calls_what_is_there():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = [step["run"].split()[1] for job in jobs.values() for step in job["steps"]
              if step.get("run", "").startswith("make ")]  # fmt: skip
    assert set(called) == {"lint", "test", "test-all", "install", "site"}
    assert all(f"\n{name}:" in makefile for name in called)

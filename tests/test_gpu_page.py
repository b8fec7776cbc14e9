"""docs/gpu.md names every module with code that CI, which has no GPU, does not run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lrnn_lm"
ASKS = re.compile(
    r"\.is_cuda\b|\.type [!=]= \"cuda\"|torch\.cuda\.(is_available|get_rng_state|get_device_capability)\(\)?"
)


def test_every_module_that_asks_for_its_device_is_on_the_page() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    asking = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if ASKS.search(path.read_text())]
    assert len(asking) > 10
    assert [str(path) for path in asking if f"`{path}`" not in page] == []


def test_every_path_on_the_page_exists() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    for path in re.findall(r"tests/[\w/]+(?:\.py)?", page):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`([a-z_]+/[\w/]*(?:\.py)?)`", page):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path

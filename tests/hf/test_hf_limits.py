"""What importing and `--help` may cost, and how libraries that are too old are told."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
from forks import LIBRARIES, LRNN

from lrnn_lm import __version__
from lrnn_lm.cli import main
from lrnn_lm.requirements import LEAST, TRANSFORMERS_TEXT, check_extra

ROOT = Path(__file__).parents[2]


def python(*arguments: str, first: str = "") -> subprocess.CompletedProcess:
    path = os.pathsep.join([*([first] if first else []), str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def children_seconds() -> float:
    """The processor's time of the processes that were started here and have ended."""
    used = os.times()
    return used.children_user + used.children_system


def best_of(times: int, measure) -> float:
    return min(measure() for _ in range(times))


def test_import_takes_less_than_300_ms():
    """Of the processor's time: what else runs on the machine does not count."""
    code = "import time; t = time.process_time(); import lrnn_lm; print(time.process_time() - t)"
    assert best_of(5, lambda: float(python("-c", code).stdout)) < 0.3


def test_help_takes_less_than_500_ms():
    def measure() -> float:
        start = children_seconds()
        assert "Usage: lrnn" in python("-m", "lrnn_lm.cli", "--help").stdout
        return children_seconds() - start

    assert best_of(5, measure) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_imports_no_libraries(arguments):
    code = (
        "import sys; from lrnn_lm.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.fixture
def with_version(tmp_path):
    """A function from a package and a version to a folder where just the record of these is installed."""

    def install(package: str, version: str) -> str:
        record = tmp_path / f"{package}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        return str(tmp_path)

    return install


@pytest.fixture
def with_transformers(with_version):
    return partial(with_version, "transformers")


def test_a_transformers_too_old(with_transformers):
    version = "5.16.9"
    folder = with_transformers(version)
    done = python("-m", "lrnn_lm.cli", "info", "recipes/demo.yaml", first=folder)
    assert done.returncode == 2
    assert done.stderr == (
        f"lrnn: lrnn-lm needs transformers {TRANSFORMERS_TEXT}, {version} is installed: "
        f"pip install 'transformers{TRANSFORMERS_TEXT}'\n"
    )
    # Commands that need no model are refused as well: none begins work that it cannot end.
    for command in (["report", "runs/none"], ["bench", "--compare", "none.json"], ["prepare", "none.yaml"]):
        assert python("-m", "lrnn_lm.cli", *command, first=folder).stderr == done.stderr
    done = python("-c", "import lrnn_lm.model", first=folder)
    assert done.stderr.splitlines()[-1].startswith(
        "lrnn_lm.requirements.UnmetRequirementError: lrnn-lm needs"
    )
    for help_of in ([], ["train"]):
        assert "Usage" in python("-m", "lrnn_lm.cli", *help_of, "--help", first=folder).stdout
    assert python("-m", "lrnn_lm.cli", "--version", first=folder).stdout == f"lrnn-lm {__version__}\n"


@pytest.mark.parametrize("version", ["5.17.0", "5.18.0.dev0", "5.24.9"])
def test_new_enough_transformers(version, with_transformers):
    assert checked(with_transformers(version)).returncode == 0


@pytest.mark.parametrize("version", ["4.57.1", "5.25.0", "6.0.0"])
def test_too_old_or_new_transformers(version, with_transformers):
    assert f"{version} is installed" in checked(with_transformers(version)).stderr


def checked(folder: str) -> subprocess.CompletedProcess:
    return python(
        "-c", "from lrnn_lm.requirements import check_transformers; check_transformers()", first=folder
    )


@pytest.mark.parametrize(
    ("module", "version", "extra", "command"),
    [
        ("lm_eval", "0.4.11", "eval", ["eval", "MODEL", "--tasks", "heldout_cloze"]),
        ("torchao", "0.17.0", "torchao", ["export", "MODEL", "out", "--dtype", "int8"]),
    ],
)
def test_a_library_of_an_extra_that_is_too_old(
    module, version, extra, command, with_version, make_checkpoint, tmp_path
):
    folder = with_version(module, version)
    (tmp_path / f"{module}.py").write_text("raise AssertionError('imported')")
    model = str(make_checkpoint("bd_lru"))
    code = f"import sys; sys.path.insert(0, {folder!r}); {LRNN}"
    done = LIBRARIES.run(code, *(model if w == "MODEL" else w for w in command))
    least = f"{module}>={'.'.join(map(str, LEAST[module]))}"
    told = f"lrnn-lm needs {least.replace('>', ' >')}, {version} is installed: pip install '{least}'"
    assert (done.returncode, done.stderr) == (2, f"lrnn: {told}\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert least.replace("_", "-") in project["optional-dependencies"][extra]


def test_a_checkout_on_the_path_has_no_version_to_check(tmp_path, monkeypatch):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_extra("torchao", "torchao")


def test_an_unknown_mixer_in_config_json(make_checkpoint, tmp_path, capsys):
    folder = shutil.copytree(make_checkpoint(), tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mixer": {"type": "bd_lruu"}}))
    for command in (["generate", str(folder)], ["info", str(folder)]):
        with pytest.raises(SystemExit) as done:
            main(command)
        assert done.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("lrnn: ")
        assert "unknown mixer type 'bd_lruu'; did you mean 'bd_lru'?" in error


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert not done.value.code
    assert capsys.readouterr().out == f"lrnn-lm {__version__}\n"

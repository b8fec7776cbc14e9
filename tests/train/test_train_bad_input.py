"""What a user can get wrong ends in exit code 2 and one or two plain lines; nothing is lost.

A full disk is in test_train_checkpoint.py, as is a damaged checkpoint, which is no mistake of the user's.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from forks import run_code
from small_models import fill_memory
from tiny_run import fingerprint, write_recipe
from trainers import main_exits

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """Overrides, what is done to the run's folder before, and what the message must say."""

    name: str
    overrides: tuple[str, ...]
    words: tuple[str, ...]
    before: Prepare = field(default=lambda folder: None)
    trained: bool = False  # after a first run of one step


def write(name: str, data: bytes) -> Prepare:
    return lambda folder: (folder / name).write_bytes(data)


def shard(folder: Path) -> Path:
    return next((folder / "cache/data").glob("*/train-00000.tokens.bin"))


def flip_shard(folder: Path) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[1000] ^= 255
    shard(folder).write_bytes(data)


def cut_shard(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-2])


def swap_tokenizer(folder: Path) -> None:
    path = next((folder / "cache/data").glob("*/tokenizer/tokenizer.json"))
    data = json.loads(path.read_text())
    data["model"]["merges"] = data["model"]["merges"][:-1]
    path.write_text(json.dumps(data))


def store_key(folder: Path) -> None:
    """As a version would that knows more keys."""
    path = folder / "runs/tiny/recipe.yaml"
    path.write_text(path.read_text().replace("train:\n", "train:\n  of_tomorrow: 1\n"))


def text(name: str) -> tuple[str, ...]:
    """The source is this text file of the folder, with a tokenizer that needs little text."""
    return ("data.source.type=text", f"data.source.path=FOLDER/{name}")


CASES = [
    Case("unknown key", ("model.hiden_size=4",), ("model.hiden_size", "unknown key", "'hidden_size'")),
    Case("unknown section", ("optimizer.lr=1",), ("optimizer", "unknown key", "'optim'")),
    Case("wrong type", ("optim.lr=fast",), ("optim.lr", "number", "'fast'")),
    Case("not a count", ("train.tokens=many",), ("train.tokens", "2M", "'many'")),
    Case("block size 0", ("model.mixer.block_size=0",), ("model.mixer.block_size", "1", "0")),
    Case("no value", ("model.hidden_size",), ("model.hidden_size", "section.key=value")),
    Case("budget below a step", ("train.tokens=100",), ("train.tokens 100", "one step", "512")),
    Case("unknown optimizer", ("optim.name=adamww",), ("optim.name", "'adamww'", "did you mean 'adamw'")),
    Case("parameter count", ("model.parameters=7",), ("model.parameters", "7")),
    Case("unknown task", ("eval.during={tasks: [heldout_clze]}",), ("unknown task", "heldout_cloze")),
    Case("no such text", text("none.txt"), ("none.txt", "no such file")),
    Case("empty text", text("empty.txt"), ("empty.txt", "empty"), write("empty.txt", b"")),
    Case("binary text", text("a.bin"), ("a.bin", "binary"), write("a.bin", bytes(range(256)) * 40)),
    Case("broken JSONL", ("data.source.path=FOLDER/b.jsonl",), ("b.jsonl:1", "JSON"),
         write("b.jsonl", b"{\n")),
    Case("too short", ("data.sequence_length=65536", "train.tokens_per_step=65536", "train.tokens=65536"),
         ("too short", "65537")),
    Case("vocabulary", ("model.vocab_size=30000",),
         ("vocab_size 30000", "larger than", "largest that works")),
    Case("hub data", ("data.source.type=hf", "data.source.path=no-such-owner/no-such-set"),
         ("no-such-owner/no-such-set", "local copy")),
    Case("hub tokenizer", ("data.tokenizer=no-such-owner/no-such-tokenizer",),
         ("no-such-owner/no-such-tokenizer", "local copy")),
    Case("bf16 on a CPU", ("train.precision=bf16",), ("train.precision", "bf16", "fp32")),
    Case("no CUDA", ("train.device=cuda",), ("train.device", "no CUDA device")),
    Case("runs_dir is a file", ("train.runs_dir=FOLDER/file",), ("file/tiny", "Not a directory"),
         write("file", b"")),
    Case("another model", ("model.hidden_size=40", "model.mixer.block_size=4"),
         ("hidden_size: was 32, is 40", "block_size: was 2, is 4", "name=.."), trained=True),
    Case("another mixer", ("model.mixer={type: h_lru, num_blocks: 8, order: 2}",),
         ("(model.mixer.type: was 'bd_lru', is 'h_lru'). Give",), trained=True),
    Case("another seed", ("seed=3",), ("seed: was 0, is 3",), trained=True),
    Case("stored by a newer version", (),
         ("runs/tiny/recipe.yaml", "train.of_tomorrow: unknown key", "newer lrnn-lm", "name=.."), store_key,
         True),
    Case("rows left out by an older version", (), ("runs/tiny/skips.json", "name=.."),
         write("runs/tiny/skips.json", b"[[48, 64]]"), True),
    Case("flipped byte", (), ("train-00000.tokens.bin", "damaged", "lrnn prepare"), flip_shard, True),
    Case("shard cut short", (), ("train-00000.tokens.bin", "damaged", "lrnn prepare"), cut_shard, True),
    Case("another tokenizer", (), ("tokenizer", "did not make the shards", "lrnn prepare"), swap_tokenizer,
         True),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data prepared and a run of one step. To be copied."""
    folder = tmp_path_factory.mktemp("trained")
    main_exits(0, "train", write_recipe(folder), "train.tokens=512")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(
    case: Case,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if case.name == "unknown task":
        request.getfixturevalue("few_tasks")
    if case.name == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "folder"
    shutil.copytree(trained, folder, symlinks=True, copy_function=shutil.copy2)
    recipe = write_recipe(folder)  # its paths are those of the copy
    run = folder / "runs/tiny"
    if not case.trained:
        shutil.rmtree(run)
    else:  # the copied run, as if made here
        stored = run / "recipe.yaml"
        stored.write_text(stored.read_text().replace(str(trained), str(folder)))
    before = fingerprint(run / "checkpoints/latest") if case.trained else None
    case.before(folder)
    capsys.readouterr()
    main_exits(
        2, "train", recipe, "train.tokens=1024", *(o.replace("FOLDER", str(folder)) for o in case.overrides)
    )
    errors = capsys.readouterr().err
    lines = [
        line for line in errors.splitlines() if line.strip() and not line.startswith(("⠋", "⠙", "⠹", "⠸"))
    ]
    said = lines[-1].replace(str(folder), "")
    assert said.startswith("lrnn: ")
    assert len(lines) <= 2
    assert len(said) <= 400
    assert "Traceback" not in errors
    for word in case.words:
        assert word in said
    assert not list(folder.rglob(".building-*"))
    if case.trained:
        assert fingerprint(run / "checkpoints/latest") == before
    else:
        assert not run.exists()


# Wrong values of the sections that are off by default, and what is told before the first step.
RAMP = "train.ramp={start: 128, tokens: 1152}"
SECTIONS = [
    ("train.average={decay: 1.0}", "train.average.decay"),
    ("train.average={every: 0}", "train.average.every"),
    ("train.average={every: 13}", "pays for 12: the average would be the initial weights; lower it"),
    ("train.average={start: 12 steps}", "train.average.start takes 12 steps and train.tokens pays for 12"),
    ("train.average={deccay: 0.9}", "did you mean 'decay'"),
    ("eval.during={tasks: []}", "eval.during.tasks"),
    ("eval.during={every: 4 steps}", "eval.during.tasks"),
    ("eval.during={tasks: [heldout_cloze], limit: 0}", "eval.during.limit"),
    ("eval.during={tasks: [heldout_cloze], every: never}", "eval.during.every"),
    ("eval.during={tasks: [heldout_cloze], evry: 4}", "did you mean 'every'"),
    ("eval.during={tasks: [offline_wikitext]}", "offline_wikitext reads a folder of local files"),
    ("train.guard={deviations: 0}", "train.guard.deviations: "),
    ("train.guard={window: 1}", "train.guard.window: "),
    ("train.profile={at: 0}", "train.profile.at"),
    ("train.profile={at: 4, steps: 0}", "train.profile.steps"),
    ("train.profile={steps: 2}", "train.profile.at"),
    ("train.profile={at: 11, steps: 3}", "train.profile ends after step 13 and train.tokens pays for 12"),
    ("train.ramp={start: 192, tokens: 1000}", "train.ramp.start 192 must divide"),
    ("train.ramp={start: 512, tokens: 1000}", "train.ramp.start 512 must divide"),
    ("train.ramp={start: 32, tokens: 1000}", "multiple of data.sequence_length 64"),
    ("train.ramp={start: 128, tokens: 1M}", "no full step is left"),
    ("train.timeout_minutes=1e300", "train.timeout_minutes: "),  # what no clock counts
    ("train.stall_minutes=1e300", "train.stall_minutes: "),
    ("data.source.limit=99999999999999999999", "data.source.limit: "),
    ("train.tokens=1e19", "from 0 to below 2^63"),  # what neither torch nor the clock counts
    ("train.tokens=1e400", "expected a count such as 2M"),
    ("train.tokens_per_step=1e999999999", "expected a count such as 2M"),
    ("model.hidden_size=99999999999999", "model.hidden_size: input should be less than"),
    ("model.num_hidden_layers=9999999999", "model.num_hidden_layers: input should be less than"),
    ("model.mixer.num_blocks=99999999999", "model.mixer.num_blocks: input should be less than"),
    ("data.sources={web: {type: text}}", "data.sources: takes a list, as in [a, b], not {'web'"),
    ("data.source.options=[1]", "data.source.options: takes keys and values, not ['1']"),
    ("checkpoint.copy_to=s3://", "names no place: give a URL such as s3://bucket/folder"),
    ("model.init_from=s3:", "names no place: give a URL such as s3://bucket/folder"),
    # Tasks that no run can be scored on: told before its first step, not after its last.
    ("eval.tasks=[offline_lambada]", "lrnn eval CHECKPOINT --tasks offline_lambada --data DIR"),
    ("eval.tasks=[heldout_bits_per_byte, offline]", "eval.tasks: offline reads a folder of local files"),
    ("eval.tasks=[mad_compression]", "asks an auto-encoder, and this run trains a language model"),
    ("eval.during={tasks: [mad_*]}", "asks an auto-encoder, and this run trains a language model"),
    *(
        (f"{key}={begin}/x", f"no such {what} here")
        for key in ("data.source.path", "data.tokenizer", "data.cache_dir", "model.init_from")
        for begin, what in (("~no-such-user", "user"), ("$NO_SUCH/", "variable"), ("${NO_SUCH}", "variable"))
    ),
    ("train.runs_dir=$NO_SUCH/runs", "no such variable here"),  # no folder of that name is made
    ("checkpoint.copy_to=$NO_SUCH/runs", "no such variable here"),
    (RAMP, "optim.warmup=1024", "optim.warmup: with train.ramp, write a number of steps"),
    (RAMP, "data.curriculum=[{length: 4, steps: 2}]", "train.ramp and data.curriculum"),
]


@pytest.mark.parametrize("case", SECTIONS, ids=lambda case: " ".join(case[:-1]))
def test_bad_sections(case: tuple[str, ...], recipe: Path, tmp_path: Path, capsys) -> None:
    *overrides, words = case
    main_exits(2, "train", recipe, f"train.runs_dir={tmp_path}", *overrides)
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "tiny/metrics.jsonl").exists()


@pytest.mark.parametrize(
    "recipe", ["none.yaml", "folder", "list.yaml", "broken.yaml", "circle.yaml", "binary.yaml"]
)
def test_bad_recipe_files(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    (tmp_path / "broken.yaml").write_text("model: {hidden_size: 3\n")
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml\n")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    main_exits(2, "train", tmp_path / recipe)
    errors = capsys.readouterr().err
    assert recipe in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(("name", "package"), [("wandb", "'lrnn-lm[wandb]'"), ("comet_ml", "comet-ml")])
def test_a_tracker_that_is_not_installed(
    name: str, package: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("lrnn_lm.train.runtime.find_spec", lambda name: None)
    main_exits(2, "train", recipe, f"train.runs_dir={tmp_path}", f"tracking.trackers=[{name}]")
    assert f"pip install {package}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_gpu(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_memory(monkeypatch)
    main_exits(2, "train", recipe, f"train.runs_dir={tmp_path}", "train.tokens=2M")
    asked, remedy = capsys.readouterr().err.strip().splitlines()[-2:]
    assert asked == "lrnn: no room on the GPU for 2.50 GiB more"
    for option in ("train.micro_batch", "train.activation_checkpointing", "train.segment"):
        assert option in remedy


# `lrnn train RECIPE` with each override, where the hub's name resolves.
EACH = """
import sys
from datasets import config
from huggingface_hub import constants
from lrnn_lm.cli import main
constants.ENDPOINT = config.HF_ENDPOINT = "http://127.0.0.1:9"
constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = False
for override in sys.argv[2:]:
    try:
        main(["train", sys.argv[1], override])
    except SystemExit as end:
        assert end.code == 2, end.code
"""


def test_a_hub_that_refuses_is_given_up_on(tmp_path: Path) -> None:
    """Not offline, the name resolves, nobody answers: said soon, not after a minute of retries."""
    overrides = ["data.tokenizer=no-such-owner/no-such-one", "data.source={type: hf, path: no-such-owner/x}"]
    done = run_code(EACH, write_recipe(tmp_path), *overrides, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("lrnn: ") == done.stderr.count("local copy") == 2
    assert "Traceback" not in done.stderr
    assert "Retry" not in done.stderr  # which the hub's library tells, each time

"""Trains on one GPU and on several, for the measured numbers of docs/scaling.md.

    python -m benchmarks.gpu.scaling --output docs/results/scaling.json      # about 3 minutes on two H100
    python -m benchmarks.gpu.scaling --gpus 4 --output scaling-4.json        # with HSDP, 2 x 2
    python -m benchmarks.gpu.scaling --gpus 4 --check --output agree-4.json  # only whether all agree
    python -m benchmarks.gpu.scaling --table docs/results/scaling.json       # its Markdown
    python -m benchmarks.gpu.scaling --device cpu --output scaling.json # a rehearsal, with a tiny model

Rows are random words, so no corpus is needed. One process measures one GPU; then a process a GPU, started by
this project's launcher with recipes/accelerate/ddp.yaml, trains with DDP, with FSDP2 and, on four GPUs, with
HSDP. FSDP2's residual stream is bf16, like its parameters, so one GPU is also measured that way: like is
compared with like. Before that, a small model in fp32 checks that all agree, with AdamW and with Muon, and
that a run saved and resumed under FSDP2 and HSDP equals one that was not.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import harmonic_mean, mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = 50_000
COUNTS = {2: "two", 4: "four"}  # GPUs
KINDS = {"ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP"}
BIG = [
    "model.vocab_size=50280",
    "data.sequence_length=2048",
    "train.tokens_per_step=524288",
    "train.micro_batch=16",
]
SMALL = [
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.intermediate_size=96",
    "model.mixer.num_blocks=16", "model.vocab_size=50280", "model.parameters=null",
    "data.sequence_length=128", "train.tokens_per_step=2048", "train.micro_batch=4", "train.precision=fp32",
    "train.compile=false", "optim.schedule=constant", "optim.warmup=0", "checkpoint.every=100 steps",
]  # fmt: skip
TINY = [
    *SMALL[:4], "model.vocab_size=50280", "model.parameters=null", "data.sequence_length=128",
    "train.tokens_per_step=2048", "train.micro_batch=2",
]  # fmt: skip


def write_words(folder: Path, documents: int) -> list[str]:
    """A tokenizer of whole words and random text in them; the overrides that name both."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder / "tokenizer")
    rng = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(documents):
            words = " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(200, 2000)))
            file.write(json.dumps({"text": words}) + "\n")
    return [
        f"data.source={{type: jsonl, path: {folder / 'text.jsonl'}}}",
        f"data.tokenizer={folder / 'tokenizer'}",
        "data.validation_fraction=0.02", f"data.cache_dir={folder / 'cache'}", "data.num_proc=4",
        f"train.runs_dir={folder / 'runs'}", "eval.every=100000 steps", "eval.tokens=2048", "eval.tasks=[]",
        "train.inspect_every=null",
    ]  # fmt: skip


def run(name: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Train the paper's BD M=4 with these overrides, in this process; its lines."""
    import torch
    from accelerate.state import AcceleratorState
    from rich.console import Console

    from lrnn_lm.recipe import load_recipe
    from lrnn_lm.train.build import build_trainer

    AcceleratorState._reset_state()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    recipe = load_recipe(ROOT / "recipes/paper/bd-lru-m4.yaml", [f"name={name}", *overrides])
    began = time.time()
    trainer = build_trainer(recipe, Console(quiet=True))
    trainer._validate_if_due = lambda *_: None  # it is not measured, and compiles the blocks again
    trainer.run()
    if trainer.accelerator.is_main_process:
        print(f"{name}: {time.time() - began:.1f} s", flush=True)
    folder = trainer.folder
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tokens(base: list[str], steps: int) -> str:
    a_step = next(o for o in base if o.startswith("train.tokens_per_step=")).split("=")[1]
    return f"train.tokens={steps * int(a_step)}"


def small_losses(name: str, steps: int, common: list[str], *more: str) -> list[float]:
    lines = run(name, [*SMALL, tokens(SMALL, steps), *common, *more])
    return [line["loss"] for line in lines if "loss" in line]


def saved_at(steps: int) -> int:
    """The step after which a checkpoint is written, beside the steps that follow."""
    return max(2, 5 * steps // 7)


def speed(lines: list[dict[str, Any]], warm: int) -> dict[str, Any]:
    """Medians over the steps after the first few and before the checkpoint; what it cost."""
    steps = [line for line in lines if "loss" in line]
    steady = steps[warm : saved_at(len(steps))]
    stalls = [line["checkpoint_seconds"] for line in steps if "checkpoint_seconds" in line]
    return {
        "steps": len(steady),
        "tokens_per_second": median(line["tokens_per_second"] for line in steady),
        "tokens_per_second_min": min(line["tokens_per_second"] for line in steady),
        "mfu": steady[-1]["mfu"] and median(line["mfu"] for line in steady),
        "memory_bandwidth": steady[-1]["memory_bandwidth"]
        and median(line["memory_bandwidth"] for line in steady),
        "tokens_per_second_each": [line["tokens_per_second"] for line in steps],
        "data_wait": mean(line["data_wait"] for line in steady),
        "host_idle": median(line["host_idle"] for line in steady),
        "memory_bytes": steps[-1]["memory_bytes"],
        "checkpoint_stalls_seconds": stalls,
    }


def links(device: str) -> dict[str, float]:
    """Bytes a second that a rank sends when fp32 gradients are summed and bf16 parameters gathered (212M)."""
    import torch
    from torch import distributed as dist

    size = 212_000_000 if device == "cuda" else 1_000_000
    gradients = torch.zeros(size, device=device)
    shard = torch.zeros(size // 2, device=device, dtype=torch.bfloat16)
    gathered = torch.zeros(size, device=device, dtype=torch.bfloat16)
    seconds = {}
    for name, call in {
        "all_reduce": lambda: dist.all_reduce(gradients),
        "all_gather": lambda: dist.all_gather_into_tensor(gathered, shard),
    }.items():
        times = []
        for _ in range(6):
            dist.barrier()
            began = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        seconds[name] = median(times[2:])
    return {"all_reduce": 4 * size / seconds["all_reduce"], "all_gather": size / seconds["all_gather"]}


def work(options: argparse.Namespace) -> None:
    """In every rank: the runs of this number of ranks, into a file of the first one's."""
    ranks, common = options.ranks, json.loads(options.common)
    big = TINY if options.device == "cpu" else BIG
    steps = options.steps
    saving = f"checkpoint.every={saved_at(steps)} steps"
    found: dict[str, Any] = {"agree": {}, "speed": {}}
    for kind in list(KINDS)[: {1: 1, 2: 2, 4: 3}[ranks]]:
        label = "one" if ranks == 1 else kind
        parallel = [f"train.parallel={kind}"]
        if kind == "hsdp":
            parallel = ["train.parallel=fsdp2", "train.shard_size=2"]
        for name, muon in (("", []), (", Muon", ["optim.name=muon"])):
            whole = small_losses(f"small-{label}{name[2:]}", 6, common, *parallel, *muon)
            found["agree"][label + name] = whole
            if kind != "ddp":
                resumed = f"resumed-{label}{name[2:]}"
                small_losses(resumed, 3, common, *parallel, *muon)
                again = small_losses(resumed, 6, common, *parallel, *muon)
                found["agree"][f"{label}{name}, saved and resumed"] = again
        if options.check:
            continue
        lines = run(f"big-{label}", [*big, tokens(big, steps), *common, *parallel, saving])
        found["speed"][label] = speed(lines, warm=3)
    if ranks == 1 and not options.check:
        bf16 = "train.residual_in_fp32=false"
        lines = run("big-one-bf16", [*big, tokens(big, steps), *common, saving, bf16])
        found["speed"]["one, residual in bf16"] = speed(lines, warm=3)
    if ranks > 1 and not options.check:
        found["links"] = links(options.device)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(options.part).write_text(json.dumps(found))


def lead(options: argparse.Namespace) -> None:
    """Write the text, start the processes, put their numbers together."""
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common = write_words(folder, 300 if options.device == "cpu" else 3000)
        common.append(f"train.device={options.device}")
        parts = []
        for ranks in (1, options.gpus):
            part = folder / f"part-{ranks}.json"
            worker = [
                str(Path(__file__).resolve()), "--worker", "--ranks", str(ranks), "--steps",
                str(options.steps), "--device", options.device, "--common", json.dumps(common), "--part",
                str(part), *["--check"] * options.check,
            ]  # fmt: skip
            launcher = [
                "-m", "lrnn_lm.train.launch", "--config_file", str(ROOT / "recipes/accelerate/ddp.yaml"),
                "--num_processes", str(options.gpus), "--main_process_port", "0",
            ]  # fmt: skip
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            surroundings = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
            if ranks == 1:
                launcher, surroundings = [], surroundings | {"CUDA_VISIBLE_DEVICES": "0"}
            subprocess.run([sys.executable, *launcher, *worker], env=surroundings, cwd=ROOT, check=True)
            parts.append(json.loads(part.read_text()))
    found = {key: parts[0][key] | parts[1][key] for key in ("agree", "speed")}
    result = {
        "about": about(options.device, options.gpus),
        **found,
        "links": parts[1].get("links"),
        "checks": checks(found, options.gpus),
        "seconds": time.time() - began,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["checks"], indent=1) if options.check else table(result))


def checks(found: dict[str, Any], gpus: int) -> dict[str, Any]:
    agree, fast = found["agree"], found["speed"]
    worst = {}
    for label, losses in agree.items():
        one = agree["one, Muon" if "Muon" in label else "one"]
        worst[label] = max(abs(a / b - 1) for a, b in zip(losses, one, strict=True))
    again = ", saved and resumed"
    pairs = [(label, label.removesuffix(again)) for label in agree if again in label]
    return {
        "largest_relative_difference_of_losses": worst,
        "resumed_equals_straight": all(agree[resumed] == agree[straight] for resumed, straight in pairs),
        "efficiency": efficiency(fast, gpus),
    }


def efficiency(fast: dict[str, Any], gpus: int = 2) -> dict[str, dict[str, float]]:
    """Of `gpus` times one GPU's speed, {kind: {"steady": of the medians before the checkpoint, "all": of all
    steps after the first, the checkpoint's among them}}. FSDP2 beside one GPU with the same residual stream
    where that was measured, as "fsdp2, like for like"; so with HSDP.
    """

    def whole(kind: str) -> float:
        return harmonic_mean(fast[kind]["tokens_per_second_each"][1:])  # steps have equal tokens

    pairs = {kind: (kind, "one") for kind in KINDS if kind in fast}
    if (like := "one, residual in bf16") in fast:
        pairs |= {f"{kind}, like for like": (kind, like) for kind in ("fsdp2", "hsdp") if kind in fast}
    return {
        name: {
            "steady": fast[kind]["tokens_per_second"] / (gpus * fast[one]["tokens_per_second"]),
            "all": whole(kind) / (gpus * whole(one)),
        }
        for name, (kind, one) in pairs.items()
    }


def about(device: str, gpus: int) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    recipe = "recipes/paper/bd-lru-m4.yaml"
    return {"device": name, "count": gpus, "torch": torch.__version__, "recipe": recipe}


def table(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    gpus = result["about"]["count"]
    labels = {"one": "one GPU", "one, residual in bf16": "one GPU, residual stream in bf16"}
    labels |= {kind: f"{COUNTS[gpus]}, {name}" for kind, name in KINDS.items()}
    times = "twice" if gpus == 2 else f"{COUNTS[gpus]} times"
    shares = efficiency(result["speed"], gpus)
    lines = [
        f"| | tokens/s | of {times} one | over all steps | MFU | bandwidth | data wait "
        "| host idle | peak memory | checkpoint stall |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for kind, label in labels.items():
        if kind not in result["speed"]:
            continue
        row = result["speed"][kind]
        of_one = shares.get(f"{kind}, like for like", shares.get(kind))
        share = [f"{of_one[key]:.3f}" for key in ("steady", "all")] if of_one else ["", ""]
        ceilings = [f"{row[key]:.1%}" if row[key] else "" for key in ("mfu", "memory_bandwidth")]
        stalls = ", ".join(f"{seconds:.2f} s" for seconds in row["checkpoint_stalls_seconds"])
        cells = [label, f"{row['tokens_per_second']:,.0f}", *share, *ceilings, f"{row['data_wait']:.2%}",
                 f"{row['host_idle']:.0%}", f"{row['memory_bytes'] / 1e9:.1f} GB", stalls]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    worst = result["checks"]["largest_relative_difference_of_losses"]
    differences = ", ".join(f"{label} {value:.1e}" for label, value in worst.items() if label != "one")
    resumed = "equal" if result["checks"]["resumed_equals_straight"] else "NOT equal"
    sharded = "FSDP2 and HSDP" if "hsdp" in result["speed"] else "FSDP2"
    lines += [
        "",
        "Losses of a small model in fp32, not compiled, over 6 steps: largest relative difference from one",
        f"GPU {differences}.",
        f"Saved and resumed under {sharded}, they are {resumed} to those of an uninterrupted run, bit for "
        "bit.",
        f"A rank sends {result['links']['all_reduce'] / 1e9:.0f} GB/s in an all-reduce of fp32 gradients and "
        f"{result['links']['all_gather'] / 1e9:.0f} GB/s in an all-gather of bf16 parameters.",
    ]
    if "one, residual in bf16" not in result["speed"]:
        lines += [
            "",
            "**FSDP2 is not compared like for like**: its residual stream is bf16, that of one GPU fp32.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/scaling.json"))
    parser.add_argument("--gpus", type=int, choices=COUNTS, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=20, help="of the large model, at least 7")
    parser.add_argument("--check", action="store_true", help="only the small model: no speeds")
    parser.add_argument("--table", type=Path, help="print the Markdown of a result")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--common", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 7:
        parser.error(
            "--steps must be at least 7: the first three warm up, the last ones run beside a checkpoint"
        )
    if options.table:
        print(table(json.loads(options.table.read_text())))
    elif options.worker:
        work(options)
    else:
        lead(options)


if __name__ == "__main__":
    main()

"""The command line: `lrnn prepare | train | submit | eval | generate | serve | bench | export | info | ..`.

Each command imports what it needs when it runs, so that `--help` is quick. A user's mistake arrives here as a
ValueError. `main` prints its message (one or two lines) and exits with code 2; LRNN_TRACEBACK=1 shows the
traceback instead.
"""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .mistakes import Commands, is_users, tell, tell_replaced
from .remote import url_of
from .requirements import UnmetRequirementError, check_extra, check_transformers
from .runs.layout import RunFolder, latest_checkpoint
from .version import __version__

EXIT_USER_ERROR = 2

app = typer.Typer(
    cls=Commands,
    name="lrnn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file (YAML)")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="override keys of the recipe", callback=tell_replaced),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint folder, or its URL")]
Branch = Annotated[
    Path | None,
    typer.Option("--from", metavar="CHECKPOINT", help="checkpoint to branch from: RUN/checkpoints/step-N"),
]
# Options of `lrnn eval`, here so that its function can be read at one sitting.
EvalData = Annotated[
    Path | None, typer.Option(help="held-out documents (JSONL), or the folder for offline tasks")
]
Length = Annotated[
    str | None, typer.Option(help="probe: loss by position in rows of N tokens, or 16x the training length")
]
Lengths = Annotated[
    str, typer.Option(help="row lengths of the state, mad and long tasks, separated by commas")
]
Recall = Annotated[
    bool, typer.Option("--recall", help="probe: loss on n-grams that already occurred in the row")
]
Rows = Annotated[int | None, typer.Option(help="rows of a probe; default: 16 for --length, 64 for --recall")]
PromptTwice = Annotated[
    bool, typer.Option("--prompt-twice", help="read each context of a task twice before its answer")
]
Certify = Annotated[
    str | None, typer.Option(metavar="TASK", help="probe: is this state task solved at every length?")
]
Harden = Annotated[
    Path | None, typer.Option(metavar="DIR", help="with --certify: a copy with gates rounded to 0 and 1")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run the Python code in the checkpoint's folder")
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lrnn-lm {__version__}")
        raise typer.Exit


@app.callback()
def lrnn(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Pretrain, score and run language models built on linear recurrent networks.

    Exit codes: 0 done; 2 a mistake in what you asked for, explained in one or two lines (LRNN_TRACEBACK=1
    shows where it was found); 85 stopped by a signal after saving.
    """
    if "--help" not in sys.argv:  # before a command imports it: an old version fails halfway through
        check_transformers()


@app.command()
def prepare(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Train or fetch the tokenizer and write the token shards.

    `lrnn train` does this itself. Run it first where many GPUs would wait for it.
    """
    from .recipe import load_recipe
    from .train.sources import describe_data, prepare_data

    loaded = load_recipe(recipe, overrides)
    print("\n".join(describe_data(loaded, prepare_data(loaded))))


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, from_checkpoint: Branch = None) -> None:
    """Train a recipe, or resume its run.

    Resumes from the newest valid checkpoint of runs/NAME, if there is one. Scores the model on eval.tasks at
    the end. SIGTERM, SIGUSR1, SIGINT or SIGHUP saves what was trained and exits with code 85. --from begins a
    branch of another run: a new run with that checkpoint's weights, optimizer, step and data position, and
    this recipe's schedule and budget. On several GPUs:
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m lrnn_lm.train RECIPE
    """
    check_extra("train", "matplotlib")  # which is imported at the end only
    from .output import leave_output, say
    from .train.stop import Stopped, StopSignal

    try:
        with StopSignal() as stop:
            stop.hold()  # a signal during an import would be reported as that import's error
            from .api import score_run, trainer_of
            from .recipe import load_recipe

            trainer = trainer_of(load_recipe(recipe, overrides), stop, from_checkpoint)
            score_run(trainer, trainer.run(stop), stop)  # run here: a file fewer on the way to the kernel
    except Stopped as stopped:
        leave_output()
        if stopped.tell:
            say(stopped, sys.stderr)
        raise typer.Exit(stopped.code) from None


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="number of machines")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs per machine; 0: train on its CPUs")] = None,
    time: Annotated[str | None, typer.Option(help="time limit of the job, as in 24:00:00")] = None,
    from_checkpoint: Branch = None,
    array: Annotated[Path | None, typer.Option(help="sweep file (YAML), one run per combination")] = None,
    array_limit: Annotated[int | None, typer.Option(help="maximum number of array runs at once")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM account to charge")] = None,
    qos: Annotated[str | None, typer.Option(help="SLURM quality of service")] = None,
    module: Annotated[list[str] | None, typer.Option(help="environment module to load; repeatable")] = None,
    container: Annotated[str | None, typer.Option(help="container image to run in")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="any other sbatch option; repeatable")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the job script, submit nothing")] = False,
) -> None:
    """Train a recipe as a SLURM job that requeues itself until done.

    The job saves before its time limit or a preemption, requeues, and resumes from its newest checkpoint. The
    recipe's launch section sets the same options; slurm/README.md explains them.
    """
    from .launch import submit as submit_job

    if array is None and array_limit:
        raise ValueError("--array-limit is for the runs of an array: give --array SWEEP, or leave it out")
    flags = {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "time": time, "array_limit": array_limit,
        "partition": partition, "account": account, "qos": qos, "modules": module, "container": container,
        "sbatch": sbatch,
    }  # fmt: skip
    given = {key: value for key, value in flags.items() if value is not None}
    submit_job(recipe, overrides, given, array, dry_run, from_checkpoint=from_checkpoint)


@app.command(name="eval")
def evaluate_checkpoint(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT", help="checkpoint folders")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas")] = "",
    suite: Annotated[Path | None, typer.Option(help="YAML file of tasks, or a name in eval/suites")] = None,
    limit: Annotated[int | None, typer.Option(help="score at most this many documents per task")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for results; default: eval/ of the run")] = None,
    data: EvalData = None,
    num_fewshot: Annotated[int | None, typer.Option(help="solved examples before each question")] = None,
    batch_size: Annotated[int, typer.Option(help="requests scored at once")] = 8,
    max_length: Annotated[int | None, typer.Option(help="context window of all requests, in tokens")] = None,
    length: Length = None,
    lengths: Lengths = "",
    recall: Recall = False,
    rows: Rows = None,
    prompt_twice: PromptTwice = False,
    certify: Certify = None,
    harden: Harden = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score checkpoints on lm-eval tasks, or probe them.

    Tasks are lm-eval's, and those in eval/tasks, which need no network. With a probe (--length, --recall,
    --certify) no task is scored, unless --tasks or --suite is given too. eval/README.md explains them.
    """
    check_extra("eval", "matplotlib")
    from .evaluate.show import check_output, check_probes, check_used
    from .evaluate.team import join, leave

    wanted = _numbers(lengths)
    scores = bool(tasks) or suite is not None or (length is None and not recall and certify is None)
    check_used(scores, limit, num_fewshot, max_length, wanted, prompt_twice)
    check_probes(length is not None or recall, rows, certify, harden)
    check_output(output)
    team, device = join(device)
    shared = {"device": device, "trust_remote_code": trust_remote_code}
    probing = shared | {"data": data} | ({} if rows is None else {"rows": rows})
    from .evaluate.compare import evaluate_each, for_each

    if length is not None and team.is_main:
        from .evaluate.probe.length import probe_length

        for_each(probe_length, checkpoints, output, length, **probing)
    if recall and team.is_main:
        from .evaluate.probe.recall import probe_recall

        probe_recall(checkpoints, output=output, **probing)
    if certify is not None and team.is_main:
        from .evaluate.probe.certify import certify as certify_one

        for_each(certify_one, checkpoints, output, certify, hardened=harden, **shared)
    if scores:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        evaluate_each(
            checkpoints, names, suite=suite, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size,
            max_length=max_length, lengths=wanted, prompt_twice=prompt_twice, team=team, data=data,
            output=output, **shared,
        )  # fmt: skip
    leave(team)


def _numbers(text: str) -> list[int] | None:
    """Whole numbers above zero, separated by commas; None for none."""
    if not text:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--lengths {text}: expected whole numbers above 0, as in --lengths 32,512")
    return [int(part) for part in parts]


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="beginning of the text")] = "",
    prompt_file: Annotated[
        Path | None, typer.Option(help="file to read before the prompt, of any length; not printed")
    ] = None,
    prompt_twice: Annotated[
        bool, typer.Option("--prompt-twice", help="read prompt file and prompt twice, print the continuation")
    ] = False,
    segment: Annotated[int, typer.Option(help="tokens of the prompt file read at once")] = 2048,
    max_new_tokens: Annotated[int, typer.Option(help="write at most this many tokens")] = 100,
    temperature: Annotated[float, typer.Option(help="divides the logits before sampling; 0: greedy")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="sample from the k likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus sampling: probability to keep")] = None,
    seed: Annotated[int | None, typer.Option(help="random seed: the same seed gives the same text")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="always take the likeliest token")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a prompt, printed as it is generated."""
    from .evaluate import generate as stream

    stream(
        checkpoint, prompt, prompt_file=prompt_file, prompt_twice=prompt_twice, segment=segment,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        greedy=greedy, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="address to listen on")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 8000,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="decode requests together; recurrent layers only")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer completions and chats over HTTP.

    Runs transformers' server, which speaks OpenAI's protocol. docs/serving.md explains it.
    """
    from .serve import serve as run

    run(checkpoint, host, port, continuous_batching, device, trust_remote_code)


@app.command()
def export(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="new folder to write, or a URL")],
    dtype: Annotated[str | None, typer.Option(help="bf16, fp32, int8 or int4; default: unchanged")] = None,
    average: Annotated[
        bool, typer.Option("--average", help="export the moving average of the weights (train.average)")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(help="licence named in the model card, as in apache-2.0; default: the recipe's"),
    ] = None,
    format: Annotated[
        str, typer.Option(help="transformers, onnx, executorch, torch-export")
    ] = "transformers",
) -> None:
    """Write a folder that loads without lrnn-lm.

    It holds weights, tokenizer, model code and model card, and loads with torch and transformers alone
    (trust_remote_code=True). The other formats hold two graphs in fp32, for 1 and for 16 tokens, which
    onnxruntime, ExecuTorch or torch.export.load run.
    """
    from .api import export_checkpoint

    export_checkpoint(checkpoint, folder, dtype, license, average, format)
    ints = "torchao, " if (dtype or "").startswith("int") else ""
    known = {"transformers": f"{ints}torch and transformers", "onnx": "onnxruntime", "torch-export": "torch"}
    print(f"exported to {url_of(folder) or folder}; it loads with {known.get(format, format)} alone")


@app.command()
def info(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|CHECKPOINT", help="recipe file or checkpoint folder")
    ],
    overrides: Overrides = None,
) -> None:
    """Show the cost of a recipe or checkpoint, without training.

    Parameters, FLOPs per token, state size, training memory (estimated), steps.
    """
    from .train.info import print_info

    print_info(target, overrides)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folders, as in runs/*")],
    output: Annotated[Path | None, typer.Option(help="plot (.png, ..), report (.md) or folder")] = None,
) -> None:
    """Plot loss curves and print a table of runs and scores."""
    from .evaluate import report as draw

    draw(runs, output)
    from .evaluate.reporting.card import write_run_card

    for run in map(RunFolder, runs):
        # Training wrote it; now there may be a curve to show. Not if the weights are gone, or another's run.
        if run.card.is_file() and latest_checkpoint(run.checkpoints) and os.access(run.path, os.W_OK):
            write_run_card(run.path)


@app.command(
    add_help_option=False,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
def bench(context: typer.Context) -> None:
    """Measure speed: kernels, train, decode (from a clone only)."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "commands.py").is_file():
        raise ValueError(
            "the benchmarks are not part of the installed package: run lrnn bench from a clone of the "
            "repository, installed with pip install --editable ."
        )
    sys.path.insert(0, str(root))  # first: another package named benchmarks may be installed
    from benchmarks.commands import bench_app

    bench_app(args=context.args, prog_name="lrnn bench")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 a user's mistake, 85 stopped by a signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # print ? for what the terminal cannot show, do not crash
    try:
        app(args=arguments, prog_name="lrnn")
    except (ValueError, OSError, RuntimeError, MemoryError, UnmetRequirementError) as mistake:
        if os.environ.get("LRNN_TRACEBACK") or not is_users(mistake):
            raise
        tell(mistake, next(iter(arguments or sys.argv[1:]), ""))
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()

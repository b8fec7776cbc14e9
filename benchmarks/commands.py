"""`lrnn bench kernels | train | decode | frontier`, and `lrnn bench --compare`."""

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)
SLOWER = 1  # exit code of a comparison that finds something slower

Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Output = Annotated[Path | None, typer.Option(help="write rows as JSON lines; plots go beside the file")]
Contenders = Annotated[str, typer.Option(help="names or recipes in order of running, separated by commas")]
Budget = Annotated[
    float | None, typer.Option(help="time budget: what would exceed it is skipped, and reported")
]
Width = Annotated[int | None, typer.Option(help="model width instead of the size's; the rest is scaled")]
Layers = Annotated[int | None, typer.Option(help="layers of the reference model instead of the size's")]
Vocab = Annotated[int | None, typer.Option(help="vocabulary size instead of the recipes'")]
Processes = Annotated[int, typer.Option(help="measure in this many processes, report the median")]
Precision = Annotated[str, typer.Option(help="auto, bf16 or fp32")]


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    compare: Annotated[
        Path | None, typer.Option(help="file of an earlier train or decode run: run it again and compare")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="compare with this file instead of running")] = None,
    tolerance: Annotated[float, typer.Option(help="allowed slowdown, as a fraction")] = 0.05,
    device: Device = "auto",
) -> None:
    """Measure speed, contenders side by side in one run.

    --compare exits with code 1 if something is slower.
    """
    if compare is None:
        if context.invoked_subcommand is None:
            raise ValueError(
                "name a benchmark (kernels, train, decode, frontier), or --compare and the file of an "
                "earlier run"
            )
        for name in ("against", "tolerance", "device"):
            if context.get_parameter_source(name).name != "DEFAULT":
                raise ValueError(f"--{name} belongs to --compare, or behind the name of the benchmark")
        return
    if context.invoked_subcommand is not None:
        raise ValueError("--compare runs the benchmark that its file names; leave the command out")
    from .compare import compare_with

    worse = compare_with(compare, against, device, tolerance)
    print("\n".join(worse) or "nothing is slower")
    raise typer.Exit(SLOWER if worse else 0)


@bench_app.command()
def kernels(
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="write rows to this JSON file")] = None,
    tokens: Annotated[int, typer.Option(help="tokens of a scan on a GPU: B * T")] = 65_536,
    length: Annotated[int, typer.Option(help="tokens per row of a scan on a GPU: T")] = 2048,
    peers: Annotated[bool, typer.Option(help="also measure other implementations")] = True,
    layers: Annotated[bool, typer.Option(help="also measure whole mixer layers")] = True,
    only: Annotated[
        str, typer.Option(help='on a GPU: only sizes whose label contains this, or only "peers"')
    ] = "",
) -> None:
    """Time the scans.

    On a CPU against the reference loop; on a GPU against copy speed and other implementations.
    """
    from .kernels import run

    run(device, output, tokens=tokens, length=length, peers=peers, layers=layers, only=only)


@bench_app.command()
def train(
    device: Device = "auto",
    output: Output = None,
    contenders: Contenders = "",
    lengths: Annotated[str, typer.Option(help="tokens per row, separated by commas")] = "2048",
    tokens: Annotated[str, typer.Option(help="tokens per step, separated by commas")] = "32768",
    sizes: Annotated[
        str, typer.Option(help="some of 50M, 125M, 212M, 350M, 760M, 1.3B, separated by commas")
    ] = "212M",
    width: Width = None,
    layers: Layers = None,
    vocab: Vocab = None,
    precision: Precision = "auto",
    compile: Annotated[bool, typer.Option(help="compile the blocks")] = True,
    steps: Annotated[int, typer.Option(help="timed steps")] = 10,
    warmup: Annotated[
        int, typer.Option(help="untimed steps before them, beside the first, which compiles")
    ] = 3,
    checkpointing: Annotated[bool, typer.Option(help="activation checkpointing")] = False,
    loss_chunk: Annotated[
        int | None, typer.Option(help="tokens whose logits exist at once in the loss")
    ] = None,
    profile: Annotated[int, typer.Option(help="also list this many of a step's longest kernels")] = 0,
    residual_in_fp32: Annotated[
        bool | None,
        typer.Option(
            "--residual-in-fp32/--residual-in-bf16",
            help="dtype of the residual stream; default: the recipes'",
        ),
    ] = None,
    processes: Processes = 1,
    budget_seconds: Budget = None,
) -> None:
    """Time optimizer steps of whole models at equal parameters."""
    from .train import DEFAULT, TrainSettings, run

    settings = TrainSettings(
        contenders=contenders or DEFAULT, lengths=lengths, tokens=tokens, sizes=sizes, width=width,
        layers=layers, vocab=vocab, precision=precision, compile=compile, steps=steps, warmup=warmup,
        checkpointing=checkpointing, loss_chunk=loss_chunk, profile=profile,
        residual_in_fp32=residual_in_fp32, processes=processes,
        budget_seconds=budget_seconds,
    )  # fmt: skip
    run(settings, device, output)


@bench_app.command()
def decode(
    device: Device = "auto",
    output: Output = None,
    contenders: Contenders = "",
    batches: Annotated[str, typer.Option(help="batch sizes, separated by commas")] = "1,64",
    contexts: Annotated[
        str, typer.Option(help="tokens of context, separated by commas")
    ] = "1024,8192,32768,1048576",
    modes: Annotated[
        str, typer.Option(help="ways to decode, separated by commas")
    ] = "fused,graph,compiled,generate",
    size: Annotated[str, typer.Option(help="50M, 125M, 212M, 350M, 760M or 1.3B")] = "212M",
    width: Width = None,
    layers: Layers = None,
    vocab: Vocab = None,
    precision: Precision = "auto",
    tokens: Annotated[int, typer.Option(help="timed tokens")] = 64,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="recurrent models read only 1,024 tokens of any context")
    ] = False,
    processes: Processes = 1,
    budget_seconds: Budget = None,
) -> None:
    """Time prefill and decoding, against the memory bandwidth limit."""
    from .decode import DEFAULT, DecodeSettings, run

    settings = DecodeSettings(
        contenders=contenders or DEFAULT, batches=batches, contexts=contexts, modes=modes, size=size,
        width=width, layers=layers, vocab=vocab, precision=precision, tokens=tokens, emulate=emulate,
        processes=processes,
        budget_seconds=budget_seconds,
    )  # fmt: skip
    run(settings, device, output)


@bench_app.command()
def frontier(
    device: Device = "auto",
    output: Output = None,
    contenders: Annotated[str, typer.Option(help="names in studies/contenders.py, separated by commas")] = "",
    tasks: Annotated[str, typer.Option(help="synthetic tasks, separated by commas")] = "",
    corpus: Annotated[
        Path | None, typer.Option(help="recipe to train with each mixer, for its loss; default: none")
    ] = None,
    corpus_tokens: Annotated[str, typer.Option(help="tokens that the corpus is trained on")] = "20M",
    lrs: Annotated[
        str, typer.Option(help="learning rates tried on each task, separated by commas; default: 0.003,0.01")
    ] = "",
    steps: Annotated[int | None, typer.Option(help="training steps on a task; default: 3600")] = None,
    longest: Annotated[int, typer.Option(help="longest rows of the state tasks, in tokens")] = 2048,
    processes: Annotated[
        int, typer.Option(help="processes per GPU, a contender in each; 0: all in this process")
    ] = 0,
    seconds_each: Annotated[
        float | None, typer.Option(help="time limit of such a process; its rows say that it was reached")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="tiny models, and other defaults: half a minute on a CPU")
    ] = False,
    budget_seconds: Budget = None,
) -> None:
    """Draw speed against expressivity.

    Expressivity is what each mixer can track, recall and model; all have equal parameters.
    Resumable: the same command with the same --output continues where it stopped.
    """
    from .frontier import SMALL, SMALL_BUDGET, FrontierSettings, run
    from .results import numbers

    (tokens,) = numbers(corpus_tokens, "--corpus-tokens")
    given = {"contenders": contenders, "tasks": tasks, "lrs": lrs, "steps": steps}
    chosen = (SMALL | SMALL_BUDGET if small else {}) | {k: v for k, v in given.items() if v not in ("", None)}
    settings = FrontierSettings(
        corpus=None if corpus is None else str(corpus), corpus_tokens=tokens, longest=longest,
        budget_seconds=budget_seconds, processes=processes, seconds_each=seconds_each, **chosen,
    )  # fmt: skip
    run(settings, device, output)

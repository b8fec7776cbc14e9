"""`lrnn bench kernels | train | decode`, and `lrnn bench --compare`."""

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
)
SLOWER = 1  # exit code of a comparison that finds something slower

Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Output = Annotated[Path | None, typer.Option(help="JSON lines for the rows; pictures go beside it")]
Contenders = Annotated[str, typer.Option(help="names or recipes, separated by commas; the first come first")]
Budget = Annotated[float | None, typer.Option(help="leave out what would end after so many seconds")]
Width = Annotated[int | None, typer.Option(help="model width in place of the size's; the rest is scaled")]
Layers = Annotated[int | None, typer.Option(help="layers of the reference in place of the size's")]
Vocab = Annotated[int | None, typer.Option(help="vocabulary in place of the recipes'")]
Processes = Annotated[int, typer.Option(help="measure so often, each time in a new process; medians")]
Precision = Annotated[str, typer.Option(help="auto, bf16 or fp32")]


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    compare: Annotated[Path | None, typer.Option(help="an earlier run's file: run it again, compare")] = None,
    against: Annotated[Path | None, typer.Option(help="compare with this file instead of running")] = None,
    tolerance: Annotated[float, typer.Option(help="allowed slowdown, as a fraction")] = 0.05,
    device: Device = "auto",
) -> None:
    """Measure speed, contenders side by side in one run. --compare exits with 1 where something is slower."""
    if compare is None:
        if context.invoked_subcommand is None:
            raise ValueError(
                "name a benchmark (kernels, train, decode), or --compare and an earlier run's file"
            )
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
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows")] = None,
    tokens: Annotated[int, typer.Option(help="B * T of a scan on a GPU")] = 65_536,
    length: Annotated[int, typer.Option(help="T of a scan on a GPU")] = 2048,
    peers: Annotated[bool, typer.Option(help="measure other formulations beside ours")] = True,
    layers: Annotated[bool, typer.Option(help="measure whole mixer layers")] = True,
    only: Annotated[str, typer.Option(help='on a GPU, the sizes that this names, or "peers"')] = "",
) -> None:
    """Time the scans against the reference on a CPU, against copy speed and peers on a GPU."""
    from .kernels import run

    run(device, output, tokens=tokens, length=length, peers=peers, layers=layers, only=only)


@bench_app.command()
def train(
    device: Device = "auto",
    output: Output = None,
    contenders: Contenders = "",
    lengths: Annotated[str, typer.Option(help="tokens a row, separated by commas")] = "2048",
    tokens: Annotated[str, typer.Option(help="tokens a step, separated by commas")] = "32768",
    sizes: Annotated[
        str, typer.Option(help="50M, 125M, 212M, 350M, 760M, 1.3B, separated by commas")
    ] = "212M",
    width: Width = None,
    layers: Layers = None,
    vocab: Vocab = None,
    precision: Precision = "auto",
    compile: Annotated[bool, typer.Option(help="compile the blocks")] = True,
    steps: Annotated[int, typer.Option(help="steps that are timed")] = 10,
    warmup: Annotated[int, typer.Option(help="steps before them, after the first")] = 3,
    checkpointing: Annotated[bool, typer.Option(help="recompute layers in the backward pass")] = False,
    loss_chunk: Annotated[int | None, typer.Option(help="tokens whose logits exist at once")] = None,
    profile: Annotated[int, typer.Option(help="also list so many of a step's longest kernels")] = 0,
    residual_in_fp32: Annotated[
        bool | None,
        typer.Option("--residual-in-fp32/--residual-in-bf16", help="between blocks; default: the recipes'"),
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
    batches: Annotated[str, typer.Option(help="rows decoded at once, separated by commas")] = "1,64",
    contexts: Annotated[
        str, typer.Option(help="tokens before, separated by commas")
    ] = "1024,8192,32768,1048576",
    modes: Annotated[
        str, typer.Option(help="how a token is made, separated by commas")
    ] = "fused,graph,compiled,generate",
    size: Annotated[str, typer.Option(help="50M, 125M, 212M, 350M, 760M or 1.3B")] = "212M",
    width: Width = None,
    layers: Layers = None,
    vocab: Vocab = None,
    precision: Precision = "auto",
    tokens: Annotated[int, typer.Option(help="tokens that are timed")] = 64,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="recurrent models read 1k tokens, however long the context")
    ] = False,
    processes: Processes = 1,
    budget_seconds: Budget = None,
) -> None:
    """Time prefill and decoding, a token at a time, beside the limit of the device's memory."""
    from .decode import DEFAULT, DecodeSettings, run

    settings = DecodeSettings(
        contenders=contenders or DEFAULT, batches=batches, contexts=contexts, modes=modes, size=size,
        width=width, layers=layers, vocab=vocab, precision=precision, tokens=tokens, emulate=emulate,
        processes=processes,
        budget_seconds=budget_seconds,
    )  # fmt: skip
    run(settings, device, output)

"""A line of numbers a step, and now and then what the layers do."""

from typing import TYPE_CHECKING

from .inspect_layers import shortened, summary, watched
from .parallel import reshard
from .rows import Batch
from .throughput import Spent
from .watch import straggler

if TYPE_CHECKING:
    from .loop import StepResult, Trainer


def log_step(trainer: "Trainer", result: "StepResult", lr: float, spent: Spent, batches: list[Batch]) -> None:
    """Write the trainer's last step to `metrics.jsonl` and to the progress line."""
    step, every = trainer.position.step, trainer.recipe.train.inspect_every
    line = {
        "step": step,
        "tokens": step * trainer.recipe.train.tokens_per_step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        **trainer.throughput.line(spent),
        "skipped": trainer.position.skipped,
        **straggler(result.seconds),
    }
    if trainer.stalled:
        line["checkpoint_seconds"], trainer.stalled = trainer.stalled, 0.0
    if every is not None and step % every == 0:
        line |= _inspect(trainer, batches[0])
    trainer.metrics.write(line)
    trainer.line.step(step, result.loss, line["tokens_per_second"], result.applied)


def _inspect(trainer: "Trainer", batch: Batch) -> dict[str, list[float | None]]:
    """Each layer's state and gates on the main rank's rows; every rank must pass through the model."""
    with watched(trainer.bare_model) as seen:
        trainer.forward(shortened(batch), 1.0, return_logits=False)
    reshard(trainer.model)
    return summary(seen)

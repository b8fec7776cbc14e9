"""The training loop: steps of the token budget, validation, checkpoints, and a clean stop when asked.

Legend: a step is one optimiser update over `tokens_per_step` tokens of all ranks, taken in micro-batches.
"""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from torch import Tensor, nn

from ..data import PreparedData, SyntheticData, TrainLoader, validation_batches
from ..model import LRNNForCausalLM
from ..model.accounting import account
from ..model.export import write_remote_code
from ..model.loss import IGNORE
from ..recipe import Recipe, flatten
from . import checkpoint
from .checkpoint import Position
from .metrics import Cadence, Metrics
from .optim import learning_rate
from .progress import ProgressLine
from .runtime import peak_flops, peak_memory_bytes
from .stop import Stopped, StopSignal

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats a target over the global step, gradient norm before clipping, whether applied."""

    loss: float
    grad_norm: float
    applied: bool


class Trainer:
    """Owns a run from its position to the end of its budget."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Any,
        prepared: PreparedData | SyntheticData,
        position: Position,
        console: Console,
    ):
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.bare_model, self.tokenizer, self.prepared = model, tokenizer, prepared
        self.position, self.console = position, console
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.loader = TrainLoader(
            prepared.train,
            recipe.data.sequence_length,
            recipe.seed,
            recipe.rows_per_step,
            recipe.train.micro_batch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=recipe.data.num_workers,
            position=position.samples,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.save_cadence = Cadence(recipe.checkpoint.every, recipe.train.tokens_per_step)
        self.eval_cadence = Cadence(recipe.eval.every, recipe.train.tokens_per_step)
        cost = account(model.config, recipe.data.sequence_length)
        self.flops_per_token = cost.flops_per_token_training
        self.stop = StopSignal()
        self.lock: TextIO | None = None  # held to the end of `run`
        self._saved_step = position.step if position.step else -1

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        return self.position.step >= self.recipe.total_steps

    def run(self, stop: StopSignal | None = None) -> Path:
        """Train to the end of the budget; returns the last checkpoint.

        `stop` is the caller's, if handlers stand already.

        Raises:
            Stopped: a signal came; the run was saved at a step boundary.
            CheckpointError, ValueError: it could not be saved, or the loss stayed non-finite.
        """
        with nullcontext(stop) if stop else StopSignal() as self.stop, self.stop.held():
            self.metrics = Metrics(self.folder, self.accelerator, self.position)
            try:
                self._start_trackers()
                with ProgressLine(
                    self.console, self.recipe, self.position.step, self.accelerator
                ) as self.line:
                    self._train()
            finally:
                self.metrics.close()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
                if self.lock is not None:
                    self.lock.close()
        return self.checkpoints / checkpoint.folder_name(self.position.step)

    def _train(self) -> None:
        self._validate_if_due()  # a stop may have come before the validation of the step resumed from
        if self.finished:
            return
        batches = iter(self.loader)
        while not self.finished:
            self._train_step(batches)
            self._validate_if_due()
            if self._due(self.save_cadence) or self.finished:
                self._save()

    def _start_trackers(self) -> None:
        """Trackers take flat settings only, and TensorBoard numbers and texts only."""
        if self.recipe.tracking.trackers:
            settings = {
                k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(self.recipe).items()
            }
            self.accelerator.init_trackers(self.recipe.tracking.project, config=settings)

    def _due(self, cadence: Cadence) -> bool:
        """Whether it is due after this step, by the main rank's clock where clocks decide."""
        due = cadence.due(self.position.step)
        if not cadence.by_clock or self.accelerator.num_processes == 1:
            return due
        return bool(broadcast(torch.tensor(int(due), device=self.accelerator.device)).item())

    def _train_step(self, batches: Iterator[list[Batch]]) -> None:
        """One step with everything around it: rate, measurement, the guard, the wish to stop."""
        position, optim = self.position, self.recipe.optim
        started = time.perf_counter()
        lr = learning_rate(position.step, self.recipe.total_steps, self.recipe.train.tokens_per_step, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        result = self.step(next(batches))
        position.step += 1
        position.samples += self.recipe.rows_per_step
        position.bad_in_a_row = 0 if result.applied else position.bad_in_a_row + 1
        position.skipped += not result.applied
        if position.step % self.recipe.train.log_every == 0 or not result.applied:
            self._log(result, lr, time.perf_counter() - started)
        if position.bad_in_a_row >= self.recipe.train.max_bad_steps:
            raise ValueError(
                f"the loss or its gradient was not finite for {position.bad_in_a_row} steps in a row, up to "
                f"step {position.step}; lower optim.lr, then run again to go on from {self._last_name()}"
            )
        self._stop_if_asked()

    def step(self, micro_batches: list[Batch]) -> StepResult:
        """Forward, backward and update over one global step; skipped on every rank if it is not finite."""
        self.model.train()
        targets = self._count_targets(micro_batches)
        # Gradients are averaged over ranks, so each divides its sums by the mean number of targets a rank.
        share = max(1.0, targets / self.accelerator.num_processes)
        loss = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(micro_batches):
            with self.accelerator.no_sync(self.model) if i + 1 < len(micro_batches) else nullcontext():
                part = self._loss(batch, share)
                self.accelerator.backward(part)
            loss += part.detach()
        limit = self.recipe.optim.grad_clip or math.inf
        grad_norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        mean_loss = float(self.accelerator.reduce(loss, reduction="mean"))
        applied = math.isfinite(mean_loss) and math.isfinite(grad_norm)
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean_loss, grad_norm, applied)

    def _loss(self, batch: Batch, num_items: float | None) -> Tensor:
        return self._forward(batch, num_items, return_logits=False).loss

    def _forward(self, batch: Batch, num_items: float | None, return_logits: bool) -> Any:
        device = self.accelerator.device
        input_ids, reset, labels = (
            batch[key].to(device, non_blocking=True) for key in ("input_ids", "reset", "labels")
        )
        return self.model(
            input_ids=input_ids,
            reset=reset,
            shift_labels=labels,
            num_items_in_batch=num_items,
            return_logits=return_logits,
            use_cache=False,
        )

    def _count_targets(self, micro_batches: list[Batch]) -> int:
        """Valid target tokens of the whole global step."""
        count = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
        if self.accelerator.num_processes == 1:
            return count
        total = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), reduction="sum")
        return int(total)

    # Validation -------------------------------------------------------------------------------------

    def _validate_if_due(self) -> None:
        step = self.position.step
        if (
            step == 0
            or self.position.validated >= step
            or not (self._due(self.eval_cadence) or self.finished)
        ):
            return
        loss, accuracy = self.validate()
        self.position.validated = step
        line = {
            "step": step,
            "tokens": step * self.recipe.train.tokens_per_step,
            "validation_loss": loss,
        }
        if accuracy is None:
            held_out = self.prepared.validation
            tokens = held_out.num_tokens - held_out.num_documents
            line["bits_per_byte"] = loss * tokens / held_out.num_bytes / math.log(2)
        else:
            line["accuracy"] = accuracy
        self.metrics.write(line)
        self.line.validation(step, loss, line.get("bits_per_byte"), accuracy)

    @torch.no_grad()
    def validate(self) -> tuple[float, float | None]:
        """Mean loss in nats a target over the first `eval.tokens` held out, and of a synthetic task the share
        of targets that are the likeliest token (None for text, whose logits never exist as a whole)."""
        self.model.eval()
        synthetic = isinstance(self.prepared, SyntheticData)
        total = torch.zeros(3, dtype=torch.float64)  # nats, targets, hits
        for batch in validation_batches(
            self.prepared.validation,
            self.recipe.data.sequence_length,
            self.recipe.train.micro_batch,
            self.recipe.eval.tokens,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        ):
            targets = int((batch["labels"] != IGNORE).sum())
            loss, hits = self._score(batch) if synthetic else (self._loss(batch, 1.0), 0)
            total += torch.tensor([float(loss), targets, hits], dtype=torch.float64)
            self._stop_if_asked()
        total = self.accelerator.reduce(total.to(self.accelerator.device), reduction="sum")
        return float(total[0] / total[1]), float(total[2] / total[1]) if synthetic else None

    def _score(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed loss, and how many targets are the likeliest token."""
        outputs = self._forward(batch, 1.0, return_logits=True)
        labels = batch["labels"].to(outputs.logits.device)
        return outputs.loss, int((outputs.logits.argmax(dim=-1) == labels).sum())

    # Saving, stopping, telling ----------------------------------------------------------------------

    def _save(self) -> None:
        if self._saved_step == self.position.step:
            return
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.metrics.sync()
            checkpoint.save(
                self.checkpoints,
                self.position,
                self.bare_model,
                self.optimizer,
                self._write_extras,
                self.recipe.checkpoint.keep_last,
            )
        self.accelerator.wait_for_everyone()
        self._saved_step = self.position.step

    def _write_extras(self, folder: Path) -> None:
        """The tokenizer, and the model's code: a checkpoint loads where this package is not."""
        shutil.copytree(self.prepared.tokenizer_dir, folder, dirs_exist_ok=True)
        if isinstance(self.bare_model, LRNNForCausalLM):
            write_remote_code(folder)

    def _stop_if_asked(self) -> None:
        if self.stop.requested(self.accelerator):
            self._save()
            raise Stopped(
                f"stopped by {self.stop.name} after step {self.position.step} of {self.recipe.total_steps}; "
                f"saved {self._last_name()}"
            )

    def _last_name(self) -> str:
        name = checkpoint.latest_name(self.checkpoints)
        return "the beginning" if name == "none" else str(self.checkpoints / name)

    def _log(self, result: StepResult, lr: float, seconds: float) -> None:
        tokens_per_step = self.recipe.train.tokens_per_step
        speed = tokens_per_step / seconds
        peak = peak_flops(self.accelerator.device)
        used = speed * self.flops_per_token
        line = {
            "step": self.position.step,
            "tokens": self.position.step * tokens_per_step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(speed, 1),
            "mfu": None if peak is None else used / (peak * self.accelerator.num_processes),
            "memory_bytes": peak_memory_bytes(self.accelerator.device),
            "skipped": self.position.skipped,
        }
        self.metrics.write(line)
        self.line.step(self.position.step, result.loss, speed, result.applied)

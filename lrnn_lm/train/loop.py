"""The training loop: steps of the token budget, validation, checkpoints, and a clean stop when asked.

Legend: a step is one optimiser update over `tokens_per_step` tokens of all ranks, taken in micro-batches.
Ranks speak once a step beyond the gradients, and the host waits for the device once: `_exchange`.
"""

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch import distributed as dist

from ..data import PreparedData, SyntheticData
from ..model.loss import IGNORE
from ..recipe import Recipe, flatten
from ..runs import checkpoint
from ..runs.checkpoint import Position
from ..runs.layout import RunFolder
from .inspect_layers import inspect, shortened
from .metrics import Cadence, Metrics
from .optim import learning_rate
from .parallel import Plan, accumulating, clip_gradients, is_sharded, reshard, settle_buckets
from .progress import ProgressLine
from .rows import Batch, Rows
from .saver import Saver
from .step_log import StepResult, step_line
from .stop import Stopped, StopSignal
from .tensors import Group
from .throughput import Spent, Throughput
from .validate import bytes_read, validate, validation_line
from .watch import Heartbeat, Stopwatch, slots


class Trainer:
    """Owns a run from its position to the end of its budget."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator,
        bare_model: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Any,
        prepared: PreparedData | SyntheticData,
        position: Position,
        console: Console,
        group: Group,
        plan: Plan,
    ):
        """`model` is what to call for a pass, `bare_model` what it wraps, by `plan`; `group` as in Saver."""
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.bare_model, self.model, self.optimizer = bare_model, model, optimizer
        self.tokenizer, self.prepared = tokenizer, prepared
        self.position, self.console, self.group, self.plan = position, console, group, plan
        self.rows = Rows(recipe, prepared, accelerator, position)
        self.save_cadence = Cadence(recipe.checkpoint.every, recipe.train.tokens_per_step)
        self.eval_cadence = Cadence(recipe.eval.every, recipe.train.tokens_per_step)
        self.throughput = Throughput(
            recipe,
            bare_model.config,
            accelerator.num_processes,
            is_sharded(bare_model),
            accelerator.mixed_precision == "bf16",
            accelerator.device,
        )
        self.saver = Saver(
            self.checkpoints, accelerator, bare_model, optimizer, self._write_extras, recipe.checkpoint, group
        )
        self.saver.good = checkpoint.step_name(position.step) if position.step else None
        self.heartbeat = Heartbeat(folder, accelerator.is_main_process, 60 * recipe.train.stall_minutes)
        self.stopwatch = Stopwatch(accelerator.device)
        self.stop = StopSignal()
        self.metrics: Metrics | None = None  # while it runs
        self.lock: TextIO | None = None  # held to the end of `run`
        self._worked = self.stalled = 0.0
        self.saved_step = position.step if position.step else -1
        self._save_pending = False  # a save came due during bad steps

    @property
    def checkpoints(self) -> Path:
        return RunFolder(self.folder).checkpoints

    @property
    def whole_model(self) -> nn.Module | None:
        """The model, where this rank holds all of it; else it has to be read from the last checkpoint."""
        return None if is_sharded(self.bare_model) else self.bare_model

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
            if self.metrics.put_away is not None:
                self.console.print(
                    f"[yellow]begins anew: no checkpoint was written yet, or they were removed; the lines of "
                    f"the steps before are in {escape(str(self.metrics.put_away))}",
                    soft_wrap=True,
                )
            try:
                self._start_trackers()
                with ProgressLine(
                    self.console, self.recipe, self.position.step, self.accelerator
                ) as self.line:
                    self._train()
                self.saver.finish()
            finally:
                gc.unfreeze()
                self.heartbeat.stop()
                self.rows.close()
                self.saver.close()
                self.metrics.close()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
                if self.lock is not None:
                    self.lock.close()
        return self.checkpoints / checkpoint.step_name(self.position.step)

    def _train(self) -> None:
        self._validate_if_due()  # a stop may have come before the validation of the step resumed from
        if self.finished:
            self.saver.complete(self.position.step)
            return
        self.saver.warm_up()
        self.rows.start()
        settle_buckets(self.model, self._empty_pass)
        first = True
        while not self.finished:
            save_rang, eval_rang = self._train_step().clocks
            if first and self.accelerator.device.type == "cuda":
                # Freeze long-lived objects: a full garbage collection pauses this rank for 0.2 s.
                gc.collect()
                gc.freeze()
            first = False
            self._validate_if_due(eval_rang)
            if self._save_is_due(save_rang) or self.finished:
                self._save()
            self.beat("training")
        if self.metrics.problem is not None:
            self.metrics.check()
        self.beat("finished", now=True)

    def _empty_pass(self) -> None:
        """Forward and backward over nothing; the gradients are dropped."""
        self._loss(self.rows.empty(), 1.0).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _start_trackers(self) -> None:
        """Trackers take flat settings only, and TensorBoard numbers and texts only."""
        if self.recipe.tracking.trackers:
            settings = {
                k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(self.recipe).items()
            }
            self.accelerator.init_trackers(self.recipe.tracking.project, config=settings)

    # One step ---------------------------------------------------------------------------------------

    def _train_step(self) -> StepResult:
        """One step with everything around it: rate, rows, measurement, the guard, the wish to stop."""
        position = self.position
        started = time.perf_counter()
        lr = learning_rate(
            position.step, self.recipe.total_steps, self.recipe.train.tokens_per_step, self.recipe.optim
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches = self.rows.take()
        last = position.step + 1 >= self.recipe.total_steps
        result = self.step(batches, None if last else self.rows.fetch)
        position.step += 1
        position.samples += self.recipe.rows_per_step
        position.bad_in_a_row = 0 if result.applied else position.bad_in_a_row + 1
        position.skipped += not result.applied
        spent = Spent(time.perf_counter() - started, self.rows.waited(), result.waited)
        if position.step % self.recipe.train.log_every == 0 or not result.applied:
            self._log(result, lr, spent, batches[0])
        if result.written == self.accelerator.num_processes:
            with self._stalling():
                self.saver.finish()
        if position.bad_in_a_row >= self.recipe.train.max_bad_steps:
            self._end_after_bad_steps()
        if result.unwritten:
            self.metrics.check()
        if result.stop:
            self._save_and_stop()
        return result

    def step(self, micro_batches: list[Batch], meanwhile: Callable[[], None] | None = None) -> StepResult:
        """Forward, backward and update over one global step; skipped on every rank if it is not finite.

        `meanwhile` is called when the device has been given its work and the host would only wait for it.
        """
        self.model.train()
        share = self._targets_of_a_rank(micro_batches)
        loss = torch.zeros((), device=self.accelerator.device)
        for i, batch in enumerate(micro_batches):
            with accumulating(self.model, i + 1 == len(micro_batches), self.plan):
                if i == 0:
                    self.stopwatch.start()
                part = self._loss(batch, share)
                if i == 0:
                    self.stopwatch.stop()
                part.backward()
            loss += part.detach()
        grad_norm = clip_gradients(self.model.parameters(), self.recipe.optim.grad_clip or math.inf)
        if meanwhile is not None:
            meanwhile()
        result = self._exchange(loss, grad_norm)
        if result.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _exchange(self, loss: Tensor, grad_norm: Tensor) -> StepResult:
        """What ranks must agree on before the update, in one sum over them and one transfer to the host."""
        ranks, device = self.accelerator.num_processes, self.accelerator.device
        seconds = [] if ranks == 1 or is_sharded(self.model) else slots(self.accelerator, self._worked)
        unwritten = self.metrics is not None and self.metrics.problem is not None
        clocks = [
            c.rang() and self.accelerator.is_main_process for c in (self.save_cadence, self.eval_cadence)
        ]
        own = [self.stop.asked, self.saver.written, unwritten, *clocks, *seconds]
        sent = torch.tensor(own, dtype=torch.float64).to(device, non_blocking=True)
        told = torch.cat([loss.double().view(1) / ranks, sent])
        if ranks > 1:
            dist.all_reduce(told)
        asked = time.perf_counter()
        mean_loss, *flags, norm = torch.cat([told, grad_norm.double().view(1)]).tolist()
        waited = time.perf_counter() - asked
        stop, written, unwritten, *clocks = flags[: len(flags) - len(seconds)]
        self._worked = self.stopwatch.seconds()  # told in the next step: the device is done with it now
        return StepResult(
            mean_loss,
            norm,
            applied=math.isfinite(mean_loss) and math.isfinite(norm),
            stop=stop > 0,
            written=int(written),
            unwritten=unwritten > 0,
            clocks=(clocks[0] > 0, clocks[1] > 0),
            seconds=tuple(flags[len(flags) - len(seconds) :]),
            waited=waited,
        )

    def _loss(self, batch: Batch, num_items: Tensor | float) -> Tensor:
        return self.forward(batch, num_items, return_logits=False).loss

    def forward(self, batch: Batch, num_items: Tensor | float, return_logits: bool) -> Any:
        """The model's outputs of a micro-batch, its summed loss divided by `num_items`."""
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

    def _targets_of_a_rank(self, micro_batches: list[Batch]) -> Tensor:
        """() on the device: the mean number of valid targets a rank in the global step, at least 1.

        Gradients are averaged over ranks, so each divides its sums by this.
        """
        count = sum(int((batch["labels"] != IGNORE).sum()) for batch in micro_batches)
        total = torch.tensor(float(count), dtype=torch.float64).to(self.accelerator.device, non_blocking=True)
        if self.accelerator.num_processes > 1:
            dist.all_reduce(total)
        return (total / self.accelerator.num_processes).clamp_min(1).float()

    # Validation, saving, stopping, telling ----------------------------------------------------------

    def _validate_if_due(self, rang: bool = False) -> None:
        step = self.position.step
        if step == 0 or self.position.validated >= step:
            return
        if self.eval_cadence.due(step, rang) or self.finished:
            self.beat("validating", now=True)
            self._validate()

    def _validate(self) -> None:
        found = validate(
            self.prepared,
            self.recipe,
            self.accelerator,
            self.model,
            self.forward,
            self._between_batches,
            self._held_out_bytes,
        )
        position = self.position
        position.validated, position.validation_loss = position.step, found.loss
        self.metrics.write(validation_line(position.step, self.recipe.train.tokens_per_step, found))
        self.line.validation(position.step, found.loss, found.bits_per_byte, found.accuracy)

    @cached_property
    def _held_out_bytes(self) -> int | None:
        """Bytes of the text that each validation reads; None for a synthetic task."""
        if isinstance(self.prepared, SyntheticData):
            return None
        return bytes_read(self.prepared, self.recipe.data.sequence_length, self.recipe.eval.tokens)

    def _between_batches(self) -> None:
        self.beat("validating")
        self.stop_if_asked()

    def _log(self, result: StepResult, lr: float, spent: Spent, batch: Batch) -> None:
        """A line of metrics.jsonl, now and then with what the layers do, and the progress line."""
        step, every = self.position.step, self.recipe.train.inspect_every
        measured = self.throughput.line(spent)
        line = step_line(result, self.position, self.recipe.train.tokens_per_step, lr, measured)
        if self.stalled:
            line["checkpoint_seconds"], self.stalled = self.stalled, 0.0
        if every is not None and step % every == 0:  # every rank must pass through the model
            line |= inspect(self.bare_model, lambda: self.forward(shortened(batch), 1.0, return_logits=False))
            reshard(self.model)
        self.metrics.write(line)
        self.line.step(step, result.loss, line["tokens_per_second"], result.applied)

    def _end_after_bad_steps(self) -> None:
        """Raise ValueError, with words on the main rank; a save under way is finished first."""
        self.saver.finish()
        if not self.accelerator.is_main_process:
            raise ValueError("")
        raise ValueError(
            f"the loss or its gradient was not finite for {self.position.bad_in_a_row} steps in a row, up to "
            f"step {self.position.step}; lower optim.lr, then run again to go on from {self.last_name()}"
        )

    def _save_is_due(self, rang: bool) -> bool:
        """Whether to save now. What comes due amid bad steps waits for the next good one."""
        self._save_pending |= self.save_cadence.due(self.position.step, rang)
        if self.position.bad_in_a_row:
            return False
        due, self._save_pending = self._save_pending, False
        return due

    def _save(self, wait: bool = False) -> None:
        """Begin to save; at the end of the run, or if asked to, wait until it is done."""
        self.beat("saving", now=True)
        with self._stalling():
            if self.saved_step != self.position.step:
                self.metrics.sync()
                self.saved_step = self.position.step
                self.saver.begin(self.position, last=self.finished)
            if wait or self.finished:
                self.saver.finish()

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        """Around what keeps training waiting for a checkpoint; the seconds stand in the next line."""
        began = time.perf_counter()
        yield
        self.stalled += time.perf_counter() - began

    def _write_extras(self, folder: Path) -> None:
        """The tokenizer, so that a checkpoint is all that a reader needs."""
        shutil.copytree(self.prepared.tokenizer_dir, folder, dirs_exist_ok=True)

    def stop_if_asked(self) -> None:
        """Between the batches of a validation: every rank must call it."""
        asked = self.stop.asked
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(int(asked), device=self.accelerator.device)
            dist.all_reduce(flag)
            asked = bool(flag.item())
        if asked:
            self._save_and_stop()

    def _save_and_stop(self) -> None:
        reshard(self.model)
        self._save(wait=True)
        self.beat("stopped", now=True)
        raise Stopped(
            f"stopped by {self.stop.name} after step {self.position.step} of {self.recipe.total_steps}; "
            f"saved {self.last_name()}",
            tell=self.accelerator.is_main_process,
        )

    def last_name(self) -> str:
        """The checkpoint to go on from, for messages."""
        name = checkpoint.latest_name(self.checkpoints)
        return "the beginning" if name == "none" else str(self.checkpoints / name)

    def beat(self, doing: str, now: bool = False) -> None:
        self.heartbeat.beat(
            self.position.step, self.position.step * self.recipe.train.tokens_per_step, doing, now
        )

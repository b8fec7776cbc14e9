"""The training loop: steps of the token budget, validation, checkpoints, and a clean stop when asked.

Legend: a step is one optimiser update over `tokens_per_step` tokens of all ranks, taken in micro-batches.
What ranks tell one another in a step is in `exchange.py`.
"""

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from ..model.carried import CarriedStates
from ..recipe import Recipe, flatten
from ..runs import checkpoint
from ..runs.checkpoint import Position
from ..runs.layout import RunFolder
from .average import Average
from .carry import Carry
from .exchange import StepResult, exchange, on_any_rank, targets_per_rank
from .guard import is_outlier
from .inspect_layers import inspect, shortened
from .metrics import Cadence, Metrics
from .optim import learning_rate
from .parallel import Plan, accumulating, clip_gradients, is_sharded, reshard, settle_buckets
from .profile import StepProfile
from .progress import ProgressLine
from .rows import Batch, Rows
from .saver import Saver
from .segments import backward_by_segments, evaluate_by_segments, split
from .sources import Prepared
from .stop import Stopped, StopSignal
from .tasks import Scorer, in_words, score_live
from .tensors import Group
from .throughput import Spent, Throughput
from .validate import Validation, held_out_bytes, validate, validation_line
from .watch import Heartbeat, Stopwatch


class _AskedToStopError(Exception):
    """A signal came during a validation or the scoring of tasks."""


class Trainer:
    """Trains a run from its position to the end of its token budget."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        accelerator: Accelerator,
        bare_model: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Any,
        prepared: Prepared,
        position: Position,
        console: Console,
        group: Group,
        plan: Plan,
        average: Average | None = None,
        scorer: Scorer | None = None,
    ):
        """`model` is called for a pass; it wraps `bare_model` as `plan` says (DDP), or is the same object.

        position: where the run resumes. group: as in Saver. scorer: scores the tasks of `eval.during`.
        """
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.bare_model, self.model, self.optimizer = bare_model, model, optimizer
        self.tokenizer, self.prepared = tokenizer, prepared
        self.position, self.console, self.group, self.plan = position, console, group, plan
        self.average, self.scorer = average, scorer
        self.rows = Rows(recipe, prepared, accelerator, position)
        self.save_cadence = Cadence(recipe.checkpoint.every, recipe.tokens_at)
        self.eval_cadence = Cadence(recipe.eval.every, recipe.tokens_at)
        during = recipe.eval.during or recipe.eval  # without tasks it asks for nothing
        self.task_cadence = Cadence(during.every, recipe.tokens_at)
        ranks, bf16 = accelerator.num_processes, accelerator.mixed_precision == "bf16"
        self.throughput = Throughput(
            recipe, bare_model.config, ranks, is_sharded(bare_model), bf16, accelerator.device
        )
        self.saver = Saver(
            self.checkpoints, accelerator, bare_model, optimizer, self._write_extras, recipe.checkpoint,
            group, average,
        )  # fmt: skip
        self.carry: Carry | None = None
        if recipe.data.rows_in_order is not None or recipe.train.start_from_other:
            share = self.rows.loader.share
            self.carry = Carry(recipe, accelerator.process_index * share, share, accelerator.device)
            self.saver.carried = self.carry.tensors
        self.saver.good = checkpoint.step_name(position.step) if position.step else None
        self.heartbeat = Heartbeat(folder, accelerator.is_main_process, 60 * recipe.train.stall_minutes)
        self.stopwatch = Stopwatch(accelerator.device)
        self.profile: StepProfile | None = None
        if recipe.train.profile is not None and accelerator.is_main_process:
            self.profile = StepProfile(recipe.train.profile, RunFolder(folder), accelerator.device)
        self.stop = StopSignal()
        self.metrics: Metrics | None = None  # while it runs
        self.lock: TextIO | None = None  # of the run folder, held to the end of `run`
        self._forward_seconds = 0.0  # of this rank's last step, to find slow ranks
        self.stalled = 0.0  # seconds that training waited for a checkpoint since the last logged step
        self.first_step = position.step  # where this process began
        self.saved_step = position.step if position.step else -1
        # An argument of the model's; it reads it in training only, so validation is without it.
        self.z_loss = {"z_loss": recipe.train.z_loss} if recipe.train.z_loss else {}
        self._z_sum = torch.zeros((), device=accelerator.device)  # of a step
        self._save_pending = False  # a save came due during bad steps

    @property
    def checkpoints(self) -> Path:
        return RunFolder(self.folder).checkpoints

    @property
    def whole_model(self) -> nn.Module | None:
        """The model if this rank holds all of it; None if it must be read from the last checkpoint."""
        return None if is_sharded(self.bare_model) else self.bare_model

    @property
    def finished(self) -> bool:
        """Whether the token budget is used up."""
        return self.position.step >= self.recipe.total_steps

    def run(self, stop: StopSignal | None = None) -> Path:
        """Train to the end of the budget; returns the last checkpoint.

        `stop` is the caller's, if it has installed signal handlers.

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
                if self.profile is not None:
                    self.profile.close()
                self.saver.close()
                self.metrics.close()
                for tracker in self.accelerator.trackers:
                    tracker.finish()
                if self.lock is not None:
                    self.lock.close()
        return self.checkpoints / checkpoint.step_name(self.position.step)

    def _train(self) -> None:
        # The run may have stopped between its last step and that step's validation and scores.
        self._validate_if_due()
        self._score_if_due()
        if self.finished:
            self.saver.complete(self.position.step)
            return
        self.saver.warm_up()
        self.rows.start()
        settle_buckets(self.model, self._empty_pass)
        first = True
        while not self.finished:
            save_rang, eval_rang, task_rang = self._train_step().clocks
            if first and self.accelerator.device.type == "cuda":
                # Freeze long-lived objects: a full garbage collection pauses this rank for 0.2 s.
                gc.collect()
                gc.freeze()
            first = False
            self._validate_if_due(eval_rang)
            self._score_if_due(task_rang)
            if self._save_is_due(save_rang) or self.finished:
                self._save()
            self.beat("training")
        if self.metrics.problem is not None:
            self.metrics.check()
        self.beat("finished", now=True)

    def _empty_pass(self) -> None:
        """Forward and backward over a dummy batch; the gradients are dropped."""
        if self.recipe.train.segment is None:
            self._loss(self.rows.empty(), 1.0).backward()
        else:
            self._backward_by_segments(self.rows.empty(), 1.0, last=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _start_trackers(self) -> None:
        """Give trackers the recipe, flat and as numbers or texts: TensorBoard takes nothing else."""
        if self.recipe.tracking.trackers:
            settings = {
                k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(self.recipe).items()
            }
            self.accelerator.init_trackers(self.recipe.tracking.project, config=settings)

    # One step ---------------------------------------------------------------------------------------

    def _train_step(self) -> StepResult:
        """One step and what surrounds it: learning rate, rows, logging, stop."""
        position = self.position
        started = time.perf_counter()
        lr = learning_rate(
            position.step, self.recipe.total_steps, self.recipe.train.tokens_per_step, self.recipe.optim
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.profile is not None:
            self.profile.begins(position.step + 1)
        batches = self.rows.take()
        last = position.step + 1 >= self.recipe.total_steps
        result = self.step(batches, None if last else self.rows.fetch)
        position.samples += self.recipe.rows_at(position.step)
        position.step += 1
        if self.profile is not None and (said := self.profile.ends(position.step)):
            self.line.found(position.step, escape(said))
        position.outliers += result.outlier
        guard = self.recipe.train.guard
        if result.applied and guard is not None:
            position.recent = [*position.recent, [result.loss, result.grad_norm]][-guard.window :]
        if result.applied and self.average is not None:
            self.average.update(position.step)
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
        """Forward, backward and update over one global step; every rank skips the update if it is not finite.

        `meanwhile` is called once the device has all its work: the host would only wait.
        """
        self.model.train()
        share = targets_per_rank(micro_batches, self.accelerator)
        loss, self._z_sum = torch.zeros(2, device=self.accelerator.device)  # all of it; the z-loss in it
        for i, batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            if self.recipe.train.segment is not None or self.carry is not None:
                loss += self._backward_by_segments(batch, share, last, self.carry)
                continue
            with accumulating(self.model, last, self.plan):
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
        result = self._exchange(torch.stack([loss, self._z_sum]), grad_norm)
        if self.carry is not None:
            self.carry.end_step(result.applied or result.outlier)
        if result.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _exchange(self, losses: Tensor, grad_norm: Tensor) -> StepResult:
        """What ranks must agree on before the update."""
        # Under FSDP2 a forward pass waits for other ranks' parameters: its time says nothing of this rank.
        timed = self.accelerator.num_processes > 1 and not is_sharded(self.model)
        seconds = self._forward_seconds if timed else None
        unwritten = self.metrics is not None and self.metrics.problem is not None
        # Clocks differ between ranks; the main rank's decides.
        clocks = [
            c.rang() and self.accelerator.is_main_process
            for c in (self.save_cadence, self.eval_cadence, self.task_cadence)
        ]
        flags = [self.stop.asked, self.saver.written, unwritten, *clocks]
        result = exchange(losses, grad_norm, flags, seconds, self.accelerator)
        # Sent in the next step: reading the timer earlier would make the host wait for the device again.
        self._forward_seconds = self.stopwatch.seconds()
        guard, recent = self.recipe.train.guard, self.position.recent
        if guard and result.applied and is_outlier((result.loss, result.grad_norm), recent, guard):
            return replace(result, applied=False, outlier=True)
        return result

    def _loss(self, batch: Batch, num_items: Tensor | float, carried: CarriedStates | None = None) -> Tensor:
        outputs = self.forward(batch, num_items, return_logits=False, carried=carried)
        if self.z_loss:
            self._z_sum += outputs.z_loss
        return outputs.loss

    def _backward_by_segments(
        self, batch: Batch, num_items: Tensor | float, last: bool, carry: Carry | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, a segment at a time; the loss. `last`: of its step."""
        start = None
        if carry is not None:
            start, batch = carry.before(self.position.step, batch)
        loss, end = backward_by_segments(
            lambda part, carried: self.forward(part | {"labels": None}, num_items, False, carried),
            lambda part, carried: self._loss(part, num_items, carried),
            self.bare_model.config,
            split(batch, self.recipe.train.segment or self.recipe.data.sequence_length),
            lambda first: accumulating(self.model, last and first, self.plan),
            start,
            keep_end=carry is not None,
        )
        if carry is not None and end is not None:
            carry.after(end)
        return loss

    def forward(
        self,
        batch: Batch,
        num_items: Tensor | float,
        return_logits: bool,
        carried: CarriedStates | None = None,
    ) -> Any:
        """The model's outputs on a micro-batch, or on a segment after what the one before carries.

        `loss` is the summed loss divided by `num_items`; None without labels.
        """
        device = self.accelerator.device
        input_ids, reset, labels = (
            None if batch[key] is None else batch[key].to(device, non_blocking=True)
            for key in ("input_ids", "reset", "labels")
        )
        more = {} if carried is None else {"past_key_values": carried}
        return self.model(
            input_ids=input_ids,
            reset=reset,
            shift_labels=labels,
            num_items_in_batch=num_items,
            return_logits=return_logits,
            use_cache=False,
            **self.z_loss,
            **more,
        )

    def _evaluate(self, batch: Batch, num_items: float, return_logits: bool) -> Any:
        """`forward` for validation: by segments where training is."""
        if (segment := self.recipe.train.segment) is None:
            return self.forward(batch, num_items, return_logits)
        return evaluate_by_segments(
            lambda part, carried: self.forward(part, num_items, return_logits, carried),
            self.bare_model.config,
            split(batch, segment),
            return_logits,
        )

    # Validation, logging, saving, stopping -----------------------------------------------------------

    def _validate_if_due(self, rang: bool = False) -> None:
        step = self.position.step
        if step == 0 or self.position.validated >= step:
            return
        if self.eval_cadence.due(step, rang) or self.finished:
            self.beat("validating", now=True)
            try:
                self._validate()
            except _AskedToStopError:
                self._save_and_stop()

    def _validate(self) -> None:
        found = self._measure()
        position = self.position
        line = self._validation_line(found)
        if self.average is not None:
            with self.average.in_place():
                averaged = self._validation_line(self._measure())
            line |= {f"average_{key}": averaged[key] for key in averaged if key not in ("step", "tokens")}
        position.validated, position.validation_loss = position.step, found.loss
        self.metrics.write(line)
        self.line.found(position.step, f"validation {found}")

    def _validation_line(self, found: Validation) -> dict[str, Any]:
        step = self.position.step
        return validation_line(step, self.recipe.tokens_at(step), found)

    def _measure(self) -> Validation:
        return validate(
            self.prepared,
            self.recipe,
            self.accelerator,
            self.model,
            self._evaluate,
            self._between_batches,
            self._bytes_of_sources,
        )

    @cached_property
    def _bytes_of_sources(self) -> dict[str, int | None]:
        return held_out_bytes(self.prepared, self.recipe.data.sequence_length, self.recipe.eval.tokens)

    def _between_batches(self) -> None:
        """Between the batches of a validation: end it if any rank was asked to stop; all ranks call it."""
        self.beat("validating")
        self._meet(False)

    def _meet(self, working: bool) -> bool:
        """Whether any rank is working; raises if any was asked to stop. All ranks call it."""
        asked, working = on_any_rank(self.accelerator, self.stop.asked, working)
        if asked:
            raise _AskedToStopError  # not saved here: the model may have the averages for weights
        return working

    def _score_if_due(self, rang: bool = False) -> None:
        """Score the tasks of `eval.during` at their interval and at the end of the run."""
        step, began = self.position.step, time.perf_counter()
        if self.scorer is None or step == 0 or self.position.scored >= step:
            return
        if not (self.task_cadence.due(step, rang) or self.finished):
            return
        self.beat("scoring", now=True)
        try:
            found = score_live(
                self.scorer, self.bare_model, self.tokenizer, self.accelerator, self._meet_scoring
            )
        except _AskedToStopError:
            self._save_and_stop()
        except ValueError as error:  # a mistake that only this task's requests show; all ranks have it
            self._save(wait=True)
            raise ValueError(str(error) if self.accelerator.is_main_process else "") from None
        self.position.scored = step
        seconds = time.perf_counter() - began
        line = {"step": step, "tokens": self.recipe.tokens_at(step), **found, "tasks_seconds": seconds}
        self.metrics.write(line)
        self.line.found(step, in_words(found))

    def _meet_scoring(self, working: bool) -> bool:
        self.beat("scoring")
        return self._meet(working)

    def _log(self, result: StepResult, lr: float, spent: Spent, batch: Batch) -> None:
        """Write a line of metrics.jsonl and show progress; now and then, inspect the layers."""
        step, every = self.position.step, self.recipe.train.inspect_every
        tokens = self.recipe.tokens_at(step)
        measured = self.throughput.line(spent, tokens - self.recipe.tokens_at(step - 1))
        line = result.line(self.position, tokens, lr, measured)
        if self.recipe.train.guard is not None:
            line["outliers"] = self.position.outliers
        if self.stalled:
            line["checkpoint_seconds"], self.stalled = self.stalled, 0.0
        if every is not None and step % every == 0:  # on every rank: under FSDP2 a forward pass needs all
            line |= inspect(self.bare_model, lambda: self.forward(shortened(batch), 1.0, return_logits=False))
            reshard(self.model)
        self.metrics.write(line)
        self.line.step(step, result.loss, line["tokens_per_second"], result.applied, result.outlier)

    def _end_after_bad_steps(self) -> None:
        """Finish the save in progress, then raise ValueError; the main rank's has the message."""
        self.saver.finish()
        if not self.accelerator.is_main_process:
            raise ValueError("")
        guarded = self.recipe.train.guard is not None
        beyond = ", or beyond train.guard," if guarded else ""
        advice = " or raise train.guard.deviations" if guarded else ""
        raise ValueError(
            f"the loss or its gradient was not finite{beyond} for {self.position.bad_in_a_row} steps in a "
            f"row, up to step {self.position.step}; lower optim.lr{advice}, then run again to go on from "
            f"{self.last_name()}"
        )

    def _save_is_due(self, rang: bool) -> bool:
        """Whether to save now. A save that comes due in a bad step waits for the next good one."""
        self._save_pending |= self.save_cadence.due(self.position.step, rang)
        if self.position.bad_in_a_row:
            return False
        due, self._save_pending = self._save_pending, False
        return due

    def _save(self, wait: bool = False) -> None:
        """Start to save; at the end of the run, or with `wait`, finish it."""
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
        """Count the seconds that training waits for a checkpoint; they go into the next logged line."""
        began = time.perf_counter()
        yield
        self.stalled += time.perf_counter() - began

    def _write_extras(self, folder: Path) -> None:
        """Put the tokenizer beside the weights, so that a checkpoint loads on its own."""
        shutil.copytree(self.prepared.tokenizer_dir, folder, dirs_exist_ok=True)

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
        """The checkpoint that a new start resumes from, for messages."""
        name = checkpoint.latest_name(self.checkpoints)
        return "the beginning" if name == "none" else str(self.checkpoints / name)

    def beat(self, doing: str, now: bool = False) -> None:
        step = self.position.step
        self.heartbeat.beat(step, self.recipe.tokens_at(step), doing, now)

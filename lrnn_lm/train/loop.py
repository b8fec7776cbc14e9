"""The training loop: steps of the token budget, validation, checkpoints, and a clean stop when asked.

Legend: a step is one optimizer update over `tokens_per_step` tokens of all ranks, taken in micro-batches.
What ranks exchange in a step, beside gradients, is in `exchange.py`.
"""

import gc
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from ..model.carried import CarriedStates
from ..recipe import Recipe
from ..runs import checkpoint
from ..runs.checkpoint import Position
from ..runs.layout import RunFolder
from .average import Average
from .carry import Carry
from .exchange import StepResult, exchange, on_any_rank, targets_per_rank
from .graphed import graphed_passes
from .guard import after_bad_steps, guarded
from .inspect_layers import inspect, shortened
from .metrics import Cadence, Metrics
from .optim import drop_frozen_gradients, learning_rate
from .parallel import Plan, accumulating, clip_gradients, is_sharded, reshard, settle_buckets
from .profile import StepProfile
from .progress import ProgressLine
from .rows import Batch, Rows
from .saver import Saver
from .segments import split
from .sequence import sequence_parallel
from .sources import Prepared
from .stop import AskedToStopError, OtherRankError, Stopped, StopSignal
from .tasks import Scorer, in_words, score_live
from .tensors import Group
from .throughput import Spent, Throughput
from .validate import Validator
from .watch import Heartbeat, Stopwatch


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
        self.checkpoints = RunFolder(folder).checkpoints
        self.bare_model, self.model, self.optimizer = bare_model, model, optimizer
        self._parameters = [*model.parameters()]  # those of the optimizer, in the model's order
        self.tokenizer, self.prepared = tokenizer, prepared
        self.position, self.console, self.group, self.plan = position, console, group, plan
        self.average, self.scorer = average, scorer
        self.sequence = sequence_parallel(recipe, bare_model.config, accelerator)
        self.rows = Rows(recipe, prepared, accelerator, position, self.sequence)
        self.save_cadence, self.validation_cadence, self.task_cadence = (
            Cadence(each.every, recipe.tokens_at, accelerator.is_main_process)
            for each in (recipe.checkpoint, recipe.eval, recipe.eval.during or recipe.eval)
        )
        self.throughput = Throughput(recipe, bare_model.config, is_sharded(bare_model), accelerator)
        self.saver = Saver(
            self.checkpoints, accelerator, bare_model, optimizer, prepared.tokenizer_dir, recipe,
            position.step, console, group, average,
        )  # fmt: skip
        self.carry: Carry | None = None
        if recipe.data.rows_in_order is not None or recipe.train.start_from_other:
            share = self.rows.loader.share
            self.carry = Carry(recipe, accelerator.process_index * share, share, accelerator.device)
            self.saver.carried = self.carry.tensors
        self.heartbeat = Heartbeat(folder, accelerator.is_main_process, 60 * recipe.train.stall_minutes)
        self.stopwatch = Stopwatch(accelerator.device)
        self.profile = StepProfile(recipe.train.profile, RunFolder(folder), accelerator)
        self.validator = Validator(
            prepared, recipe, accelerator, model, self.rows, lambda *given: self.forward(*given), average,
        )  # fmt: skip
        self.stop = StopSignal()
        self.metrics: Metrics | None = None  # while it runs
        self.lock: TextIO | None = None  # of the run folder, held until the run is scored
        self._forward_seconds = 0.0  # of this rank's last step, to find slow ranks
        self.first_step = position.step  # where this process began
        # The model reads this argument in training only, so validation is without it.
        self.z_loss = {"z_loss": recipe.train.z_loss} if recipe.train.z_loss else {}
        self.graphed = graphed_passes(recipe, accelerator, self._backward, self._parameters)

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
            self.line = ProgressLine(self.console, self.recipe, self.position.step, self.accelerator)
            self.metrics = Metrics(self.folder, self.accelerator, self.position, self.line.warn)
            try:
                self.metrics.start_trackers(self.recipe)
                with self.line:
                    self._train()
                self.saver.finish()
            finally:
                gc.unfreeze()
                self.heartbeat.stop()
                self.rows.close()
                self.profile.close()
                self.saver.close()
                self.metrics.close()
                if self.lock is not None and not self.finished:
                    self.lock.close()
        return self.checkpoints / checkpoint.step_name(self.position.step)

    def _train(self) -> None:
        # The run may have stopped between its last step and that step's validation and scores.
        self._validate_if_due()
        self._score_if_due()
        if self.finished:
            self.saver.complete(self.position)
            return
        self.saver.warm_up()
        self.rows.start()
        settle_buckets(self.model, self._empty_pass)
        while not self.finished:
            save_timer, validation_timer, task_timer = self._train_step().timers
            if self.position.step == self.first_step + 1 and self.accelerator.device.type == "cuda":
                # Freeze long-lived objects: a full garbage collection pauses this rank for 0.2 s.
                gc.collect()
                gc.freeze()
            self._validate_if_due(validation_timer)
            self._score_if_due(task_timer)
            bad = self.position.bad_in_a_row > 0  # its weights may be the cause: save after a good step
            if self.save_cadence.due(self.position.step, save_timer, wait=bad) or self.finished:
                self._save()
            self.beat("training")
        if self.metrics.problem is not None:
            self.metrics.check()
        self.beat("finished", now=True)

    def _empty_pass(self) -> None:
        """Forward and backward over a dummy batch; the gradients are dropped."""
        pieces = partial(self._by_pieces, last=True, carry=None)
        (pieces if self.sequence.by_pieces else self._backward)(self.rows.empty(), 1.0)
        self.optimizer.zero_grad(set_to_none=True)

    # One step ---------------------------------------------------------------------------------------

    def _train_step(self) -> StepResult:
        """One step and what surrounds it: learning rate, rows, logging, stop."""
        position, recipe, started = self.position, self.recipe, time.perf_counter()
        lr = learning_rate(position.step, recipe.total_steps, recipe.train.tokens_per_step, recipe.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.profile.begins(position.step + 1)
        batches, guard = self.rows.take(), recipe.train.guard
        last = position.step + 1 >= recipe.total_steps
        result = self.step(batches, None if last else self.rows.fetch)
        result.count(position, recipe.rows_at(position.step), guard.window if guard else 0)
        if said := self.profile.ends(position.step):
            self.line.say(f"step {position.step}: {escape(said)}")
        if result.applied and self.average is not None:
            self.average.update(position.step)
        spent = Spent(time.perf_counter() - started, self.rows.waited(), result.waited)
        every = (recipe.train.log_every, recipe.train.inspect_every)
        if not result.applied or any(n and position.step % n == 0 for n in every):
            self._log(result, lr, spent, batches[0])
        if result.written == self.accelerator.num_processes:
            self.saver.finish()
        if position.bad_in_a_row >= recipe.train.max_bad_steps:
            self.saver.finish()
            why = after_bad_steps(position, guard is not None, checkpoint.resumes_from(self.checkpoints))
            raise ValueError(why if self.accelerator.is_main_process else "")
        if result.unwritten:
            self.metrics.check()
        if result.stop:
            self._save_and_stop()
        return result

    def step(self, micro_batches: list[Batch], meanwhile: Callable[[], None] | None = None) -> StepResult:
        """Forward, backward and update; all ranks skip the update if loss or gradient norm is not finite.

        `meanwhile` is called once all work is launched: the host would only wait for the device.
        """
        if not self.bare_model.training:  # after a validation: to walk through all modules takes 0.3 ms
            self.model.train()
        num_items = targets_per_rank(micro_batches, self.accelerator)
        sums = torch.zeros(2, device=self.accelerator.device)
        for i, batch in enumerate(micro_batches):
            first, last = i == 0, i + 1 == len(micro_batches)
            if self.sequence.by_pieces or self.carry is not None:
                sums += self._by_pieces(batch, num_items, last, self.carry)
            elif self.graphed is not None:
                sums += self.graphed(batch, num_items, first)
            else:
                with accumulating(self.model, last, self.plan):
                    sums += self._backward(batch, num_items, self.stopwatch.timing() if first else None)
        drop_frozen_gradients(self.optimizer)
        grad_norm = clip_gradients(self._parameters, self.recipe.optim.grad_clip or math.inf)
        if meanwhile is not None:
            meanwhile()
        result = self._exchange(sums, grad_norm)
        if self.carry is not None:
            self.carry.end_step(result.applied or result.outlier)
        if result.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _exchange(self, losses: Tensor, grad_norm: Tensor) -> StepResult:
        """Sum over ranks what all must know before the update: losses, norm, flags, times."""
        # Under FSDP2 a forward pass waits for other ranks' parameters: its time says nothing of this rank.
        timed = self.accelerator.num_processes > 1 and not is_sharded(self.model)
        seconds = self._forward_seconds if timed else None
        unwritten = self.metrics is not None and self.metrics.problem is not None
        timers = [c.timer_expired() for c in (self.save_cadence, self.validation_cadence, self.task_cadence)]
        flags = [self.stop.asked or self.rows.unread, self.saver.written, unwritten, *timers]
        result = exchange(losses, grad_norm, flags, seconds, self.accelerator)
        # Sent in the next step: reading the timer earlier would make the host wait for the device again.
        self._forward_seconds = self.stopwatch.seconds()
        return guarded(result, self.position.recent, self.recipe.train.guard)

    def _backward(self, batch: Batch, num_items: Tensor | float, timing: Any = None) -> Tensor:
        """Forward and backward of a micro-batch: (2,) its loss, the z-loss included, and the z-loss."""
        self._z_sum = torch.zeros((), device=self.accelerator.device)
        with timing or nullcontext():
            loss = self._loss(batch, num_items)
        loss.backward()
        return torch.stack([loss.detach(), self._z_sum])

    def _loss(self, batch: Batch, num_items: Tensor | float, carried: CarriedStates | None = None) -> Tensor:
        outputs = self.forward(batch, num_items, return_logits=False, carried=carried)
        if self.z_loss:
            self._z_sum += outputs.z_loss
        return outputs.loss

    def _by_pieces(self, batch: Batch, num_items: Tensor | float, last: bool, carry: Carry | None) -> Tensor:
        """The same, a segment at a time. `last`: of its step."""
        start, self._z_sum = None, torch.zeros((), device=self.accelerator.device)
        if carry is not None:
            start, batch = carry.before(self.position.step, batch)
        loss, end = self.sequence.backward(
            lambda part, carried: self.forward(part | {"labels": None}, num_items, False, carried),
            lambda part, carried: self._loss(part, num_items, carried),
            split(batch, self.sequence.piece),
            lambda first: accumulating(self.model, last and first, self.plan),
            start,
            keep_end=carry is not None,
        )
        if carry is not None and end is not None:
            carry.after(end)
        return torch.stack([loss, self._z_sum])

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
        input_ids, reset, labels = (
            None if batch[key] is None else batch[key].to(self.accelerator.device, non_blocking=True)
            for key in ("input_ids", "reset", "labels")
        )
        # Not None: an auto-encoder takes no cache.
        more = self.z_loss if carried is None else self.z_loss | {"past_key_values": carried}
        return self.model(
            input_ids=input_ids,
            reset=reset,
            shift_labels=labels,
            num_items_in_batch=num_items,
            return_logits=return_logits,
            use_cache=False,
            **more,
        )

    # Validation, logging, saving, stopping -----------------------------------------------------------

    def _validate_if_due(self, timer: bool = False) -> None:
        if not self._is_due(self.validation_cadence, timer, self.position.validated):
            return
        self.beat("validating", now=True)
        try:
            found, line = self.validator.measure(partial(self._meet, "validating"))
        except AskedToStopError:
            self._save_and_stop()
        self.position.validated, self.position.validation_loss = self.position.step, found.loss
        self._write(line, f"validation {found}")

    def _is_due(self, cadence: Cadence, timer: bool, done: int) -> bool:
        """Whether to do now, at its interval or at the run's end, what was last done after step `done`."""
        return self.position.step > max(0, done) and (cadence.due(self.position.step, timer) or self.finished)

    def _write(self, fields: dict[str, Any], words: str) -> None:
        """Write a line of metrics.jsonl beside those of the steps, and say what it holds."""
        step = self.position.step
        self.metrics.write({"step": step, "tokens": self.recipe.tokens_at(step), **fields})
        self.line.say(f"step {step}: {escape(words)}")

    def _meet(self, doing: str, working: bool = False, failed: bool = False) -> bool:
        """Whether any rank still works; OtherRankError if any has failed, AskedToStopError if any was asked.
        All ranks call it."""
        self.beat(doing)
        asked = self.stop.asked or self.rows.unread
        asked, working, failed = on_any_rank(self.accelerator, asked, working, failed)
        if failed:
            raise OtherRankError
        if asked:
            raise AskedToStopError  # not saved here: the model may have the averages for weights
        return working

    def _score_if_due(self, timer: bool = False) -> None:
        """Score the tasks of `eval.during` at their interval and at the end of the run."""
        if self.scorer is None or not self._is_due(self.task_cadence, timer, self.position.scored):
            return
        began = time.perf_counter()
        self.beat("scoring", now=True)
        try:
            found = score_live(
                self.scorer, self.bare_model, self.tokenizer, self.accelerator,
                partial(self._meet, "scoring"), partial(self._save, wait=True),
            )  # fmt: skip
        except AskedToStopError:
            self._save_and_stop()
        self.position.scored = self.position.step
        self._write({**found, "tasks_seconds": time.perf_counter() - began}, in_words(found))

    def _log(self, result: StepResult, lr: float, spent: Spent, batch: Batch) -> None:
        """Write a line of metrics.jsonl and show progress; now and then, inspect the layers."""
        step, every = self.position.step, self.recipe.train.inspect_every
        tokens = self.recipe.tokens_at(step)
        measured = self.throughput.line(spent, tokens - self.recipe.tokens_at(step - 1))
        line = result.line(self.position, tokens, lr, measured)
        if self.recipe.train.guard is not None:
            line["outliers"] = self.position.outliers
        if self.saver.stalled:
            line["checkpoint_seconds"], self.saver.stalled = self.saver.stalled, 0.0
        if every is not None and step % every == 0:  # on every rank: under FSDP2 a forward pass needs all
            line |= inspect(self.bare_model, lambda: self.forward(shortened(batch), 1.0, return_logits=False))
            reshard(self.model)
        self.metrics.write(line)
        self.line.step(step, result.loss, line["tokens_per_second"], result.applied, result.outlier)

    def _save(self, wait: bool = False) -> None:
        """Start to save; at the end of the run, or with `wait`, finish it and its copy."""
        self.beat("saving", now=True)
        self.metrics.sync()
        self.saver.begin(self.position, last=self.finished)
        if wait or self.finished:
            self.saver.settle()

    def _save_and_stop(self) -> None:
        reshard(self.model)
        (unread,) = on_any_rank(self.accelerator, self.rows.unread)
        self._save(wait=True)
        self.rows.check()
        self.beat("stopped", now=True)
        by = "text that another rank could not read" if unread else self.stop.name
        by += f" after step {self.position.step} of {self.recipe.total_steps}"
        saved = checkpoint.resumes_from(self.checkpoints)
        raise Stopped(f"stopped by {by}; saved {saved}", tell=self.accelerator.is_main_process)

    def beat(self, doing: str, now: bool = False) -> None:
        step = self.position.step
        self.heartbeat.beat(step, self.recipe.tokens_at(step), doing, now)

"""Trains many small models side by side on one device: the package's models, each step a CUDA graph.

A step of a tiny model is about two hundred kernels of microseconds each, so Python, not the GPU, limits the
speed. Here a whole step (its rows, forward, backward, clipping, AdamW, the scheduled learning rate) is
captured once as a graph that reads everything from memory, and replayed. Each replica has a stream, so the
graphs of a wave run concurrently. On a CPU the same step runs eagerly.

Legend: S steps filled at once, B rows a step, T time.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrnn_lm import LRNNConfig, LRNNForCausalLM
from lrnn_lm.data import SYNTHETIC_TASKS, SyntheticTask
from lrnn_lm.data.pack import IGNORED
from lrnn_lm.model.autoencoder import LRNNForReconstruction

from .rows import TrainingRows, task_rows

FILLED = 250  # S: steps whose rows lie in memory at once
WARMUP_STEPS = 2  # before a capture: libraries make their plans then
HELDOUT_ROWS = {"causal": 256, "autoencoder": 1280}
EVALUATED_TOKENS = 16_384  # of one forward pass without gradients


@dataclass(frozen=True)
class Job:
    """One run, whole: what is written beside its result. `stages` are (length T, steps), one after the other;
    `tested` the lengths up to which accuracy is measured. options, examples: of the task, where they are not
    its own; examples are the training rows of a finite set. search: whether the run chooses settings; it is
    in no table then.
    """

    name: str
    task: str
    model: str
    mixer: dict[str, Any]
    seed: int
    lr: float
    stages: tuple[tuple[int, int], ...]
    tested: tuple[int, ...]
    rows: int = 128
    hidden: int = 64
    layers: int = 2
    intermediate: int = 128
    weight_decay: float = 0.0
    warmup: float = 0.02
    grad_clip: float = 1.0
    precision: str = "fp32"
    options: dict[str, float] = field(default_factory=dict)
    examples: int | None = None
    study: str = ""
    search: bool = False

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.stages)

    def task_at(self, length: int) -> SyntheticTask:
        return SyntheticTask(self.task, length, dict(self.options))

    def config(self) -> LRNNConfig:
        """The model's configuration; the loss is computed in one piece."""
        longest = max(length for length, _ in self.stages)
        return LRNNConfig(
            vocab_size=self.task_at(longest).vocab_size, hidden_size=self.hidden,
            num_hidden_layers=self.layers, intermediate_size=self.intermediate, mixer=self.mixer,
            max_position_embeddings=longest, loss_chunk=self.rows * longest, use_cache=False,
        )  # fmt: skip

    def build(self) -> nn.Module:
        """The model at its start, a function of the seed."""
        torch.manual_seed(self.seed)
        head = SYNTHETIC_TASKS[self.task].head
        return (LRNNForReconstruction if head == "autoencoder" else LRNNForCausalLM)(self.config())


def rates(job: Job) -> Tensor:
    """(steps,) the learning rate of each step: linear warm-up, then a cosine to zero."""
    total, warmup = job.steps, max(1, round(job.warmup * job.steps))
    decay = [0.5 * (1 + math.cos(math.pi * i / max(1, total - warmup))) for i in range(total - warmup)]
    return job.lr * torch.tensor([(i + 1) / warmup for i in range(warmup)] + decay)[:total]


def tune_nothing() -> int:
    """Leave flash-linear-attention's kernels the first of their launch shapes; how many kernels there are.

    It would time dozens of each for every shape of the model, minutes for runs of seconds.
    """
    kernels = [value for name, module in list(sys.modules.items()) if name.startswith("fla.")
               for value in vars(module).values()]  # fmt: skip
    count = 0
    for kernel in kernels:
        while kernel is not None and not hasattr(kernel, "configs"):
            kernel = getattr(kernel, "fn", None)  # what heuristics are wrapped around
        if kernel is not None and isinstance(kernel.configs, list):
            kernel.configs = kernel.configs[:1]
            count += 1
    return count


class Replica:
    """One model in training: its step reads its place in the run from the device, not from Python."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.model = job.build().to(device).train()
        tune_nothing()
        self.rates = torch.nn.functional.pad(rates(job), (0, WARMUP_STEPS)).to(device)
        self.rate = torch.zeros((), device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # steps taken
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # of the next step in the filled rows
        self.loss_sum = torch.zeros((), device=device)
        self.losses: list[float] = []
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": job.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.98), fused=True, capturable=device.type == "cuda"
        )

    def step(self, rows: TrainingRows) -> None:
        """One step on the rows at `place`."""
        self.rate.copy_(self.rates.index_select(0, self.count).squeeze(0))
        inputs = rows.inputs.index_select(0, self.place).squeeze(0)  # (B, T)
        labels = rows.labels.index_select(0, self.place).squeeze(0)
        loss = self._forward(inputs, shift_labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.job.grad_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach()
        self.place += 1
        self.count += 1

    def _forward(self, inputs: Tensor, **arguments: Any) -> Any:
        half = self.job.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            return self.model(input_ids=inputs, use_cache=False, **arguments)

    def capture(self, rows: TrainingRows) -> None:
        """Make the graph of a step on these rows; parameters and optimiser stay as they were."""
        if self.stream is None:
            with torch.no_grad():
                self._forward(rows.inputs[0])  # whether it can run here
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.rehearse(rows)
        torch.cuda.synchronize(self.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step(rows)

    def rehearse(self, rows: TrainingRows) -> None:
        """Some steps that leave no trace: libraries choose algorithms, the optimiser makes its moments."""
        saved = [t.clone() for t in self._state()]
        for _ in range(WARMUP_STEPS):
            self.step(rows)
        for i, kept in enumerate(self._state()):
            if i < len(saved):
                kept.copy_(saved[i])
            else:  # moments that came into being meanwhile
                kept.zero_()

    @torch.no_grad()
    def _state(self) -> list[Tensor]:
        """All that a step changes; the optimiser's moments last, as they come into being with the first."""
        own = [self.count, self.place, self.loss_sum, *(p.data for p in self.model.parameters())]
        moments = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return [*own, *moments]

    def run(self, rows: TrainingRows) -> None:
        """One step, as a graph where there is one."""
        if self.graph is None:
            self.step(rows)
            return
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def note(self, steps: int) -> None:
        """Keep the mean loss of the last `steps` steps, and begin anew with the next rows."""
        self.losses.append(round(float(self.loss_sum) / steps, 6))
        self.loss_sum.zero_()
        self.place.zero_()

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Accuracy on two held-out sets: `selection`, at the training length, chooses settings; the rest is
        reported. State tasks: by length, of one set as long as the longest, whose first tokens are a set of
        the shorter length (`by_length`: all tokens; `last_half`: those of the second half alone).
        """
        job = self.job
        trained = max(length for length, _ in job.stages)
        hits, asked = self._hits("validation", trained)
        facts: dict[str, Any] = {"losses": self.losses, "loss": self.losses[-1]}
        facts["selection"] = float(hits.sum() / asked.sum())
        hits, asked = self._hits("test", max(job.tested))
        if SYNTHETIC_TASKS[job.task].examples is not None:
            return {**facts, "accuracy": float(hits.sum() / asked.sum())}

        def share(begin: int, end: int) -> float:
            return float(hits[:, begin:end].sum() / asked[:, begin:end].sum())

        return {
            **facts,
            "accuracy": share(0, trained),
            "by_length": {str(length): share(0, length) for length in job.tested},
            "last_half": {str(length): share(length // 2, length) for length in job.tested},
        }

    def _hits(self, split: str, length: int) -> tuple[Tensor, Tensor]:
        """Of the rows of a split, (rows, length) each: where the model is right, and where it is asked."""
        state = SYNTHETIC_TASKS[self.job.task].examples is None
        count = HELDOUT_ROWS["causal" if state else "autoencoder"]
        inputs, labels = task_rows(self.job.task_at(length), self.job.seed, split, 0, count, self.device)
        self.model.eval()
        at_once = max(1, EVALUATED_TOKENS // length)
        chosen = torch.cat([self._forward(part).logits.argmax(-1) for part in inputs.split(at_once)])
        self.model.train()
        return (chosen == labels).double(), (labels != IGNORED).double()


def train_wave(jobs: list[Job], device: torch.device, deadline: float) -> list[dict[str, Any]]:
    """Train jobs of equal stages and rows beside each other; a result each, or none once `deadline`
    (time.monotonic) is past. What a model cannot do here stands in its `error`.
    """
    began = time.monotonic()
    exact = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    results: dict[str, dict[str, Any]] = {}
    replicas: list[Replica] = []
    for job in jobs:
        try:
            replicas.append(Replica(job, device))
        except ValueError as error:
            results[job.name] = {**asdict(job), "error": str(error)}
    done = 0
    for length, steps in jobs[0].stages:
        replicas = _train_stage(replicas, length, steps, done, device, deadline, results)
        done += steps
        if time.monotonic() > deadline:
            return []
    torch.set_float32_matmul_precision("highest")
    for replica in replicas:
        results[replica.job.name] = {
            **asdict(replica.job),
            "parameters": sum(p.numel() for p in replica.model.parameters()),
            **replica.measure(),
        }
    torch.set_float32_matmul_precision(exact)
    seconds = round((time.monotonic() - began) / len(jobs), 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return [{**results[job.name], "seconds": seconds, "device": name} for job in jobs]


def _train_stage(
    replicas: list[Replica],
    length: int,
    steps: int,
    done: int,
    device: torch.device,
    deadline: float,
    results: dict[str, dict[str, Any]],
) -> list[Replica]:
    """`steps` steps on rows of `length`, the first `done` of the run being taken; the replicas that could."""
    data: dict[tuple[str, int], TrainingRows] = {}
    at_once = min(FILLED, steps)
    able = []
    for replica in replicas:
        job = replica.job
        key = (job.task, job.seed)
        if key not in data:
            data[key] = TrainingRows(job.task_at(length), job.seed, job.rows, at_once, device, job.examples)
            data[key].fill(done, at_once)
        try:
            replica.capture(data[key])
            able.append(replica)
        except (ValueError, RuntimeError, torch.OutOfMemoryError) as error:
            results[job.name] = {**asdict(job), "error": str(error).split("\n")[0]}
    for first in range(0, steps, at_once):
        count = min(at_once, steps - first)
        for rows in data.values():
            rows.fill(done + first, count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for _ in range(count):
            for replica in able:
                replica.run(data[replica.job.task, replica.job.seed])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for replica in able:
            replica.note(count)
        if time.monotonic() > deadline:
            break
    return able

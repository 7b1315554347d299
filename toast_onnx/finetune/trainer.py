"""The training loop: steps, evaluation, the best weights, checkpoints."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.finetune.checkpoint import load_checkpoint, save_checkpoint
from toast_onnx.finetune.evaluation import evaluate
from toast_onnx.finetune.module import GraphModule
from toast_onnx.finetune.objective import Targets, loss_parts, total
from toast_onnx.finetune.parallel import Processes, agree, any_of, wrapped
from toast_onnx.finetune.samples import Batch, Reader, Samples, plain_batches
from toast_onnx.finetune.schedule import rate_at
from toast_onnx.finetune.settings import Settings

State = dict[str, Tensor]
#: Called after every step with the number of steps done and what to show.
Progress = Callable[[int, str], None]


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        best_step: step of the best evaluation; 0 means that no training beat the start.
        best: that evaluation.
        start: evaluation of the weights before training.
        history: all evaluations, each with its `step` and the mean training `train` loss since the one before.
        steps: steps done.
        reason: why training ended: `finished`, `stopped early`, `interrupted` or `diverged`.
        message: what to tell about a run that diverged.
        images_per_second: samples trained on a second, evaluation left out.
    """

    best_step: int
    best: dict[str, float]
    start: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    reason: str = "finished"
    message: str = ""
    images_per_second: float = 0.0


@dataclass(frozen=True)
class Run:
    """What is trained on what.

    Attributes:
        student: the module to train.
        teacher: the module to imitate, None for labels alone.
        targets: the tensors compared.
        samples: the data.
        train: numbers of the samples to train on.
        held: numbers of the samples to evaluate on.
        fixed: whether the graph fixes the batch size.
        group: the processes.
        checkpoint: where to write checkpoints, None for none.
        identity: what a checkpoint must agree on to be resumed.
    """

    student: GraphModule
    teacher: GraphModule | None
    targets: Targets
    samples: Samples
    train: np.ndarray[Any, Any]
    held: np.ndarray[Any, Any]
    fixed: bool
    group: Processes
    checkpoint: Path | None = None
    identity: dict[str, Any] = field(default_factory=dict)


def train(
    run: Run,
    settings: Settings,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda steps, note: None,
) -> Outcome:
    """Train; afterwards the student holds the best weights found, which are the start's where nothing beat them.

    Training that reaches a loss of NaN or infinity stops there, with the reason `diverged`.

    Everything a step does follows from the settings, the data and the step's number, so a run resumed from a checkpoint
    ends in the same weights as one that was never stopped (on one machine, with one number of threads).

    Raises:
        ConfigError: the checkpoint belongs to another run, or everything is frozen.
        ModelError: the model's outputs are NaN or infinite before any training.
    """
    session = _Session(run, settings)
    if resume and run.checkpoint is not None:
        session.restore(load_checkpoint(run.checkpoint, run.identity))
    else:
        session.evaluate()
    reader = Reader(
        run.samples, run.train, settings.batch * settings.accumulate, run.group.rank, run.group.count, settings.seed
    )
    try:
        for batch in reader.steps(session.step, settings.steps):
            if session.is_patience_over():
                break
            try:
                note = session.advance(batch)
            except _Diverged as e:
                session.outcome.reason, session.outcome.message = "diverged", str(e)
                break
            progress(session.step, note)
            stop = any_of(should_stop(), run.group)
            if session.step % settings.evaluate == 0 or session.step == settings.steps:
                session.evaluate()
                session.save()
            elif stop:
                session.save()
            if stop:
                session.outcome.reason = "interrupted"
                break
    finally:
        session.finish()
    if session.outcome.reason == "finished" and session.step < settings.steps:
        session.outcome.reason = "stopped early"
    return session.outcome


class _Diverged(Exception):
    """The loss is no number any more."""


class _Session:
    """The state of a run: weights, optimizer, average, best, history."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.settings, self.step = run, settings, 0
        self.outcome = Outcome(0, {}, {})
        self._device = run.group.device
        self._student = run.student.to(self._device)
        self._teacher = None if run.teacher is None else run.teacher.to(self._device).requires_grad_(False)
        _freeze(self._student, settings.freeze)
        if settings.local and not run.targets.stream:
            raise ConfigError("block-local training needs block ends that both models share; there are none")
        # In the stream's names lie the block ends, where recomputation may cut.
        self._student.boundaries = run.targets.stream if settings.recompute else ()
        self._student.cuts = frozenset(run.targets.stream) if settings.local else frozenset()
        self._trained = {n: p for n, p in self._student.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(_groups(self._trained, settings.decay), lr=settings.rate)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=settings.amp == "fp16")
        self._parallel = wrapped(self._student, run.group)
        self._average: State | None = self._copy() if settings.average else None
        self._best: State = self._copy()
        self._losses: list[float] = []
        self._seconds, self._samples_done = 0.0, 0

    # --- one step ---

    def advance(self, batch: Batch) -> str:
        """One optimizer step on a batch of `batch * accumulate` samples; returns what to show."""
        settings, started = self.settings, time.perf_counter()
        rate = rate_at(self.step, settings.steps, settings.rate, settings.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        shown: dict[str, float] = {}
        for k, part in enumerate(_cut(batch, settings.accumulate)):
            last = k == settings.accumulate - 1
            waiting = nullcontext() if last or self.run.group.count == 1 else self._parallel.no_sync()
            with waiting:
                parts = self._losses_of(part, k)
                loss = total(parts, settings) / settings.accumulate
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            for name, value in parts.items():
                shown[name] = shown.get(name, 0.0) + value.item() / settings.accumulate
        value = sum(getattr(settings, name) * part for name, part in shown.items())
        if any_of(not math.isfinite(value), self.run.group):
            precise = "" if settings.amp == "off" else ", or use --amp off"
            raise _Diverged(f"the loss became {value} at step {self.step + 1} (rate {rate:.2g}); lower --lr{precise}")
        self._scaler.unscale_(self._optimizer)
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(list(self._trained.values()), settings.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.step += 1
        self._update_average()
        self._losses.append(value)
        self._seconds += time.perf_counter() - started
        self._samples_done += batch.valid * self.run.group.count
        return "  ".join([f"loss {value:.4g}", *(f"{n} {v:.4g}" for n, v in shown.items()), f"rate {rate:.2g}"])

    def _losses_of(self, batch: Batch, k: int) -> dict[str, Tensor]:
        settings, targets = self.settings, self.run.targets
        feeds = {name: torch.from_numpy(value).to(self._device) for name, value in batch.feeds.items()}
        labels = None if batch.labels is None else torch.from_numpy(batch.labels).to(self._device)
        keep = targets.names if targets.scores is None else (*targets.names, targets.scores)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.amp)
        casting = torch.autocast(self._device.type, kind) if kind is not None else nullcontext()
        weight = None
        if settings.mixup:
            rng = np.random.default_rng([settings.seed, 3, self.step, k, self.run.group.rank])
            weight, order = float(rng.beta(settings.mixup, settings.mixup)), rng.permutation(batch.valid)
            feeds = {n: _blend(x, order, weight) for n, x in feeds.items()}
        with casting:
            theirs = None
            if self._teacher is not None:
                with torch.no_grad():
                    theirs = self._teacher(**feeds, keep=targets.names)
            ours = self._parallel(**feeds, keep=keep)
        if labels is not None and weight is not None and targets.scores is not None:
            hot = torch.nn.functional.one_hot(labels, ours[targets.scores].shape[-1]).float()
            labels = _blend(hot, order, weight)
        return loss_parts(targets, ours, theirs, labels, settings)

    def _update_average(self) -> None:
        """Moving average with decay min(d, (1 + n) / (10 + n)): fast at first, so that the start does not linger."""
        if self._average is None:
            return
        decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self._trained.items():
                self._average[name].lerp_(parameter, 1 - decay)

    # --- evaluation and what is kept ---

    def evaluate(self) -> None:
        """Evaluate the weights (their average where there is one), and keep them if they are the best so far."""
        run, settings = self.run, self.settings
        current = self._copy() if self._average is not None else None
        if self._average is not None:
            self._load(self._average)
        found: dict[str, float] = {"loss": 0.0}
        if run.group.first:
            batches = plain_batches(run.samples, run.held, settings.batch, run.fixed)
            found = evaluate(self._student, self._teacher, run.targets, batches, settings, self._device)
        found["loss"] = agree(found["loss"], run.group)
        if not math.isfinite(found["loss"]):
            if self.step == 0:
                raise ModelError(
                    "the model's outputs are NaN or infinite before any training; check it with `toast-onnx eval`"
                )
            found = {key: value for key, value in found.items() if math.isfinite(value)} | {"loss": math.inf}
        entry = {"step": self.step} | found
        if self._losses:
            entry["train"] = sum(self._losses) / len(self._losses)
        self._losses = []
        self.outcome.history.append(entry)
        if self.step == 0:
            self.outcome.start = found
        if self.step == 0 or found["loss"] < self.outcome.best["loss"]:
            self.outcome.best_step, self.outcome.best = self.step, found
            self._best = self._copy()
        if current is not None:
            self._load(current)

    def is_patience_over(self) -> bool:
        """Whether the last evaluations, as many as the patience, were all worse than the best."""
        later = [e for e in self.outcome.history if e["step"] > self.outcome.best_step]
        return bool(self.settings.patience) and len(later) >= self.settings.patience

    def finish(self) -> None:
        """Put the best weights into the student."""
        self._load(self._best)
        self._student.boundaries, self._student.cuts = (), frozenset()
        self.outcome.steps = self.step
        self.outcome.images_per_second = self._samples_done / self._seconds if self._seconds else 0.0

    # --- checkpoints ---

    def save(self) -> None:
        """Write a checkpoint (first process only)."""
        if self.run.checkpoint is None or not self.run.group.first:
            return
        save_checkpoint(
            self.run.checkpoint,
            {
                "identity": self.run.identity,
                "step": self.step,
                "weights": self._copy(),
                "average": self._average,
                "best": self._best,
                "optimizer": self._optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "history": self.outcome.history,
                "best_step": self.outcome.best_step,
                "losses": self._losses,
            },
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step = state["step"]
        self._load(state["weights"])
        self._best = {n: t.to(self._device) for n, t in state["best"].items()}
        if state["average"] is not None:
            self._average = {n: t.to(self._device) for n, t in state["average"].items()}
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._losses = list(state["losses"])
        history: list[dict[str, float]] = state["history"]
        kept = [{k: v for k, v in entry.items() if k not in ("step", "train")} for entry in history]
        self.outcome.history, self.outcome.start = history, kept[0]
        self.outcome.best_step = state["best_step"]
        self.outcome.best = next(k for k, e in zip(kept, history, strict=True) if e["step"] == state["best_step"])

    def _copy(self) -> State:
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    def _load(self, state: State) -> None:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state[name])


def _freeze(module: GraphModule, patterns: tuple[str, ...]) -> None:
    names = [n for n, _ in module.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"--freeze {pattern} fits no weight; names are such as {', '.join(names[:3])}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(fnmatch.fnmatchcase(name, p) for p in patterns))
    if all(not p.requires_grad for p in module.parameters()):
        raise ConfigError("--freeze leaves no weight to train")


def _groups(trained: dict[str, torch.nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Biases and gains are not decayed."""
    matrices = [p for p in trained.values() if p.squeeze().ndim >= 2]
    vectors = [p for p in trained.values() if p.squeeze().ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _cut(batch: Batch, parts: int) -> list[Batch]:
    """Equal parts of a batch."""
    size = batch.valid // parts
    cuts = [slice(k * size, (k + 1) * size) for k in range(parts)]
    return [
        Batch({n: a[c] for n, a in batch.feeds.items()}, None if batch.labels is None else batch.labels[c], size)
        for c in cuts
    ]


def _blend(x: Tensor, order: np.ndarray[Any, Any], weight: float) -> Tensor:
    """weight x + (1 - weight) x[order] for floats (mixup, Zhang et al. 2018); other tensors as they are."""
    return x * weight + x[torch.from_numpy(order).to(x.device)] * (1 - weight) if x.is_floating_point() else x

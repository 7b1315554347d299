"""Local compensation: a block's surviving weights trained to reproduce the dense block's output. Needs PyTorch.

Block-wise reconstruction without labels, as BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) does it for quantization.
A block's input is what the pruned blocks before it make, its target what the dense model has behind the block, so each
block also takes back part of the error of the earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import BackendError
from toast_onnx.finetune.convert import to_torch
from toast_onnx.model import Model

if TYPE_CHECKING:
    import torch

    from toast_onnx.finetune.module import GraphModule

Array = NDArray[Any]


@dataclass(frozen=True)
class LocalSettings:
    """How a block is trained.

    Attributes:
        steps: Adam steps.
        rate: peak learning rate, as a fraction of a tensor's root mean square; falls to 0 by a cosine.
        group: batches a step.
        held_out: fraction of the batches that only judge the result.
        class_weight: of the class token, where the output is shown to read nothing else.
        seed: of the order of batches.
    """

    steps: int = 150
    rate: float = 0.01
    group: int = 1
    held_out: float = 0.125
    class_weight: float = 20.0
    seed: int = 0


@dataclass(frozen=True)
class LocalResult:
    """What training did to one block.

    Attributes:
        block: number of the block.
        before: squared error of the block's output on held-out samples with the closed-form weights, as a fraction of
            the output's energy; None where the block was not trained.
        after: the same with the weights that were kept.
        kept: `trained`, `mean` (only the output's mean corrected) or `closed form`.
        note: why a block was not trained.
    """

    block: int
    before: float | None = None
    after: float | None = None
    kept: str = "closed form"
    note: str | None = None

    def to_document(self) -> dict[str, object]:
        """Plain data for the report."""
        return asdict(self)


def require_torch() -> Any:
    """The torch package.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise BackendError(
            "compensation: local trains with PyTorch: pip install 'toast-onnx[torch]', or choose kind: ridge"
        ) from e
    return torch


def train_block(
    piece: Model,
    masks: Mapping[str, Array],
    bias: str | None,
    scale: Array | None,
    inputs: Array,
    targets: Array,
    weights: Array,
    settings: LocalSettings,
) -> tuple[dict[str, Array], float, float, str]:
    """Train a block's weights on pairs of input and wanted output; held-out pairs decide what is kept.

    Args:
        piece: the block as a model of one input and one output.
        masks: initializer name -> (its shape) True where it may change; all others stay.
        bias: initializer that is added to the block's output along the last axis, for matching its mean; None without.
        scale: layer scale (channels,) between that bias and the output.
        inputs: (batches, *shape of the piece's input).
        targets: (batches, *shape of its output).
        weights: broadcastable to a target: how much each element's error counts.
        settings: how to train.

    Returns:
        The new values by initializer name (empty when nothing was better than the start), the error before, the error
        after (fractions of the targets' energy, held-out batches), and which weights were kept.

    Raises:
        ModelError: an operator of the piece has no counterpart in PyTorch.
    """
    torch = require_torch()
    module = to_torch(piece)
    by_tensor = {tensor: name for name, tensor in module.initializers.items()}
    parameters = dict(module.named_parameters())
    for p in parameters.values():
        p.requires_grad_(False)
    free = {t: parameters[by_tensor[t]] for t in masks if t in by_tensor}
    problem = _Problem(module, inputs, targets, torch.as_tensor(weights, dtype=torch.float32))
    fit, judge = _split(len(inputs), settings.held_out)
    start = {t: p.detach().clone() for t, p in free.items()}
    before, best, kept, values = problem.error(judge), 0.0, "closed form", start
    best = before
    if bias in free and masks[bias].all():
        shift = problem.mean_error(fit)
        live = np.ones(len(shift)) if scale is None else np.asarray(scale, np.float64)
        shift = np.where(live != 0, shift / np.where(live != 0, live, 1.0), 0.0)
        free[bias].data -= torch.from_numpy(shift).to(free[bias].dtype)
        matched = problem.error(judge)
        if matched < best:
            best, kept, values = matched, "mean", {t: p.detach().clone() for t, p in free.items()}
        else:
            free[bias].data.copy_(start[bias])
    if settings.steps:
        _fit(problem, free, {t: torch.from_numpy(masks[t]) for t in free}, fit, settings)
        trained = problem.error(judge)
        if trained < best:
            best, kept, values = trained, "trained", {t: p.detach().clone() for t, p in free.items()}
    if kept == "closed form":
        return {}, before, best, kept
    return {t: v.numpy() for t, v in values.items()}, before, best, kept


def _split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on and of those that judge: the last ones, at least one."""
    judges = min(max(1, round(count * held_out)), count - 1)
    return list(range(count - judges)), list(range(count - judges, count))


class _Problem:
    def __init__(self, module: GraphModule, inputs: Array, targets: Array, weights: torch.Tensor) -> None:
        self.module, self.inputs, self.targets, self.weights = module, inputs, targets, weights

    def batch(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        x, y = (torch.from_numpy(np.array(a[k], np.float32)) for a in (self.inputs, self.targets))
        return x, y

    def loss(self, k: int) -> torch.Tensor:
        """Weighted squared error of a batch over the weighted energy of its target."""
        x, y = self.batch(k)
        found: torch.Tensor = (self.weights * (self.module(x) - y) ** 2).sum() / (self.weights * y**2).sum()
        return found

    def error(self, batches: list[int]) -> float:
        import torch

        with torch.no_grad():
            found = float(np.mean([float(self.loss(k)) for k in batches]))
        return found if math.isfinite(found) else math.inf

    def mean_error(self, batches: list[int]) -> NDArray[np.float64]:
        """Weighted mean of (output - target) over everything but the last axis, (channels,)."""
        import torch

        total, count = np.zeros(1), np.zeros(1)
        with torch.no_grad():
            for k in batches:
                x, y = self.batch(k)
                w = self.weights.expand_as(y)
                axes = tuple(range(y.ndim - 1))
                total = total + (w * (self.module(x) - y)).double().sum(axes).numpy()
                count = count + w.double().sum(axes).numpy()
        return np.asarray(total / count, np.float64)


def _fit(
    problem: _Problem,
    free: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    batches: list[int],
    settings: LocalSettings,
) -> None:
    import torch

    rates = []
    largest = max((_rms(p, masks[t]) for t, p in free.items() if p.ndim > 1), default=1.0)
    for t, p in free.items():
        p.requires_grad_(True)
        # A bias may start at zero; weights say how large the block's numbers are.
        rates.append(settings.rate * (_rms(p, masks[t]) if p.ndim > 1 else largest))
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(free.values(), rates, strict=True)])
    rng = np.random.default_rng(settings.seed)
    queue: list[int] = []
    for step in range(settings.steps):
        factor = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        for _ in range(settings.group):
            if not queue:
                queue = [batches[k] for k in rng.permutation(len(batches))]
            loss = problem.loss(queue.pop()) / settings.group
            loss.backward()  # type: ignore[no-untyped-call]
        for t, p in free.items():
            if p.grad is not None:
                p.grad *= masks[t]
        optimizer.step()
    for p in free.values():
        p.requires_grad_(False)


def _rms(p: torch.Tensor, mask: torch.Tensor) -> float:
    chosen = p.detach()[mask]
    return float(chosen.pow(2).mean().sqrt()) if chosen.numel() else 0.0

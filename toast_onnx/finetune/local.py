"""Local compensation: a block's surviving weights trained to reproduce the dense block's output. Needs PyTorch.

Block-wise reconstruction without labels, as BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) does it for quantization.
A block's input is what the pruned blocks before it make, its target what the dense model has behind the block, so each
block also takes back part of the error of the earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx import require
from toast_onnx.finetune.convert import to_torch
from toast_onnx.model import Model

if TYPE_CHECKING:
    import torch

    from toast_onnx.finetune.module import GraphModule

Array = NDArray[Any]
#: Number of a batch -> what a block reads there besides the residual stream, by tensor.
Beside = Callable[[int], Mapping[str, Array]]


@dataclass(frozen=True)
class LocalSettings:
    """How a block is trained.

    Attributes:
        steps: Adam steps; 0 only corrects the mean and refits the last layer of each block, and needs no PyTorch.
        check: steps between two looks at the held-out samples, the best of which is kept.
        rate: peak learning rate, as a fraction of a tensor's root mean square; falls to 0 by a cosine.
        group: batches a step.
        held_out: fraction of the batches that only judge the result.
        class_weight: of the class token, where the output is shown to read nothing else.
        seed: of the order of batches, and of classes.
        views: of each sample that does not judge, in which the dense and the pruned model see another class
            (`finetune.views`); blocks are corrected on these, too.
    """

    steps: int = 100
    check: int = 25
    rate: float = 0.01
    group: int = 1
    held_out: float = 0.125
    class_weight: float = 20.0
    seed: int = 0
    views: int = 0


@dataclass(frozen=True)
class LocalResult:
    """What training did to one block.

    Attributes:
        block: number of the block.
        before: squared error of the block's output on held-out samples with the closed-form weights, as a fraction of
            the output's energy; None where the block was not corrected.
        after: the same with the weights that were kept.
        kept: `trained`, `refit` (the last layer fitted to what the output lacks), `mean` (only the output's mean
            corrected) or `closed form`.
        note: why a block was not corrected or trained.
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
    return require.require_torch("compensation: local trains with", ", or choose kind: ridge")


@require.with_gradients
def train_block(
    piece: Model,
    masks: Mapping[str, Array],
    inputs: Array,
    targets: Array,
    weights: Array,
    settings: LocalSettings,
    beside: Beside = lambda _: {},
) -> tuple[dict[str, Array], float]:
    """Train a block's weights on pairs of input and wanted output; held-out pairs decide when the weights were best.

    It runs on the GPU that PyTorch finds, else on the processor.

    Args:
        piece: the block as a model of one input, and what `beside` gives, and of one output.
        masks: initializer name -> (its shape) True where it may change; all others stay.
        inputs: (batches, *shape of the piece's input).
        targets: (batches, *shape of its output).
        weights: (batches, *broadcastable to a target): how much each element's error counts.
        settings: how to train.
        beside: number of a batch -> further inputs of the piece, by name.

    Returns:
        The new values by initializer name, and the error with them on the held-out batches as a fraction of the
        targets' energy; no values when the start was better.

    Raises:
        ModelError: an operator of the piece has no counterpart in PyTorch.
    """
    torch = require_torch()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = to_torch(piece).to(device)
    by_tensor = {tensor: name for name, tensor in module.initializers.items()}
    parameters = dict(module.named_parameters())
    for p in parameters.values():
        p.requires_grad_(False)
    free = {t: parameters[by_tensor[t]] for t in masks if t in by_tensor}
    problem = _Problem(module, inputs, targets, weights, beside, device)
    fit, judge = split(len(inputs), settings.held_out)
    best = _Best(problem.error(judge))
    for _ in _fit(problem, free, {t: torch.as_tensor(masks[t], device=device) for t in free}, fit, settings):
        best.look(problem.error(judge), free)
    return best.values, best.error


class _Best:
    """The weights with the least error so far; none while the start is best."""

    def __init__(self, error: float) -> None:
        self.error = error
        self.values: dict[str, Array] = {}

    def look(self, error: float, free: Mapping[str, torch.Tensor]) -> None:
        if error < self.error:
            self.error, self.values = error, {t: p.detach().cpu().numpy().copy() for t, p in free.items()}


def split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Numbers of the batches to train on and of those that judge: the last ones, at least one of each."""
    judges = min(max(1, round(count * held_out)), count - 1)
    return list(range(count - judges)), list(range(count - judges, count))


def relative_error(output: Array, target: Array, weights: Array) -> float:
    """Weighted squared error of a batch as a fraction of the target's energy."""
    wanted = np.asarray(target, np.float64)
    energy = max(float((weights * wanted**2).sum()), np.finfo(np.float64).tiny)
    found = (weights * (output - wanted) ** 2).sum() / energy
    return float(found) if math.isfinite(found) else math.inf


class _Problem:
    def __init__(
        self, module: GraphModule, inputs: Array, targets: Array, weights: Array, beside: Beside, device: torch.device
    ) -> None:
        self.module, self.inputs, self.targets, self.weights = module, inputs, targets, weights
        self.beside, self.device = beside, device

    def loss(self, k: int) -> torch.Tensor:
        """Weighted squared error of a batch over the weighted energy of its target."""
        import torch

        arrays = (np.array(a[k], np.float32) for a in (self.inputs, self.targets, self.weights))
        x, y, w = (torch.from_numpy(a).to(self.device) for a in arrays)
        more = {name: torch.from_numpy(np.array(a)).to(self.device) for name, a in self.beside(k).items()}
        energy = (w * y**2).sum().clamp_min(torch.finfo(torch.float32).tiny)  # none where all tokens are padding
        found: torch.Tensor = (w * (self.module(x, **more) - y) ** 2).sum() / energy
        return found

    def error(self, batches: list[int]) -> float:
        import torch

        with torch.no_grad():
            found = float(np.mean([float(self.loss(k)) for k in batches]))
        return found if math.isfinite(found) else math.inf


def _fit(
    problem: _Problem,
    free: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    batches: list[int],
    settings: LocalSettings,
) -> Iterator[None]:
    """Train, pausing where the weights are to be looked at."""
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
        if (step + 1) % settings.check == 0 or step + 1 == settings.steps:
            yield
    for p in free.values():
        p.requires_grad_(False)


def _rms(p: torch.Tensor, mask: torch.Tensor) -> float:
    chosen = p.detach()[mask]
    return float(chosen.pow(2).mean().sqrt()) if chosen.numel() else 0.0

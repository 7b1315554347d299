"""Samples changed a little until the model sees another class in them: what a few images do not show. Needs PyTorch.

A few hundred images hold few of a thousand classes, and statistics know nothing of what the answers to the others need.
A view follows the gradient of the likelihood of one class for a few steps, each by the gradient's sign (Kurakin,
Goodfellow and Bengio 2017, their method for a chosen class). No labels are read: which class it is does not matter, as
long as all have their turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toast_onnx.errors import DataError
from toast_onnx.finetune.convert import to_torch
from toast_onnx.finetune.fisher import log_likelihoods
from toast_onnx.model import Model
from toast_onnx.require import require_torch, with_gradients

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]

#: Steps along the gradient's sign.
STEPS = 8
#: Length of a step, as a fraction of a sample's standard deviation.
STEP = 0.05
#: Views made at a time where the model leaves the batch free.
GROUP = 8


class Views:
    """Makes views of samples, each towards a class of its own.

    It runs on the GPU that PyTorch finds, else on the processor.
    """

    def __init__(self, model: Model, classifiers: Sequence[str], count: int, batch: int | None, seed: int = 0) -> None:
        """Translate a model.

        Args:
            model: the model; weights do not change.
            classifiers: outputs that hold class scores or probabilities, (batch, classes).
            count: views of each sample.
            batch: samples that the model takes at once; None where that is free.
            seed: of the order in which classes have their turn.

        Raises:
            BackendError: PyTorch is not installed.
            ModelError: an operator of the model has no counterpart in PyTorch.
        """
        torch = require_torch("views of samples need", ", or leave views out")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module = to_torch(model).to(self._device)
        for parameter in self._module.parameters():
            parameter.requires_grad_(False)
        self._classifiers, self._count, self._batch, self._seed = tuple(classifiers), count, batch, seed

    @with_gradients
    def of(self, sample: Mapping[str, Array], number: int) -> dict[str, Array]:
        """The views of one sample.

        Args:
            sample: arrays by input name, (1, ...).
            number: of the sample among all; the classes of its views follow from it.

        Returns:
            Arrays by input name, (count, ...), of the types of the sample's. The image, or else the largest of floating
            point, differs from the sample, within the range of its values; all others are repeated. Where a class has
            no gradient, as behind a Softmax that is certain, its view is the sample.

        Raises:
            DataError: there is none, or the classes do not depend on it.
        """
        floats = [name for name, array in sample.items() if array.dtype.kind == "f"]
        if not floats:
            raise DataError("a view differs in a floating-point input, and there is none; leave views out")
        name = max(floats, key=lambda n: (_is_image(sample[n]), sample[n].size))
        turns = np.arange(number * self._count, (number + 1) * self._count)
        size = self._batch or min(self._count, GROUP)
        parts = [self._towards(sample, name, turns[k : k + size], size) for k in range(0, self._count, size)]
        repeated = {n: np.repeat(array, self._count, axis=0) for n, array in sample.items()}
        return repeated | {name: np.concatenate(parts).astype(sample[name].dtype, copy=False)}

    def _towards(self, sample: Mapping[str, Array], name: str, turns: NDArray[np.int64], rows: int) -> Array:
        """What one input becomes for some turns; rows that only fill a fixed batch are made and forgotten."""
        import torch

        given = {n: torch.from_numpy(np.repeat(a, rows, axis=0)).to(self._device) for n, a in sample.items()}
        given = {n: tensor.float() if tensor.is_floating_point() else tensor for n, tensor in given.items()}
        start = given.pop(name)
        low, high, step = start.min(), start.max(), STEP * start.std(correction=0)
        now = start
        for _ in range(STEPS):
            now = now.detach().requires_grad_()
            found = self._module(**given, **{name: now}, keep=self._classifiers)
            wanted = torch.stack([self._likelihood(found[n], turns, rows) for n in self._classifiers]).sum()
            slope = torch.autograd.grad(wanted, now, allow_unused=True)[0] if wanted.requires_grad else None
            if slope is None:
                raise DataError(f"the model's classes do not depend on '{name}' by a gradient; leave views out")
            now = (now + step * slope.sign()).clamp(low, high)
        return np.asarray(now.detach().cpu().numpy()[: len(turns)])

    def _likelihood(self, output: torch.Tensor, turns: NDArray[np.int64], rows: int) -> torch.Tensor:
        """Log-likelihood of each row's class, summed."""
        import torch

        chosen = [class_of(int(turn), output.shape[-1], self._seed) for turn in turns]
        index = torch.as_tensor(chosen + chosen[-1:] * (rows - len(chosen)), device=output.device)
        return log_likelihoods(output).gather(-1, index[:, None]).sum()


def _is_image(array: Array) -> bool:
    """Whether an array holds images of three channels, first or last."""
    return array.ndim == 4 and 3 in (array.shape[1], array.shape[3])


def class_of(turn: int, classes: int, seed: int) -> int:
    """Whose turn it is: every class once in each round, in an order of the round's own."""
    order = np.random.default_rng((seed, turn // classes)).permutation(classes)
    return int(order[turn % classes])

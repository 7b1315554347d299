"""Samples changed a little until the model sees another class in them: what a few images do not show. Needs PyTorch.

A few hundred images hold few of a thousand classes, and statistics know nothing of what the answers to the others need.
A view follows the gradient of the likelihood of one class for a few steps, each by the gradient's sign (Kurakin,
Goodfellow and Bengio 2017, their method for a chosen class). No labels are read: which class it is does not matter, as
long as all have their turn. Where two models are to see the class, as the dense and the pruned one, the view follows
both.
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

    from toast_onnx.finetune.module import GraphModule

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

    def __init__(self, models: Sequence[Model], classifiers: Sequence[str], seed: int = 0) -> None:
        """Translate what is to see the classes.

        Args:
            models: the model, or several with the same inputs and outputs, whose likelihoods count alike; weights do
                not change.
            classifiers: outputs that hold class scores or probabilities, (batch, classes).
            seed: of the order in which classes have their turn.

        Raises:
            BackendError: PyTorch is not installed.
            ModelError: an operator of the model has no counterpart in PyTorch.
        """
        torch = require_torch("views of samples need", ", or leave views out")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._modules = [to_torch(model).to(self._device) for model in models]
        for module in self._modules:
            module.requires_grad_(False)
        self._classifiers, self._seed = tuple(classifiers), seed

    def of(self, sample: Mapping[str, Array], number: int, count: int, batch: int | None) -> dict[str, Array]:
        """The views of one sample.

        Args:
            sample: arrays by input name, (1, ...).
            number: of the sample among all; the classes of its views follow from it.
            count: how many there are of every sample.
            batch: samples that the models take at once; None where that is free.

        Returns:
            Arrays by input name, (count, ...), as `towards` gives them.

        Raises:
            DataError: as there.
        """
        turns = range(number * count, (number + 1) * count)
        size = batch or min(count, GROUP)
        made = []
        for k in range(0, count, size):
            some = list(turns[k : k + size])
            filled = some + some[-1:] * (size - len(some))  # rows that only fill a fixed batch are forgotten
            found = self.towards({name: np.repeat(array, size, axis=0) for name, array in sample.items()}, filled)
            made.append({name: array[: len(some)] for name, array in found.items()})
        return {name: np.concatenate([each[name] for each in made]) for name in sample}

    @with_gradients
    def towards(self, samples: Mapping[str, Array], turns: Sequence[int]) -> dict[str, Array]:
        """One view of each of some samples.

        Args:
            samples: arrays by input name, (n, ...).
            turns: whose class each view takes, n numbers, as for `class_of`.

        Returns:
            Arrays by input name, (n, ...), of the types of the samples'. The image, or else the largest of floating
            point, differs from the sample, within the range of its values; all others stay. Where a class has no
            gradient, as behind a Softmax that is certain, or one that is no number, its view is the sample.

        Raises:
            DataError: there is none, or the classes do not depend on it.
        """
        import torch

        floats = [name for name, array in samples.items() if array.dtype.kind == "f"]
        if not floats:
            raise DataError("a view differs in a floating-point input, and there is none; leave views out")
        name = max(floats, key=lambda n: (_is_image(samples[n]), samples[n].size))
        given = {n: torch.from_numpy(np.array(a)).to(self._device) for n, a in samples.items()}
        given = {n: tensor.float() if tensor.is_floating_point() else tensor for n, tensor in given.items()}
        now = given.pop(name)
        flat, each = now.reshape(len(now), -1), (-1, *[1] * (now.ndim - 1))
        low, high = flat.amin(1).reshape(each), flat.amax(1).reshape(each)
        step = STEP * flat.std(1, correction=0).reshape(each)
        for _ in range(STEPS):
            now = now.detach().requires_grad_()
            slopes = []
            for module in self._modules:  # one after the other: what backward needs of both at once may not fit
                wanted = self._likelihood(module, {**given, name: now}, turns)
                slope = torch.autograd.grad(wanted, now, allow_unused=True)[0] if wanted.requires_grad else None
                slopes += [] if slope is None else [slope]
            if not slopes:
                raise DataError(f"the model's classes do not depend on '{name}' by a gradient; leave views out")
            now = (now + step * torch.stack(slopes).sum(0).sign()).clamp(low, high)
        view = now.detach().cpu().numpy().astype(samples[name].dtype, copy=False)
        return {**samples, name: view}

    def _likelihood(self, module: GraphModule, given: Mapping[str, torch.Tensor], turns: Sequence[int]) -> torch.Tensor:
        """Log-likelihood of each row's class by each output, summed."""
        import torch

        found = module(**given, keep=self._classifiers)
        sums = []
        for name in self._classifiers:
            classes = [class_of(turn, found[name].shape[-1], self._seed) for turn in turns]
            index = torch.as_tensor(classes, device=found[name].device)
            sums.append(log_likelihoods(found[name]).gather(-1, index[:, None]).sum())
        return torch.stack(sums).sum()


def _is_image(array: Array) -> bool:
    """Whether an array holds images of three channels, first or last."""
    return array.ndim == 4 and 3 in (array.shape[1], array.shape[3])


def class_of(turn: int, classes: int, seed: int) -> int:
    """Whose turn it is: every class once in each round, in an order of the round's own."""
    order = np.random.default_rng((seed, turn // classes)).permutation(classes)
    return int(order[turn % classes])

"""The training objective of a pair of graphs: which tensors are compared, how, and with what weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toast_onnx.errors import ConfigError
from toast_onnx.finetune.losses import cross_entropy, kl_divergence, relative_mse
from toast_onnx.finetune.settings import Settings
from toast_onnx.finetune.streams import common_ends
from toast_onnx.matching.graph import FLOATS
from toast_onnx.matching.operators import Trait, having
from toast_onnx.matching.study import Study


@dataclass(frozen=True)
class Targets:
    """What is compared.

    Attributes:
        classifiers: tensors with class scores before softmax, compared by KL divergence.
        others: further output tensors, compared by relative squared error.
        stream: tensors at block ends, compared by relative squared error.
        scores: the tensor that labels are compared with, None where there is none.
        class_token: how often token 0 counts in the stream, where the outputs read that token alone.
    """

    classifiers: tuple[str, ...]
    others: tuple[str, ...]
    stream: tuple[str, ...]
    scores: str | None
    class_token: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors, each once."""
        return tuple(dict.fromkeys((*self.classifiers, *self.others, *self.stream)))


def choose_targets(pruned: Study, dense: Study | None, distil: str = "auto", labelled: bool = False) -> Targets:
    """Decide what to compare.

    Args:
        pruned: the graph to train.
        dense: the teacher's graph; None trains on labels alone.
        distil: `kl`, `mse`, or `auto`: KL for 2-D outputs of graphs whose float outputs are all 2-D and not squashed or
            normalised at the end (such are embeddings), squared error otherwise.
        labelled: labels are given, so the first 2-D output holds class scores.

    Raises:
        ConfigError: the graphs share no float output, or labels are given and no output is 2-D.
    """
    graph = pruned.view.model.proto.graph
    floats = [o.name for o in graph.output if o.type.tensor_type.elem_type in FLOATS]
    flat = [n for n in floats if len(pruned.counted.shape(n) or ()) == 2]
    shared = [n for n in floats if dense is None or n in dense.view.outputs]
    if not shared:
        raise ConfigError(
            "teacher and pruned model have no float output of the same name; give the model it was pruned from"
        )
    if labelled and not flat:
        raise ConfigError("labels need an output with one row of class scores a sample, the model has none")
    classes = flat if distil == "kl" or labelled else []
    if distil == "auto" and not classes and len(flat) == len(floats):
        classes = [n for n in flat if not _is_squashed(pruned, n)]
    classes = [n for n in classes if n in shared and distil != "mse"]
    scores = _before_softmax(pruned, (classes or flat)[0]) if labelled else None
    return Targets(
        tuple(_before_softmax(pruned, n) for n in classes),
        tuple(n for n in shared if n not in classes) if dense is not None else (),
        common_ends(pruned, dense) if dense is not None else (),
        scores,
    )


def loss_parts(
    targets: Targets,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None,
    labels: Tensor | None,
    settings: Settings,
) -> dict[str, Tensor]:
    """Unweighted loss terms: `outputs` and `stream` against the teacher, `labels`."""
    parts: dict[str, Tensor] = {}
    if teacher is not None:
        outputs = [kl_divergence(student[n], teacher[n], settings.temperature) for n in targets.classifiers]
        outputs += [relative_mse(student[n], teacher[n]) for n in targets.others]
        parts["outputs"] = torch.stack(outputs).mean()
        if targets.stream and settings.stream:
            parts["stream"] = torch.stack(
                [relative_mse(student[n], teacher[n], targets.class_token) for n in targets.stream]
            ).mean()
    if labels is not None and targets.scores is not None:
        parts["labels"] = cross_entropy(student[targets.scores], labels, settings.smoothing)
    return parts


def total(parts: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """The weighted sum."""
    return torch.stack([getattr(settings, name) * value for name, value in parts.items()]).sum()


def _before_softmax(found: Study, name: str) -> str:
    node = found.view.producer_of(name)
    return node.input[0] if node is not None and node.op_type in ("Softmax", "LogSoftmax") else name


def _is_squashed(found: Study, name: str) -> bool:
    """Whether an output is an embedding by its last node; averaged heads (DeiT's distilled) divide by a constant."""
    node = found.view.producer_of(name)
    if node is None or node.op_type not in having(Trait.SQUASHES):
        return False
    return node.op_type != "Div" or not found.facts.is_constant(node.input[1])

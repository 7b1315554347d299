"""The layers of an engine, as TensorRT's inspector or its builder's log lists them, and which are fused attention.

The inspector needs an engine that loads, and so a GPU. The builder writes the same list into its log, in another
spelling, whether there is a GPU or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

#: How the builder's message with the layers begins.
LOG_START = "Layers:"
_ENTRY = re.compile(r"^Name: (?P<name>[^,]*), LayerType: (?P<kind>[^,]*),", re.MULTILINE)
_TACTIC = re.compile(r"TacticName: (?P<tactic>[^,]*),")
#: Kernels that hold both products of an attention and its Softmax: `_gemm_mha_v2`, `fmha_v2_...`, `flash_attention`.
_FUSED = re.compile(r"(?<![a-z])f?mha(?![a-z])|fused_multihead|flash_att|fused_attention", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: TensorRT's name for it, which joins those of ONNX nodes or lists operations.
        kind: its layer type.
        tactic: the kernel that was chosen.
    """

    name: str
    kind: str
    tactic: str = ""

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is a whole attention in one kernel."""
        return any(_FUSED.search(text) is not None for text in (self.name, self.kind, self.tactic))


def layers_of_log(text: str) -> tuple[Layer, ...] | None:
    """Layers in the builder's log message; None where it lists none."""
    starts = list(_ENTRY.finditer(text))
    ends = [*(m.start() for m in starts[1:]), len(text)][: len(starts)]
    found = []
    for match, end in zip(starts, ends, strict=True):
        tactic = _TACTIC.search(text, match.end(), end)
        found.append(Layer(match["name"], match["kind"], "" if tactic is None else tactic["tactic"]))
    return tuple(found) or None


def layers_of_inspector(text: str) -> tuple[Layer, ...] | None:
    """Layers in the inspector's JSON; None where it holds none, or only names because of its verbosity."""
    try:
        listed = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return None
    found = [
        Layer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), str(entry.get("TacticName", "")))
        for entry in listed
        if isinstance(entry, dict)
    ]
    return tuple(found) or None


def count_fused_attention(layers: Iterable[Layer]) -> int:
    """How many layers are a whole attention in one kernel."""
    return sum(layer.is_fused_attention for layer in layers)

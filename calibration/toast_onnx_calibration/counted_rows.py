"""Which rows of outputs and branches count where two models are compared: not those of tokens that a mask hides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.linear import Linear
from toast_onnx.matching.study import Study
from toast_onnx_calibration.graph_writer import GraphWriter
from toast_onnx_calibration.padding import Placed, placed, placed_behind


@dataclass
class CountedRows:
    """Which rows count, batch by batch, and what there was to say of it.

    Attributes:
        proto: the dense model, with nodes that say which tokens are padding.
        places: by tensor, where there is a mask.
        hidden: tensors of which tokens were left out.
        unclear: tensors with tokens that a mask hides, where nobody knows which.
    """

    proto: onnx.ModelProto
    places: Mapping[str, Placed]
    hidden: set[str] = field(default_factory=set)
    unclear: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, dense: Study, outputs: Sequence[str], branches: Iterable[tuple[Block, Linear]]) -> CountedRows:
        """Those of a model's outputs, and of what some layers of its blocks give.

        Args:
            dense: the model.
            outputs: its outputs.
            branches: layers, and the blocks whose masks say what is padding there.
        """
        writer = GraphWriter(dense.view.model)
        places = {name: placed_behind(writer, dense, name) for name in outputs}
        for block, linear in branches:
            # an encoder's mask says nothing of who asks it
            if block.attention is not None and block.attention.own_keys:
                with suppress(MatchError):
                    places[linear.output] = placed(writer, dense, block, linear.output, linear.channel_axis)
        return cls(writer.proto, {name: place for name, place in places.items() if place is not None})

    @property
    def tensors(self) -> tuple[str, ...]:
        """What the nodes make; `counts` reads it."""
        return tuple(dict.fromkeys(place.seen for place in self.places.values()))

    def counts(self, tensor: str, shape: Sequence[int], found: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_] | None:
        """Which rows of a batch of a tensor count, (...) without channels; None where all do, or it cannot be told.

        Args:
            tensor: an output or a branch of the dense model.
            shape: of the batch, without channels.
            found: what the dense model gave, `tensors` among it.
        """
        place = self.places.get(tensor)
        if place is None or np.all(found[place.seen]):
            return None
        try:
            counts = place.tokens(found[place.seen], shape)
        except MatchError:
            self.unclear.add(tensor)
            return None
        self.hidden.add(tensor)
        return counts

    def notes(self) -> list[str]:
        """What was left out, and where nobody knows."""
        left = ["tokens that a mask hides do not count"] if self.hidden else []
        many = f"{len(self.unclear)} outputs and branches may hold tokens that a mask hides, which count there"
        return [*left, many] if self.unclear else left

"""What blocks read beside the residual stream: masks, and which tokens they hide, for every batch of the samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toast_onnx.errors import MatchError
from toast_onnx.matching.blocks import Block
from toast_onnx.matching.span import masks_beside
from toast_onnx.matching.study import Study
from toast_onnx.model import Model, write_draft
from toast_onnx.proof.precision import to_float32
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.chain import Link, cut
from toast_onnx_calibration.graph_writer import GraphWriter
from toast_onnx_calibration.padding import Placed, placed, placed_behind
from toast_onnx_calibration.sessions import make_session, run
from toast_onnx_calibration.stored import Samples

Array = NDArray[Any]


class Beside:
    """Masks of a model's blocks on samples, made when they are asked for, and kept in files.

    Attributes:
        tensors: the masks of all blocks.
    """

    def __init__(self, study: Study, samples: Samples, options: CalibrationOptions, folder: Path) -> None:
        self._study, self._samples, self._options, self._folder = study, samples, options, folder
        self._same = masks_beside(study.view, study.facts, study.match.blocks)
        self.tensors = frozenset(self._same)
        self._kept: dict[str, Array] = {}

    def feeds(self, names: Iterable[str], batch: int) -> dict[str, Array]:
        """Masks of one batch by tensor."""
        wanted = tuple(names)
        stand = {name: self._same.get(name, name) for name in wanted}
        if not self._kept.keys() >= set(stand.values()):
            self._kept |= self._run(self._study.view.model.proto, sorted({*self._same.values(), *stand.values()}))
        return {name: np.asarray(self._kept[stand[name]][batch]) for name in wanted}

    def token_weights(self, block: Block, tensor: str, shape: tuple[int, ...]) -> Array | None:
        """How much each token of an activation counts, (batches, *shape without channels, 1): not where it is padding.

        Args:
            block: whose masks say what is padding.
            tensor: the activation, channels last.
            shape: of one batch of it.

        Returns:
            None where no token of any sample is hidden.

        Raises:
            MatchError: tokens are hidden, and which ones of the activation cannot be told.
        """
        writer = GraphWriter(self._study.view.model)
        found = self._tokens(writer, placed(writer, self._study, block, tensor), shape)
        return None if found is None else found[..., None].astype(np.float32)

    def output_tokens(self, output: str, shape: tuple[int, ...]) -> Array | None:
        """Which rows of an output count, (batches, *shape without channels); None where all do, as far as is known.

        Args:
            output: its name.
            shape: of one batch of it.
        """
        writer = GraphWriter(self._study.view.model)
        place = placed_behind(writer, self._study, output)
        try:
            return self._tokens(writer, place, shape)
        except MatchError:
            return None

    def _tokens(self, writer: GraphWriter, place: Placed | None, shape: tuple[int, ...]) -> Array | None:
        if place is None:
            return None
        seen = self._run(writer.proto, [place.seen])[place.seen]
        return None if np.all(seen) else np.stack([place.tokens(each, shape[:-1]) for each in seen])

    def _run(self, proto: onnx.ModelProto, names: Sequence[str]) -> dict[str, Array]:
        """Tensors of a graph on the samples, (batches, *shape) each; nothing is run but what makes them."""
        part = onnx.ModelProto()
        part.CopyFrom(proto)
        cut(part, Link((), ()), names, {})
        model = self._study.view.model
        path = write_draft(to_float32(Model(part, model.path, dict(model.arrays))), self._folder, "beside.onnx")
        session = make_session(path, self._options.provider, threads=self._options.threads)
        kept: dict[str, Array] = {}
        for k, feeds in enumerate(self._samples):
            for name, value in run(session, feeds, names).items():
                if name not in kept:
                    file = self._folder / f"beside-{len(self._kept) + len(kept)}.npy"
                    kept[name] = np.lib.format.open_memmap(file, "w+", value.dtype, (self._samples.count, *value.shape))
                kept[name][k] = value
        return kept

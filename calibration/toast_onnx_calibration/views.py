"""Samples, each followed by views in which the model sees other classes (`toast_onnx.finetune.views`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from toast_onnx.errors import ConfigError, DataError
from toast_onnx.finetune.views import STEP, STEPS, Views
from toast_onnx.matching.study import Study
from toast_onnx.model import file_hash
from toast_onnx_calibration.comparing import is_classifier
from toast_onnx_calibration.feeds import fit
from toast_onnx_calibration.images import ReadReport
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import Arrays, Chunk, Source


def classifiers(study: Study, inputs: Sequence[ModelInput], option: str) -> list[str]:
    """The outputs that hold classes, which views can show.

    Args:
        study: the model.
        inputs: of the model.
        option: what asks for views, for messages.

    Raises:
        ConfigError: the model has no classes, or takes no floating-point input.
    """
    outputs = [output.name for output in study.view.model.proto.graph.output]
    found = [name for name in outputs if is_classifier(study, name)]
    if not found:
        raise ConfigError(
            f"views show samples as other classes, and {study.source.path.name} has no output that holds classes "
            f"(it gives {', '.join(outputs)}): leave {option} out"
        )
    if not any(each.dtype.kind == "f" for each in inputs):
        raise ConfigError(f"views change pixels, and {study.source.path.name} reads whole numbers: leave {option} out")
    return found


class ViewedSource:
    """Every sample of a source, and behind it some views of it.

    Attributes:
        description: one line for people.
        count: samples and views; None where the source does not know its own.
    """

    def __init__(
        self, source: Source, study: Study, inputs: Sequence[ModelInput], views: int, seed: int, first: int = 0
    ) -> None:
        """See whether views can be made.

        Args:
            source: the samples.
            study: the model.
            inputs: of the model, with the batch that it holds.
            views: of each sample.
            seed: of the order in which classes have their turn.
            first: number of the first sample among all.

        Raises:
            ConfigError: the model has no classes, or takes no floating-point input.
        """
        self._classifiers = classifiers(study, inputs, "--views")
        self._source, self._study, self._inputs = source, study, list(inputs)
        self._views, self._seed, self._first = views, seed, first
        self.description = f"{source.description}, {views} views of each"
        self.count = None if source.count is None else source.count * (1 + views)

    @property
    def recipe(self) -> Recipe | None:
        """What images were put through."""
        return self._source.recipe

    @property
    def report(self) -> ReadReport | None:
        """What the latest pass over the samples met."""
        return self._source.report

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the samples' own, of the model, and of how views are made."""
        how = (self._views, self._seed, self._first, STEPS, STEP)
        made = (self._source.fingerprint, file_hash(self._study.source.path), *how)
        return hashlib.sha256(repr(made).encode()).hexdigest()

    def part(self, start: int, stop: int) -> ViewedSource:
        """Samples and views from `start` up to `stop`.

        Raises:
            ConfigError: a sample and its views would lie in two parts.
        """
        each = 1 + self._views
        if start % each or stop % each:
            raise ConfigError(
                f"a sample and its {self._views} views cannot be divided: take a --batch that is a multiple of {each}"
            )
        inner = self._source.part(start // each, stop // each)
        return ViewedSource(inner, self._study, self._inputs, self._views, self._seed, self._first + start // each)

    def __iter__(self) -> Iterator[Chunk]:
        held = [each.shape[0] for each in self._inputs if each.shape and isinstance(each.shape[0], int)]
        maker = Views([self._study.view.model], self._classifiers, self._seed)
        changed = False
        for number, (sample, row) in enumerate(self._samples(), self._first):
            yield Chunk(sample, (row,))
            made = maker.of(sample, number, self._views, held[0] if held else None)
            changed = changed or any(bool((made[name] != array).any()) for name, array in sample.items())
            yield Chunk(made, tuple(f"{row} (view {k + 1})" for k in range(self._views)))
        if not changed:
            raise DataError(
                f"{self._source.description}: no view differs from its sample, as the classes have no gradient at the "
                "inputs: leave --views out"
            )

    def _samples(self) -> Iterator[tuple[Arrays, str]]:
        """The samples one by one, as the model takes them."""
        for chunk in self._source:
            fitted = fit(chunk, self._inputs, self._source.description)
            for k, row in enumerate(fitted.rows):
                yield {name: array[k : k + 1] for name, array in fitted.arrays.items()}, row

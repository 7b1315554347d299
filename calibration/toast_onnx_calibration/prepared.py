"""Samples opened for a model, with the preprocessing it came with, and what a user should know of that choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from toast_onnx_calibration.recipe_files import RecipeChoice, check_fit, recipe_for
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import Drawn, Source, is_callable, open_source

#: Called with what the user should know, as soon as it is known.
Note = Callable[[str], object]
#: Samples whose values are told where the recipe is a guess.
SHOWN = 8


@dataclass(frozen=True)
class Values:
    """Range, mean and standard deviation of what an input gets: a wrong recipe shows in them.

    Attributes:
        low: the smallest value.
        high: the largest value.
        mean: over all values of all samples.
        std: likewise.
        samples: how many were looked at.
    """

    low: float
    high: float
    mean: float
    std: float
    samples: int

    @classmethod
    def of(cls, arrays: Sequence[NDArray[Any]]) -> Values:
        """Of samples, each of any shape."""
        values = np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays]) if arrays else np.zeros(1)
        return cls(float(values.min()), float(values.max()), float(values.mean()), float(values.std()), len(arrays))

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"values from {self.low:.3g} to {self.high:.3g}, mean {self.mean:.3g}, standard deviation {self.std:.3g} "
            f"({self.samples} samples)"
        )

    def to_json(self) -> dict[str, float]:
        """As plain data."""
        return {"min": self.low, "max": self.high, "mean": self.mean, "std": self.std}


def silent(_: str) -> None:
    """Says nothing."""


def open_prepared(
    model: Path,
    data: str | Path,
    inputs: Sequence[ModelInput],
    preprocess: str | None,
    *,
    metadata: Mapping[str, str] | None = None,
    note: Note = silent,
    **drawn: Unpack[Drawn],
) -> tuple[Source, list[str]]:
    """Samples in the preprocessing that fits a model.

    Args:
        model: the ONNX file; a recipe may lie beside it.
        data: as for `sources.open_source`.
        inputs: what the model needs.
        preprocess: as for `recipe_files.recipe_for`.
        metadata: the model's, in which a recipe may be kept.
        note: told what the user should know before the work begins.
        drawn: as for `sources.open_source`.

    Returns:
        The samples, and what was told.

    Raises:
        DataError: the data cannot be read.
        ConfigError: the recipe is none, or does not fit the model's input.
    """
    shape = inputs[0].shape if len(inputs) == 1 else None
    choice = recipe_for(model, preprocess, shape, metadata)
    source = open_source(data, inputs, choice.recipe, **drawn)
    if source.recipe is None:
        return source, []
    if shape is not None:
        check_fit(choice, shape)
    notes = list(choice.notes)
    if choice.guessed and not is_callable(data):
        notes.append(_seen(source, inputs[0], choice))
    for text in notes:
        note(text)
    return source, notes


def _seen(source: Source, wanted: ModelInput, choice: RecipeChoice) -> str:
    """What the first layer gets."""
    found: list[NDArray[Any]] = []
    for chunk in source:
        found += list(chunk.arrays[wanted.name])
        if len(found) >= SHOWN:
            break
    return seen_text(Values.of(found), choice)


def seen_text(values: Values, choice: RecipeChoice) -> str:
    """What to say of the values that a guessed recipe leads to."""
    return f"with {choice.source} the first layer sees {values.text}; another recipe goes with --preprocess"

"""Samples opened for a model, with the preprocessing it came with, and what a user should know of that choice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from toast_onnx_calibration.recipe_files import RecipeChoice, check_fit, recipe_for
from toast_onnx_calibration.sessions import ModelInput
from toast_onnx_calibration.sources import Source, is_callable, open_source

#: Called with what the user should know, as soon as it is known.
Note = Callable[[str], object]
#: Samples whose values are told where the recipe is a guess.
SHOWN = 8


def silent(_: str) -> None:
    """Says nothing."""


def open_prepared(
    model: Path,
    data: str | Path,
    inputs: Sequence[ModelInput],
    preprocess: str | None,
    *,
    metadata: Mapping[str, str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    only: Collection[str] | None = None,
    hold: int = 0,
    held: bool = False,
    note: Note = silent,
) -> tuple[Source, list[str]]:
    """Samples in the preprocessing that fits a model.

    Args:
        model: the ONNX file; a recipe may lie beside it.
        data: as for `sources.open_source`.
        inputs: what the model needs.
        preprocess: as for `recipe_files.recipe_for`.
        metadata: the model's, in which a recipe may be kept.
        samples: as for `sources.open_source`.
        seed: as for `sources.open_source`.
        threads: as for `sources.open_source`.
        only: as for `sources.open_source`.
        hold: as for `sources.open_source`.
        held: as for `sources.open_source`.
        note: told what the user should know before the work begins.

    Returns:
        The samples, and what was told.

    Raises:
        DataError: the data cannot be read.
        ConfigError: the recipe is none, or does not fit the model's input.
    """
    shape = inputs[0].shape if len(inputs) == 1 else None
    choice = recipe_for(model, preprocess, shape, metadata)
    source = open_source(
        data,
        inputs,
        choice.recipe,
        samples=samples,
        seed=seed,
        threads=threads,
        only=only,
        hold=hold,
        held=held,
    )
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
    """What the first layer gets: a wrong recipe shows in its range, mean and standard deviation."""
    arrays, count = [], 0
    for chunk in source:
        arrays.append(np.asarray(chunk.arrays[wanted.name], np.float64).ravel())
        count += len(chunk.rows)
        if count >= SHOWN:
            break
    values = np.concatenate(arrays) if arrays else np.zeros(1)
    return (
        f"with {choice.source} the first layer sees values from {values.min():.3g} to {values.max():.3g}, mean "
        f"{values.mean():.3g}, standard deviation {values.std():.3g} ({count} samples); another recipe goes with "
        "--preprocess"
    )

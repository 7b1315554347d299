"""Stored samples with views in which two models see other classes (`toast_onnx.finetune.views`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from toast_onnx.errors import DataError
from toast_onnx.finetune.views import Views
from toast_onnx.model import Model
from toast_onnx_calibration.stored import Samples


def with_views(
    models: Sequence[Model],
    classes: Sequence[str],
    samples: Samples,
    first: int,
    views: int,
    seed: int,
    folder: Path,
    done: Callable[[float], None] = lambda _: None,
) -> Samples:
    """Batches of views in front of the samples' own batches.

    Args:
        models: that are to see the classes.
        classes: their outputs that hold classes.
        samples: the samples.
        first: how many of their batches views are made of, from the first one on.
        views: of each sample of these.
        seed: of the order in which classes have their turn.
        folder: for files.
        done: told what share of the views is made.

    Returns:
        `first * views` batches of views, then all batches of the samples; a batch of views holds one of each sample of
        a batch, so that those of one sample are apart.

    Raises:
        DataError: no view differs from its sample.
        ModelError: an operator of a model has no counterpart in PyTorch.
    """
    maker, count = Views(models, classes, seed), first * views
    feeds = {
        name: np.lib.format.open_memmap(
            folder / f"views-{number}.npy", "w+", array.dtype, (count + samples.count, *array.shape[1:])
        )
        for number, (name, array) in enumerate(samples.feeds.items())
    }
    changed = False
    for k, batch in enumerate(samples.first(first * samples.size)):
        numbers = range(k * samples.size, (k + 1) * samples.size)
        for view in range(views):
            made = maker.towards(batch, [number * views + view for number in numbers])
            for name, array in made.items():
                feeds[name][view * first + k] = array
                changed = changed or not np.array_equal(array, batch[name])
            done((k * views + view + 1) / count)
    if not changed:
        raise DataError(
            f"{samples.source.description}: no view differs from its sample, as the classes have no gradient at the "
            "inputs: leave compensation.views out"
        )
    for name, array in samples.feeds.items():
        feeds[name][count:] = array
    rows = [f"{row} (view {view + 1})" for view in range(views) for row in samples.rows[: first * samples.size]]
    return replace(samples, feeds=dict(feeds), rows=(*rows, *samples.rows))

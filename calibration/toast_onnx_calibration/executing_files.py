"""What workers read from files: a model and its recipe are found or sent, samples lie where every worker sees them."""

from __future__ import annotations

from pathlib import Path

from toast_onnx.model import model_files
from toast_onnx_calibration.executing import Find
from toast_onnx_calibration.recipe_files import recipe_sources


def reading_files(model: Path, preprocess: str | None) -> tuple[tuple[Path, ...], ...]:
    """The files of a model, those beside it that may hold a recipe, and the recipe that was asked for."""
    sources = recipe_sources(model, preprocess)
    if preprocess is not None:
        return (tuple(model_files(model)), *((source,) for source in sources))
    return ((*model_files(model), *sources),)


def found_recipe(preprocess: str | None, find: Find) -> str | None:
    """The recipe that was asked for: its name, or where its file lies for a worker."""
    if preprocess is None or not Path(preprocess).is_absolute():
        return preprocess
    return str(find(Path(preprocess)))


def placed_recipe(model: Path, preprocess: str | None) -> str | None:
    """The recipe that was asked for: its name, or its file as another process finds it."""
    if preprocess is None:
        return None
    (found,) = recipe_sources(model, preprocess) or (preprocess,)
    return str(found)


def placed(name: str | Path) -> str:
    """A name as another process finds it, wherever it was started; what names no file stays as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else str(name)

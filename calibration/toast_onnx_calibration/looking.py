"""The first samples as the first layer of a model gets them: their values in numbers, and a sheet of pictures."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from toast_onnx.errors import ConfigError, DataError
from toast_onnx.model import load_model
from toast_onnx.report.tables import shortened
from toast_onnx_calibration.pictures import picture
from toast_onnx_calibration.prepared import Note, Values, open_prepared, silent
from toast_onnx_calibration.recipe_files import recipe_for
from toast_onnx_calibration.recipes import Recipe
from toast_onnx_calibration.sessions import graph_inputs

#: Pictures in a row, pixels of each one's longer side, and pixels of a letter.
ACROSS, SIDE, LETTER = 4, 224, 13
_GAP = 12
_PAPER, _INK = (255, 255, 255), (30, 30, 30)


@dataclass(frozen=True)
class Look:
    """Samples as a model gets them.

    Attributes:
        input: name of the model's input that is shown.
        names: of the samples: a file, or a row's number.
        samples: each (C, H, W) or (H, W, C), or of any other shape where they are no images.
        values: the range, mean and standard deviation over all of them.
        recipe: what images went through; None for ready tensors.
        source: where the recipe came from: a name, a path, the model's metadata; None for ready tensors.
        data: what the samples are, for people.
    """

    input: str
    names: tuple[str, ...]
    samples: tuple[NDArray[Any], ...]
    values: Values
    recipe: Recipe | None
    source: str | None
    data: str

    @property
    def lines(self) -> tuple[str, ...]:
        """The recipe and the values, a line each."""
        how = "ready tensors" if self.recipe is None else f"preprocessing {self.source}: {self.recipe.describe()}"
        return how, f"'{self.input}' gets {self.values.text}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "input": self.input,
            "data": self.data,
            "samples": list(self.names),
            "preprocessing": None if self.recipe is None else self.recipe.model_dump(mode="json"),
            "source": self.source,
            "values": self.values.to_json(),
        }

    def sheet(self) -> Image.Image:
        """The samples as pictures, their preprocessing undone, with names, recipe and values below.

        Raises:
            DataError: they are no images.
        """
        pictures = [picture(sample, self.recipe) for sample in self.samples]
        shown = [(enlarged(p), name) for p, name in zip(pictures, self.names, strict=True) if p is not None]
        if not shown:
            raise DataError(
                f"{self.data}: samples of shape {self.samples[0].shape} are no pictures; leave --contact-sheet out"
            )
        across = min(ACROSS, len(shown))
        cell, below = SIDE + _GAP, SIDE + LETTER + 2 * _GAP
        width = max(across * cell, 2 * cell) + _GAP
        letters = (width - 2 * _GAP) * 2 // LETTER
        caption = [part for line in self.lines for part in textwrap.wrap(line, letters)]
        rows = -(-len(shown) // across)
        page = Image.new("RGB", (width, rows * below + len(caption) * (LETTER + 5) + 2 * _GAP), _PAPER)
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(LETTER)
        for number, (image, name) in enumerate(shown):
            left, top = _GAP + number % across * cell, _GAP + number // across * below
            page.paste(image, (left, top))
            draw.text((left, top + SIDE + 3), shortened(name, SIDE * 2 // LETTER), _INK, font)
        for number, line in enumerate(caption):
            draw.text((_GAP, rows * below + _GAP + number * (LETTER + 5)), line, _INK, font)
        return page


def look(
    model: str | Path, data: str | Path, *, preprocess: str | None = None, samples: int = 16, note: Note = silent
) -> Look:
    """What the first layer of a model gets of the first samples.

    Args:
        model: the ONNX file.
        data: as for `sources.open_source`.
        preprocess: as for `recipe_files.recipe_for`.
        samples: how many, from the start.
        note: told what the user should know of the recipe.

    Raises:
        DataError: the data cannot be read, or do not fit the model.
        ConfigError: the recipe is none, or does not fit the model's input.
    """
    graph = load_model(model)
    inputs = graph_inputs(graph)
    metadata = {entry.key: entry.value for entry in graph.proto.metadata_props}
    source, _ = open_prepared(Path(model), data, inputs, preprocess, metadata=metadata, note=note)
    shown = next((i for i in inputs if len(i.shape) == 4), inputs[0])
    names: list[str] = []
    found: list[NDArray[Any]] = []
    for chunk in source:
        names += chunk.rows
        found += list(chunk.arrays[shown.name])
        if len(found) >= samples:
            break
    if not found:
        raise DataError(f"{data}: no sample of it can be read")
    kept = tuple(found[:samples])
    chosen = None
    if source.recipe is not None:
        shape = inputs[0].shape if len(inputs) == 1 else None
        chosen = recipe_for(model, preprocess, shape, metadata).source
    named = tuple(names[:samples])
    return Look(shown.name, named, kept, Values.of(kept), source.recipe, chosen, source.description)


def enlarged(image: Image.Image) -> Image.Image:
    """A picture in colour whose longer side is `SIDE`; small ones in whole pixels, so that these stay visible."""
    whole = SIDE // max(image.size)
    if whole > 1:
        image = image.resize((image.width * whole, image.height * whole), Image.Resampling.NEAREST)
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return image


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file's name asks for.

    Raises:
        ConfigError: nothing is written under such a name.
    """
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in ("PNG", "JPEG", "WEBP"):
        raise ConfigError(f"{path}: no picture is written under this name; end it in .png, .jpg or .webp")
    return form


def image_bytes(image: Image.Image, path: Path) -> bytes:
    """A picture in the format that a file's name asks for; raises as `picture_format`."""
    out = io.BytesIO()
    image.save(out, picture_format(path))
    return out.getvalue()

"""Finding the recipe a model came with: YAML, Hugging Face's preprocessor_config.json, timm's config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toast_onnx.errors import ConfigError
from toast_onnx.hub import CONFIGS
from toast_onnx.planning.settings import first_problem
from toast_onnx.planning.strict_json import parse_json, read_json
from toast_onnx.planning.strict_yaml import read_document
from toast_onnx_calibration.recipes import NAMED, Dim, Recipe, adapt, misfit, parse_recipe, show, takes_images

_MAX_BYTES = 1 << 22
#: Key of a model's metadata under which its recipe is kept.
METADATA = "toast_onnx.preprocessing"
# Pillow's numbers for its filters, which Hugging Face stores as `resample`.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Old configs write `size` as one number. These families mean the shorter side by it, the others a square.
_SHORTER_SIDE_FAMILIES = ("CLIP", "ChineseCLIP", "Bit", "ConvNext", "Levit", "PoolFormer", "MobileNet")


@dataclass(frozen=True)
class RecipeChoice:
    """A recipe, where it came from (a name or a path), and what the user should know about the choice.

    Attributes:
        recipe: adapted to the model's input where that is known.
        source: a name, a path, or `the model's metadata`.
        notes: what the user should know.
        guessed: whether nothing said which recipe it is.
        written: the recipe before it was adapted.
    """

    recipe: Recipe
    source: str
    notes: tuple[str, ...] = ()
    guessed: bool = False
    written: Recipe | None = None


def recipe_sources(model: Path, option: str | None) -> tuple[Path, ...]:
    """The files that `recipe_for` may read: the one that was asked for, or those beside the model that are there."""
    if option is not None:
        return (Path(option).absolute(),) if option not in NAMED and Path(option).is_file() else ()
    return tuple(path for path, _ in _beside(model) if path.is_file())


def recipe_for(
    model_path: str | Path | None,
    option: str | None,
    input_shape: Sequence[Dim] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> RecipeChoice:
    """Chooses the preprocessing of a model, adapted to its input.

    `option` wins: a name of `NAMED`, or a YAML recipe, a `preprocessor_config.json` or a timm config. Else the recipe
    that `prune` kept in the model's metadata. Else a `preprocessor_config.json` or a timm `config.json` in the model's
    folder. Else `imagenet`, with a note that says so.

    Args:
        model_path: The ONNX file, or None where there is none.
        option: What the user asked for, or None.
        input_shape: The image input's shape, (B, C, H, W) or (B, H, W, C); any other leaves the recipe unadapted.
        metadata: The model's own.

    Raises:
        ConfigError: An unknown name, or a file that is no recipe or asks for what no recipe can do.
    """
    choice = _choose(Path(model_path) if model_path is not None else None, option, metadata or {})
    if input_shape is None or not takes_images(input_shape):
        return choice
    return replace(choice, recipe=adapt(choice.recipe, input_shape), written=choice.recipe)


def check_fit(choice: RecipeChoice, shape: Sequence[Dim]) -> None:
    """Refuse a recipe that is for other images than the model takes.

    Args:
        choice: the recipe.
        shape: of the model's input, batch first.

    Raises:
        ConfigError: says which of the named recipes fit.
    """
    reason = misfit(choice.written or choice.recipe, shape)
    if reason is not None:
        fitting = " or ".join(name for name, recipe in NAMED.items() if misfit(recipe, shape) is None)
        taken = f"{choice.source}, taken because none was given," if choice.guessed else choice.source
        raise ConfigError(
            f"the preprocessing {taken} does not fit: {reason}, and the model's input is {show(shape)}; of the named "
            f"ones --preprocess {fitting} fits, or write a recipe file"
        )


def keep_recipe(proto: onnx.ModelProto, recipe: Mapping[str, Any]) -> None:
    """Put a recipe into a model's metadata, where `recipe_for` finds it."""
    others = [entry for entry in proto.metadata_props if entry.key != METADATA]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)
    proto.metadata_props.add(key=METADATA, value=json.dumps(dict(recipe)))


def load_recipe(path: str | Path) -> RecipeChoice:
    """Reads a recipe file: YAML, or JSON as Hugging Face or timm write it.

    Raises:
        ConfigError: The file cannot be read or is none of these.
    """
    path = Path(path)
    data: Any = _read_json(path) if path.suffix.lower() == ".json" else _plain(read_document(path))
    if _is_timm(data):
        return RecipeChoice(from_timm(data, str(path)), str(path))
    if _is_hugging_face(data):
        recipe, notes = from_hugging_face(data, str(path))
        return RecipeChoice(recipe, str(path), notes)
    return RecipeChoice(parse_recipe(data, str(path)), str(path))


def _read_json(path: Path) -> object:
    return read_json(path, hint="give a recipe, a preprocessor_config.json or a timm config", limit=_MAX_BYTES)


def _plain(value: object) -> object:
    """Numbers of a YAML file as floats."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return float(value) if isinstance(value, Decimal) else value


class _HuggingFace(BaseModel):
    """Types of the keys that are read of an image processor's configuration; null stands for a key that is not set."""

    model_config = ConfigDict(strict=True, extra="ignore")

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_resize: bool | None = None
    do_center_crop: bool | None = None
    do_rescale: bool | None = None
    do_normalize: bool | None = None
    do_flip_channel_order: bool | None = None
    do_pad: bool | None = None
    resample: int | None = None
    crop_pct: Annotated[float, Field(ge=0.01, le=100)] | None = None
    rescale_factor: Annotated[float, Field(gt=0, le=1e9)] | None = None


class _Timm(BaseModel):
    """Types of the keys that are read of a timm configuration."""

    model_config = ConfigDict(strict=True, extra="ignore")

    input_size: Annotated[Sequence[Annotated[int, Field(ge=1, le=65536)]], Field(min_length=3, max_length=3)]
    mean: Any
    std: Any
    crop_pct: Annotated[float, Field(ge=0.01, le=100)] | None = None
    crop_mode: str | None = None
    interpolation: str | None = None


def _check(model: type[BaseModel], config: object, where: str) -> dict[str, Any]:
    """The configuration, whose keys have the types that a model says.

    Raises:
        ConfigError: the first that has not.
    """
    try:
        model.model_validate(config)
    except ValidationError as error:
        key, what = first_problem(error)
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{what}; write a YAML recipe instead") from error
    assert isinstance(config, dict)
    return config


def from_hugging_face(config: dict[str, Any], where: str) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of a Hugging Face image processor's configuration, and notes on what it leaves out.

    Raises:
        ConfigError: A key is missing or has a value that a recipe cannot express.
    """
    # processor_config.json holds it one level down
    config = _check(_HuggingFace, config.get("image_processor", config), where)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    fields: dict[str, Any] = {"crop_offset": "floor", "channels": "rgb"}
    notes = []
    if config.get("do_resize", "size" in config):
        fields |= _hugging_face_resize(config, kind, where)
    if config.get("do_center_crop", "crop_size" in config):
        fields["crop"] = _hugging_face_side(config.get("crop_size"), "crop_size", where)
    if config.get("crop_pct") is not None and isinstance(fields.get("resize"), int):
        fields |= _convnext_sizes(fields["resize"], float(config["crop_pct"]))
    fields["scale"] = float(config.get("rescale_factor") or 1 / 255) if config.get("do_rescale", True) else 1.0
    if config.get("do_normalize", "image_mean" in config):
        for field, key in (("mean", "image_mean"), ("std", "image_std")):
            if key not in config:
                raise ConfigError(f"{where}: do_normalize without {key}; write a YAML recipe instead")
            fields[field] = config[key]
    if config.get("do_flip_channel_order"):
        fields["channels"] = "bgr"
    if config.get("rescale_offset"):
        raise ConfigError(f"{where}: rescale_offset is not supported; write a YAML recipe with mean and std instead")
    if config.get("do_pad"):
        notes.append(f"{where} pads images to a common size; here they are resized to the model's input size")
    return parse_recipe(fields, where), tuple(notes)


def from_timm(config: dict[str, Any], where: str) -> Recipe:
    """The recipe of a timm configuration: `pretrained_cfg` with input_size, crop_pct, crop_mode, mean and std.

    Raises:
        ConfigError: A key is missing, or `crop_mode` is `border`.
    """
    config = config.get("pretrained_cfg") or config
    if not isinstance(config, dict) or not {"input_size", "mean", "std"} <= config.keys():
        raise ConfigError(f"{where}: a timm config needs input_size (three numbers), mean and std")
    config = _check(_Timm, config, where)
    channels, height, width = config["input_size"]
    mean, std = config["mean"], config["std"]
    ratio = config.get("crop_pct") or 0.875
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ConfigError(f"{where}: crop_mode '{mode:.40}' is not supported; write a YAML recipe instead")
    resize = (math.floor(height / ratio), math.floor(width / ratio))
    square = resize[0] == resize[1]
    return parse_recipe(
        {
            "resize": resize[0] if square and mode == "center" else resize,
            "keep_ratio": mode == "center" and not square,
            "interpolation": _timm_interpolation(config.get("interpolation") or "bilinear"),
            "crop": (height, width),
            "mean": mean,
            "std": std,
            "channels": "gray" if channels == 1 else "rgb",
        },
        where,
    )


def _choose(model_path: Path | None, option: str | None, metadata: Mapping[str, str]) -> RecipeChoice:
    if option is not None:
        if option in NAMED:
            return RecipeChoice(NAMED[option], option)
        if Path(option).is_file():
            return load_recipe(option)
        raise ConfigError(f"no recipe '{option}': give one of {', '.join(NAMED)}, or the path of a YAML or JSON file")
    if METADATA in metadata:
        where = "the model's metadata"
        recipe = parse_recipe(parse_json(metadata[METADATA], where), where)
        return RecipeChoice(recipe, where, (f"preprocessing as kept in the model: {recipe.describe()}",))
    if model_path is not None:
        for beside, ours in _beside(model_path):
            if beside.is_file() and ours(_json_or_none(beside)):
                found = load_recipe(beside)
                note = f"preprocessing from {beside}: {found.recipe.describe()}"
                return RecipeChoice(found.recipe, found.source, (note, *found.notes))
    standard = NAMED["imagenet"]
    note = f"no preprocessing was given and no config lies beside the model: using imagenet ({standard.describe()})"
    return RecipeChoice(standard, "imagenet", (note,), guessed=True)


def _beside(model_path: Path) -> Iterator[tuple[Path, Callable[[Any], bool]]]:
    """Files that may hold a model's recipe; exporters put graphs into a folder `onnx`, and leave these above it."""
    folder = model_path.parent
    for place in (folder, folder.parent) if folder.name == "onnx" else (folder,):
        yield from zip((place / name for name in CONFIGS), (_is_hugging_face, _is_timm), strict=True)


def _is_timm(data: Any) -> bool:
    return isinstance(data, dict) and ("pretrained_cfg" in data or {"input_size", "mean", "std"} <= data.keys())


def _is_hugging_face(data: Any) -> bool:
    marks = {"image_processor_type", "feature_extractor_type", "image_mean", "do_resize", "image_processor"}
    return isinstance(data, dict) and bool(marks & data.keys())


def _json_or_none(path: Path) -> Any:
    try:
        return _read_json(path)
    except ConfigError:
        return None  # somebody else's file that merely has the name


def _hugging_face_resize(config: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    size = config.get("size")
    resample = config.get("resample")
    if resample is None:
        resample = 3 if kind.startswith(("CLIP", "Bit", "DeiT", "ConvNext")) else 2
    if resample not in _RESAMPLE:
        raise ConfigError(f"{where}: resample {resample!r} is none of Pillow's filters 0..5")
    fields: dict[str, Any] = {"interpolation": _RESAMPLE[resample]}
    if isinstance(size, int):
        fields["resize"] = size if kind.startswith(_SHORTER_SIDE_FAMILIES) else (size, size)
    elif isinstance(size, dict) and "shortest_edge" in size:
        fields["resize"] = size["shortest_edge"]
    else:
        fields["resize"] = _hugging_face_side(size, "size", where)
    return fields


def _hugging_face_side(size: Any, key: str, where: str) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    raise ConfigError(
        f"{where}: {key} {size!r:.60} is neither a number nor height and width; write a YAML recipe instead"
    )


def _convnext_sizes(side: int, ratio: float) -> dict[str, Any]:
    """ConvNeXT's rule: below 384 a crop of `side` from side / ratio, from 384 on stretched without a crop."""
    return {"resize": int(side / ratio), "crop": side} if side < 384 else {"resize": (side, side)}


def _timm_interpolation(name: str) -> str:
    return "bicubic" if name == "random" else str(name).removesuffix("-exact")

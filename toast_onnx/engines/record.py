"""The JSON beside an engine: where it lies, and what is read of it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import toast_onnx
from toast_onnx.errors import ToastError
from toast_onnx.model import file_hash, stored_bytes
from toast_onnx.planning.strict_json import read_json


def record_path(engine: Path) -> Path:
    """The JSON beside an engine: its name with `.json` added."""
    return engine.with_name(engine.name + ".json")


def described(output: Path, size: int, model: Path, backend: str, version: str) -> dict[str, Any]:
    """What every such JSON begins with: what was written, from which model, by what.

    Args:
        output: the file that is written.
        size: its bytes.
        model: the model it was made from.
        backend: name of what built it.
        version: of that.
    """
    return {
        "engine": output.name,
        "engine_bytes": size,
        "model": str(model),
        "model_bytes": stored_bytes(model),
        "model_sha256": file_hash(model),
        "backend": backend,
        "backend_version": version,
        "toast_onnx_version": toast_onnx.__version__,
    }


Extents = Annotated[tuple[int, ...], Field(min_length=1)]


class ProfileEntry(BaseModel):
    """Sizes that an engine takes of one input."""

    model_config = ConfigDict(extra="ignore")

    min: Extents
    opt: Extents
    max: Extents


class AttentionEntry(BaseModel):
    """What became of the attentions of a graph."""

    model_config = ConfigDict(extra="ignore")

    found: int
    fused: int | None = None


class EngineRecord(BaseModel):
    """What the JSON beside an engine or an `.ort` file says, as far as it is read again."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = None
    model_sha256: str | None = None
    backend: str | None = None
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    profile: dict[str, ProfileEntry] | None = None
    attention: AttentionEntry | None = None


def read_record(engine: Path) -> EngineRecord | None:
    """What the JSON beside an engine says; None where there is none, or another program's."""
    try:
        return EngineRecord.model_validate(read_json(record_path(engine)))
    except (ToastError, ValidationError):
        return None

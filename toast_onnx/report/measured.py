"""What a pruned model was measured with, from the report beside it: later steps draw their samples alike."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toast_onnx.errors import ToastError
from toast_onnx.model import file_hash
from toast_onnx.planning.strict_json import read_json


class Measured(BaseModel):
    """How samples were drawn.

    Attributes:
        samples: how many; None where no samples were read.
        seed: of the draw.
    """

    model_config = ConfigDict(extra="ignore")

    samples: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)


class _Side(BaseModel):
    model_config = ConfigDict(extra="ignore")

    sha256: str


class _Report(BaseModel):
    model_config = ConfigDict(extra="ignore")

    pruned: _Side
    statistics: Measured


def read_measured(model: Path) -> Measured:
    """How the samples of a pruned model were drawn; the defaults where no report of this very model lies beside it."""
    beside = model.with_suffix(".json")
    if not beside.is_file():
        return Measured()
    try:
        report = _Report.model_validate(read_json(beside))
        return report.statistics if report.pruned.sha256 == file_hash(model) else Measured()
    except (ToastError, ValidationError):
        return Measured()

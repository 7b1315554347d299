"""Checkpoints: everything a run needs to go on as if it had never stopped, written whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from toast_onnx.errors import ConfigError, ModelError
from toast_onnx.files import drafts, place

FORMAT = "toast-onnx/checkpoint/1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its final name, then rename it.

    Raises:
        ModelError: it cannot be written.
    """
    with drafts(path) as folder:
        draft = folder / path.name
        torch.save({"format": FORMAT} | state, draft)
        place(draft, path)


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of the same run.

    Args:
        path: the file.
        identity: what must be equal (settings, hashes of models and data).

    Raises:
        ModelError: it is missing or no checkpoint.
        ConfigError: it belongs to another run; names what differs.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise ModelError(f"{path} does not exist; start without --resume") from e
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise ModelError(f"{path} is no readable checkpoint; start without --resume") from e
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ModelError(f"{path} is no checkpoint of toast-onnx finetune; start without --resume")
    then = state["identity"]
    for key in identity:
        if then.get(key) != identity[key]:
            raise ConfigError(
                f"{path} belongs to a run with another {key} ({then.get(key)}, now {identity[key]}); "
                "give the same options, or start without --resume"
            )
    return state

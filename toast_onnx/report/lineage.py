"""Which model a document speaks of: the run's dense model, its pruned one, or a converted copy of either."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError

from toast_onnx.errors import ToastError
from toast_onnx.model import file_hash

#: The run's two models.
Side = Literal["dense", "pruned"]
#: What `build` and `deploy` append to a model's name: `m.engine`, `m.fp16.onnx`.
_ENDING = r"(\.(fp32|tf32|fp16|bf16))?\.(onnx|ort|engine)"


@dataclass(frozen=True)
class Lineage:
    """A model, and what was converted or built from it.

    Attributes:
        file: its name.
        sha256: its hash; None where the run does not hold it.
        names: names of the files made of it, as their records say.
        hashes: its hash and those of its converted copies.
    """

    file: str
    sha256: str | None
    names: frozenset[str]
    hashes: frozenset[str]

    def has_name(self, path: str) -> bool:
        """Whether a file is the model or made of it, by its record or by the names that `build` and `deploy` give."""
        name = Path(path).name
        stem = re.escape(Path(self.file).stem)
        return name == self.file or name in self.names or re.fullmatch(stem + _ENDING, name) is not None


def trace(identity: dict[str, Any], records: Iterable[dict[str, Any]], folder: Path) -> Lineage:
    """Follow a model through the records of `build`, by hash.

    Args:
        identity: `file` and `sha256` of the model.
        records: what `build` wrote: the hash of its input and the name of its output.
        folder: where the outputs lie. A copy that lies elsewhere is known by name only: records hold no hash of it.
    """
    sha256 = identity.get("sha256")
    hashes = {sha256} if sha256 else set()
    names: set[str] = set()
    waiting = list(records)
    while made := [r for r in waiting if r["model_sha256"] in hashes]:
        waiting = [r for r in waiting if r not in made]
        for record in made:
            copy = folder / Path(record["engine"]).name
            names.add(copy.name)
            if copy.suffix == ".onnx" and (found := _hash(copy)) is not None:
                hashes.add(found)
    return Lineage(identity["file"], sha256, frozenset(names), frozenset(hashes))


def side_of(path: str, dense: Lineage, pruned: Lineage, sha256: Any = None) -> Side | None:
    """Whose file this is; None where it is neither's, or where nothing tells: both have the name.

    Args:
        path: the file as a document names it.
        dense: the run's dense model.
        pruned: its pruned one.
        sha256: hash of the model that the document gives, if any; it counts more than the name.
    """
    own: dict[Side, Lineage] = {"dense": dense, "pruned": pruned}
    known = isinstance(sha256, str)
    by_hash = [side for side, model in own.items() if known and sha256 in model.hashes]
    if len(by_hash) == 1:
        return by_hash[0]
    name = Path(path).name
    exact = [side for side, model in own.items() if model.file == name]
    sides = exact or [side for side, model in own.items() if model.has_name(name)]
    if len(sides) != 1:
        return None
    (side,) = sides
    another = exact and known and own[side].sha256 is not None and not by_hash  # only of the same name
    return None if another else side


def _hash(path: Path) -> str | None:
    """Hash of a model; None where there is no readable one."""
    try:
        return file_hash(path)
    except (ToastError, OSError, DecodeError):
        return None

"""The documents a report page is made of: the run's own, and those beside it that speak of the same models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toast_onnx.errors import ConfigError

_MOST_BYTES = 64 << 20  # of one JSON; a page is made of figures, not of data
#: Step of a deployment -> the kind of document that its result is.
_STEP_KINDS = {
    "compare": "compare",
    "eval-dense": "eval",
    "eval": "eval",
    "bench-onnxruntime": "bench",
    "bench-trtexec": "bench",
    "build": "build",
    "build-dense": "build",
    "convert": "build",
    "convert-dense": "build",
    "check": "check",
}


@dataclass
class Sources:
    """Everything a page shows, by kind.

    Attributes:
        run: the report that `prune` (and `finetune`) wrote.
        path: its file.
        deploy: the record of a deployment, where there is one.
        found: kind (`compare`, `eval`, `bench`, `build`, `check`, `sensitivity`) to documents of it.
        names: the files read besides `path`.
    """

    run: dict[str, Any]
    path: Path
    deploy: dict[str, Any] | None = None
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Documents of a kind, in the order they were found."""
        return self.found.get(kind, [])


def kind_of(document: Any) -> str | None:
    """What a JSON document of this program is; None where it is another's."""
    if not isinstance(document, dict):
        return None
    form = str(document.get("format", ""))
    for kind in ("prune", "finetune", "deploy", "sensitivity"):
        if form.startswith(f"toast-onnx/{kind}/"):
            return kind
    marks = {
        "compare": {"models", "outputs", "samples"},
        "eval": {"fingerprint", "accuracy", "model"},
        "bench": {"runtime", "results"},
        "build": {"engine_bytes", "model_sha256", "backend"},
        "check": {"passed", "tolerance", "outputs"},
    }
    return next((kind for kind, keys in marks.items() if keys <= document.keys()), None)


def find_sources(run: Path, extra: Sequence[Path] = ()) -> Sources:
    """Read a run and what lies beside it.

    Args:
        run: the JSON beside a pruned model, the pruned model itself, a deployment's record or output folder.
        extra: further documents to show; each must be one of this program's.

    Raises:
        ConfigError: a file is missing, or is no document of a kind that the page shows.
    """
    path = _locate(run)
    document = _read(path)
    kind = kind_of(document)
    if kind == "deploy":
        sources = _of_deployment(path, document)
        _add_found(sources, _beside(path))
        return _add(sources, extra)
    if kind not in ("prune", "finetune") or "blocks" not in document:
        raise ConfigError(f"{path} is no report of a pruning run; give the JSON that prune wrote beside its model")
    sources = Sources(document, path)
    _add_found(sources, _beside(path))
    return _add(sources, extra)


def _beside(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """This program's other documents in the folder of one of them."""
    others = sorted(p for p in path.parent.glob("*.json") if p != path)
    return [(p, document) for p in others if (document := _try(p)) is not None]


def _locate(run: Path) -> Path:
    if run.is_dir():
        found = run / "deploy.json"
        if not found.is_file():
            raise ConfigError(f"{run} holds no deploy.json; give the JSON beside a pruned model")
        return found
    return run.with_suffix(".json") if run.suffix == ".onnx" else run


def _read(path: Path) -> Any:
    document = _try(path)
    if document is None:
        reason = "is no JSON document of this program" if path.is_file() else "does not exist"
        raise ConfigError(f"{path} {reason}; give the JSON that a command wrote, or printed with --json")
    return document


def _try(path: Path) -> dict[str, Any] | None:
    """A document of this program, or None: what else lies in a folder is nobody's business."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if kind_of(document) is not None else None


def _of_deployment(path: Path, document: dict[str, Any]) -> Sources:
    """The run that a deployment's prune step wrote, with what its other steps found."""
    prune = document["steps"].get("prune", {})
    reports = [name for name in prune.get("outputs", {}) if name.endswith(".json")]
    beside = [path.parent / Path(name).name for name in reports]
    if not beside or not beside[0].is_file():
        raise ConfigError(f"{path}: its prune step is not done, so there is nothing to show yet; run deploy again")
    sources = Sources(_read(beside[0]), beside[0], deploy=document, names=[path.name])
    for name, entry in document["steps"].items():
        if entry.get("status") == "done" and isinstance(entry.get("result"), dict) and name in _STEP_KINDS:
            sources.found.setdefault(_STEP_KINDS[name], []).append(entry["result"])
    return sources


def _add(sources: Sources, extra: Sequence[Path]) -> Sources:
    """What the user named is shown whatever it speaks of."""
    for path in extra:
        document = _read(path)
        _keep(sources, path, document)
    return sources


def _add_found(sources: Sources, candidates: Iterable[tuple[Path, dict[str, Any]]]) -> None:
    for path, document in candidates:
        if kind_of(document) == "deploy" and sources.deploy is None and _is_about(sources.run, document):
            inner = _of_deployment(path, document)
            sources.deploy, sources.found = inner.deploy, inner.found
            sources.names += inner.names
    told = {"prune", "finetune", "deploy"}
    if sources.deploy is not None:
        told.update(_STEP_KINDS.values())  # the record holds what its steps wrote beside it
    for path, document in candidates:
        if kind_of(document) not in told and _is_about(sources.run, document):
            _keep(sources, path, document)


def _keep(sources: Sources, path: Path, document: dict[str, Any]) -> None:
    kind = kind_of(document)
    assert kind is not None
    if document in sources.of(kind):
        return
    sources.found.setdefault(kind, []).append(document)
    sources.names.append(path.name)


def _is_about(run: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a document names one of the run's models: by hash where it has hashes, else by file name."""
    text = json.dumps(document)
    if any(run[side].get("sha256", "-") in text for side in ("dense", "pruned") if side in run):
        return True
    stem = Path(run["pruned"]["file"]).stem
    named = [document.get("model"), *(r.get("model") for r in document.get("results", []) if isinstance(r, dict))]
    files = {Path(n).name for n in named if isinstance(n, str)}
    # `m.pruned.onnx`, and what was made of it: `m.pruned.fp16.onnx`, `m.pruned.engine`.
    return any(name == f"{stem}.onnx" or name.startswith(f"{stem}.") for name in files)

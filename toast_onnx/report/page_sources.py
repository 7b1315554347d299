"""The documents a report page is made of: the run's own, and those beside it that speak of the same models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toast_onnx.errors import ConfigError
from toast_onnx.planning.strict_json import read_json
from toast_onnx.report.lineage import Lineage, side_of, trace

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
        dense: the dense model of the run and its converted copies.
        pruned: the same of the pruned model.
    """

    run: dict[str, Any]
    path: Path
    deploy: dict[str, Any] | None = None
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    dense: Lineage = field(init=False)
    pruned: Lineage = field(init=False)

    def __post_init__(self) -> None:
        self.trace(())

    def trace(self, records: Iterable[dict[str, Any]]) -> None:
        """Follow the run's models through the records of `build`: those shown already, and these."""
        known = [*self.of("build"), *records]
        self.dense, self.pruned = (trace(self.run[side], known, self.path.parent) for side in ("dense", "pruned"))

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
    beside = _beside(path)
    if kind == "deploy":
        sources = _of_deployment(path, document)
    elif _is_run(document):
        sources = Sources(document, path)
        _add_deployment(sources, beside)
    else:
        raise ConfigError(f"{path} is no report of a pruning run; give the JSON that prune wrote beside its model")
    named = [(file, _read(file)) for file in extra]
    sources.trace(found for _, found in (*beside, *named) if kind_of(found) == "build")
    _add_found(sources, beside)
    for file, found in named:  # what the user named is shown whatever it speaks of
        _keep(sources, file, found)
    return sources


def find_runs(places: Sequence[Path]) -> list[Sources]:
    """Runs in some folders and files, each with what lies beside it.

    Args:
        places: what `find_sources` takes, and folders with the reports of several runs.

    Raises:
        ConfigError: a file is missing or is no report, or a folder holds none.
    """
    reports: list[Path] = []
    for place in places:
        if not place.is_dir():
            reports.append(_locate(place))
            continue
        own = sorted(p for p in place.glob("*.json") if (d := _try(p)) is not None and _is_run(d))
        if not own:
            raise ConfigError(f"{place} holds no report of a pruned model; give the folder that prune wrote into")
        reports += own
    return [find_sources(p) for p in dict.fromkeys(reports)]


def _is_run(document: dict[str, Any]) -> bool:
    return kind_of(document) in ("prune", "finetune") and "blocks" in document


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
        document = read_json(path, limit=_MOST_BYTES)
    except ConfigError:
        return None
    return document if isinstance(document, dict) and kind_of(document) is not None else None


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


def _add_deployment(sources: Sources, candidates: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Take in the deployment that made this very pruned model, where it lies beside the run."""
    for path, document in candidates:
        if kind_of(document) != "deploy":
            continue
        step = document["steps"].get("prune", {})
        made = (step.get("result") or {}).get("pruned", {}).get("sha256")
        if step.get("status") == "done" and made is not None and made == sources.pruned.sha256:
            inner = _of_deployment(path, document)
            sources.deploy, sources.found = inner.deploy, inner.found
            sources.names += inner.names
            return


def _add_found(sources: Sources, candidates: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    told = {"prune", "finetune", "deploy"}
    if sources.deploy is not None:
        told.update(_STEP_KINDS.values())  # the record holds what its steps wrote beside it
    for path, document in candidates:
        if kind_of(document) not in told and _is_about(sources, document):
            _keep(sources, path, document)


def _keep(sources: Sources, path: Path, document: dict[str, Any]) -> None:
    kind = kind_of(document)
    assert kind is not None
    if document in sources.of(kind):
        return
    sources.found.setdefault(kind, []).append(document)
    sources.names.append(path.name)


def _is_about(sources: Sources, document: dict[str, Any]) -> bool:
    """Whether a document speaks of the run's models: by hash where its kind has one, else by file name.

    Many pruned models come from one dense model, so the dense one's hash tells something only of documents about it.
    """
    dense, pruned = sources.dense, sources.pruned
    kind = kind_of(document)
    if kind == "compare":
        return _sha256(document["models"], "pruned") in pruned.hashes
    if kind == "build":
        return document["model_sha256"] in dense.hashes | pruned.hashes
    if kind == "sensitivity":
        return _sha256(document, "model") in dense.hashes | pruned.hashes
    rows = [r for r in document.get("results", ()) if isinstance(r, dict)]
    sides = {
        side_of(name, dense, pruned, each.get("model_sha256"))
        for each in (document, *rows)
        for name in (each.get("model"), each.get("engine"))
        if isinstance(name, str)
    }
    if "pruned" in sides:
        return True
    # A dense file's name is too common to go by, unless the hash stands beside it.
    given = document.get("model_sha256")
    return kind == "eval" and isinstance(given, str) and given in dense.hashes


def _sha256(models: Any, key: str) -> str | None:
    """Hash of a model in a document; None where there is none, as in another program's that looks alike."""
    identity = models.get(key) if isinstance(models, dict) else None
    found = identity.get("sha256") if isinstance(identity, dict) else None
    return found if isinstance(found, str) else None

"""Models by their name on the Hugging Face hub: `hf:ORG/NAME`, or `hf:ORG/NAME:FILE.onnx` where there are several."""

from __future__ import annotations

import contextlib
import importlib
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import onnx
import onnx.external_data_helper as external

from toast_onnx.errors import BackendError, ConfigError, ModelError, one_line
from toast_onnx.external import all_tensors

PREFIX = "hf:"
#: What says how images are prepared, fetched with a model where it is there.
CONFIGS = ("preprocessor_config.json", "config.json")
_MOST_NAMED = 6


@dataclass(frozen=True)
class HubName:
    """What a name says.

    Attributes:
        text: the whole name, for messages.
        repository: organisation and name.
        file: path of the ONNX file in it; None where it should be the only one.
    """

    text: str
    repository: str
    file: str | None

    @property
    def stem(self) -> str:
        """How results are named: by the repository."""
        return self.repository.partition("/")[2]


def parse(text: str) -> HubName | None:
    """The parts of a name; None for what is a path.

    Raises:
        ConfigError: it begins like a name and is none.
    """
    if not text.startswith(PREFIX):
        return None
    found = re.fullmatch(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<file>[^:]+\.onnx))?", text)
    if found is None:
        raise ConfigError(f"{text:.200} is no name of a model on the hub; write hf:ORG/NAME or hf:ORG/NAME:FILE.onnx")
    return HubName(text, found["repository"], found["file"])


def fetch(name: HubName) -> Path:
    """The ONNX file of a model in the hub's local cache, with its weights and its preprocessing beside it.

    Args:
        name: which.

    Raises:
        BackendError: `huggingface_hub` is not installed, or the hub does not answer and the cache does not have it.
        ConfigError: there is no such repository, no such file, or more than one and none is named.
        ModelError: a file cannot be fetched.
    """
    get, names = _open(name)
    file = _choose(name, names)
    path = get(file)
    folder = posixpath.dirname(file)
    for other in (*_weights(path), *CONFIGS):
        if (beside := posixpath.normpath(posixpath.join(folder, other))) in names:
            get(beside)
    for config in CONFIGS:  # exporters put graphs into a folder of their own, and leave these above it
        if folder and config in names:
            get(config)
    return path


def be_quiet() -> None:
    """Fetch without bars from now on."""
    with contextlib.suppress(ImportError):
        importlib.import_module("huggingface_hub.utils").disable_progress_bars()


def _open(name: HubName) -> tuple[Callable[[str], Path], Sequence[str]]:
    """What fetches a file of a repository, and the names of its files; from the cache where the hub is out of reach."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise BackendError(
            f"{name.text} needs huggingface_hub, which is not installed: pip install 'toast-onnx[hub]', or give a file"
        ) from error

    def get(file: str) -> Path:
        try:
            return Path(hub.hf_hub_download(name.repository, file))
        except Exception as error:  # of the hub, of its transport, of the disk
            raise ModelError(f"{name.text}: {file} could not be fetched ({_reason(error)}); try again") from error

    try:
        return get, [s.rfilename for s in hub.HfApi().model_info(name.repository).siblings or ()]
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise ConfigError(
            f"{name.text}: the hub shows no such model; check the name, or log in where it is private or gated"
        ) from error
    except Exception as error:  # its transport has errors of its own, by its version
        cached = _cached(hub, name)
        if cached is None:
            raise BackendError(
                f"{name.text}: the hub cannot be reached ({type(error).__name__}), and the model was not fetched "
                "before; go online once, or give a file"
            ) from error
        folder = cached
        return (lambda file: folder / file), [p.relative_to(folder).as_posix() for p in _files(folder)]


def _cached(hub: Any, name: HubName) -> Path | None:
    """The folder of what was fetched before."""
    try:
        return Path(hub.snapshot_download(name.repository, local_files_only=True))
    except Exception:  # nothing is there, said in as many ways as there are versions
        return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _choose(name: HubName, names: Sequence[str]) -> str:
    graphs = [n for n in names if n.endswith(".onnx")]
    if name.file is not None:
        if name.file in graphs:
            return name.file
        near = get_close_matches(name.file, graphs, 1)
        meant = f"did you mean {PREFIX}{name.repository}:{near[0]}?" if near else f"it has {_listed(graphs)}"
        raise ConfigError(f"{name.text}: there is no such file; {meant}")
    if not graphs:
        raise ConfigError(f"{name.text} holds no ONNX file; export the model, or name a repository that has one")
    if len(graphs) > 1:
        raise ConfigError(
            f"{name.text} holds {len(graphs)} ONNX files; name one, as in {PREFIX}{name.repository}:{graphs[0]} "
            f"(it has {_listed(graphs)})"
        )
    return graphs[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "") if names else "none"


def _weights(path: Path) -> list[str]:
    """Files beside a graph that hold its weights."""
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception:  # whoever loads it next says what is wrong with it
        return []
    outside = (t for t in all_tensors(proto) if external.uses_external_data(t))
    return sorted({external.ExternalDataInfo(t).location for t in outside})


def _reason(error: Exception) -> str:
    """An error's kind and text, without the address that it may name."""
    return re.sub(r"\S*://\S+", "an address", f"{type(error).__name__}: {one_line(error)}")[:160]

"""Models by their name on the hub, against a hub on this machine: files, weights, preprocessing, failures."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants as constants
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import toast_onnx
from tests.end_to_end.command import DIGITS
from toast_onnx import hub
from toast_onnx.errors import BackendError, ConfigError, ModelError
from toast_onnx_cli.main import main

COMMIT = hashlib.sha1(b"a commit").hexdigest()
RECIPE = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False}


class FakeHub(BaseHTTPRequestHandler):
    """The two addresses that models are read from: a repository's list of files, and a file."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.root.joinpath(*parts[2:4])
            files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
            siblings = [{"rfilename": name} for name in files]
            document = json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}).encode()
            self._send(document if folder.is_dir() else None, "RepoNotFound", body)
            return
        path = self.root.joinpath(*parts[:2], *parts[4:])  # ORG/NAME/resolve/REVISION/FILE
        self._send(path.read_bytes() if path.is_file() else None, "EntryNotFound", body)

    def _send(self, data: bytes | None, code: str, body: bool) -> None:
        self.send_response(404 if data is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if data is None:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if body:
            self.wfile.write(data or b"")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose ORG/NAME are repositories of a hub at a port of this machine; the cache is empty."""
    root = tmp_path / "served"
    root.mkdir()
    FakeHub.root, FakeHub.asked = root, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    point(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield root
    server.shutdown()
    server.server_close()


def point(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Have huggingface_hub speak to an address, and keep what it gets in a folder."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


def publish(root: Path, name: str, *files: str, outside: bool = False) -> Path:
    """A repository with the digits model under each of the names, and its recipe."""
    folder = root / name
    folder.mkdir(parents=True)
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if outside:
            proto = onnx.load(DIGITS)
            onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=1000)
        else:
            shutil.copy(DIGITS, path)
    (folder / "preprocessor_config.json").write_text(json.dumps(RECIPE))
    (folder / "README.md").write_text("a card")
    return folder


def test_a_name_is_a_file_with_its_weights_and_its_recipe(served: Path) -> None:
    publish(served, "org/digits", "onnx/model.onnx", outside=True)
    result = CliRunner().invoke(main, ["eval", "hf:org/digits", "--data", str(DIGITS.with_name("digits_test.npz"))])
    assert result.exit_code == 0, result.output
    assert "98.1" in result.stdout  # as with the file and `--preprocess none`
    assert "preprocessor_config.json" in result.stderr
    fetched = {path.partition("?")[0].rpartition("/")[2] for path in FakeHub.asked if "/resolve/" in path}
    assert fetched == {"model.onnx", "model.onnx_data", "preprocessor_config.json"}


def test_results_go_to_the_present_folder_and_python_takes_names_too(served: Path) -> None:
    publish(served, "org/digits", "model.onnx")
    shutil.copy(DIGITS.with_name("ratios.yaml"), "r.yaml")
    words = ["prune", "hf:org/digits:model.onnx", "--ratios", "r.yaml", "--compensation", "none"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    document = json.loads(Path("digits.pruned.json").read_text())
    assert document["command"] == words
    cached = toast_onnx.load("hf:org/digits")
    assert document["dense"]["params"] == cached.report()["params"]
    assert cached.source.path.parent.name == COMMIT


def test_a_deployment_takes_a_name(served: Path) -> None:
    publish(served, "org/digits", "onnx/model.onnx", outside=True)
    shutil.copy(DIGITS.with_name("ratios.yaml"), "r.yaml")
    data = DIGITS.with_name("digits_test.npz")
    Path("d.yaml").write_text(
        f"version: 1\nmodel: hf:org/digits\npreprocess: none\nprune: {{ratios: r.yaml}}\neval: {{data: {data}}}\n"
    )
    result = CliRunner().invoke(main, ["deploy", "d.yaml"])
    assert result.exit_code == 0, result.output
    assert Path("d", "model.pruned.onnx").is_file()
    Path("d.yaml").write_text("version: 1\nmodel: hf:org/absent\nprune: {ratios: r.yaml}\n")
    result = CliRunner().invoke(main, ["deploy", "d.yaml", "--dry-run"])
    assert result.exit_code == 1
    assert "Error: hf:org/absent: the hub shows no such model" in result.stderr


def test_what_was_fetched_is_there_offline(served: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    publish(served, "org/digits", "model.onnx", outside=True)
    name = hub.parse("hf:org/digits")
    assert name is not None
    path = hub.fetch(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(name) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # where nobody answers
    assert hub.fetch(name) == path
    other = hub.parse("hf:org/other")
    assert other is not None
    with pytest.raises(BackendError, match=r"the hub cannot be reached .* go online once, or give a file"):
        hub.fetch(other)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("hf:org/two", ConfigError, "2 ONNX files; name one, as in hf:org/two:a.onnx .*it has a.onnx, onnx/b.onnx"),
        ("hf:org/two:onnx/c.onnx", ConfigError, "no such file; did you mean hf:org/two:onnx/b.onnx"),
        ("hf:org/none", ConfigError, "holds no ONNX file"),
        ("hf:org/absent", ConfigError, "shows no such model; check the name"),
    ],
)
def test_what_a_name_lacks_is_one_line(text: str, error: type[Exception], says: str, served: Path) -> None:
    publish(served, "org/two", "a.onnx", "onnx/b.onnx")
    publish(served, "org/none")
    name = hub.parse(text)
    assert name is not None
    with pytest.raises(error, match=says) as caught:
        hub.fetch(name)
    assert "://" not in str(caught.value)
    result = CliRunner().invoke(main, ["inspect", text])
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("Error:")] == [f"Error: {caught.value}"]


def test_a_file_that_cannot_be_read_and_a_library_that_is_absent(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(served, "org/digits", "model.onnx")
    name = hub.parse("hf:org/digits")
    assert name is not None

    def fail(*_: object) -> str:
        raise OSError("no space left, says http://127.0.0.1/x")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(ModelError, match=r"model.onnx could not be fetched \(OSError: no space left, says an addr"):
            hub.fetch(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match=r"pip install 'toast-onnx\[hub\]', or give a file"):
        hub.fetch(name)


@pytest.mark.parametrize("text", ["hf:", "hf:name", "hf:org/name:model.pt", "hf:org/name:", "hf:a/b/c"])
def test_what_is_no_name_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="write hf:ORG/NAME"):
        hub.parse(text)
    assert hub.parse(text.replace("hf:", "dir/hf:")) is None


def test_weights_of_a_graph_are_found_wherever_it_names_them(tmp_path: Path) -> None:
    publish(tmp_path, "org/digits", "onnx/model.onnx", outside=True)
    assert hub._weights(tmp_path / "org/digits/onnx/model.onnx") == ["model.onnx_data"]
    np.save(tmp_path / "no.npy", np.zeros(1))
    assert hub._weights(tmp_path / "no.npy") == []

"""Where outputs may go, and what is left when writing fails or a run is killed: all as it was, or all of it new."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

from tests.end_to_end.command import QUICK, contents, program, refuse, succeed, write_ratios


def kept(folder: Path, *arguments: str | Path, **options: object) -> str:
    """A refusal that leaves a folder exactly as it was."""
    before = contents(folder)
    line = refuse(*arguments, **options)
    assert contents(folder) == before
    return line


# --- outputs that are inputs ---


def _same(model: Path) -> Path:
    return model


def _relative(model: Path) -> Path:
    (model.parent / "inner").mkdir()
    return model.parent / "inner" / ".." / model.name


def _symlink(model: Path) -> Path:
    (model.parent / "link.onnx").symlink_to(model.name)
    return model.parent / "link.onnx"


def _hard_link(model: Path) -> Path:
    os.link(model, model.parent / "hard.onnx")
    return model.parent / "hard.onnx"


def _through_a_folder(model: Path) -> Path:
    (model.parent / "there").symlink_to(model.parent, target_is_directory=True)
    return model.parent / "there" / model.name


@pytest.mark.parametrize("option", ["-o", "--report"])
@pytest.mark.parametrize("spell", [_same, _relative, _symlink, _hard_link, _through_a_folder])
def test_output_is_the_input(spell: Callable[[Path], Path], option: str, model: Path, ratios: Path) -> None:
    assert "is the input" in kept(model.parent, "prune", model, "--ratios", ratios, option, spell(model))


def test_input_and_output_are_both_links(model: Path, ratios: Path) -> None:
    link = _symlink(model)
    assert "is the input" in kept(model.parent, "prune", link, "--ratios", ratios, "-o", model)


def test_output_would_replace_the_weights_of_the_input(external: Path, ratios: Path) -> None:
    """The weights of `new.onnx` would go to `new.onnx.data`, which is where those of the input lie."""
    weights = external.parent / "new.onnx.data"
    proto = onnx.load(external)
    onnx.save(proto, external, save_as_external_data=True, location=weights.name, size_threshold=1024)
    for option in (("-o", external.parent / "new.onnx"), ("--report", weights), ("-o", weights)):
        line = kept(external.parent, "prune", external, "--ratios", ratios, *option)
        assert "new.onnx.data is the input file" in line


def test_report_would_replace_the_ratios(model: Path) -> None:
    ratios = write_ratios(model.parent / "model.pruned.json", QUICK)
    assert "is the input file" in kept(model.parent, "prune", model, "--ratios", ratios)


def test_report_would_replace_the_output(model: Path, ratios: Path) -> None:
    out = model.parent / "new.onnx"
    line = kept(model.parent, "prune", model, "--ratios", ratios, "-o", out, "--report", out)
    assert "would both be" in line


# --- places that cannot be written ---


@pytest.mark.parametrize("option", ["-o", "--report"])
@pytest.mark.parametrize("place", ["nowhere/new.onnx", "model.onnx/new.onnx", "folder"])
def test_places_that_cannot_be(place: str, option: str, model: Path, ratios: Path) -> None:
    (model.parent / "folder").mkdir()
    line = kept(model.parent, "prune", model, "--ratios", ratios, option, model.parent / place)
    assert place.split("/")[0] in line
    assert "choose another" in line


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_an_earlier_result_is_kept_unless_told_otherwise(option: str, model: Path, ratios: Path) -> None:
    earlier = model.parent / "model.pruned.onnx"
    earlier = earlier if option == "-o" else earlier.with_suffix(".json")
    earlier.write_text("hours of work")
    line = kept(model.parent, "prune", model, "--ratios", ratios)
    assert f"{earlier.name} exists already; give --overwrite" in line
    assert option in line
    succeed("prune", model, "--ratios", ratios, "--overwrite")
    assert earlier.read_bytes() != b"hours of work"


def test_a_device_is_not_replaced_by_a_file(model: Path, ratios: Path) -> None:
    assert "not a regular file" in kept(model.parent, "prune", model, "--ratios", ratios, "--report", os.devnull)
    assert not Path(os.devnull).is_file()


def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 256 KiB, a sixth of what the pruned model needs."""
    yield from _mounted(tmp_path_factory.mktemp("small") / "disk", "size=256k")


@pytest.fixture
def fixed_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that is mounted read-only."""
    yield from _mounted(tmp_path_factory.mktemp("fixed") / "disk", "size=256k", "ro")


def test_full_disk(small_disk: Path, model: Path, ratios: Path) -> None:
    (small_disk / "new.onnx").write_text("an older result")
    line = kept(small_disk, "prune", model, "--ratios", ratios, "-o", small_disk / "new.onnx", "--overwrite")
    assert "the disk is full" in line


def test_full_disk_for_the_report_leaves_no_model_without_one(small_disk: Path, model: Path, ratios: Path) -> None:
    (small_disk / "fill").write_bytes(bytes(250 << 10))
    before = contents(model.parent, small_disk)
    line = refuse("prune", model, "--ratios", ratios, "--report", small_disk / "report.json")
    assert "the disk is full" in line
    assert contents(model.parent, small_disk) == before


def test_full_temporary_folder(small_disk: Path, model: Path, ratios: Path) -> None:
    line = kept(model.parent, "prune", model, "--ratios", ratios, env=os.environ | {"TMPDIR": str(small_disk)})
    assert "TMPDIR" in line
    assert list(small_disk.glob("toast*")) == []


def test_read_only_disk(fixed_disk: Path, model: Path, ratios: Path) -> None:
    line = kept(fixed_disk, "prune", model, "--ratios", ratios, "-o", fixed_disk / "new.onnx")
    assert "cannot be written" in line


def test_file_size_limit(model: Path, ratios: Path) -> None:
    """A failure to write that needs no privileges: files may not grow beyond 1 MB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    out = model.parent / "new.onnx"
    out.write_text("an older result")
    words = ("--ratios", ratios, "--no-check", "-o", out, "--overwrite")
    line = kept(model.parent, "prune", model, *words, preexec_fn=limit)
    assert "new.onnx cannot be written: File too large" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(model: Path, ratios: Path) -> None:
    locked = model.parent / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be written" in refuse("prune", model, "--ratios", ratios, "-o", locked / "new.onnx")


# --- killed runs ---

#: Ends the process without warning before the N-th operation that changes what lies on disk.
KILL = """
import os, pathlib, signal, sys
left = int(sys.argv.pop(1))
def deadly(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.fsync, os.replace, os.unlink = deadly(os.fsync), deadly(os.replace), deadly(os.unlink)
pathlib.Path.unlink = deadly(pathlib.Path.unlink)
from toast_onnx_cli.main import main
main()
"""


def _killed_before(operation: int, *arguments: str | Path) -> bool:
    """Run the command and kill it before its N-th operation on disk; False when it ended before."""
    command = [sys.executable, "-c", KILL, str(operation), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def _loaded(out: Path) -> bytes:
    """The graph with its weights, wherever they lie: in the middle of an exchange they have another name."""
    return onnx.load(out).SerializeToString(deterministic=True)


def _whole(out: Path, versions: list[bytes]) -> bool:
    """Whether the output with its weights is one of the given versions, or absent."""
    return not out.exists() or _loaded(out) in versions


@pytest.mark.slow  # tests/trust/test_kills.py does it in every run, without the command around it
@pytest.mark.parametrize(("kind", "old"), [("inline", True), ("external", False)])
def test_killed_before_any_operation_on_disk(
    kind: str, old: bool, request: pytest.FixtureRequest, ratios: Path, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue("model" if kind == "inline" else "external")
    out = tmp_path / "out" / "new.onnx"
    out.parent.mkdir()

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in out.parent.iterdir() if p.is_file() and p.suffix != ".json"}

    other = write_ratios(tmp_path / "other.yaml", QUICK | {"ffn": {"fc2": 0.25, "score": "l1"}})
    succeed("prune", source, "--ratios", ratios, "-o", out, "--no-check")
    new, new_model = files(), _loaded(out)
    succeed("prune", source, "--ratios", other, "-o", out, "--no-check", "--overwrite")
    older, older_model = files(), _loaded(out)
    assert older != new
    operation = 1
    while True:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        for name, data in older.items() if old else ():
            (out.parent / name).write_bytes(data)
        if not _killed_before(operation, "prune", source, "--ratios", ratios, "-o", out, "--no-check", "--overwrite"):
            break
        assert _whole(out, [older_model, new_model] if old else [new_model]), f"killed before operation {operation}"
        if old and kind == "inline":
            assert out.exists(), f"killed before operation {operation}"
        operation += 1
    assert files() == new
    assert operation > 4  # the drafts of model and report, then both names


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.6, 0.95])
def test_killed_by_the_clock(share: float, model: Path, ratios: Path) -> None:
    out = model.parent / "new.onnx"
    started = time.monotonic()
    succeed("prune", model, "--ratios", ratios, "-o", out)
    whole, took = out.read_bytes(), time.monotonic() - started
    old = b"an older result"
    out.write_bytes(old)
    process = subprocess.Popen(
        [program(), "prune", model, "--ratios", ratios, "-o", out, "--overwrite"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(share * took)
    process.kill()
    process.wait()
    assert out.read_bytes() in (old, whole)

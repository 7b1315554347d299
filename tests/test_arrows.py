"""Imports point one way: between the packages, between the rooms of the library, at any level of a file."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "toast_onnx": ROOT / "toast_onnx",
    "toast_onnx_calibration": ROOT / "calibration" / "toast_onnx_calibration",
    "toast_onnx_cli": ROOT / "cli" / "toast_onnx_cli",
}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside functions, too; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides where it points"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def rooms() -> dict[str, set[str]]:
    """Room of the library -> rooms that it imports; a file at the top is a room of its own."""
    folder = PACKAGES["toast_onnx"]
    names = {p.stem if p.is_file() else p.name for p in folder.iterdir() if p.suffix == ".py" or p.is_dir()}
    found: dict[str, set[str]] = defaultdict(set)
    for path in folder.rglob("*.py"):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        targets = {name.split(".")[1] for name in imported(path) if name.startswith("toast_onnx.")}
        found[room] |= (targets & names) - {room}
    return found


def beyond(graph: dict[str, set[str]], room: str) -> set[str]:
    """All rooms that one reaches."""
    seen: set[str] = set()
    ahead = [room]
    while ahead:
        fresh = graph.get(ahead.pop(), set()) - seen
        seen |= fresh
        ahead.extend(fresh)
    return seen


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("toast_onnx", {"toast_onnx_calibration", "toast_onnx_cli"}),
        ("toast_onnx_calibration", {"toast_onnx_cli"}),
    ],
)
def test_packages_import_only_what_is_below_them(package: str, forbidden: set[str]) -> None:
    for path in PACKAGES[package].rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & forbidden, path


def test_rooms_of_the_library_form_no_circle() -> None:
    graph = rooms()
    assert len(graph) > 12
    assert [room for room in graph if room in beyond(graph, room)] == []


def test_files_of_a_room_form_no_circle() -> None:
    """Lazy imports count: what has to be imported late to work at all is a circle all the same."""
    graph: dict[str, set[str]] = {}
    for package, folder in PACKAGES.items():
        files = {
            ".".join((package, *p.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): p
            for p in folder.rglob("*.py")
        }
        graph |= {name: (imported(path) & set(files)) - {name} for name, path in files.items()}
    fronts = {"toast_onnx", "toast_onnx_calibration"}  # they name what lies inside, for type checkers
    graph = {name: targets - fronts for name, targets in graph.items() if name not in fronts}
    assert [name for name in graph if name in beyond(graph, name)] == []


@pytest.mark.parametrize(
    ("room", "unknown"),
    [
        ("proof", {"rewriting", "pruning", "choosing"}),
        ("importance", {"matching", "model", "edit", "rewriting"}),
        ("solving", {"matching", "model", "edit", "rewriting"}),
        ("matching", {"importance", "solving", "planning"}),
        ("filling", {"edit", "rewriting", "proof"}),
        ("nodes", {"matching", "model", "edit"}),
    ],
)
def test_what_a_room_must_not_know(room: str, unknown: set[str]) -> None:
    assert not beyond(rooms(), room) & unknown

"""The short form: some damage of every kind, the same in every run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import Target, outcome, targets

KINDS = 11
TRIES = {"m.onnx": 60, "s.npz": 40}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Target]]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, targets(folder)


@pytest.mark.parametrize("kind", range(KINDS))
def test_damage_is_refused_or_does_not_matter(kind: int, everything: tuple[Path, list[Target]]) -> None:
    folder, found = everything
    assert len(found) == KINDS
    target = found[kind]
    results = [outcome(target, folder, seed) for seed in range(TRIES.get(target.name, 150))]
    assert set(results) <= {"refused", "taken"}, [
        (k, r) for k, r in enumerate(results) if r not in ("refused", "taken")
    ]
    assert "refused" in results

"""The short form: some damage of every kind, the same in every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.strategies import damaged_files, documents
from tests.fuzz.targets import Target, damaged, outcome, targets

KINDS = 17
TRIES = {"m.onnx": 60, "s.npz": 40, "x.onnx": 60, "page/m.json": 15}
GOOD = ("refused", "taken")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Target]]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, targets(folder)


@pytest.mark.parametrize("kind", range(KINDS))
def test_good_files_are_taken(kind: int, everything: tuple[Path, list[Target]]) -> None:
    folder, found = everything
    assert len(found) == KINDS
    assert outcome(found[kind], folder, found[kind].good) == "taken"


@pytest.mark.parametrize("kind", range(KINDS))
def test_damage_is_refused_or_does_not_matter(kind: int, everything: tuple[Path, list[Target]]) -> None:
    folder, found = everything
    target = found[kind]
    results = [outcome(target, folder, damaged(target, seed)) for seed in range(TRIES.get(target.name, 100))]
    assert set(results) <= set(GOOD), [(k, r) for k, r in enumerate(results) if r not in GOOD]
    assert "refused" in results


@pytest.mark.parametrize("kind", range(KINDS))
def test_damage_as_hypothesis_draws_it(kind: int, everything: tuple[Path, list[Target]]) -> None:
    """Also documents that are no damaged good ones, where a kind is a document."""
    folder, found = everything
    target = found[kind]
    drawn = damaged_files(target)
    if _is_document(target.good):
        drawn = st.one_of(drawn, documents(target))

    @settings(
        max_examples=10 if target.name in TRIES else 60,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def check(content: bytes) -> None:
        assert outcome(target, folder, content) in GOOD

    check()


def _is_document(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False

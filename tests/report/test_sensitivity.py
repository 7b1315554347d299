"""The sensitivity figure: what is drawn, and what it needs."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from toast_onnx.errors import BackendError, ConfigError
from toast_onnx.report.sensitivity import curves, plot_sensitivity

DOCUMENT: dict[str, Any] = {
    "metric": "kl",
    "dense_top1": None,
    "trials": [
        {"block": b, "part": part, "ratio": r, "kept": {}, "damage": {"kl": r * (b + 1), "relative_error": 0.5}}
        for b in (0, 1)
        for part in ("fc1", "fc2", "fc1+fc2")
        for r in (0.5, 0.1)
    ],
}


def with_labels() -> dict[str, Any]:
    """The same trials with top-1."""
    trials = [t | {"damage": t["damage"] | {"top1": 1 - t["ratio"]}} for t in DOCUMENT["trials"]]
    return DOCUMENT | {"trials": trials, "dense_top1": 0.9}


def test_one_curve_a_block_and_part() -> None:
    found, measure = curves(DOCUMENT)
    assert measure == "kl"
    assert found["fc2"] == {0: [(0.1, 0.1), (0.5, 0.5)], 1: [(0.1, 0.2), (0.5, 1.0)]}
    assert curves(with_labels())[1] == "top1"


@pytest.mark.parametrize("document", [DOCUMENT, with_labels()])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_figure_is_written(document: dict[str, Any], ending: str, tmp_path: Path) -> None:
    plot_sensitivity(document, tmp_path / f"f.{ending}")
    assert (tmp_path / f"f.{ending}").stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [f"f.{ending}"]


def test_panels_and_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure as figure_module

    drawn: list[Any] = []
    original = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k))
    )
    plot_sensitivity(DOCUMENT, tmp_path / "f.png")
    axes = drawn[0].axes
    assert [a.get_title() for a in axes] == ["fc1 (inputs)", "fc2 (hidden units)", "fc1 and fc2"]
    assert [len(a.get_lines()) for a in axes] == [2, 2, 2]
    assert list(axes[1].get_lines()[1].get_ydata()) == [0.2, 1.0]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no image format"):
        plot_sensitivity(DOCUMENT, tmp_path / "f.txt")
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot_sensitivity(DOCUMENT | {"trials": []}, tmp_path / "f.png")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"toast-onnx\[report\]"):
        plot_sensitivity(DOCUMENT, tmp_path / "f.png")

"""Places that share weights are one: pooled statistics, one choice, one new weight, and no larger file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.matching.tiny import HIDDEN, WIDTH, Graph
from tests.pruning import look, prune_file
from toast_onnx.choosing.shared import Pooled, Sharing, find_sharing
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import ConfigError, MatchError
from toast_onnx.importance.moments import Moments
from toast_onnx.planning.macs import graph_params
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.pruning import prune
from toast_onnx_cli.main import main
from toast_onnx_cli.prune_summary import summary

CASES = Path(__file__).parent.parent / "cases" / "graphs"
HALF: dict[str, Any] = {
    "version": 1,
    "attention": {"qk": 0.5, "vo": 0.5},
    "ffn": {"fc2": 0.5},
    "align": 1,
}


@pytest.mark.parametrize("ratio", [0.5, 0.0625])
@pytest.mark.parametrize("name", ["albert", "matcher_cross"])
def test_shared_weights_stay_shared(name: str, ratio: float, tmp_path: Path) -> None:
    ratios = HALF | {"attention": {"qk": ratio, "vo": ratio}, "ffn": {"fc2": ratio}}
    path, out = CASES / f"{name}.onnx", tmp_path / "pruned.onnx"
    dense, pruned = prune_file(path, ratios, out)
    assert pruned.twin is not None
    assert set(pruned.weights) == set(range(len(dense.match.blocks)))
    small = look(out)
    assert graph_params(small.view) < graph_params(dense.view)
    assert out.stat().st_size < path.stat().st_size
    first, *others = pruned.weights.values()
    for other in others:
        assert other.ffn is first.ffn
        assert other.attention is first.attention


def test_with_copies_of_their_own_the_file_grows(tmp_path: Path) -> None:
    path, out = CASES / "albert.onnx", tmp_path / "pruned.onnx"
    dense, _ = prune_file(path, HALF | {"ffn": {"fc2": 0.0625}}, out, split_shared=True)
    assert graph_params(look(out).view) > graph_params(dense.view)


def _networks(path: Path, uses: int = 2, outside: bool = False) -> Path:
    """One network after another with the same weights; `outside`, its first layer is read once more, alone."""
    graph = Graph()
    first, second = graph.random(WIDTH, HIDDEN), graph.random(HIDDEN, WIDTH)
    x = "x"
    for _ in range(uses):
        hidden = graph.add("Relu", graph.add("MatMul", graph.norm(x), first))
        x = graph.add("Add", x, graph.add("MatMul", hidden, second))
    if outside:
        graph.also_output(graph.add("MatMul", x, first), "batch", "tokens", HIDDEN)
    return graph.save(path, x)


def test_one_choice_from_pooled_statistics(tmp_path: Path) -> None:
    """A unit that is dead in one place and alive in the other stays; one that is dead in both goes."""
    dense = look(_networks(tmp_path / "model.onnx"))
    spread = np.ones((2, HIDDEN))
    spread[0, :8], spread[1, 4:12] = 0, 0  # units 4 to 7 are dead in both

    class Measured(SyntheticStatistics):
        def hidden(self, block: int) -> Moments:
            return Moments(100.0, np.zeros(HIDDEN), 100 * np.diag(spread[block]), 100.0)

    ratios = parse_ratios({"version": 1, "ffn": {"fc2": 0.25}, "align": 1})
    pruned = prune(dense, ratios, Measured(dense))
    kept = pruned.weights[0].ffn
    assert kept is not None
    assert kept is pruned.weights[1].ffn
    assert kept.units is not None
    assert sorted(set(range(HIDDEN)) - set(kept.units.tolist())) == [4, 5, 6, 7]
    assert any("blocks 0, 1 share weights" in note for note in pruned.notes)


def test_measured_attention_counts_by_its_queries() -> None:
    class Two:
        source = "two"

        def attention(self, block: int) -> Any:
            from toast_onnx.importance.synthetic import AttentionStatistics

            s = np.eye(2)[None] * (1 if block == 0 else 5)
            context = Moments(10.0 * (block + 1), np.zeros(2), np.eye(2) * (block + 1))
            return AttentionStatistics(s, s, context, tokens=(300.0, 100.0)[block])

    pooled = Pooled(Two(), Sharing({0: (0, 1), 1: (0, 1)}, {}, {})).attention(0)  # type: ignore[arg-type]
    assert pooled.s_qq[0] == pytest.approx(2 * np.eye(2))
    assert pooled.tokens == 400
    assert pooled.context.count == 30


def test_a_place_of_another_kind_is_a_reason(tmp_path: Path) -> None:
    path = _networks(tmp_path / "model.onnx", outside=True)
    with pytest.raises(MatchError, match=r"its weights are shared with .* --split-shared"):
        prune_file(path, HALF)
    _, left = prune_file(path, HALF, skip_unprunable=True)
    assert not left.weights
    _, split = prune_file(path, HALF, split_shared=True)
    assert set(split.weights) == {0, 1}


def test_ratios_that_differ_are_refused(tmp_path: Path) -> None:
    path = _networks(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="blocks 0, 1 share their weights"):
        prune_file(path, HALF | {"ffn": {"fc2": [0.5, 0.25]}})
    _, pruned = prune_file(path, HALF | {"ffn": {"fc2": [0.5, 0.25]}}, split_shared=True)
    assert set(pruned.weights) == {0, 1}


def test_a_part_that_stays_in_one_place_stays_in_all(tmp_path: Path) -> None:
    _, pruned = prune_file(_networks(tmp_path / "model.onnx"), HALF | {"ffn": {"fc2": [0.5, 0]}})
    assert not pruned.weights
    assert "fc2 of blocks 0, 1 stays whole: they share its weights, and block 1 must keep them" in pruned.notes


def test_slices_of_one_tensor_are_several_weights(tmp_path: Path) -> None:
    """As `nn.MultiheadAttention` keeps them; the same slice, cut once more for every place, is one."""
    graph = Graph()
    packed = graph.random(WIDTH, 2 * HIDDEN)
    second = graph.random(HIDDEN, WIDTH)
    x = "x"
    for start in (0, HIDDEN, 0):
        ends = (graph.constant([start]), graph.constant([start + HIDDEN]), graph.constant([1]))
        hidden = graph.add("Relu", graph.add("MatMul", graph.norm(x), graph.add("Slice", packed, *ends)))
        last = graph.random(HIDDEN, WIDTH) if start else second
        x = graph.add("Add", x, graph.add("MatMul", hidden, last))
    found = find_sharing(look(graph.save(tmp_path / "model.onnx", x)))
    assert dict(found.ffn) == {0: (0, 2), 2: (0, 2)}
    assert not found.reasons


def test_nothing_is_shared_in_an_ordinary_model(tmp_path: Path) -> None:
    assert not find_sharing(look(CASES.parent.parent.parent / "examples" / "digits_vit.onnx"))


@pytest.mark.parametrize(
    ("size", "params", "start", "end"),
    [
        (1002, 50, "out.onnx", "(+0.2%, nodes that were added)"),
        (1002, 51, "LARGER than the original", ""),
        (1500, 50, "LARGER than the original", ""),
        (900, 50, "out.onnx", ""),
    ],
)
def test_a_larger_file_is_said_as_loud_as_it_matters(size: int, params: int, start: str, end: str) -> None:
    document = {
        "dense": {"bytes": 1000, "params": 50, "macs": 9, "files": []},
        "pruned": {"bytes": size, "params": params, "macs": 9},
        "twin": None,
        "statistics": {"source": "none"},
        "tokens": None,
        "blocks": [{"kept": {"qk": [[0, 1]], "vo": None}, "predicted_errors": {}}],
        "no_norm_in_front": [],
        "agreement": None,
        "read": [],
        "options": {"expects": None},
    }
    line = summary(document, Path("out.onnx"), Path("out.json")).splitlines()[0]
    assert line.startswith(start)
    assert ("nodes that were added" in line) is bool(end)
    assert end in line


def test_a_model_that_was_left_alone_is_named_in_the_first_line(tmp_path: Path) -> None:
    """No norm stands in front of these blocks, and without data they stay as they are."""
    ratios, out = tmp_path / "half.yaml", tmp_path / "out.onnx"
    ratios.write_text("version: 1\nattention: {qk: 0.5, vo: 0.5}\nffn: {fc2: 0.5}\n")
    asked = ["prune", str(CASES / "yolo_psa.onnx"), "--ratios", str(ratios), "-o", str(out)]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    first = next(line for line in result.output.splitlines() if "MACs" in line)
    assert first.startswith(f"NOTHING WAS REMOVED: {out}")
    forced = CliRunner().invoke(main, [*asked, "--force-synthetic", "--overwrite"])
    assert "NOTHING" not in forced.output

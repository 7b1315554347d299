"""Blocks that read a mask besides the residual stream, or the graph's input itself, are corrected as others are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import zoo
from tests.pruning import look
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.errors import MatchError
from toast_onnx.finetune.local import LocalResult, LocalSettings
from toast_onnx.matching.facts import Facts
from toast_onnx.matching.piece import cut_piece
from toast_onnx.matching.span import block_span
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.planning.search import Kept
from toast_onnx.planning.width_costs import dense_widths
from toast_onnx.pruning import Pruned, prune
from toast_onnx.runtime import run_model
from toast_onnx_calibration.beside import Beside
from toast_onnx_calibration.calibrating import CalibrationOptions
from toast_onnx_calibration.comparing import compare
from toast_onnx_calibration.local import refine_locally
from toast_onnx_calibration.sensitivity_stream import Trials
from toast_onnx_calibration.sensitivity_trials import Solver
from toast_onnx_calibration.stored import Samples, piece_session, store_samples

Exported = Callable[[zoo.Case], Path]
Feeds = dict[str, np.ndarray]
CASES = Path(__file__).parents[1] / "cases" / "graphs"
OPTIONS = CalibrationOptions(threads=1, batch=8)
RATIOS: dict[str, Any] = {
    "version": 1,
    "attention": {"qk": 0.35, "vo": 0.35},
    "ffn": {"fc2": 0.35},
    "align": 1,
}
#: Samples; the last eighth of their batches judges.
COUNT, JUDGES = 32, 8


def drawn(path: Path, folder: Path) -> tuple[Path, Feeds]:
    """Samples for a model, as a file and as arrays."""
    feeds = zoo.inputs(path, batch=COUNT, seed=4)
    np.savez(folder / "samples.npz", **feeds)
    return folder / "samples.npz", feeds


def corrected(dense: Study, data: Path, steps: int = 0, **options: Any) -> Pruned:
    def refine(new: Any) -> Any:
        return refine_locally(dense, new, data, OPTIONS, LocalSettings(steps=steps))

    kind = {"compensation": {"kind": "local" if steps else "ridge"}}
    given = parse_ratios(RATIOS | kind)
    return prune(dense, given, SyntheticStatistics(dense), refine=refine, **options)


def stored(dense: Study, data: Path, folder: Path) -> Samples:
    return store_samples(dense, data, OPTIONS, folder, lambda _: 8)


def inside(path: Path, names: list[str], feeds: Feeds, folder: Path) -> Feeds:
    """Tensors inside a model."""
    copy = folder / "copy.onnx"  # which gets further outputs
    copy.write_bytes(path.read_bytes())
    return run_model(copy, names, [feeds], threads=1)[0]


def both(tensor: str, path: Path, feeds: Feeds, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A tensor inside a model and inside `pruned.onnx` of the folder, in float64."""
    found = [inside(p, [tensor], feeds, folder)[tensor].astype(np.float64) for p in (path, folder / "pruned.onnx")]
    return found[0], found[1]


def relative(want: np.ndarray, got: np.ndarray, seen: np.ndarray) -> float:
    """Squared error over the tokens that count, (samples, tokens), as a fraction of their energy."""
    return float((seen[..., None] * (got - want) ** 2).sum() / (seen[..., None] * want**2).sum())


@pytest.mark.parametrize("steps", [0, 12])
@pytest.mark.parametrize("source", ["hf-bert", "hf-bert-eager", "einops_attn", "gqa"])
def test_errors_are_those_of_the_written_model_where_tokens_count(
    source: str, steps: int, exported: Exported, tmp_path: Path
) -> None:
    path = CASES / f"{source}.onnx" if (CASES / f"{source}.onnx").exists() else exported(zoo.Case(source))
    dense = look(path)
    data, feeds = drawn(path, tmp_path)
    pruned = corrected(dense, data, steps)
    assert pruned.twin is not None
    assert pruned.twin.worst < 1e-4
    assert {r.kept for r in pruned.local} & {"refit", "trained"}
    assert all(r.note is None for r in pruned.local)
    save_model(pruned.model, tmp_path / "pruned.onnx")
    judges = {name: array[-JUDGES:] for name, array in feeds.items()}
    for block, result in zip(dense.match.blocks, pruned.local, strict=True):
        assert result.before is not None
        assert result.after is not None
        assert result.after < result.before or result.kept == "closed form"
        end = block_span(dense.view, dense.facts, block).end
        want, got = both(end, path, judges, tmp_path)
        seen = judges.get("attention_mask", np.ones(want.shape[:2]))
        assert result.after == pytest.approx(relative(want, got, seen), rel=1e-4)


@pytest.mark.parametrize("steps", [0, 12])
def test_blocks_side_by_side_are_corrected_behind_one_another(steps: int, exported: Exported, tmp_path: Path) -> None:
    """Their spans are one: the second is run with what the first became, its bias included."""
    path = exported(zoo.Case("timm-vit-parallel"))
    dense = look(path)
    data, feeds = drawn(path, tmp_path)
    pruned = corrected(dense, data, steps)
    save_model(pruned.model, tmp_path / "pruned.onnx")
    spans = [block_span(dense.view, dense.facts, block) for block in dense.match.blocks]
    assert len({span.end for span in spans}) < len(spans)
    judges = {name: array[-JUDGES:] for name, array in feeds.items()}
    last = {span.end: result for span, result in zip(spans, pruned.local, strict=True)}
    for end, result in last.items():
        want, got = both(end, path, judges, tmp_path)
        counts = np.ones(want.shape[:2])
        counts[:, 0] = LocalSettings().class_weight
        assert result.after == pytest.approx(relative(want, got, counts), rel=1e-3)


@pytest.mark.parametrize("steps", [0, 12])
def test_what_stands_in_padding_is_never_seen(steps: int, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("hf-bert"))
    dense = look(path)
    data, feeds = drawn(path, tmp_path)
    np.savez(tmp_path / "noisy.npz", **noisy_in_padding(feeds))
    plain, other = (corrected(dense, each, steps) for each in (data, tmp_path / "noisy.npz"))
    for index, weights in plain.weights.items():
        ours, theirs = weights.ffn, other.weights[index].ffn
        assert ours is not None
        assert theirs is not None
        assert ours.fc2 is not None
        assert theirs.fc2 is not None
        for a, b in zip(ours.fc2, theirs.fc2, strict=True):
            assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()


@pytest.mark.parametrize("case", [zoo.Case("hf-bert"), zoo.Case("hf-bert-eager", after="fp16")], ids=lambda c: c.id)
def test_masks_and_visible_tokens_of_every_batch(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    path = exported(case)
    dense = look(path)
    data, feeds = drawn(path, tmp_path)
    samples = stored(dense, data, tmp_path)
    beside = Beside(dense, samples, OPTIONS, tmp_path)
    assert beside.tensors
    for name in beside.tensors:
        for batch in (3, 0):
            part = {k: v[8 * batch : 8 * batch + 8] for k, v in feeds.items()}
            np.testing.assert_array_equal(beside.feeds([name], batch)[name], inside(path, [name], part, tmp_path)[name])
    facts = Facts(dense.view, samples.shapes)
    for block in dense.match.blocks:
        end = block_span(dense.view, facts, block).end
        found = beside.token_weights(block, end, facts.known_shape(end))
        assert found is not None
        np.testing.assert_array_equal(found[..., 0].reshape(COUNT, -1), feeds["attention_mask"])


def test_a_mask_that_hides_nothing_needs_no_weights(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("hf-bert"))
    dense = look(path)
    _, feeds = drawn(path, tmp_path)
    np.savez(tmp_path / "full.npz", **feeds | {"attention_mask": np.ones_like(feeds["attention_mask"])})
    beside = Beside(dense, stored(dense, tmp_path / "full.npz", tmp_path), OPTIONS, tmp_path)
    facts = Facts(dense.view, {name: (8, *array.shape[1:]) for name, array in feeds.items()})
    end = block_span(dense.view, facts, dense.match.blocks[0]).end
    assert beside.token_weights(dense.match.blocks[0], end, facts.known_shape(end)) is None


def test_padding_that_cannot_be_placed_is_an_error(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("hf-bert"))
    dense = look(path)
    data, _ = drawn(path, tmp_path)
    beside = Beside(dense, stored(dense, data, tmp_path), OPTIONS, tmp_path)
    (pooled,) = (o.name for o in dense.view.model.proto.graph.output if o.name == "pooler_output")
    with pytest.raises(MatchError, match="padding cannot be told"):
        beside.token_weights(dense.match.blocks[0], pooled, (8, 192))


def noisy_in_padding(feeds: Feeds) -> Feeds:
    """Samples with other words where the mask hides them."""
    padding = feeds["attention_mask"] == 0
    assert padding.any()
    return feeds | {"input_ids": np.where(padding, (feeds["input_ids"] + 37) % 100, feeds["input_ids"])}


def test_a_comparison_and_trials_leave_padding_out(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("hf-bert"))
    dense = look(path)
    feeds = zoo.inputs(path, batch=COUNT, seed=4)
    feeds["attention_mask"][:, 2:] = 0  # most tokens are padding
    data = tmp_path / "samples.npz"
    np.savez(data, **feeds)
    kept: Kept = {1: {"fc2": 104}}
    weights = Solver(dense, parse_ratios({"version": 1}), SyntheticStatistics(dense)).weights(kept)
    small = prune_to(dense, kept, tmp_path / "small.onnx")
    want, got = (inside(p, ["last_hidden_state"], feeds, tmp_path)["last_hidden_state"] for p in (path, small))
    seen = feeds["attention_mask"] > 0
    expected = np.sqrt(np.square(want[seen] - got[seen]).sum() / np.square(want[seen]).sum())
    assert expected != pytest.approx(np.sqrt(np.square(want - got).sum() / np.square(want).sum()), rel=1e-2)
    trials = Trials(dense, stored(dense, data, tmp_path), OPTIONS, tmp_path, output="last_hidden_state")
    assert trials.damage(weights)["relative_error"] == pytest.approx(expected, rel=1e-3)
    found = compare(path, small, data, threads=1, rounds=0)
    assert found.outputs["last_hidden_state"]["relative_error"] == pytest.approx(expected, rel=1e-4)
    assert "tokens that a mask hides do not count" in found.notes
    np.savez(tmp_path / "noisy.npz", **noisy_in_padding(feeds))
    other = compare(path, small, tmp_path / "noisy.npz", threads=1, rounds=0)
    for a, b in zip(found.blocks, other.blocks, strict=True):
        for part in ("attention", "ffn"):
            assert a[part]["relative_error"] == pytest.approx(b[part]["relative_error"], rel=1e-3, abs=1e-6)


def prune_to(dense: Study, kept: Kept, out: Path) -> Path:
    ratios = planned_ratios(parse_ratios({"version": 1}), kept, [dense_widths(b) for b in dense.match.blocks])
    save_model(prune(dense, ratios, SyntheticStatistics(dense)).model, out)
    return out


def test_a_piece_with_a_mask_gives_what_the_model_gives(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("hf-bert"))
    dense = look(path)
    feeds = zoo.inputs(path, batch=2, seed=5)
    shapes = {name: array.shape for name, array in feeds.items()}
    facts = Facts(dense.view, shapes)
    span = block_span(dense.view, facts, dense.match.blocks[1])
    assert span.beside
    with pytest.raises(MatchError, match="depends on"):
        cut_piece(dense.view, facts, span.start, span.end)
    piece = cut_piece(dense.view, facts, span.start, span.end, span.beside)
    names = [each.name for each in piece.graph.input]
    assert names[0] == span.start
    assert set(names[1:]) == set(span.beside)
    values = inside(path, [*names, span.end], feeds, tmp_path)
    session = piece_session(piece, path, OPTIONS, tmp_path / "piece.onnx")
    (found,) = session.run([span.end], {name: values[name] for name in names})
    np.testing.assert_allclose(found, values[span.end], atol=1e-5 * np.abs(values[span.end]).max())


def test_a_block_with_a_second_stream_keeps_its_closed_form(tmp_path: Path) -> None:
    dense = look(CASES / "matcher_cross.onnx")
    data, _ = drawn_singly(CASES / "matcher_cross.onnx", tmp_path)
    local = corrected(dense, data, split_shared=True).local
    assert local == tuple(LocalResult(r.block, note=r.note) for r in local)
    assert all(r.note is not None and "more than one activation" in r.note for r in local)


def test_blocks_that_share_weights_keep_them_and_say_so(tmp_path: Path) -> None:
    dense = look(CASES / "albert.onnx")
    data, _ = drawn(CASES / "albert.onnx", tmp_path)
    given = parse_ratios(RATIOS | {"compensation": {"kind": "ridge"}})
    plain, pruned = prune(dense, given, SyntheticStatistics(dense)), corrected(dense, data)
    first, *others = pruned.weights.values()
    assert others
    for index, weights in pruned.weights.items():
        assert weights.ffn is first.ffn
        assert weights.ffn is not None
        old = plain.weights[index].ffn
        assert old is not None
        for a, b in zip(weights.ffn.fc2 or (), old.fc2 or (), strict=True):
            np.testing.assert_array_equal(a, b)
    for result in pruned.local:
        assert (result.kept, result.before, result.after) == ("closed form", None, None)
        assert result.note is not None
        assert "shares weights with" in result.note


def drawn_singly(path: Path, folder: Path) -> tuple[Path, Feeds]:
    """Samples for a model that takes one at a time."""
    each = [zoo.inputs(path, seed=seed) for seed in range(COUNT)]
    feeds = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    np.savez(folder / "samples.npz", **feeds)
    return folder / "samples.npz", feeds

"""Single steps of following tokens, on numbers small enough to be checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.matching.tiny import Graph
from toast_onnx.matching.facts import Facts, Probe
from toast_onnx.matching.graph import GraphView
from toast_onnx.model import load_model
from toast_onnx.reasons import Decline, Kind
from toast_onnx.tokens.along import Along
from toast_onnx.tokens.follow import TokenAxis, Tokens, TokenSequence, Walker
from toast_onnx.tokens.nodes import TokenCounts
from toast_onnx.tokens.rewrite import _renumbered

#: A class token, fifteen patches, a register.
SEQUENCE = TokenSequence("x", 17, 1, 1)


@pytest.fixture
def walker(tmp_path: Path) -> Walker:
    """Over x joined with what is made of it, and a choice of its rows by what it holds."""
    g = Graph()
    joined = g.add("Concat", "x", g.add("Relu", "x", name="other"), name="join", axis=1)
    chosen = g.add("Gather", joined, g.add("ArgMax", "x", name="best", axis=1), name="pick", axis=1)
    view = GraphView(load_model(g.save(tmp_path / "model.onnx", chosen)))
    facts = Facts(view, {"x": (1, 5, 8)})
    return Walker(Probe(view, facts, facts), SEQUENCE, {}, [], {}, {})


def test_a_range_is_whole_special_or_declined(walker: Walker) -> None:
    whole, patches = Along(1, 1, 17), Along(1, 1, 15, 1)
    assert walker._range_behind(0, whole) == whole
    assert walker._range_behind(0, patches) == patches  # those that may be merged, all of them
    assert walker._range_behind(0, 0) is None  # the class token
    assert walker._range_behind(0, Along(1, 1, 1, 16)) is None  # the register
    for moved, text in ((None, "regroups tokens"), (3, "takes a part"), (Along(1, 1, 8, 1), "takes a part")):
        with pytest.raises(Decline, match=text) as why:
            walker._range_behind(0, moved)
        assert why.value.reason.kind == Kind.WINDOWS


def test_all_that_a_node_moves_must_be_tokens_of_one_place(walker: Walker) -> None:
    at = {walker.view.nodes[i].name: i for i in range(len(walker.view.nodes))}
    walker.flow.tokens["x"] = Tokens(None, (TokenAxis(Along(1, 1, 17), 0),))
    with pytest.raises(Decline, match="joins the tokens with others"):
        walker._moved_data(at["join"])
    walker.flow.tokens["other.out"] = Tokens(None, (TokenAxis(Along(1, 1, 17), 1),))
    with pytest.raises(Decline, match="of different places in the network"):
        walker._moved_data(at["join"])
    walker.flow.tokens["other.out"] = walker.flow.tokens["x"]
    assert walker._moved_data(at["join"]) == ["x", "other.out"]
    walker.flow.tokens["best.out"] = walker.flow.tokens["x"]
    with pytest.raises(Decline, match="picks by tokens"):
        walker._moved_data(at["pick"])


def test_tokens_that_stay_are_found_behind_a_merge() -> None:
    """Of 17 tokens 5 are merged away: the class token stays 0, the register comes to lie at 11."""
    counts = TokenCounts(SEQUENCE, (5,))
    whole, patches = TokenAxis(Along(1, 1, 17), 1), TokenAxis(Along(1, 1, 16, 1), 1)
    assert _renumbered(counts, np.asarray([0, 16, -1]), whole).tolist() == [0, 11, 11]
    assert _renumbered(counts, np.asarray(-1), whole).shape == ()
    assert _renumbered(counts, np.asarray([15]), patches).tolist() == [10]  # counted from the first patch
    assert _renumbered(counts, np.asarray([0, 16]), TokenAxis(Along(1, 1, 17), 0)).tolist() == [0, 16]

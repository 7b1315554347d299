"""The document that `inspect` prints, on a graph whose every number can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tests.matching.tiny import DIM, HEADS, HIDDEN, TOKENS, WIDTH, Graph, block
from tests.pruning import look
from toast_onnx.report.inspection import inspection, inspection_table


def test_numbers_of_a_block_by_hand(tmp_path: Path) -> None:
    graph, y = block()
    document = inspection(look(graph.save(tmp_path / "tiny.onnx", y), x=(3, TOKENS, WIDTH)))
    (found,) = document["blocks"]
    attention = 3 * (4 * TOKENS * WIDTH * WIDTH + 2 * HEADS * TOKENS * TOKENS * DIM)
    ffn = 3 * 2 * TOKENS * WIDTH * HIDDEN
    params = (4 * (WIDTH + 1) * WIDTH, WIDTH * HIDDEN + HIDDEN + HIDDEN * WIDTH + WIDTH)
    norms = 2 * 2 * WIDTH
    assert document["inputs"] == {"x": [3, TOKENS, WIDTH]}
    assert (document["macs"], document["params"]) == (attention + ffn, sum(params) + norms)
    assert (found["attention"]["macs"], found["ffn"]["macs"]) == (attention, ffn)
    assert (found["attention"]["params"], found["ffn"]["params"]) == params
    assert (found["ffn"]["activation"], found["ffn"]["gated"]) == ("relu", False)
    assert (document["model"], document["opset"], document["declined"]) == ("tiny.onnx", 17, [])


def test_reasons_stand_where_the_part_stands_and_the_document_is_plain(tmp_path: Path) -> None:
    def norm(g: Graph, name: str) -> str:
        return g.norm(name, DIM)

    graph, y = block(q=norm)
    document = inspection(look(graph.save(tmp_path / "tiny.onnx", y)))
    attention = document["blocks"][0]["attention"]
    assert attention["qk"]["prunable"] is False
    assert "q/k norm" in attention["qk"]["reason"]
    assert attention["qk"]["kind"] == "computed-on"
    assert attention["qk"]["node"] in attention["qk"]["reason"]
    assert attention["vo"] == {"prunable": True, "reason": None, "kind": None, "node": None}
    assert attention["heads"] == HEADS
    assert attention["heads_prunable"] == {
        "prunable": True,
        "reason": None,
        "kind": None,
        "node": None,
    }  # the norm is of each head alone
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_block_without_attention_and_what_was_declined(tmp_path: Path) -> None:
    graph, y = block(axis=2)
    document = inspection(look(graph.save(tmp_path / "tiny.onnx", y)))
    assert document["blocks"][0]["attention"] is None
    assert document["blocks"][0]["ffn"]["width"] == HIDDEN
    (declined,) = document["declined"]
    assert declined == {
        "node": "'softmax' (Softmax)",
        "reason": "this Softmax runs over axis 2, not over the one of the keys",
        "kind": "no-attention",
    }


def test_what_differs_in_the_node_alone_is_one_line(tmp_path: Path) -> None:
    graph, y = block(v=lambda g, name: g.add("Relu", name, name="first/bent"))
    document = inspection(look(graph.save(tmp_path / "tiny.onnx", y)))
    (one,) = document["blocks"]
    text = json.dumps(one | {"index": 1}).replace("first/bent", "second/bent")
    document["blocks"] = [one, json.loads(text), one | {"index": 2}]
    lines = [line for line in inspection_table(document).lines if " vo: " in line]
    assert lines == [f"not prunable: vo: {one['attention']['vo']['reason']} (block 0, 2; alike in 1)"]

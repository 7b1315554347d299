from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toast_onnx.errors import ConfigError
from toast_onnx.planning.ratios import BlockRatios, parse_ratios, resolve

NAMES = [f"/encoder/layer.{index}" for index in range(12)]
NODES = [[f"/encoder/layer.{index}/attn/MatMul", f"/encoder/layer.{index}/fc1/Gemm"] for index in range(12)]


def _resolve(**document: Any) -> tuple[BlockRatios, ...]:
    return resolve(parse_ratios({"version": 1, **document}), NAMES, NODES)


def test_one_number_holds_everywhere_and_lists_go_block_by_block() -> None:
    fc2 = [index / 20 for index in range(12)]
    blocks = _resolve(attention={"qk": 0.5}, ffn={"fc2": fc2})
    assert [block.qk for block in blocks] == [Decimal("0.5")] * 12
    assert [float(block.fc2) for block in blocks] == fc2
    assert [(block.index, block.name) for block in blocks] == list(enumerate(NAMES))


def test_heads_are_resolved_like_any_part_of_an_attention() -> None:
    heads = [index / 20 for index in range(12)]
    blocks = _resolve(attention={"heads": heads}, blocks={"*/layer.3/*": {"attention": {"heads": 0.5}}})
    assert [float(block.heads) for block in blocks] == [*heads[:3], 0.5, *heads[4:]]
    with pytest.raises(ConfigError, match=r"attention\.heads lists 2 ratios but the model has 12 blocks"):
        _resolve(attention={"heads": [0, 0.5]})


def test_a_number_addresses_one_block_and_a_pattern_the_nodes_it_matches() -> None:
    blocks = _resolve(
        attention={"qk": 0.5}, blocks={0: {"attention": {"qk": 0}}, "*/layer.1/*": {"ffn": {"fc1": 0.25}}}
    )
    assert [block.qk == 0 for block in blocks] == [True] + [False] * 11
    assert [block.index for block in blocks if block.fc1 == Decimal("0.25")] == [1]  # and not blocks 10 and 11


def test_a_pattern_may_name_the_block_itself() -> None:
    assert [block.index for block in _resolve(blocks={"/encoder/layer.7": {"ffn": {"fc2": 0.5}}}) if block.fc2] == [7]


def test_later_overrides_win_and_leave_the_rest() -> None:
    blocks = _resolve(
        ffn={"fc1": 0.1, "fc2": 0.2, "score": "variance"},
        blocks={
            "*": {"ffn": {"fc2": 0.5}},
            3: {"ffn": {"fc2": 0.75, "score": "l2"}},
            "*/layer.4/*": {"ffn": {"fc1": 0}},
        },
    )
    assert (blocks[2].fc2, blocks[3].fc2, blocks[4].fc2) == (Decimal("0.5"), Decimal("0.75"), Decimal("0.5"))
    assert (blocks[3].fc1, blocks[4].fc1) == (Decimal("0.1"), 0)
    assert (blocks[2].ffn_score, blocks[3].ffn_score) == ("variance", "l2")


def test_defaults_are_told_apart_block_by_block() -> None:
    blocks = _resolve(attention={"qk": 0.5}, blocks={2: {"attention": {"score": "gm"}, "ffn": {"score": "l1"}}})
    assert blocks[0].defaults == {"vo", "heads", "fc1", "fc2", "select", "score", "coupling", "ffn_score", "mode"}
    assert blocks[2].defaults == {"vo", "heads", "fc1", "fc2", "coupling", "mode"}
    assert (blocks[2].select, blocks[2].score) == ("index", "gm")


def test_an_override_brings_what_follows_from_it() -> None:
    blocks = _resolve(
        attention={"score": "gm", "coupling": "q_only"},
        blocks={1: {"attention": {"select": "subspace"}}, 2: {"attention": {"score": "energy"}}},
    )
    assert (blocks[0].select, blocks[0].score, blocks[0].coupling) == ("index", "gm", "q_only")
    assert (blocks[1].select, blocks[1].score, blocks[1].coupling) == ("subspace", "energy", "coupled")
    assert (blocks[2].select, blocks[2].score, blocks[2].coupling) == ("index", "energy", "coupled")


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"ffn": {"fc2": [0.5] * 11}}, ["ffn.fc2 lists 11 ratios", "12 blocks"]),
        ({"attention": {"vo": [0.5] * 13}}, ["attention.vo lists 13 ratios", "12 blocks"]),
        ({"blocks": {12: {}}}, ["blocks[12] does not exist", "12 blocks, counted from 0"]),
        ({"blocks": {"*/block.3/*": {}}}, ["blocks['*/block.3/*'] matches no", "/encoder/layer.0, /encoder/layer.1"]),
        ({"blocks": {4: {"attention": {"coupling": "average"}}}}, ["block 4 (/encoder/layer.4) has coupling: average"]),
    ],
)
def test_what_does_not_fit_the_model_is_named(document: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _resolve(**document)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_and_nodes_must_be_of_the_same_blocks() -> None:
    with pytest.raises(ValueError, match="12 block names but 11"):
        resolve(parse_ratios({"version": 1}), NAMES, NODES[1:])


def test_a_model_without_blocks_resolves_to_nothing() -> None:
    assert resolve(parse_ratios({"version": 1, "attention": {"qk": 0.5}}), [], []) == ()


@given(
    overrides=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 99)), max_size=8, unique_by=lambda pair: pair[0])
)
def test_number_overrides_equal_a_list(overrides: list[tuple[int, int]]) -> None:
    values = [Decimal("0.3")] * 12
    for block, percent in overrides:
        values[block] = Decimal(percent) / 100
    by_list = _resolve(ffn={"fc2": values})
    by_override = _resolve(
        ffn={"fc2": Decimal("0.3")}, blocks={block: {"ffn": {"fc2": values[block]}} for block, _ in overrides}
    )
    assert by_list == by_override

"""Reasons: one table of kinds, told in the documentation, and values that keep what is at fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toast_onnx.reasons import Decline, Kind

ROOT = Path(__file__).parent.parent
CODE = {p: p.read_text(encoding="utf-8") for p in (ROOT / "toast_onnx").rglob("*.py") if p.name != "reasons.py"}


def test_the_page_lists_every_kind_with_what_a_user_can_do() -> None:
    page = (ROOT / "docs" / "reasons.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    assert rows == [(kind.value, kind.meaning, kind.remedy) for kind in Kind]


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_is_given_by_something(kind: Kind) -> None:
    assert any(re.search(rf"\bKind\.{kind.name}\b", text) for text in CODE.values())


def test_every_decline_has_a_kind() -> None:
    """No text alone: it is raised with a reason, or by the table."""
    bare = [p.name for p, text in CODE.items() if re.search(r"raise Decline\(f?\"", text)]
    assert bare == []


def test_a_reason_keeps_what_is_at_fault() -> None:
    name = "{odd}"  # tensors may be called anything
    text = "{part} meets '{tensor}' in {node}"
    reason = Kind.READ.says(text, node="'a' (Add)", part="Q", tensor=name)
    assert str(reason) == "Q meets '{odd}' in 'a' (Add)"
    assert (reason.kind, reason.node, reason.part, reason.values) == (Kind.READ, "'a' (Add)", "Q", {"tensor": name})
    assert Decline(reason).reason is reason
    assert {reason: 1}[
        Kind.READ.says("{part} meets '{tensor}' in {node}", node="'a' (Add)", part="Q", tensor=name)
    ] == 1


def test_what_was_tried_stands_behind_the_first_reason() -> None:
    first, tried = Kind.COMPUTED.says("Q passes through a norm"), Kind.HALF_NORM.says("float32 alone")
    both = first.then(tried)
    assert (str(both), both.kind, both.first) == ("Q passes through a norm; float32 alone", Kind.HALF_NORM, first)
    inside = Kind.QUANTIZED.says("quantized", bits=8).within("the weights of {part} are {}", "V")
    assert (str(inside), inside.kind, inside.part, inside.values["bits"]) == (
        "the weights of V are quantized",
        Kind.QUANTIZED,
        "V",
        8,
    )

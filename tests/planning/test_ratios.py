from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from toast_onnx.errors import ConfigError
from toast_onnx.planning.ratios import Ratios, dump_ratios, format_ratios, load_ratios, parse_ratios

FULL = """\
version: 1
attention:
  qk: 0.5
  vo: [0, 0.25, 0.35]
  heads: [0.25, 0, 0.5]
  select: index
  score: gm
  coupling: q_only
  tie: true
tokens:
  merge: [0.1, 0, 0.05]
  metric: keys
  unread: false
ffn:
  fc1: 0.0
  fc2: [0, 0.2, 0.3]
  score: variance
  mode: runtime
  residual: masked
  tokens: 0.1
blocks:
  0: {attention: {qk: 0, vo: 0, heads: 0.5}}
  "*/layer.3/*": {ffn: {fc2: 0}}
align: {head_dim: 8, width: 16}
compensation: {kind: bias, statistics: sequential, ridge: 0.001, steps: 50, views: 3}
calibration: {data: images/, samples: 128, preprocess: clip, tokens: 0.02, views: 2, seed: 7}
"""


def _load(folder: Path, text: str) -> Ratios:
    path = folder / "ratios.yaml"
    path.write_text(text, encoding="utf-8")
    return load_ratios(path)


def _refused(folder: Path, text: str) -> str:
    """Returns the message after the file's name, having checked that it is one line that starts with it."""
    with pytest.raises(ConfigError) as caught:
        _load(folder, text)
    message = str(caught.value)
    assert message.startswith(str(folder / "ratios.yaml"))
    assert "\n" not in message
    return message.removeprefix(str(folder / "ratios.yaml")).lstrip(": ")


def test_every_key_is_read(tmp_path: Path) -> None:
    ratios = _load(tmp_path, FULL)
    assert ratios.attention.qk == Decimal("0.5")
    assert ratios.attention.vo == (Decimal(0), Decimal("0.25"), Decimal("0.35"))
    assert ratios.attention.heads == (Decimal("0.25"), Decimal(0), Decimal("0.5"))
    assert (ratios.attention.select, ratios.attention.score, ratios.attention.coupling) == ("index", "gm", "q_only")
    assert (ratios.ffn.score, ratios.ffn.mode) == ("variance", "runtime")
    assert [override.block for override in ratios.blocks] == [0, "*/layer.3/*"]
    assert ratios.blocks[0].attention.heads == Decimal("0.5")
    assert ratios.blocks[1].ffn.fc2 == 0
    assert ratios.blocks[1].attention.qk is None
    assert (ratios.align.head_dim, ratios.align.width, ratios.rounding) == (8, 16, "nearest")
    assert ratios.compensation.ridge == Decimal("0.001")
    assert ratios.calibration.tokens == Decimal("0.02")
    assert (ratios.calibration.data, ratios.calibration.samples, ratios.calibration.seed) == ("images/", 128, 7)


def test_defaults_are_known_as_defaults(tmp_path: Path) -> None:
    ratios = _load(tmp_path, "version: 1\nattention: {qk: 0.5}\n")
    attention, ffn = ratios.attention, ratios.ffn
    assert (attention.vo, ffn.fc1, ffn.fc2) == (0, 0, 0)
    assert (attention.select, attention.score, attention.coupling) == ("subspace", "energy", "coupled")
    assert (ffn.score, ffn.mode) == ("second-order", "static")
    assert (ratios.align.head_dim, ratios.align.width) == (8, 8)
    assert (ratios.compensation.kind, ratios.compensation.statistics, ratios.compensation.ridge) == (
        "ridge",
        "one-shot",
        "auto",
    )
    assert ratios.given("attention.qk")
    assert not ratios.given("attention.select")
    assert not ratios.given("compensation.kind")


def test_ratios_are_exact_decimals(tmp_path: Path) -> None:
    ratios = _load(tmp_path, "version: 1\nffn: {fc1: 0.1, fc2: 0.30000000000000000001}\n")
    assert ratios.ffn.fc1 == Decimal("0.1") != Decimal(0.1)  # noqa: RUF032 - the binary value is what it must not be
    assert ratios.ffn.fc2 == Decimal("0.30000000000000000001")


@pytest.mark.parametrize("value", [0.35, np.float64(0.35), Decimal("0.35")])
def test_floats_of_python_mean_what_they_print(value: object) -> None:
    assert parse_ratios({"version": 1, "ffn": {"fc2": value}}).ffn.fc2 == Decimal("0.35")


def test_one_number_aligns_both(tmp_path: Path) -> None:
    ratios = _load(tmp_path, "version: 1\nalign: 16\n")
    assert (ratios.align.head_dim, ratios.align.width) == (16, 16)


@pytest.mark.parametrize("score", ["gm", "l1", "l2", "second-order"])
def test_a_score_of_dimensions_asks_for_index(tmp_path: Path, score: str) -> None:
    ratios = _load(tmp_path, f"version: 1\nattention: {{score: {score}}}\n")
    assert ratios.attention.select == "index"
    assert ratios.given("attention.select")
    override = _load(tmp_path, f"version: 1\nblocks: {{2: {{attention: {{score: {score}}}}}}}\n").blocks[0]
    assert override.attention.select == "index"


def test_paper_rounding_brings_its_alignment(tmp_path: Path) -> None:
    assert _load(tmp_path, "version: 1\nrounding: paper\n").align.width == 1


@pytest.mark.parametrize(
    ("text", "start", "also"),
    [
        ("", "is empty", "`version: 1`"),
        ("# only a comment\n", "is empty", "`version: 1`"),
        ("[1, 2]", "holds a list", "`version: 1`"),
        ("ratios", "holds a single value", "`version: 1`"),
        ("attention: {qk: 0.5}", "has no version", "add the line `version: 1`"),
        ("version: 2", "version is 2", "reads version 1"),
        ("version: 1.0", "version is 1.0", "reads version 1"),
        ("version: true", "version is true", "reads version 1"),
        ("version: '1'", "version is the text '1'", "reads version 1"),
        ("version: 1\nattention: {qk: 0.5, qk: 0.25}", "2: the key 'qk' stands here again", "keep one"),
        ("version: 1\nffn: {fc2: [0, 0.1, 0.2, 1.5]}", "ffn.fc2[3] is 1.5", "from 0 up to but not including 1"),
        ("version: 1\nffn: {fc2: [0, 0.1, x]}", "ffn.fc2[2] is the text 'x'", "expected a number"),
        ("version: 1\nffn: {fc2: [0, [0.1]]}", "ffn.fc2[1] is a list", "expected a number"),
        ("version: 1\nffn: {fc2: []}", "ffn.fc2 is an empty list", "one entry for each block"),
        ("version: 1\nffn: {fc2: 1}", "ffn.fc2 is 1;", "from 0 up to but not including 1"),
        ("version: 1\nffn: {fc2: -0.1}", "ffn.fc2 is -0.1", "from 0 up to"),
        ("version: 1\nffn: {fc2: 35}", "ffn.fc2 is 35", "for 35 % write 0.35"),
        ("version: 1\nffn: {fc2: .nan}", "ffn.fc2 is NaN", "from 0 up to"),
        ("version: 1\nffn: {fc2: .inf}", "ffn.fc2 is Infinity", "from 0 up to"),
        ("version: 1\nffn: {fc2: true}", "ffn.fc2 is true", "expected a number"),
        ("version: 1\nffn: {fc2: '0.5'}", "ffn.fc2 is the text '0.5'", "without quotes"),
        ("version: 1\nffn: {fc2: 50%}", "ffn.fc2 is the text '50%'", "such as 0.5"),
        ("version: 1\nattention: {head: 0.5}", "attention has the unknown key 'head'", "did you mean heads?"),
        ("version: 1\nattention: {heads: 1}", "attention.heads is 1;", "from 0 up to but not including 1"),
        ("version: 1\nblocks: {0: {attention: {heads: [0.5]}}}", "blocks[0].attention.heads is a list", "one number"),
        ("version: 1\nffn: {fc3: 0.5}", "ffn has the unknown key 'fc3'", "did you mean fc2?"),
        ("version: 1\nattn: {qk: 0.5}", "the file has the unknown key 'attn'", "did you mean attention?"),
        ("version: 1\nqk: 0.5", "the file has the unknown key 'qk'", "did you mean attention.qk?"),
        ("version: 1\nblocks: {0: {fc2: 0.5}}", "blocks[0] has the unknown key 'fc2'", "did you mean ffn.fc2?"),
        ("version: 1\nblocks: {0: {block: 1}}", "blocks[0] has the unknown key 'block'", "attention, ffn"),
        ("version: 1\nffn:", "ffn is empty", "remove the key"),
        ("version: 1\nffn: {fc1:}", "ffn.fc1 is empty", "remove the key"),
        ("version: 1\nffn: 0.5", "ffn is 0.5", "fc1, fc2, score, mode"),
        (
            "version: 1\nattention: {select: subspce}",
            "attention.select is the text 'subspce'",
            "did you mean subspace?",
        ),
        ("version: 1\nattention: {select: 3}", "attention.select is 3", "Allowed: subspace, index"),
        ("version: 1\nattention: {coupling: true}", "attention.coupling is true", "q_only"),
        (
            "version: 1\nattention: {select: subspace, score: l2}",
            "attention has score: l2 with select: subspace",
            "index",
        ),
        (
            "version: 1\nattention: {coupling: q_only}",
            "attention has coupling: q_only with score: energy",
            "gm, l1, l2",
        ),
        ("version: 1\nblocks: {-1: {}}", "blocks names block -1", "count from 0"),
        ("version: 1\nblocks: {1: {}, '1': {}}", "blocks names block 1 twice", "keep one"),
        ("version: 1\nblocks: {'': {}}", "blocks has an empty pattern", "'*/layer.3/*'"),
        ("version: 1\nblocks: [0.5]", "blocks must map", "0: {attention: {qk: 0}}"),
        ("version: 1\nblocks: {2: 0.5}", "blocks[2] is 0.5", "attention, ffn"),
        ("version: 1\nblocks: {2: {ffn: {fc2: [0.5]}}}", "blocks[2].ffn.fc2 is a list", "give one number"),
        (
            "version: 1\nblocks: {0: {}, '*/l.3/*': {attention: {qk: 1}}}",
            "blocks['*/l.3/*'].attention.qk is 1",
            "from 0 up to",
        ),
        ("version: 1\nalign: 0", "align.head_dim is 0", "at least 1"),
        ("version: 1\nalign: true", "align is true", "one whole number"),
        ("version: 1\nalign: 8.0", "align is 8.0", "one whole number"),
        ("version: 1\nalign: {width: 8.5}", "align.width is 8.5", "expected a whole number"),
        ("version: 1\nrounding: paper\nalign: 8", "the file has rounding: paper with an align", "remove one"),
        ("version: 1\ncompensation: {ridge: -1}", "compensation.ridge is -1", "auto"),
        ("version: 1\ncompensation: {ridge: strong}", "compensation.ridge is the text 'strong'", "auto"),
        ("version: 1\ncompensation: {kind: ridgy}", "compensation.kind is the text 'ridgy'", "did you mean ridge?"),
        ("version: 1\ncompensation: {steps: 0}", "compensation.steps is 0", "at least 1"),
        ("version: 1\ncompensation: {views: -1}", "compensation.views is -1", "at least 0"),
        ("version: 1\ncalibration: {samples: 0}", "calibration.samples is 0", "at least 1"),
        ("version: 1\ncalibration: {samples: true}", "calibration.samples is true", "whole number"),
        ("version: 1\ncalibration: {seed: -1}", "calibration.seed is -1", "at least 0"),
        ("version: 1\ncalibration: {data: ''}", "calibration.data is the text ''", "expected text"),
        ("version: 1\ncalibration: {data: 'code:run'}", "calibration.data is the text 'code:run'", "--data"),
        ("version: 1\ncalibration: {data: 5}", "calibration.data is 5", "expected text"),
        ("version: 1\ncalibration: {tokens: 0}", "calibration.tokens is 0", "above 0 and at most 1"),
        ("version: 1\nffn: {fc1: 2, fc2: 3, mode: x}", "ffn.fc1 is 2", "(2 more problems after this)"),
    ],
)
def test_a_wrong_file_gets_one_clear_line(tmp_path: Path, text: str, start: str, also: str) -> None:
    message = _refused(tmp_path, text)
    assert message.startswith(start)
    assert also in message


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    ratios = _load(tmp_path, FULL)
    with pytest.raises(ValidationError, match="frozen"):
        ratios.attention.qk = Decimal(0)  # type: ignore[misc]
    assert hash(ratios) == hash(_load(tmp_path, FULL))


def test_the_document_is_plain_and_holds_every_number_of_the_file(tmp_path: Path) -> None:
    document = json.loads(json.dumps(_load(tmp_path, FULL).to_document()))
    expected = yaml.safe_load(FULL)
    expected["blocks"]["0"] = expected["blocks"].pop(0)
    assert {key: document[key] for key in expected} == expected
    assert set(document) - set(expected) == {"rounding"}


def test_the_document_shows_defaults() -> None:
    document = parse_ratios({"version": 1}).to_document()
    assert document["attention"] == {
        "qk": 0,
        "vo": 0,
        "heads": 0,
        "select": "subspace",
        "score": "energy",
        "coupling": "coupled",
        "tie": False,
    }
    expected = {"kind": "ridge", "statistics": "one-shot", "ridge": "auto", "steps": 100, "views": 0}
    assert document["compensation"] == expected


def test_the_document_can_be_read_again(tmp_path: Path) -> None:
    ratios = _load(tmp_path, FULL)
    assert parse_ratios(json.loads(json.dumps(ratios.to_document()))) == ratios


def test_what_is_written_keeps_defaults_apart(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    dump_ratios(parse_ratios({"version": 1, "ffn": {"fc2": 0.35}}), path, "budget: 0.6\nof the MACs")
    assert path.read_text() == "# budget: 0.6\n# of the MACs\nversion: 1\nffn: {fc2: 0.35}\n"
    assert not load_ratios(path).given("ffn.score")


_RATIO = st.decimals(0, "0.9999", places=4)
_PER_BLOCK = _RATIO | st.lists(_RATIO, min_size=1, max_size=4)


def _some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


_DOCUMENTS = st.fixed_dictionaries(
    {"version": st.just(1)},
    optional={
        "attention": _some(qk=_PER_BLOCK, heads=_PER_BLOCK, score=st.sampled_from(["energy", "gm", "l1"])),
        "ffn": _some(fc1=_PER_BLOCK, fc2=_PER_BLOCK, mode=st.sampled_from(["static", "runtime"])),
        "blocks": st.dictionaries(
            st.integers(0, 40) | st.sampled_from(["*", "*/layer.3/*", "[ab]?: #", "1e5", "null", "no"]),
            _some(attention=_some(qk=_RATIO), ffn=_some(fc1=_RATIO, score=st.sampled_from(["variance", "l2"]))),
            max_size=3,
        ),
        "align": st.integers(1, 64) | _some(head_dim=st.integers(1, 64), width=st.integers(1, 64)),
        "compensation": _some(kind=st.sampled_from(["none", "local"]), ridge=st.just("auto") | _RATIO),
        "calibration": _some(data=st.sampled_from(["images/", "1e5", "0.5", "~", "a: b"]), seed=st.integers(0, 2**63)),
    },
)


@given(document=_DOCUMENTS)
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    ratios = parse_ratios(document)
    path = tmp_path_factory.getbasetemp() / "ratios.yaml"
    dump_ratios(ratios, path)
    again = load_ratios(path)
    assert again == ratios
    assert format_ratios(again) == format_ratios(ratios)

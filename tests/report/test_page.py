"""The report page: what it takes in, what it shows, and that it needs nothing but itself."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.report.documents import DENSE, comparison, evaluation, pruning, put, timing
from toast_onnx.errors import ConfigError
from toast_onnx.report.page import page_context, render_page
from toast_onnx.report.page_sources import find_sources, kind_of
from toast_onnx_cli.main import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return put(tmp_path / "m.pruned.json", pruning())


class Reader(HTMLParser):
    """Collects text, the addresses that elements load, and checks that elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "data", "href", "xlink:href")]
        if tag not in ("meta", "br", "img", "link", "path", "use", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path, *extra: Path) -> tuple[str, Reader]:
    """A page's visible text in one line, and what the parser saw."""
    reader = Reader()
    reader.feed(render_page(find_sources(path, extra)))
    assert reader.open == []
    return " ".join(" ".join(reader.text).split()), reader


def test_the_page_needs_nothing_but_itself(run: Path) -> None:
    put(run.with_name("compare.json"), comparison())
    _, reader = read(run)
    assert all(address.startswith("#") for address in reader.loads)  # places inside the page
    html = render_page(find_sources(run))
    assert not re.search(r"@import|url\((?!#)|<script|<link|<img|<iframe", html)
    assert html == render_page(find_sources(run))
    assert str(run.parent) not in html


def test_figures_at_the_top_are_those_of_the_run(run: Path) -> None:
    text, _ = read(run)
    for part in ("500 K 25.0% of 2 M", "300 K 30.0% of 1 M", "1 MB 25.0% of 4 MB"):
        assert part in text
    assert "agree at 3 places to 2.5e-07 of their scale (1e-04 is allowed)" in text
    assert "top-1" not in text


def test_every_block_has_its_widths_in_a_table_and_a_bar(run: Path) -> None:
    text, _ = read(run)
    for number in range(3):
        assert f"block.{number} 3 64 → 32 64 192 768 → {100 + number}" in text
    for heading, shown in (("query and key", True), ("hidden units", True), ("value dimensions", False)):
        assert (heading in " ".join(re.findall(r"<text[^>]*>([^<]*)", render_page(find_sources(run))))) is shown


def test_bars_are_as_high_as_the_widths(run: Path) -> None:
    """Bar heights in the SVG, measured from its paths, are in the ratio of the widths."""
    from toast_onnx.report.page_charts import PRUNED as COLOUR
    from toast_onnx.report.page_charts import widths_chart

    svg = widths_chart(pruning()["blocks"])
    heights = []
    for path in re.findall(r'<path d="([^"]*)"[^>]*style="fill: ' + COLOUR, svg):
        ys = [float(pair[1]) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
        heights.append(max(ys) - min(ys))
    assert len(heights) == 6  # two panels of three blocks
    hidden = heights[3:]
    assert [h / hidden[0] for h in hidden] == pytest.approx([1.0, 1.01, 1.02], rel=1e-4)


def test_what_lies_beside_the_run_is_shown_where_it_is_about_it(run: Path) -> None:
    put(run.with_name("compare.json"), comparison())
    put(run.with_name("other.json"), comparison("0" * 64) | {"models": {"pruned": {"file": "x"}}})
    put(run.with_name("dense.json"), evaluation("somewhere/m.onnx", 0.8) | {"model_sha256": DENSE})
    put(run.with_name("half.json"), evaluation("m.pruned.fp16.onnx", 0.75))
    results = [timing("m.onnx", 4.0, 1.0), timing("m.pruned.onnx", 2.0, 2.0)]
    put(run.with_name("bench.json"), {"runtime": "onnxruntime", "provider": "cpu", "threads": 1, "results": results})
    put(run.with_name("foreign.json"), {"name": "package"})
    run.with_name("broken.json").write_text("{")
    sources = find_sources(run)
    assert sources.names == ["bench.json", "compare.json", "dense.json", "half.json"]
    text, _ = read(run)
    assert "top-1 accuracy 75.0% dense 80.0%, -5.0 points" in text
    assert "same answers 87.5%" in text
    assert "speed 2.00 × of the dense model's, batch 8, 2.00 ms" in text
    assert "m.pruned.onnx logits 87.5% 0.0625 0.9900 1.25e-01 64" in text


def test_what_is_named_is_shown_whatever_it_is_about(run: Path) -> None:
    other = run.parent / "elsewhere"
    other.mkdir()
    trials = [
        {"block": b, "part": "fc2", "ratio": r, "kept": {}, "damage": {"kl": r * (b + 1)}}
        for b in range(2)
        for r in (0.25, 0.5)
    ]
    sensitivity = put(other / "s.json", {"format": "toast-onnx/sensitivity/1", "metric": "kl", "trials": trials})
    check = {"engine": "a.engine", "passed": False, "tolerance": 0.02, "outputs": {"y": {"relative": 0.5}}}
    text, _ = read(run, sensitivity, put(other / "c.json", check))
    assert "What each block can spare" in text
    assert "block 1" in text
    assert "a.engine DIFFERS with ONNX Runtime 5.0e-01 of 0.02" in text


def test_names_cannot_break_the_page(run: Path) -> None:
    document = pruning()
    document["pruned"]["file"] = "<script>alert(1)</script>.onnx"
    html = render_page(find_sources(put(run, document)))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "/odd&lt;b&gt;" in html


def test_a_run_without_proof_says_so_and_one_where_nothing_changed_too(run: Path) -> None:
    document = pruning() | {"twin": None}
    for block in document["blocks"]:
        block["after"] = copy.deepcopy(block["before"])
    text, _ = read(put(run, document))
    assert "was not checked against its padded twin" in text
    assert "No width changed." in text


def test_blocks_that_lack_a_part_leave_a_gap(run: Path) -> None:
    document = pruning(blocks=40)
    for block in document["blocks"][::2]:
        for side in ("before", "after"):
            del block[side]["qk_dim"], block[side]["attention_macs"]
    document["blocks"][3]["after"] = None
    text, _ = read(put(run, document))
    assert "block.39" in text


def test_a_deployment_brings_its_steps(run: Path) -> None:
    steps = {
        "prune": {
            "status": "done",
            "outputs": {"out/m.pruned.onnx": "h", "out/m.pruned.json": "h"},
            "seconds": 1.0,
            "result": {key: pruning()[key] for key in ("dense", "pruned", "twin")},
        },
        "eval-dense": {"status": "done", "result": evaluation("m.onnx", 0.9), "seconds": 2.0},
        "eval": {"status": "done", "result": evaluation("out/m.pruned.onnx", 0.85), "seconds": 2.0},
        "check": {"status": "waiting", "reason": "it needs an NVIDIA GPU and none is here"},
    }
    put(run.with_name("deploy.json"), {"format": "toast-onnx/deploy/1", "steps": steps})
    trial = {"block": 0, "part": "qk", "ratio": 0.5, "kept": {}, "damage": {"kl": 0.1}}
    sensitivity = {"format": "toast-onnx/sensitivity/1", "model": {"sha256": DENSE}, "metric": "kl", "trials": [trial]}
    put(run.with_name("sensitivity.json"), sensitivity)
    put(run.with_name("old.json"), comparison())  # of an earlier run: the record's own steps are what counts
    for asked in (run, run.parent, run.with_name("deploy.json"), run.with_name("m.pruned.onnx")):
        text, _ = read(asked)
        assert "top-1 accuracy 85.0% dense 90.0%" in text
        assert "check waiting it needs an NVIDIA GPU" in text
        assert "What each block can spare" in text
        assert "Agreement with the dense model" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.json", None, "does not exist"),
        ("r.json", "{", "is no JSON document of this program"),
        ("r.json", '{"name": "x"}', "is no JSON document of this program"),
        ("r.json", json.dumps(comparison()), "is no report of a pruning run"),
        ("r.json", '{"format": "toast-onnx/deploy/1", "steps": {}}', "its prune step is not done"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        find_sources(tmp_path / name)


def test_kinds() -> None:
    assert kind_of(pruning()) == "prune"
    assert kind_of(comparison()) == "compare"
    assert kind_of(evaluation("m", 0.5)) == "eval"
    assert kind_of([]) is None


def test_the_command_writes_beside_the_run_and_never_over_it(run: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(run)])
    assert (result.exit_code, result.stdout) == (0, f"{run.with_suffix('.html')}\n")
    assert run.with_suffix(".html").read_text().startswith("<!doctype html>")
    result = CliRunner().invoke(main, ["report", str(run), "-o", str(run)])
    assert result.exit_code == 1
    assert "is the input" in result.stderr
    assert kind_of(json.loads(run.read_text())) == "prune"


def test_the_page_does_not_replace_the_models_of_the_run(run: Path) -> None:
    for side in ("dense", "pruned"):
        model = run.parent / json.loads(run.read_text())[side]["file"]
        model.write_bytes(b"weights")
        result = CliRunner().invoke(main, ["report", str(run), "-o", str(model)])
        assert result.exit_code == 1
        assert f"is the input file {model}" in result.stderr
        assert model.read_bytes() == b"weights"


def test_tokens_are_drawn_where_they_are_merged(tmp_path: Path) -> None:
    merges = [
        {"block": 0, "before": 197, "after": 190, "how": "merged", "metric": "keys"},
        {"block": 3, "before": 190, "after": 120, "how": "merged", "metric": "keys"},
        {"block": 5, "before": 120, "after": 1, "how": "unread tokens dropped", "metric": None},
    ]
    put(tmp_path / "p.json", pruning() | {"tokens": {"merges": merges, "twin": None}})
    text, _ = read(tmp_path / "p.json")
    assert "in front of the merge" in text
    assert "tokens behind the attention of each block" in text
    put(tmp_path / "q.json", pruning())
    assert "in front of the merge" not in read(tmp_path / "q.json")[0]


def test_samples_whose_answers_changed_are_shown_and_nothing_is_loaded(run: Path) -> None:
    sides = {"dense": {"class": 3, "confidence": 0.91}, "pruned": {"class": 7, "confidence": 0.52}}
    own, foreign = "data:image/jpeg;base64,AAAA", "https://example.org/x.png"
    changed = [{"sample": f"{n}.jpg", "picture": p, **sides} for n, p in enumerate((own, foreign, None))]
    put(run, pruning() | {"agreement": {"samples": 8, "outputs": {}, "disagreements": changed}})
    text, reader = read(run)
    assert text.count("3 (91%) → 7 (52%)") == 3
    assert [address for address in reader.loads if not address.startswith("#")] == [own]
    assert "<img" not in render_page(find_sources(run), images=False)


def test_the_command_and_the_predicted_damage_are_told(run: Path) -> None:
    blocks = [b | {"predicted_errors": {"qk": 0.1, "vo": 0.3, "fc2": 0.2}} for b in pruning()["blocks"]]
    measured = comparison()["blocks"]
    words = ["prune", "my model.onnx", "--macs", "0.6"]
    agreement = {"samples": 8, "outputs": {"y": {"top1_agreement": 0.75}}, "blocks": measured}
    put(run, pruning() | {"blocks": blocks, "command": words, "agreement": agreement})
    text, _ = read(run)
    assert "toast-onnx prune 'my model.onnx' --macs 0.6" in text
    assert "same answers 75.0%" in text
    told = page_context(find_sources(run))["drift"]
    assert told["alternative"].startswith("relative error of the branch by block, from 0.1 to 0.3")
    assert told["svg"].count("predicted</text>") == 2


def test_a_curve_of_one_point_is_a_table(run: Path) -> None:
    trials = [{"block": 0, "part": "fc2", "ratio": 0.5, "kept": {}, "damage": {"kl": 0.25}}]
    model = {"file": "m.onnx", "sha256": DENSE}
    found = {"format": "toast-onnx/sensitivity/1", "model": model, "metric": "kl", "trials": trials}
    put(run.with_name("m.sensitivity.json"), found)
    text, _ = read(run)
    assert "block 0 0.5 0.25" in text
    assert "removed of the hidden units" in text


def test_every_chart_has_a_text(run: Path) -> None:
    put(run.with_name("compare.json"), comparison())
    html = render_page(find_sources(run))
    assert len(re.findall(r'<figure role="img" aria-label="[^"]{20,}">', html)) == html.count("<figure") == 3


@pytest.mark.parametrize("damage", [{"twin": {"worst": 1e-7}}, {"twin": "agrees"}, {"finetune": {"steps": 3}}])
def test_a_document_changed_by_hand_is_one_line(run: Path, damage: dict[str, object]) -> None:
    put(run, {**pruning(), **damage})
    result = CliRunner().invoke(main, ["report", str(run), "-o", str(run.with_suffix(".html"))])
    assert result.exit_code == 1, result.output
    assert not run.with_suffix(".html").exists()
    assert "is not as its command wrote it" in result.output

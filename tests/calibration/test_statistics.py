"""Measured statistics against float64 NumPy on activations of the PyTorch module the graph was exported from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnxruntime.transformers.float16 import convert_float_to_float16

from tests import zoo
from tests.calibration.reference import Reference, image_keys, moments, query_moments, references, seen_keys
from tests.pace import mostly_slow
from tests.pruning import look
from toast_onnx.errors import ConfigError, DataError
from toast_onnx.importance.activation import attended_magnitude, token_channel_scores
from toast_onnx.importance.moments import Moments
from toast_onnx.matching.class_token import class_token
from toast_onnx.matching.study import Study
from toast_onnx_calibration import statistics_graph
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.needs import DEFAULT_PARTS, everything
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_calibration.statistics_graph import PARTS, TokenSettings, measuring_graph
from toast_onnx_calibration.store import merge_statistics, open_statistics

Exported = Callable[[zoo.Case], Path]

UNFUSED = [
    zoo.Case("timm-vit-unfused"),
    zoo.Case("timm-vit-unfused", "dynamo-20"),
    zoo.Case("timm-swin-unfused"),
    zoo.Case("hf-dinov2-eager"),
    zoo.Case("hf-dinov2-eager", "dynamo-18"),
]
SAMPLES = 5


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of the expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def differs(found: Moments, expected: Moments) -> float:
    """The largest of the relative differences of count, mean and covariance."""
    return max(
        abs(found.count / expected.count - 1),
        relative(found.mean, expected.mean),
        relative(found.covariance, expected.covariance),
    )


def measure(
    study: Study, feeds: dict[str, np.ndarray], out: Path, parts: frozenset[str] = DEFAULT_PARTS, **options: object
) -> CalibratedStatistics:
    """Calibrate a model on ready tensors, in batches of 2 unless told otherwise."""
    data = out.with_name(f"{out.stem}.feeds.npz")
    np.savez(data, **feeds)
    settings = CalibrationOptions(**{"batch": 2, "threads": 1} | options)
    calibrate(study, data, out, everything(study, parts), settings)
    return CalibratedStatistics(study, out)


def token_weights(r: Reference, boosted: bool) -> np.ndarray:
    """(1, tokens) ones, the first token 20 where the output reads it alone."""
    weights = np.ones((1, r.hidden.shape[1]))
    weights[0, 0] = 20 if boosted else 1
    return weights


@pytest.mark.parametrize("case", mostly_slow(UNFUSED, lambda c: c == zoo.Case("timm-vit-unfused"), lambda c: c.id))
def test_moments_are_those_of_the_module(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    path = exported(case)
    study, feeds = look(path), zoo.inputs(path, SAMPLES)
    found = measure(study, feeds, tmp_path / "s.npz", DEFAULT_PARTS | {"inputs"})
    boosted = case.family.startswith("timm-vit")
    assert found.file.header.class_weight == (20 if boosted else 1)
    for index, r in enumerate(references(case.family, feeds)):
        weights, attention = token_weights(r, boosted), found.attention(index)
        groups = weights if boosted else np.ones((1, 1))
        assert relative(attention.s_qq, query_moments(r, groups)) < 1e-5
        assert relative(attention.s_kk, seen_keys(r, np.ones((1, 1)))) < 1e-5
        assert differs(attention.context, moments(r.context, groups)) < 1e-5
        assert differs(found.hidden(index), moments(r.hidden, weights)) < 1e-5
        assert differs(found.inputs(index), moments(r.inputs, weights)) < 1e-5


@pytest.mark.parametrize("class_weight", [1.0, 20.0])
def test_wide_gram_matrices_are_made_of_panels(
    class_weight: float, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small models reach the width at which they are by lowering it; panels of unequal widths among them."""
    path = exported(zoo.Case("timm-vit-unfused"))
    study, feeds = look(path), zoo.inputs(path, SAMPLES)
    plain = len(measuring_graph(study, everything(study), TokenSettings()).proto.graph.node)
    monkeypatch.setattr(statistics_graph, "PANEL", 9)
    assert len(measuring_graph(study, everything(study), TokenSettings()).proto.graph.node) > plain
    found = measure(study, feeds, tmp_path / "s.npz", class_weight=class_weight)
    for index, r in enumerate(references("timm-vit-unfused", feeds)):
        weights = np.ones((1, r.hidden.shape[1]))
        weights[0, 0] = class_weight
        assert differs(found.attention(index).context, moments(r.context, weights)) < 1e-5
        assert differs(found.hidden(index), moments(r.hidden, weights)) < 1e-5


@pytest.mark.parametrize(
    "case",
    [zoo.Case("timm-vit", "dynamo-23"), zoo.Case("timm-vit-unfused", after="onnxsim"), zoo.Case("timm-vit")],
    ids=lambda c: c.id,
)
def test_other_spellings_of_the_same_module(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    """Fused attention hides its probabilities: keys are then centred by image; rows flattened by onnxsim keep order."""
    path = exported(case)
    study, feeds = look(path), zoo.inputs(path, SAMPLES)
    found = measure(study, feeds, tmp_path / "s.npz")
    keys = image_keys if case.exporter == "dynamo-23" else seen_keys
    for index, r in enumerate(references("timm-vit-unfused", feeds)):
        weights, attention = token_weights(r, True), found.attention(index)
        assert relative(attention.s_qq, query_moments(r, weights)) < 1e-5
        assert relative(attention.s_kk, keys(r, np.ones((1, 1)))) < 1e-5
        assert differs(attention.context, moments(r.context, weights)) < 1e-5
        assert differs(found.hidden(index), moments(r.hidden, weights)) < 1e-5


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [
            zoo.Case("hf-bert-eager"),
            zoo.Case("hf-bert"),
            zoo.Case("hf-bert", "dynamo-23"),
            zoo.Case("hf-bert", "dynamo-20"),
        ],
        lambda c: c.exporter == "torchscript-17",
        lambda c: c.id,
    ),
)
def test_padded_tokens_count_nowhere(case: zoo.Case, exported: Exported, tmp_path: Path) -> None:
    path = exported(case)
    study, feeds = look(path), zoo.inputs(path, SAMPLES)
    valid = feeds["attention_mask"].astype(np.float64)
    assert 0 < valid.mean() < 1
    found = measure(study, feeds, tmp_path / "s.npz")
    assert found.file.header.notes == ()
    keys = image_keys if case.exporter == "dynamo-23" else seen_keys
    for index, r in enumerate(references("hf-bert-eager", feeds)):
        attention = found.attention(index)
        assert relative(attention.s_qq, query_moments(r, valid)) < 1e-5
        assert relative(attention.s_kk, keys(r, valid)) < 1e-5
        assert differs(attention.context, moments(r.context, valid)) < 1e-5
        assert differs(found.hidden(index), moments(r.hidden, valid)) < 1e-5


@pytest.mark.parametrize("family", mostly_slow(["hf-vitdet", "hf-detr", "timm-swinv2"], "hf-vitdet".__eq__))
def test_what_layers_add_to_the_scores_is_no_padding(family: str, exported: Exported, tmp_path: Path) -> None:
    """Relative positions computed from Q, cross-attention, cosine attention: measured whole, without a note."""
    path = exported(zoo.Case(family))
    study = look(path)
    found = measure(study, zoo.inputs(path, 2), tmp_path / "s.npz", frozenset(PARTS))
    assert found.file.header.notes == ()
    assert set(found.file.header.parts) == {str(b.index) for b in study.match.blocks}


@pytest.mark.parametrize("part", ["fc1", "fc2"])
def test_token_channel_selection(part: str, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit-unfused"))
    study, feeds = look(path), zoo.inputs(path, SAMPLES)
    found = measure(study, feeds, tmp_path / "s.npz", frozenset({part}))
    for index, r in enumerate(references("timm-vit-unfused", feeds)):
        x = r.inputs if part == "fc1" else r.hidden
        attended = r.p[:, :, 0, 1:].mean(axis=1)  # of the class token to the patches, over heads
        patches = attended_magnitude(x[:, 1:], attended)
        expected = token_channel_scores(patches, np.abs(x[:, 0]).mean(axis=0), x.shape[1] - 1)
        assert relative(found.activation_scores(index, part), expected) < 1e-5  # type: ignore[arg-type]


def test_token_channel_selection_without_a_class_token(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-swin-unfused"))
    study, feeds = look(path), zoo.inputs(path, 2)
    found = measure(study, feeds, tmp_path / "s.npz", frozenset({"fc2"}))
    for index, r in enumerate(references("timm-swin-unfused", feeds)):
        expected = token_channel_scores(attended_magnitude(r.hidden))
        assert relative(found.activation_scores(index, "fc2"), expected) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "alone"),
    [
        ("timm-vit", True),
        ("timm-deit", True),
        ("hf-deit", True),
        ("torchvision-vit", True),
        ("timm-deit-distilled", False),  # reads two tokens
        ("timm-mae-finetuned", False),  # averages the patches
        ("hf-dinov2", False),  # returns every token
        ("hf-clip", False),
        ("timm-swin", False),
    ],
)
@pytest.mark.parametrize("exporter", ["torchscript-17", pytest.param("dynamo-20", marks=pytest.mark.slow)])
def test_whether_the_output_reads_the_class_token_alone(
    family: str, alone: bool, exporter: str, exported: Exported
) -> None:
    study = look(exported(zoo.Case(family, exporter)))
    assert (class_token(study.view, study.facts) is not None) is alone


def test_batch_size_and_threads_do_not_matter(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit-unfused"))
    study, feeds = look(path), zoo.inputs(path, 7)
    first = measure(study, feeds, tmp_path / "a.npz", batch=1, threads=1)
    for number, (batch, threads) in enumerate(itertools.product((3, 7), (1, 2))):
        other = measure(study, feeds, tmp_path / f"{number}.npz", batch=batch, threads=threads)
        for index in range(len(study.match.blocks)):
            assert differs(other.hidden(index), first.hidden(index)) < 1e-5
            assert relative(other.attention(index).s_kk, first.attention(index).s_kk) < 1e-5


def test_same_run_same_bytes(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    study, feeds = look(path), zoo.inputs(path, 4)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = (measure(study, feeds, tmp_path / folder / "s.npz").file.path.read_bytes() for folder in "ab")
    assert a.replace(b"/a/", b"/b/") == b or len(a) == len(b)


def test_the_rest_of_a_fixed_batch_counts_once(exported: Exported, tmp_path: Path) -> None:
    """A fixed batch of 4 is filled up for 6 samples; the repeated ones must leave no trace."""
    path = exported(zoo.Case("timm-vit-unfused"))
    feeds = zoo.inputs(path, 6)
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(proto, tmp_path / "fixed.onnx")
    parts = frozenset(PARTS)
    free, fixed = (measure(look(p), feeds, tmp_path / f"{p.stem}.npz", parts) for p in (path, tmp_path / "fixed.onnx"))
    for index in range(2):
        assert differs(fixed.hidden(index), free.hidden(index)) < 1e-5
        assert relative(fixed.attention(index).s_qq, free.attention(index).s_qq) < 1e-5
        assert relative(fixed.activation_scores(index, "fc2"), free.activation_scores(index, "fc2")) < 1e-5  # type: ignore[arg-type]


def test_passes_give_what_one_pass_gives(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    study, feeds = look(path), zoo.inputs(path, 4)
    whole = measure(study, feeds, tmp_path / "a.npz")
    pieces = measure(study, feeds, tmp_path / "b.npz", budget=1)
    for index in range(2):
        assert differs(pieces.hidden(index), whole.hidden(index)) < 1e-6


@pytest.mark.parametrize("class_weight", [1.0, 20.0])
def test_sampled_tokens(class_weight: float, exported: Exported, tmp_path: Path) -> None:
    """The same positions of every image, drawn by the seed; the class token keeps its weight against all patches."""
    path = exported(zoo.Case("timm-vit-unfused"))
    study, feeds = look(path), zoo.inputs(path, SAMPLES)
    found = measure(study, feeds, tmp_path / "s.npz", tokens=0.5, class_weight=class_weight, seed=3)
    boosted = class_weight != 1
    for index, r in enumerate(references("timm-vit-unfused", feeds)):
        total = r.hidden.shape[1]
        number = round((total - boosted) * 0.5)
        drawn = np.random.default_rng(3).choice(total - boosted, number, replace=False) + boosted
        weights = np.zeros((1, total))
        weights[0, drawn] = (total - 1) / number if boosted else 1
        if boosted:
            weights[0, 0] = 20
        assert differs(found.hidden(index), moments(r.hidden, weights)) < 1e-5
        assert found.hidden(index).tokens == pytest.approx(SAMPLES * (number + boosted))


@pytest.mark.parametrize(
    "order",
    [pytest.param(o, marks=() if o == (2, 0, 1) else pytest.mark.slow) for o in itertools.permutations(range(3))],
)
def test_shards_in_any_order(order: tuple[int, ...], exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    study, feeds = look(path), zoo.inputs(path, 7)
    whole = measure(study, feeds, tmp_path / "whole.npz", frozenset(PARTS))
    bounds = [(0, 2), (2, 3), (3, 7)]
    for number, (start, end) in enumerate(bounds):
        shard = {name: array[start:end] for name, array in feeds.items()}
        measure(study, shard, tmp_path / f"{number}.npz", frozenset(PARTS))
    header = merge_statistics([tmp_path / f"{k}.npz" for k in order], tmp_path / "merged.npz")
    merged = CalibratedStatistics(study, tmp_path / "merged.npz")
    assert header.samples == 7
    for index in range(2):
        assert differs(merged.hidden(index), whole.hidden(index)) < 1e-5
        assert differs(merged.attention(index).context, whole.attention(index).context) < 1e-5
        assert relative(merged.attention(index).s_qq, whole.attention(index).s_qq) < 1e-5
        assert relative(merged.activation_scores(index, "fc1"), whole.activation_scores(index, "fc1")) < 1e-5  # type: ignore[arg-type]


def test_shards_must_belong_together(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    study, feeds = look(path), zoo.inputs(path, 2)
    measure(study, feeds, tmp_path / "a.npz")
    measure(study, zoo.inputs(path, 2, seed=1), tmp_path / "b.npz", class_weight=5.0)
    with pytest.raises(DataError, match="class_weight is 5"):
        merge_statistics([tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "m.npz")
    with pytest.raises(DataError, match="the same samples"):
        merge_statistics([tmp_path / "a.npz", tmp_path / "a.npz"], tmp_path / "m.npz")
    assert not (tmp_path / "m.npz").exists()


def shards(study: Study, data: Path, of: int, **options: object) -> list[Path]:
    """Statistics of every shard of a run."""
    paths = [data.with_name(f"{number}-of-{of}.npz") for number in range(1, of + 1)]
    for number, path in enumerate(paths, start=1):
        run_of(study, data, path, shard=(number, of), **options)
    return paths


def run_of(study: Study, data: Path, out: Path, **options: object) -> None:
    """Statistics of one block, two samples a batch."""
    settings = CalibrationOptions(**{"batch": 2, "threads": 1} | options)
    calibrate(study, data, out, {1: frozenset({"qk", "context", "fc2"})}, settings)


def test_shards_add_up_to_one_run(exported: Exported, tmp_path: Path) -> None:
    """In float64 to 1e-12; in the file, whose covariances are float32, to the last bit but for ties of rounding."""
    path, data = exported(zoo.Case("timm-vit")), tmp_path / "x.npz"
    study = look(path)
    np.savez(data, **zoo.inputs(path, 7))
    (exact,) = map(open_statistics, shards(study, data, 1))
    run_of(study, data, tmp_path / "whole.npz")
    parts = shards(study, data, 3)
    assert "shard 1 of 3 alone" in CalibratedStatistics(study, parts[0]).source
    assert [open_statistics(p).header.samples for p in parts] == [2, 2, 3]
    merge_statistics([parts[2], parts[0]], tmp_path / "some.npz")
    assert open_statistics(tmp_path / "some.npz").header.share.missing == [2]
    merge_statistics([tmp_path / "some.npz", parts[1]], tmp_path / "late.npz")
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        merge_statistics([parts[k] for k in order], tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    whole, merged = open_statistics(tmp_path / "whole.npz"), open_statistics(tmp_path / "a.npz")
    assert merged.header == whole.header == open_statistics(tmp_path / "late.npz").header
    assert merged.names() == whole.names()
    pieces = [open_statistics(p) for p in parts]
    for name in exact.names():
        key, _, quantity = name.rpartition(".")
        a, b = whole.array(name), merged.array(name)
        assert a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= (1e-7 if quantity == "covariance" else 1e-12) * np.linalg.norm(a)
        if quantity == "covariance":
            sums = [p.moments(key).gram for p in pieces]
            gram = exact.moments(key).gram
            assert np.linalg.norm(sum(sums) - gram) <= 1e-12 * np.linalg.norm(gram)


def test_shards_of_different_runs_are_refused(exported: Exported, tmp_path: Path) -> None:
    path, data = exported(zoo.Case("timm-vit")), tmp_path / "x.npz"
    study = look(path)
    np.savez(data, **zoo.inputs(path, 6))
    np.savez(tmp_path / "y.npz", **zoo.inputs(path, 2, seed=1))
    one, two = shards(study, data, 2)
    third, whole, other = (tmp_path / f"{name}.npz" for name in ("third", "whole", "seed"))
    run_of(study, data, third, shard=(3, 3))
    run_of(study, tmp_path / "y.npz", whole)
    run_of(study, data, other, shard=(2, 2), seed=1)
    for files, words in (
        ([one, one], "the same shard, 1 of 2"),
        ([one, third], "one of 3 shards of 6 samples .* one of 2"),
        ([one, whole], "shards of the same run only"),
        ([one, other], "seed is 1, but .* has 0"),
    ):
        with pytest.raises(DataError, match=words):
            merge_statistics(files, tmp_path / "m.npz")
    merge_statistics([one, two], tmp_path / "m.npz")
    with pytest.raises(DataError, match="shards of the same run only"):
        merge_statistics([one, tmp_path / "m.npz"], tmp_path / "n.npz")


def test_samples_of_a_function_are_not_divided(exported: Exported, tmp_path: Path) -> None:
    study = look(exported(zoo.Case("timm-vit")))
    options = CalibrationOptions(threads=1, shard=(1, 2))
    with pytest.raises(ConfigError, match="the samples of a function cannot be divided"):
        calibrate(study, "numpy:ones", tmp_path / "s.npz", options=options)


def test_another_model_is_refused_by_both_hashes(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    found = measure(look(path), zoo.inputs(path, 1), tmp_path / "s.npz")
    other = look(exported(zoo.Case("timm-deit")))
    with pytest.raises(DataError) as caught:
        CalibratedStatistics(other, tmp_path / "s.npz")
    assert found.file.header.model_sha256 in str(caught.value)
    assert "timm-deit" in str(caught.value)


@pytest.mark.parametrize("cut", [0, 100, 0.3, 0.9])
def test_truncated_files_are_named(cut: float, exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    file = measure(look(path), zoo.inputs(path, 1), tmp_path / "s.npz").file.path
    data = file.read_bytes()
    file.write_bytes(data[: int(cut * len(data)) if cut < 1 else int(cut)])
    with pytest.raises(DataError, match=r"s\.npz"):
        open_statistics(file)


def test_a_flipped_bit_is_found(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    found = measure(look(path), zoo.inputs(path, 1), tmp_path / "s.npz")
    data = bytearray(found.file.path.read_bytes())
    data[data.index(b"0.hidden.covariance") + 5000] ^= 1
    found.file.path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="damaged"):
        found.hidden(0)


def test_what_was_not_measured_is_said(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit"))
    found = measure(look(path), zoo.inputs(path, 1), tmp_path / "s.npz", frozenset({"qk"}))
    with pytest.raises(DataError, match="--ratios"):
        found.hidden(0)
    assert np.isnan(found.attention(0).context.mean).all()


@pytest.mark.parametrize(("after", "tolerance"), [("external", 1e-6), ("ort-basic", 1e-5)])
def test_other_files_of_the_same_model(after: str, tolerance: float, exported: Exported, tmp_path: Path) -> None:
    """Weights in a file of their own are found there; an optimized graph gives the same sums."""
    path, other = (exported(zoo.Case("timm-vit-unfused", after=a)) for a in ("", after))
    assert_close(other, path, tolerance, tmp_path)


def test_half_precision_is_summed_in_float32(exported: Exported, tmp_path: Path) -> None:
    path = exported(zoo.Case("timm-vit-unfused"))
    half = convert_float_to_float16(onnx.load(path), keep_io_types=True)
    # the converter appends its casts at the end
    onnx.save(gs.export_onnx(gs.import_onnx(half).toposort()), tmp_path / "half.onnx")
    assert_close(tmp_path / "half.onnx", path, 2e-2, tmp_path)


def assert_close(other: Path, path: Path, tolerance: float, folder: Path) -> None:
    """Both files give the same statistics on the same samples."""
    feeds = zoo.inputs(path, 4)
    plain, same = (measure(look(p), feeds, folder / f"{k}.npz") for k, p in enumerate((path, other)))
    for index in range(2):
        assert relative(same.hidden(index).covariance, plain.hidden(index).covariance) < tolerance
        assert relative(same.attention(index).context.covariance, plain.attention(index).context.covariance) < tolerance
        assert relative(same.attention(index).s_kk, plain.attention(index).s_kk) < tolerance

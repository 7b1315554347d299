"""Padding belongs to the tokens that a mask hides: not to another tower's, nor to those that ask an encoder's keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from tests.pruning import look
from toast_onnx.choosing.synthetic import SyntheticStatistics
from toast_onnx.finetune.local import relative_error
from toast_onnx.matching.span import block_span, masks_beside
from toast_onnx.matching.study import Study
from toast_onnx.model import save_model
from toast_onnx.planning.planned import planned_ratios
from toast_onnx.planning.ratios import parse_ratios
from toast_onnx.planning.search import Kept
from toast_onnx.planning.width_costs import dense_widths
from toast_onnx.pruning import prune
from toast_onnx.runtime import run_model
from toast_onnx_calibration.agreement import Agreement
from toast_onnx_calibration.calibrating import CalibrationOptions, calibrate
from toast_onnx_calibration.comparing import compare
from toast_onnx_calibration.needs import everything
from toast_onnx_calibration.room import refining_bytes
from toast_onnx_calibration.sensitivity_stream import Trials
from toast_onnx_calibration.sensitivity_trials import Solver
from toast_onnx_calibration.statistics import CalibratedStatistics
from toast_onnx_calibration.stored import store_samples

Exported = Callable[[zoo.Case], Path]
Feeds = dict[str, np.ndarray]
OPTIONS = CalibrationOptions(threads=1, batch=8)
SETTINGS = parse_ratios({"version": 1})
WIDTH, HEADS = 64, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, z in ((self.q, x), (self.k, y), (self.v, y))
        )
        scores = q @ k.transpose(-1, -2) / 4
        found = ((scores if mask is None else scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(found)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Of an encoder; of a decoder where it asks what another one says."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.own, self.cross = Attention(), Attention() if asks else None
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, said: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        x = x + self.own(h, h, mask if said is None else None)
        if self.cross is not None:
            x = x + self.cross(self.norm3(x), said, mask)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Layer(False), Layer(False)])
        self.decoder = nn.ModuleList([Layer(True), Layer(True)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, source: Tensor, attention_mask: Tensor, target: Tensor) -> Tensor:
        mask = (1 - attention_mask.float())[:, None, None, :] * -1e9
        for layer in self.encoder:
            source = layer(source, mask)
        said = self.norm(source)
        for layer in self.decoder:
            target = layer(target, mask, said)
        return self.head(target)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("translator") / "translator.onnx"
    given = (torch.randn(2, 16, WIDTH), torch.ones(2, 16, dtype=torch.int64), torch.randn(2, 16, WIDTH))
    names = ("source", "attention_mask", "target")
    axes = {name: {0: "batch", 1: "said" if name != "target" else "asked"} for name in names}
    axes["scores"] = {0: "batch", 1: "asked"}
    torch.onnx.export(
        Translator().eval(),
        given,
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=list(names),
        output_names=["scores"],
        dynamic_axes=axes,
    )
    return path


def translated(said: int, asked: int) -> Feeds:
    """Samples of which the encoder may see three tokens each."""
    rng = np.random.default_rng(said + asked)
    mask = np.zeros((32, said), np.int64)
    mask[:, :3] = 1
    source, target = (rng.standard_normal((32, n, WIDTH)).astype(np.float32) for n in (said, asked))
    return {"source": source, "attention_mask": mask, "target": target}


def smaller(dense: Study, kept: Kept, out: Path) -> Path:
    ratios = planned_ratios(SETTINGS, kept, [dense_widths(b) for b in dense.match.blocks])
    save_model(prune(dense, ratios, SyntheticStatistics(dense)).model, out)
    return out


def output(path: Path, name: str, feeds: Feeds, folder: Path) -> np.ndarray:
    """An output or a tensor inside, in float64."""
    copy = folder / "copy.onnx"  # which gets further outputs
    copy.write_bytes(path.read_bytes())
    return run_model(copy, [name], [feeds], threads=1)[0][name].astype(np.float64)


def distance(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(want - got) / np.linalg.norm(want))


@pytest.mark.parametrize(("said", "asked"), [(16, 16), (16, 12), (12, 24), (16, 32)])
def test_who_asks_an_encoder_is_not_hidden_by_its_mask(said: int, asked: int, translator: Path, tmp_path: Path) -> None:
    """Lengths that are alike where the graph is probed, and multiples of each other, tell nothing."""
    dense, feeds = look(translator), translated(said, asked)
    data = tmp_path / "samples.npz"
    np.savez(data, **feeds)
    kept: Kept = {1: {"fc2": 64}, 3: {"fc2": 64}}
    small = smaller(dense, kept, tmp_path / "small.onnx")
    expected = distance(*(output(p, "scores", feeds, tmp_path) for p in (translator, small)))
    found = compare(translator, small, data, threads=1, rounds=0)
    assert found.outputs["scores"]["relative_error"] == pytest.approx(expected, rel=1e-5)
    for block in found.blocks[2:]:  # of the decoder
        for part in ("attention", "ffn"):
            if part in block:
                name = getattr(dense.match.blocks[block["index"]], part)
                end = (name.proj.linear if part == "attention" else name.fc2).output
                drift = distance(*(output(p, end, feeds, tmp_path) for p in (translator, small)))
                assert block[part]["relative_error"] == pytest.approx(drift, rel=1e-4, abs=1e-7)
    samples = store_samples(dense, data, OPTIONS, tmp_path, lambda _: 8)
    trials = Trials(dense, samples, OPTIONS, tmp_path)
    damage = trials.damage(Solver(dense, SETTINGS, SyntheticStatistics(dense)).weights(kept))
    assert damage["relative_error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("said", "asked"), [(16, 16), (16, 12)])
def test_statistics_of_a_decoder_take_all_its_tokens(said: int, asked: int, translator: Path, tmp_path: Path) -> None:
    dense, feeds = look(translator), translated(said, asked)
    np.savez(tmp_path / "samples.npz", **feeds)
    calibrate(dense, tmp_path / "samples.npz", tmp_path / "s.npz", everything(dense, {"hidden"}), OPTIONS)
    measured = CalibratedStatistics(dense, tmp_path / "s.npz")
    for block in dense.match.blocks:
        if block.ffn is None:
            continue
        hidden = output(translator, block.ffn.fc2.input, feeds, tmp_path)
        rows = hidden[:, :3] if block.index < 2 else hidden
        np.testing.assert_allclose(measured.hidden(block.index).mean, rows.mean(axis=(0, 1)), atol=1e-5)


def test_a_tower_is_not_hidden_by_the_mask_of_another(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported(zoo.Case("hf-bert")))
    del model.graph.value_info[:]
    towers = [onnx.compose.add_prefix(model, prefix) for prefix in ("q/", "d/")]
    for field in ("node", "initializer", "input", "output"):
        getattr(towers[0].graph, field).extend(getattr(towers[1].graph, field))
    for value in (*towers[0].graph.input, *towers[0].graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = dim.dim_param.removeprefix("q/").removeprefix("d/")
    path = tmp_path / "towers.onnx"
    onnx.save(towers[0], path)
    dense, feeds = look(path), zoo.inputs(path, batch=32, seed=4)
    feeds["q/attention_mask"][:] = 1
    feeds["d/attention_mask"][:] = np.arange(feeds["d/attention_mask"].shape[1]) < 3
    np.savez(tmp_path / "samples.npz", **feeds)
    small = smaller(dense, {1: {"fc2": 104}, 3: {"fc2": 104}}, tmp_path / "small.onnx")
    found = compare(path, small, tmp_path / "samples.npz", threads=1, rounds=0)
    for name, count in (("q/last_hidden_state", None), ("d/last_hidden_state", 3)):
        want, got = (output(p, name, feeds, tmp_path)[:, :count] for p in (path, small))
        assert found.outputs[name]["relative_error"] == pytest.approx(distance(want, got), rel=1e-5)


def test_masks_that_every_layer_makes_anew_are_kept_once_and_counted(exported: Exported) -> None:
    dense = look(exported(zoo.Case("hf-bert")))
    same = masks_beside(dense.view, dense.facts, dense.match.blocks)
    assert len(same) == 2
    assert len(set(same.values())) == 1
    shape = dense.counted.known_shape(next(iter(same)))
    plain = look(exported(zoo.Case("timm-vit")))
    assert masks_beside(plain.view, plain.facts, plain.match.blocks) == {}
    each = refining_bytes(dense, [0, 1], 10) - refining_bytes(dense, [0, 1], 9)
    span = block_span(dense.view, dense.facts, dense.match.blocks[0])
    stream = 4 * int(np.prod(dense.counted.known_shape(span.end)[1:]))
    assert each >= 2 * 2 * stream + 4 * int(np.prod(shape[1:]))


def test_nothing_but_padding_is_no_error() -> None:
    rows, nothing = np.ones((2, 3, 4)), np.zeros((2, 3, 1))
    assert relative_error(rows + 1, rows, nothing) == 0
    agreement = Agreement()
    agreement.add(rows, rows + 1, nothing[..., 0] > 0)
    assert agreement.to_json()["relative_error"] == 0

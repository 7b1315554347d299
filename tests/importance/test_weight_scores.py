"""Weight-only scores against straightforward computations with other libraries."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from toast_onnx.errors import ConfigError
from toast_onnx.importance.activation import attended_magnitude, sample_patches, token_channel_scores
from toast_onnx.importance.attention import lower_median, qk_energy, qk_scores, vo_energy, vo_scores
from toast_onnx.importance.ffn import scaled_rows, weight_scores
from toast_onnx.importance.selection import top_k


def head_matrices(seed: int = 0, c: int = 12, heads: int = 3, d: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(c, heads, d), (c, heads, d), (c, heads, d), (heads, d, c)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_lower_median_is_torch_median() -> None:
    torch = pytest.importorskip("torch")
    for d in (5, 6):
        rows = np.random.default_rng(d).standard_normal((d, 7))
        np.testing.assert_array_equal(lower_median(rows), torch.median(torch.from_numpy(rows), dim=0).values.numpy())
    assert not np.allclose(lower_median(rows), np.median(rows, axis=0))


def test_gm_coupled_follows_the_paper() -> None:
    torch = pytest.importorskip("torch")
    wq, wk, wv, wo = head_matrices()
    scores_qk, scores_vo = qk_scores(wq, wk), vo_scores(wv, wo)
    for h in range(3):
        for first, second, got in ((wq[:, h].T, wk[:, h].T, scores_qk[h]), (wv[:, h].T, wo[h], scores_vo[h])):
            rows = torch.cat([torch.from_numpy(first.copy()), torch.from_numpy(second.copy())], dim=1)
            median = torch.median(rows, dim=0).values
            expected = torch.stack([torch.dist(row, median) for row in rows])
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("coupling", "sides"), [("q_only", "first"), ("k_only", "second"), ("average", "both"), ("proj_only", "proj")]
)
@pytest.mark.parametrize(("score", "norm"), [("l1", 1), ("l2", 2)])
def test_couplings_read_the_sides_they_name(coupling: str, sides: str, score: str, norm: int) -> None:
    wq, wk, wv, wo = head_matrices()

    def reference(first: np.ndarray, second: np.ndarray, proj_side: str) -> np.ndarray:
        a = (np.abs(first.astype(np.float64)) ** norm).sum(axis=-1)
        b = (np.abs(second.astype(np.float64)) ** norm).sum(axis=-1)
        chosen = proj_side if sides == "proj" else sides
        return {"first": a, "second": b, "both": (a + b) / 2}[chosen]

    q_rows, k_rows, v_rows = (w.transpose(1, 2, 0) for w in (wq, wk, wv))
    np.testing.assert_allclose(qk_scores(wq, wk, score, coupling), reference(q_rows, k_rows, "first"))
    np.testing.assert_allclose(vo_scores(wv, wo, score, coupling), reference(v_rows, wo, "second"))


def test_layer_scale_counts_in_output_scores() -> None:
    gamma = np.linspace(0.1, 2.0, 12)
    w1, w2 = np.ones((12, 5)), np.random.default_rng(1).standard_normal((5, 12))
    scores = weight_scores([w1], scaled_rows(w2, gamma))
    np.testing.assert_allclose(scores, 12 + ((w2 * gamma) ** 2).sum(axis=1))


def test_unknown_names_are_config_errors() -> None:
    wq, wk, _, wo = head_matrices()
    with pytest.raises(ConfigError, match="gm, l1, l2"):
        qk_scores(wq, wk, "l3")
    with pytest.raises(ConfigError, match="q_only"):
        qk_scores(wq, wk, "gm", "q")
    with pytest.raises(ConfigError, match="l1 or l2"):
        weight_scores([wo[0].T], wo[0], "gm")


def test_gated_units_are_scored_on_both_entries() -> None:
    rng = np.random.default_rng(2)
    gate, up, w2 = rng.standard_normal((4, 6)), rng.standard_normal((4, 6)), rng.standard_normal((6, 4))
    expected = (gate**2).sum(axis=0) + (up**2).sum(axis=0) + (w2**2).sum(axis=1)
    np.testing.assert_allclose(weight_scores((gate, up), w2), expected)


def test_inputs_are_scored_on_what_reads_them() -> None:
    rows = np.random.default_rng(2).standard_normal((4, 12))
    np.testing.assert_allclose(weight_scores((), rows, "l1"), np.abs(rows).sum(axis=1))


def test_energy_is_the_loss_of_removing_one_dimension() -> None:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 400, 4)), rng.standard_normal((2, 400, 4))
    s_qq, s_kk = (np.einsum("hne,hnf->hef", x, x) / 400 for x in (q, k))
    expected = np.einsum("hie,hje->hije", q, k) ** 2
    np.testing.assert_allclose(qk_energy(s_qq, s_kk), expected.mean(axis=(1, 2)))
    wo = rng.standard_normal((2, 4, 5))
    expected = ((q[:, :, :, None] * wo[:, None]) ** 2).mean(axis=1).sum(axis=-1)
    np.testing.assert_allclose(vo_energy(s_qq, wo), expected)


def test_token_channel_scores_weight_the_class_token() -> None:
    rng = np.random.default_rng(4)
    tokens, attention = rng.standard_normal((3, 11, 5)), rng.random((3, 11))
    attended = np.zeros(5)
    for image in range(3):
        for patch in range(1, 11):
            attended += np.abs(tokens[image, patch]) * attention[:, patch].mean() / 30
    expected = (2 * np.abs(tokens[:, 0]).mean(axis=0)) / 11 + attended * 10 / 11
    patches = attended_magnitude(tokens[:, 1:], attention[:, 1:])
    np.testing.assert_allclose(token_channel_scores(patches, np.abs(tokens[:, 0]).mean(axis=0), 10), expected)
    np.testing.assert_array_equal(token_channel_scores(patches), patches)


def test_sampled_patches_are_seeded_and_inside() -> None:
    assert sample_patches(196, 0.02, 7).size == 3
    np.testing.assert_array_equal(sample_patches(196, 0.2, 7), sample_patches(196, 0.2, 7))
    assert sample_patches(10, 0.001, 0).size == 1
    np.testing.assert_array_equal(sample_patches(4, 1.0, 0), np.arange(4))
    assert set(sample_patches(3, 0.9, 0)) <= {0, 1, 2}


def test_gm_indices_on_real_deit_weights() -> None:
    """The kept dimensions of every head of every block, against the paper's formula in torch."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    root = os.environ.get("TOAST_DATA")
    if root is None:
        pytest.skip("TOAST_DATA is not set: no DeiT-T weights here")
    state = safetensors.load_file(str(Path(root) / "weights" / "deit_tiny_patch16_224.safetensors"))
    for block in range(12):
        qkv = state[f"blocks.{block}.attn.qkv.weight"]
        proj = state[f"blocks.{block}.attn.proj.weight"]
        q, k, v = (w.reshape(3, 64, 192) for w in qkv.split(192))
        out = proj.T.reshape(3, 64, 192)
        pairs = {"qk": torch.cat([q, k], dim=2), "vo": torch.cat([v, out], dim=2)}
        as_columns = [w.permute(2, 0, 1).numpy() for w in (q, k, v)]
        got = {
            "qk": top_k(qk_scores(*as_columns[:2]), 40),
            "vo": top_k(vo_scores(as_columns[2], out.numpy()), 40),
        }
        for name, rows in pairs.items():
            median = torch.median(rows, dim=1, keepdim=True).values
            expected = (rows - median).norm(dim=2).topk(40, dim=1).indices.sort(dim=1).values
            np.testing.assert_array_equal(got[name], expected.numpy())

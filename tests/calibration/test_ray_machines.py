"""Times on a Ray cluster of two machines, which this one plays both of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zoo
from tests.pruning import look
from toast_onnx.planning.schema import Align
from toast_onnx_calibration.costs import measure_costs, onnxruntime_runtime
from toast_onnx_calibration.ray_workers import ray_executor

pytestmark = pytest.mark.slow

Exported = Callable[[zoo.Case], Path]


def test_one_variant_at_a_time_on_each(exported: Exported) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    from ray.cluster_utils import Cluster

    dense = look(exported(zoo.Case("timm-vit")))
    runtime = onnxruntime_runtime(1, 1, rounds=3)
    align = Align(head_dim=8, width=64)
    seen: list[int] = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        with ray_executor(cluster.address) as executor:
            table = measure_costs(
                dense, runtime, ["qk", "fc2"], align, 8, lambda done, *_: seen.append(done), executor=executor
            )
    finally:
        cluster.shutdown()
    alone = measure_costs(dense, runtime, ["qk", "fc2"], align, 8)
    assert seen[-1] == max(seen)
    for a, b in zip(table.parts, alone.parts, strict=True):
        assert (a.part, a.blocks, a.dense, [*a.milliseconds]) == (b.part, b.blocks, b.dense, [*b.milliseconds])
    assert all(ms > 0 for part in table.parts for ms in part.milliseconds.values())

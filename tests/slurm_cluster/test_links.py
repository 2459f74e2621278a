"""The benchmark of slow links: what each kind of bank moves between two nodes, and its loss."""

from pathlib import Path

import pytest

from benchmarks.slurm_links import KINDS, Setting, on_nodes
from tests.slurm_cluster.cluster import Cluster

pytestmark = pytest.mark.slow


def test_kinds_of_bank_move_what_they_say_and_agree(cluster: Cluster, tmp_path: Path) -> None:
    setting = Setting(
        entries=20_000,
        images=4,
        size=32,
        backbone="small",
        precision="float32",
        pixels_per_mask=16,
        rounds=1,
        stand_ins=(0.01,),
    )
    found = on_nodes(cluster, 0.5, setting, tmp_path)
    for node in ("node1", "node2"):
        limit = cluster.node("exec", node, "tc", "qdisc", "show", "dev", "eth0")
        assert "rate 500Mbit" in limit
    pixels = 4 * 16
    moved = {"hidden": 10_000 * 32 * 2, "exposed": 10_000 * 32 * 2, "pixels": pixels * 4 * 66}
    assert found["query_pixels"] == pixels
    assert list(found["parts"]) == ["with gradients", "without gradients", "0.01 s"]
    for name, part in found["parts"].items():
        kinds = part["kinds"]
        assert list(kinds) == list(KINDS)
        assert part["disagreement"] < 1e-5
        gradients = found["gradients_mb"] * 1e6 if name == "with gradients" else 0
        for kind in KINDS:
            row = kinds[kind]
            assert row["counted"][0] == moved.get(kind, 0)
            rest = row["wire"][0] - moved.get(kind, 0) - gradients
            assert 0 < rest < 30_000 + 0.02 * gradients  # masks, prototypes, headers
        assert kinds["none"]["loss"][0] < 0.9 * kinds["hidden"]["loss"][0]
        assert kinds["replicated"]["held"] == 2 * kinds["hidden"]["held"] == 20_000 * 32 * 2

"""Which nodes of a job are fit to train: findings of real checks, and the choice among them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.build_config import BuildConfig
from data_pipeline.sources.generated import list_scenes
from data_pipeline.write_shards import build_shards
from launch.doctor_finding import Finding, failed, ok
from launch.node_check import choose, device_finding, run_finding, shards_finding

WELL = [ok("devices", "8 GPUs"), ok("shards", "3 shards")]
SICK = [ok("devices", "8 GPUs"), failed("shards", "cannot be read", "mounted?")]
NAMES = ("a", "b", "c")


def summed(*ranks: int) -> Finding:
    return failed("all-reduce", "no answer", "look there", ranks=list(ranks))


@pytest.mark.parametrize(
    ("findings", "together", "chosen", "sick"),
    [
        ({"a": WELL, "b": WELL, "c": WELL}, [], ("a", "b"), {}),
        (
            {"a": SICK, "b": WELL, "c": WELL},
            [ok("all-reduce", "right sum")],
            ("b", "c"),
            {"a": "shards: cannot be read; mounted?"},
        ),
        ({"b": WELL, "c": WELL}, [], ("b", "c"), {"a": "it gave no answer"}),
        (
            {"a": WELL, "b": WELL, "c": WELL},
            [summed(1)],
            ("a", "c"),
            {"b": "all-reduce: no answer; look there"},
        ),
        # who is blamed for a sum that nobody finished: the node that was known to be sick
        (
            {"a": WELL, "b": SICK, "c": WELL},
            [summed(0, 1, 2)],
            ("a", "c"),
            {"b": "shards: cannot be read; mounted?"},
        ),
    ],
)
def test_well_nodes_are_chosen(
    findings: dict[str, list[Finding]],
    together: list[Finding],
    chosen: tuple[str, ...],
    sick: dict[str, str],
) -> None:
    choice = choose(NAMES, findings, together, 2)
    assert (choice.nodes, choice.sick) == (chosen, sick)


def test_without_a_culprit_none_is_well() -> None:
    findings = dict.fromkeys(NAMES, WELL)
    choice = choose(NAMES, findings, [failed("all-reduce", "no result", "look")], 2)
    assert choice.nodes == ()
    assert set(choice.sick) == set(NAMES)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shards"
    build_shards(list_scenes(6, 0, 32), root, BuildConfig(2, "ids"))
    return root


def test_shards_are_looked_at(shards: Path, tmp_path: Path) -> None:
    assert shards_finding(str(shards)).result == "3 shards"
    assert shards_finding("s3://bucket/x").state == "ok"
    assert shards_finding("").state == "ok"
    gone = shards_finding(str(tmp_path / "none"))
    assert gone.state == "failed"
    assert f"{tmp_path}/none/manifest.json cannot be read (No such file" in gone.result
    copy = shutil.copytree(shards, tmp_path / "copy")
    (copy / "shard-000001.tar").write_bytes(b"short")
    assert "shard-000001.tar has 5 bytes instead of" in shards_finding(str(copy)).result
    (copy / "shard-000001.tar").unlink()
    assert "shard-000001.tar cannot be read" in shards_finding(str(copy)).result
    (copy / "manifest.json").write_text('{"shards": 3}')
    assert "cannot be understood" in shards_finding(str(copy)).result


def test_a_manifest_leads_nowhere_else(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"] = [{"name": "../../../etc/passwd", "bytes": 1}]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert f"{copy}/passwd cannot be read" in shards_finding(str(copy)).result


def test_the_run_directory_is_looked_at(tmp_path: Path) -> None:
    assert run_finding(tmp_path).state == "ok"
    assert not list(tmp_path.iterdir())
    assert "is not there on this node" in run_finding(tmp_path / "none").result


@pytest.mark.slow
def test_devices_are_looked_at() -> None:
    assert device_finding("cpu", 2, 120.0).state == "ok"
    late = device_finding("cpu", 2, 0.2)
    assert late.state == "failed"
    assert "no answer within 0.2 s" in late.result


def test_choose_as_the_script_calls_it(tmp_path: Path) -> None:
    for name, findings in (("a", WELL), ("b", SICK)):
        rows = [finding.as_json() for finding in findings]
        (tmp_path / f"node-{name}.json").write_text(json.dumps(rows))
    report = [ok("all-reduce", "right sum").as_json()]
    (tmp_path / "all-reduce.json").write_text(json.dumps(report))

    def run(num_nodes: int) -> subprocess.CompletedProcess[str]:
        command = ["-m", "launch.node_check", "choose", f"--record={tmp_path}", "--names=a\nb"]
        return subprocess.run(
            [sys.executable, *command, f"--num-nodes={num_nodes}"],
            capture_output=True,
            text=True,
            env=dict(os.environ),
        )

    one, two = run(1), run(2)
    assert (one.returncode, one.stdout) == (0, "a\n")
    assert "maskbank: b is left out: shards: cannot be read" in one.stderr
    assert two.returncode == 1
    assert two.stderr.strip().endswith("submit with --exclude=b, or with --spare-nodes")

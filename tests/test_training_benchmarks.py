"""The benchmarks of training find what is there to be found; sizes that say nothing about speed."""

import multiprocessing
import os
import statistics
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floors, roofline, scaling, steady_state
from benchmarks._watch import command_line, watch
from tests.ranks import PRELOADED
from tests.sample_data import build_scene_shards
from trainer.attention import attend

LEAKS = """
    import json, os, socket, subprocess, sys, time
    from pathlib import Path

    run, name = Path(sys.argv[1]), sys.argv[2]
    held = []
    rows = (run / "metrics.jsonl").open("a")
    segment = open(f"/dev/shm/{name}", "wb")
    subprocess.Popen(["sleep", "60"], start_new_session=True)
    for step in range(10, 101, 10):
        held.append((os.urandom(4_000_000), open("/dev/null")))
        rows.write(json.dumps({"step": step}) + "\\n")
        rows.flush()
        looks = run.with_name("looks")
        seen = looks.stat().st_size
        while looks.stat().st_size < seen + 4:  # a sample and the mappings, however slow
            time.sleep(0.01)
    socket.socket(socket.AF_UNIX).bind(str(run / "listens"))
    Path(os.environ["TMPDIR"], "forgotten").touch()
"""


@pytest.mark.slow
def test_what_grows_and_what_stays_behind_is_found(tmp_path: Path) -> None:
    """Of a program that leaks; torchrun above it grows by nothing and leaves nothing."""
    run, temporary, script = tmp_path / "run", tmp_path / "tmp", tmp_path / "leaks.py"
    run.mkdir()
    temporary.mkdir()
    script.write_text(textwrap.dedent(LEAKS))
    (tmp_path / "looks").touch()
    name = f"maskbank-test-{os.getpid()}"
    command = [sys.executable, "-m", "launch.ranks", "--standalone", "--no-python"]

    def role(pid: int) -> str:
        words = command_line(pid)
        if "launch.ranks" in words:
            return "launcher"
        if str(script) not in words:
            return "other"
        with (tmp_path / "looks").open("a") as looks:  # that the program may go on
            looks.write(".")
        return "rank"

    try:
        watched = watch(
            [*command, sys.executable, str(script), str(run), name],
            *(run, temporary, role, 0.1),
            map_at=(20, 90),
        )
    finally:
        Path("/dev/shm", name).unlink(missing_ok=True)

    assert watched.status == 0
    assert watched.left.processes == ["sleep 60"]
    assert watched.left.segments == [name]
    assert watched.left.in_run == ["listens"]
    assert watched.left.temporary == ["forgotten"]

    rows = {
        (row.who, row.what): row for row in steady_state.summarise(watched.samples, 20, 100, 0.02)
    }
    memory = rows["rank", "anonymous, MB"]
    assert memory.levels[2] - memory.levels[0] == pytest.approx(28, abs=12)
    assert min(memory.slopes) > 150  # goes on, of 400 MB
    grown = {key for key, row in rows.items() if row.grown}
    assert grown == {("rank", what) for what in ("resident, MB", "anonymous, MB", "descriptors")}
    (line,) = steady_state.grown_kinds(watched.samples, 20, 100)
    assert line.startswith("rank: descriptors of `null`: ")
    mappings = steady_state.grown_mappings(watched, 20, 90)
    assert any(line.startswith("rank: `anonymous, ") for line in mappings), mappings


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    build_scene_shards(folder, 16, 40)
    return folder


def tiny(shards: Path, run: Path, batch: int) -> tuple[str, ...]:
    return (
        *(f"data.shards={shards}", f"run.directory={run}", f"data.batch_size={batch}"),
        *("run.steps=1000", "optim.lr=0.001", "run.precision=bf16", "data.loader=torch"),
        *("views.image_size=32", "model.decoder_channels=16", "model.embedding_dim=8"),
        *("bank.capacity=301", "data.threads=1", "bank.move=bank", "run.threads=1"),
    )


@pytest.mark.slow
def test_all_kinds_of_steps_are_taken_by_all_groups(shards: Path, tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(PRELOADED)
    groups = [
        scaling.Group(ranks, 4 * ranks, tiny(shards, tmp_path / str(ranks), 4 * ranks))
        for ranks in (1, 2)
    ]
    found = scaling.measure(groups, rounds=2, steps=1)
    assert set(found) == {(ranks, kind) for ranks in (1, 2) for kind in scaling.KINDS}
    for (ranks, kind), rows in found.items():
        with_bank, with_data = scaling.KINDS[kind]
        for row in rows:
            assert row["images_per_second"] * row["seconds"] == pytest.approx(4 * ranks)
            assert (row["exchange_ms"] > 0) == (with_bank and ranks == 2)
            assert (row["data_ms"] > 0) == with_data
            assert row["peak_mb"] > 50
        assert len(rows) == 2
        pairs = zip(rows, found[1, kind], strict=True)
        expected = [a["images_per_second"] / b["images_per_second"] for a, b in pairs]
        assert scaling.efficiencies(found, ranks, kind) == expected


@pytest.mark.slow
def test_a_rank_that_ends_is_no_hang(shards: Path, tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(PRELOADED)
    group = scaling.Group(1, 4, (*tiny(shards, tmp_path, 4), "run.steps=0", "run.epochs=0.01"))
    with pytest.raises(RuntimeError, match="a rank of 1 has ended"):
        scaling.measure([group], 1, 1)


def test_operations_and_bytes_of_products() -> None:
    """A convolution forward and backward, and a product; as torch's own counter has it."""
    work = floors.Work("")
    layer = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    images = torch.randn(2, 3, 10, 12)
    with FlopCounterMode(display=False) as torchs, floors.Products(work):
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(images)
        forward, size = work.flops[torch.bfloat16], work.bytes
        output.float().sum().backward()
        torch.relu(torch.randn(5, 6) @ torch.randn(6, 7))
    one = 2 * 2 * 10 * 12 * 8 * 27
    assert forward == one
    assert size == 2 * (images.numel() + layer.weight.numel() + output.numel())
    assert work.flops == {torch.bfloat16: 2 * one, torch.float32: 2 * 5 * 6 * 7}
    assert sum(work.flops.values()) == torchs.get_total_flops()
    assert work.shapes[torch.bfloat16, (2 * 10 * 12, 27, 8)] == one
    assert work.shapes[torch.float32, (5, 6, 7)] == 2 * 5 * 6 * 7


def test_operations_of_attention_to_the_bank() -> None:
    work = floors.Work("")
    with floors.Products(work):
        attend(torch.randn(50, 8), torch.randn(300, 8), 1.0)
    assert work.flops == {torch.float32: 2 * 2 * 50 * 300 * 8}


def test_the_larger_floor_counts() -> None:
    machine = floors.Machine(torch.device("cpu"), 0.001)
    measured = floors.Machine(torch.device("cpu"), 0.001)
    assert measured.copy_rate(5000) > 1e6
    assert measured.copy_rate(8192) == measured.copy_rate(5000)
    for dtype, rate in ((torch.float32, 1e9), (torch.bfloat16, 4e9)):
        for side in (1024, 2048, 8):
            machine.products[dtype, (side, side, side)] = rate / (1 if side == 8 else 2)
    machine._copies[1 << 20] = 1e8
    work = floors.Work("", bytes=1_000_000)
    assert floors.floor(work, machine) == (pytest.approx(0.01), "bytes")
    work.flops.update({torch.float32: 9_000_000, torch.bfloat16: 8_000_000})
    assert floors.floor(work, machine) == (pytest.approx(0.011), "products, float32")


@pytest.mark.slow
def test_every_part_of_a_step_has_a_time_and_a_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # large products in bf16 take minutes where the processor emulates them
    monkeypatch.setattr(floors, "_SQUARES", (64,))
    options = roofline.parse(
        [
            *("--network", "small", "--size", "32", "--batch", "4", "--bank", "5000"),
            *("--threads", "1", "--loader", "torch", "--rate-seconds", "0.001"),
        ]
    )
    step = roofline.make_step(options, tmp_path)
    before = [one.clone() for one in step.state.engine.network.parameters()]
    try:
        parts = roofline.measure(step, rounds=2)
    finally:
        step.close()
    after = list(step.state.engine.network.parameters())
    assert not torch.equal(after[0], before[0])  # the parts make up a step
    assert all(len(work.seconds) == 2 and work.bytes > 0 for work in parts.values())
    weights = 4 * sum(one.numel() for one in after)
    assert parts["momentum update"].bytes == 3 * weights
    assert parts["optimizer step"].bytes == 5 * weights
    assert parts["gradient norm"].bytes == weights
    query, backward = (parts[name].flops[torch.bfloat16] for name in ("query forward", "backward"))
    assert parts["key forward"].flops[torch.bfloat16] == query
    first = 2 * 4 * 16 * 16 * 32 * 27  # images have no gradient
    # on 8×8 features rates 2 and 4 see padding, of which the weights' gradient takes no product
    padding = sum(9 * 8 * 8 - (8 + 2 * (8 - rate)) ** 2 for rate in (2, 4)) * 2 * 4 * 128 * 64
    assert backward == 2 * query - first - padding
    decoded = parts["decode and augment"].bytes
    assert 2 * 4 * 32 * 32 * 13 < decoded < 2 * 4 * 32 * 32 * 13 + 4 * 100 * 100 * 4
    rows = {
        row["part"]: row
        for row in roofline.rows_of(parts, floors.Machine(torch.device("cpu"), 0.001))
    }
    assert rows["backward"]["share"] == pytest.approx(
        rows["backward"]["floor_ms"] / statistics.median(rows["backward"]["ms"])
    )

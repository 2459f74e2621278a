"""The benchmarks of training find what is there to be found; sizes that say nothing about speed."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks import steady_state
from benchmarks._watch import command_line, watch

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
        time.sleep(0.15)
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
    name = f"maskbank-test-{os.getpid()}"
    command = [sys.executable, "-m", "launch.ranks", "--standalone", "--no-python"]

    def role(pid: int) -> str:
        words = command_line(pid)
        return "launcher" if "launch.ranks" in words else "rank" if str(script) in words else "o"

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
    assert memory.levels[2] - memory.levels[0] == pytest.approx(28, abs=8)
    assert memory.slopes == pytest.approx((400, 400), rel=0.5)
    grown = {key for key, row in rows.items() if row.grown}
    assert grown == {("rank", what) for what in ("resident, MB", "anonymous, MB", "descriptors")}
    (line,) = steady_state.grown_kinds(watched.samples, 20, 100)
    assert line.startswith("rank: descriptors of `null`: ")
    mappings = steady_state.grown_mappings(watched, 20, 90)
    assert any(line.startswith("rank: `anonymous, ") for line in mappings), mappings

"""A real SLURM cluster on one machine: a controller, and nodes with networks of their own.

`start-cluster`, `node` and `stop-cluster` do the work, as root; each node has its own network, host
name, mounts and process numbers, so that power can be cut, cables pulled and file systems hidden.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "BOOT_FAIL", "OUT_OF_MEMORY"}
_SECONDS = 240.0


def why_not() -> str:
    """Why there can be no cluster here, or nothing."""
    if os.geteuid() != 0:
        return "root is needed for nodes with networks of their own"
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (packages slurm-wlm, munge, iproute2)"
    made = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True)
    return "" if made.returncode == 0 else "network namespaces cannot be made here"


class Cluster:
    """Of `num_nodes` nodes node1, node2, …, with two cores and two pretend GPUs each.

    Args:
        folder: of its state and logs.
        num_nodes: up to 9.
        network: first three numbers of its addresses.
    """

    def __init__(self, folder: Path, num_nodes: int, network: str = "10.77.0") -> None:
        self.folder, self.num_nodes, self._network = folder, num_nodes, network
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> "Cluster":
        started = subprocess.run(
            [HERE / "start-cluster", self.folder, str(self.num_nodes), self._network],
            capture_output=True,
            text=True,
        )
        if started.returncode:
            logs = [file.read_text()[-2000:] for file in (self.folder / "log").glob("*.log")]
            self.__exit__()
            raise RuntimeError("\n".join([started.stderr, *logs]))
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([HERE / "stop-cluster", self.folder], check=True)

    def call(self, *command: str, text: str | None = None) -> str:
        """What a command prints, SLURM's or ours; fails with what it said."""
        done = subprocess.run(
            command,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def node(self, what: str, name: str, *command: str) -> str:
        """kill (power off), start, cut or heal (its cable), or exec a command there."""
        done = subprocess.run(
            [HERE / "node", self.folder, what, name.removeprefix("node"), *command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script: str, *options: str) -> str:
        """Submits the text of a script; returns the job's number."""
        return self.call("sbatch", "--parsable", *options, text=script)

    def state(self, job: str) -> str:
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def nodes(self, job: str) -> list[str]:
        """Names of the nodes that a job has."""
        names = self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%N")
        return self.call("scontrol", "show", "hostnames", names).split() if names else []

    def show(self, job: str, name: str) -> str:
        """A value of `scontrol show job`."""
        line = self.call("scontrol", "--oneliner", "show", "job", job)
        return next(
            word.partition("=")[2] for word in line.split() if word.partition("=")[0] == name
        )

    def restarts(self, job: str) -> int:
        return int(self.show(job, "Restarts"))

    def hurry(self, job: str) -> None:
        """A requeued job waits for two minutes; this one starts now."""
        if self.state(job) != "PENDING" or self.show(job, "Reason") != "BeginTime":
            return
        time.sleep(2)  # earlier it would fail for good
        if self.state(job) == "PENDING":
            self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait(self, jobs: Sequence[str], seconds: float = _SECONDS) -> list[str]:
        """The states of jobs when all have ended; requeued ones need not wait."""

        def ended() -> bool:
            for job in jobs:
                self.hurry(job)
            return all(self.state(job) in ENDED for job in jobs)

        self.until(ended, f"the end of jobs {jobs}", jobs, seconds)
        return [self.state(job) for job in jobs]

    def until(
        self,
        what: Callable[[], bool],
        name: str,
        jobs: Sequence[str] = (),
        seconds: float = _SECONDS,
    ) -> None:
        """Waits for something, and fails with all that may explain why it did not come."""
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                known = [self.call("scontrol", "show", "job", job) for job in jobs]
                raise AssertionError("\n".join([f"waited {seconds:g} s for {name}", *known]))
            time.sleep(0.25)

    def processes(self, text: str) -> list[str]:
        """Command lines that hold `text`, anywhere on this machine, and still run."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                zombie = ") Z " in (folder / "stat").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if text in words and not zombie:
                found.append(f"{folder.name} {words}")
        return found

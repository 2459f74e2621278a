"""Which rank this process is, as torchrun or srun say it."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """This process among the ranks.

    Attributes:
        rank, world_size, local_rank: as torchrun counts them.
        node: number or name of the machine.
        address, port: of the store, where rank 0 is.
        agent_store: torchrun serves the store; else rank 0 has to.
    """

    rank: int
    world_size: int
    local_rank: int
    node: str
    address: str
    port: int
    agent_store: bool

    def environment(self) -> dict[str, str]:
        """The variables that say all this to a process, as torchrun sets them."""
        numbers = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": self.local_rank}
        return {
            **{name: str(value) for name, value in numbers.items()},
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_place(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun's variables name, or else srun's; None outside of ranks.

    A batch script and a shell that srun opened are one task each, and no ranks.

    Raises:
        ValueError: the variables contradict each other, or some are missing; what is wrong, a
            semicolon, and what to do.
    """
    if environment.get("RANK") and environment.get("WORLD_SIZE"):
        rank, world_size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
        local_rank = _number(environment, "LOCAL_RANK", "SLURM_LOCALID")
    elif _number(environment, "SLURM_STEP_NUM_TASKS") > 1 and environment.get("SLURM_PROCID"):
        rank, world_size = (
            _number(environment, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        )
        local_rank = _number(environment, "SLURM_LOCALID")
    else:
        return None
    if not 0 <= rank < world_size:
        raise ValueError(
            f"RANK is {rank} of WORLD_SIZE {world_size}, and is counted from 0; start with "
            "torchrun or srun, which set both, or unset them"
        )
    address, port = _store(environment)
    return Place(
        rank,
        world_size,
        local_rank,
        environment.get("GROUP_RANK") or environment.get("SLURM_NODEID") or socket.gethostname(),
        address,
        port,
        environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def first_host(nodes: str) -> str:
    """The first machine of SLURM's list: gpu[007-009,12],login → gpu007."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def _store(environment: Mapping[str, str]) -> tuple[str, int]:
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if address and port and port.isdigit():
        return address, int(port)
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job = environment.get("SLURM_JOB_ID")
    if nodes and job and job.isdigit():
        step = environment.get("SLURM_STEP_ID", "0")
        return first_host(nodes), 20_000 + (int(job) * 7 + _digits(step)) % 12_000
    raise ValueError(
        "RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT are not; start with torchrun "
        "or srun, or unset RANK and WORLD_SIZE for a check of this machine alone"
    )


def _number(environment: Mapping[str, str], *names: str) -> int:
    for name in names:
        if text := environment.get(name):
            if not text.isdigit():
                raise ValueError(f"{name} is {text!r}, which is no number; unset it")
            return int(text)
    return 0


def _digits(text: str) -> int:
    return int(text) if text.isdigit() else 0

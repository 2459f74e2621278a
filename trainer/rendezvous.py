"""A key-value store of this attempt alone, where torchrun keeps one store for all of them.

torchrun's agent serves the same store after a restart, with the addresses of the ranks before in it
(torch 2.14; it says that it makes a new one, and does not). Ranks that read an old address cannot
connect, or wait for ever. So rank 0 draws a name, tells it to each rank that asks with a number
drawn just now, and what the ranks then exchange is kept under that name.
"""

import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from data_pipeline.errors import InputError

_PAUSE = 0.02  # seconds between two looks


def fresh_store(rank: int, world_size: int, timeout_seconds: float) -> Store | None:
    """The store for `init_process_group`, None where its own is fresh; a collective.

    Raises:
        InputError: not all ranks came.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    limit = timedelta(seconds=timeout_seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=limit)
    deadline = time.monotonic() + timeout_seconds
    if rank == 0:
        name = uuid.uuid4().hex
        _tell_all(store, name, world_size, deadline)
    else:
        name = _ask(store, rank, deadline)
    return PrefixStore(f"maskbank/{name}", store)


def _tell_all(store: Store, name: str, world_size: int, deadline: float) -> None:
    missing, answered = set(range(1, world_size)), set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"come/{name}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"ask/{rank}"]):
                number = store.get(f"ask/{rank}").decode()
                if number not in answered:  # an old one harms nobody: no one waits for the answer
                    answered.add(number)
                    store.set(f"answer/{number}", name)
        _pause(deadline, f"ranks {sorted(missing)[:8]} did not come")


def _ask(store: Store, rank: int, deadline: float) -> str:
    number = uuid.uuid4().hex
    store.set(f"ask/{rank}", number)
    while not store.check([f"answer/{number}"]):
        _pause(deadline, "rank 0 did not answer")
    name = store.get(f"answer/{number}").decode()
    store.set(f"come/{name}/{rank}", "")
    return name


def _pause(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise InputError(
            f"the ranks did not find each other: {what}; look for what ended them in their output, "
            "and raise run.start_timeout_seconds if they need longer to start"
        )
    time.sleep(_PAUSE)

"""Several nodes on one machine: network namespaces behind one switch, on links of a known speed.

Needs root, `ip` and `tc`. Nothing of the machine's own network is touched.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH = "maskbank-switch"


def why_not() -> str:
    """Why nodes cannot be made here, or nothing."""
    if os.geteuid() != 0:
        return "root is needed for network namespaces"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{missing[0]} is not installed (package iproute2)" if missing else ""


@contextmanager
def nodes(count: int, gbit: float) -> Iterator[list[list[str]]]:
    """For each node the beginning of a command that runs there; its interface is eth0.

    Args:
        count: of nodes; node i has the address of `address(i)`.
        gbit: Gbit/s that a node can send.
    """
    names = [f"maskbank-node{number}" for number in range(count)]
    try:
        for name in (_SWITCH, *names):
            _run("ip", "netns", "add", name)
        _inside(_SWITCH, "ip", "link", "add", "switch", "type", "bridge")
        _inside(_SWITCH, "ip", "link", "set", "switch", "up")
        for number, name in enumerate(names):
            port = f"port{number}"
            pair = ("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0")
            _inside(_SWITCH, *pair, "netns", name)
            _inside(_SWITCH, "ip", "link", "set", port, "mtu", "9000", "master", "switch", "up")
            _inside(name, "ip", "link", "set", "eth0", "mtu", "9000")
            _inside(name, "ip", "address", "add", f"{address(number)}/16", "dev", "eth0")
            for device in ("eth0", "lo"):
                _inside(name, "ip", "link", "set", device, "up")
            rate = ("rate", f"{int(gbit * 1000)}mbit", "burst", "256kb", "latency", "100ms")
            _inside(name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *rate)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in (_SWITCH, *names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def address(number: int) -> str:
    return f"10.213.{number // 250}.{number % 250 + 1}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _inside(name: str, *command: str) -> None:
    _run("ip", "netns", "exec", name, *command)

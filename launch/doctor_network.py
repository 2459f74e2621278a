"""Network interfaces, the host's own name, and the addresses that a process is connected from.

`python -m launch.doctor_network SECONDS` looks the own name up, which can block, and answers with
JSON.
"""

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.doctor_finding import Finding, failed, info, ok, warning
from launch.doctor_process import run_probe

Interfaces = Mapping[str, Sequence[str]]  # addresses of each; none where it is down or unused

_SIOCGIFADDR = 0x8915  # netdevice(7)
_ESTABLISHED = "01"
VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}


def read_interfaces() -> dict[str, list[str]]:
    """The interfaces of this machine and their addresses, IPv4 first."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name, addresses in found.items():
            with contextlib.suppress(OSError):  # it has none
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                addresses.append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            words = line.split()
            address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0]))
            found.setdefault(words[-1], []).append(address)
    return found


def list_interfaces(interfaces: Interfaces) -> str:
    """For people: those that can be used first, loopback last."""
    usable = [name for name, addresses in interfaces.items() if addresses]
    usable.sort(key=lambda name: (is_loopback(interfaces[name]), name))
    listed = ", ".join(f"{name} ({interfaces[name][0]})" for name in usable)
    idle = ", ".join(sorted(set(interfaces) - set(usable)))
    return listed + (f"; without an address: {idle}" if idle else "")


def best_interface(interfaces: Interfaces) -> str:
    """The one that other machines can reach as a rule; loopback where there is no other."""
    usable = [name for name, addresses in interfaces.items() if addresses]
    virtual = ("docker", "veth", "br-", "virbr", "cni", "flannel")
    outside = [name for name in usable if not is_loopback(interfaces[name])]
    real = [name for name in outside if not name.startswith(virtual)]
    return (real or outside or usable or ["eth0"])[0]


def is_loopback(addresses: Sequence[str]) -> bool:
    return bool(addresses) and all(
        address.startswith("127.") or address == "::1" for address in addresses
    )


def missing_interfaces(backend: str, value: str, interfaces: Interfaces) -> list[str]:
    """Names in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME that no interface with an address has.

    gloo takes names, nccl prefixes (`eth`), exact names (`=eth0`) or what to leave out (`^docker`).
    """
    usable = [name for name, addresses in interfaces.items() if addresses]
    if backend == "gloo":
        return [name for name in value.split(",") if name not in usable]
    words = value.removeprefix("^").removeprefix("=").split(",")
    exact = value.removeprefix("^").startswith("=")

    def matches(word: str, name: str) -> bool:
        return name == word if exact else name.startswith(word)

    if value.startswith("^"):
        left = [name for name in usable if not any(matches(word, name) for word in words)]
        return [] if left else [value]
    found = any(matches(word, name) for word in words for name in usable)
    return [] if found else words  # the first that is there is taken


def interface_findings(
    environment: Mapping[str, str], interfaces: Interfaces, backend: str
) -> list[Finding]:
    """Whether the variables that choose an interface name one that is there.

    Args:
        backend: that the ranks will use: for it a wrong name is a failure.
    """
    findings = []
    for each, variable in VARIABLES.items():
        value = environment.get(variable)
        if not value:  # empty is as good as unset to both
            continue
        check, said = f"{each} interface", f"{variable}={value}"
        if not (missing := missing_interfaces(each, value, interfaces)):
            findings.append(ok(check, said))
            continue
        report = failed if each == backend else warning
        what = ", ".join(name or "an empty name" for name in missing)
        known = [name for name in missing if name in interfaces]
        why = "has no address" if known else "is no interface of this machine"
        remedy = interface_remedy(variable, interfaces)
        findings.append(report(check, f"{said}, but {what} {why}", remedy, value=value))
    return findings


def interface_remedy(variable: str, interfaces: Interfaces) -> str:
    best = best_interface(interfaces)
    return f"export {variable}={best}, or unset it; there are: {list_interfaces(interfaces)}"


def host_finding(
    facts: Mapping[str, Any], interfaces: Interfaces, num_nodes: int, chosen: str | None
) -> Finding:
    """Whether the host's own name leads to an address of the host, as torchrun and gloo need.

    Args:
        facts: of `look_up_own_name`, or an `error`.
        chosen: GLOO_SOCKET_IFNAME, with which gloo does not look at the name.
        num_nodes: with several, an address that only this machine reaches is not enough.
    """
    host = str(facts.get("host") or socket.gethostname())
    addresses, usable = list(facts.get("addresses", [])), list(facts.get("usable", []))
    shown = ", ".join(usable or addresses)
    elsewhere = f"export GLOO_SOCKET_IFNAME={best_interface(interfaces)}"
    values = {"host": host, "addresses": addresses}
    if num_nodes == 1 and not (usable and facts.get("full_usable", True)):
        name = facts.get("full_name", host) if usable else host
        reason = facts.get("error") or (f"{shown} is another's" if shown else "unknown")
        return failed(
            "host name",
            f"{name} leads to no address of this machine ({reason}); torchrun's ranks look for "
            "each other under this name",
            f"add the line '127.0.0.1 {name}' to /etc/hosts",
            **values,
        )
    if chosen and num_nodes > 1:
        return info("host name", f"{host}; GLOO_SOCKET_IFNAME={chosen} is used instead", **values)
    if num_nodes > 1 and (not usable or is_loopback(usable[:1])):  # gloo takes the first
        said = f"{host} leads to {usable[0]}" if usable else f"{host} leads to no address"
        return warning(
            "host name",
            f"{said}, which the other nodes cannot reach",
            f"{elsewhere} on all nodes, or mend the name in /etc/hosts or DNS",
            **values,
        )
    return Finding("host name", f"{host} is {shown}", "ok", values=values, varies=True)


def look_up_own_name() -> dict[str, Any]:
    """The host's name, its addresses, and those of them that are this machine's.

    `full_name` is what torchrun calls the machine; it need not lead back to it.
    """
    host = socket.gethostname()
    addresses, usable = _look_up(host)
    full_name = socket.getfqdn(host)
    full_usable = True
    if full_name != host:
        try:
            full_usable = bool(_look_up(full_name)[1])
        except OSError:
            full_usable = False
    return {
        "host": host,
        "addresses": addresses,
        "usable": usable,
        "full_name": full_name,
        "full_usable": full_usable,
    }


def _look_up(host: str) -> tuple[list[str], list[str]]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    addresses = {str(entry[4][0]): entry for entry in found}
    usable = []
    for address, (family, kind, protocol, _, place) in addresses.items():
        with socket.socket(family, kind, protocol) as probe, contextlib.suppress(OSError):
            probe.bind(place)
            usable.append(address)
    return list(addresses), usable


def connected_interfaces(without_port: int) -> list[str]:
    """Interfaces that this process's connections to other processes go over, sorted.

    Args:
        without_port: of the peer; connections to it (the store) are passed over.
    """
    own = {_link(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    names = {address: name for name, all_ in read_interfaces().items() for address in all_}
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                local, remote, state, inode = words[1], words[2], words[3], words[9]
                port = int(remote.partition(":")[2], 16)
                if state == _ESTABLISHED and f"socket:[{inode}]" in own and port != without_port:
                    address = parse_address(local.partition(":")[0])
                    found.add(names.get(address, address))
    return sorted(found)


def parse_address(text: str) -> str:
    """An address of /proc/net/tcp or tcp6: hexadecimal words in the machine's byte order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    if len(packed) == 4:
        return socket.inet_ntoa(packed)
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):  # IPv4 over an IPv6 socket
        return socket.inet_ntoa(packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def network_finding(used: Mapping[int, Sequence[str]], backend: str) -> Finding | None:
    """Which interface the ranks were connected over.

    Args:
        used: interfaces by rank.
    """
    kinds = {tuple(names) for names in used.values()}
    if not any(kinds):
        return None
    if len(kinds) == 1:
        said = f"the ranks talk over {', '.join(next(iter(kinds)))}"
    else:
        said = "; ".join(f"rank {rank}: {', '.join(used[rank])}" for rank in sorted(used))
    if backend == "nccl":
        said += " (to find each other; NCCL_DEBUG=INFO says what the data take)"
    return info("network", said, interfaces={str(rank): list(used[rank]) for rank in used})


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


if __name__ == "__main__":
    run_probe(look_up_own_name)

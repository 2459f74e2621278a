"""What became of the ranks, as findings: pure functions of the collector's report."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from launch.doctor_finding import Finding, duration, failed, info, ok, warning
from launch.doctor_network import Interfaces, best_interface, interface_remedy, network_finding

MEGABYTES = 64
SLOW = 100e6  # bytes a second
_MORE_TIME = "raise --timeout if the machine is only slow"
_CHECK = "all-reduce"


def node_labels(report: Mapping[str, Any]) -> dict[int, str]:
    """Names of the nodes by rank; two nodes of one host name are told apart by their number."""
    arrived = {int(rank): found.get("arrived") for rank, found in report["ranks"].items()}
    nodes: dict[str, set[str]] = {}
    for about in arrived.values():
        if about:
            nodes.setdefault(about["host"], set()).add(about["node"])
    labels = {}
    for rank, about in arrived.items():
        if about:
            host, node = about["host"], about["node"]
            labels[rank] = host if len(nodes[host]) == 1 else f"{host} (node {node})"
    return labels


def rank_findings(
    report: Mapping[str, Any], interfaces: Interfaces, environment: Mapping[str, str]
) -> list[Finding]:
    """The sum, the network, the clocks and the shared folder.

    Args:
        report: of `doctor_ranks.collect`, or an `error`.
        interfaces, environment: of this machine, for remedies where ranks do not tell theirs.
    """
    if error := report.get("error"):
        return [
            failed(
                _CHECK,
                f"the ranks did not come together: {error}",
                _remedy(error, interfaces, environment),
            )
        ]
    ranks = {int(rank): found for rank, found in report["ranks"].items()}
    labels = node_labels(report)
    findings = _failures(report, ranks, labels, interfaces, environment)
    results = {rank: found["result"] for rank, found in ranks.items() if "result" in found}
    if not findings:
        findings = [_sum_finding(results, labels, interfaces)]
    if results:
        backend = next(iter(results.values()))["backend"]
        used = {rank: result["interfaces"] for rank, result in results.items()}
        network = network_finding(used, backend)
        findings += [network] if network else []
    clocks = {rank: found["clock"] for rank, found in ranks.items() if found.get("clock")}
    findings += [clock_finding(clocks, labels)] if len(clocks) > 1 else []
    shared = {rank: result["shared"] for rank, result in results.items() if result["shared"]}
    return findings + ([shared_finding(shared, labels)] if len(shared) > 1 else [])


def _failures(
    report: Mapping[str, Any],
    ranks: Mapping[int, Mapping[str, Any]],
    labels: Mapping[int, str],
    interfaces: Interfaces,
    environment: Mapping[str, str],
) -> list[Finding]:
    """The ranks that failed, one row a reason; what merely follows from another is left out."""
    reasons: dict[str, list[int]] = {}
    broken = {rank: found["failed"] for rank, found in ranks.items() if "failed" in found}
    died = {rank: failure for rank, failure in broken.items() if failure.get("died")}
    own = {rank: each for rank, each in broken.items() if not _follows(each["reason"])}
    for rank, failure in sorted((died or own or broken).items()):
        stage = f" while {failure['stage']}" if failure.get("stage") else ""
        reasons.setdefault(f"{failure['reason']}{stage}", []).append(rank)
    silent = [rank for rank, found in ranks.items() if not {"result", "failed"} & set(found)]
    if silent and not reasons:
        missing = [rank for rank in silent if "arrived" not in ranks[rank]]
        waited = f"{report.get('waited', 0):.0f} s"
        for rank in missing or silent:
            what = f"did not arrive within {waited}"
            if not missing:
                stage = ranks[rank].get("stage", "joining")
                what = f"gave no answer within {waited}; it was {stage}"
            reasons.setdefault(what, []).append(rank)
    return [
        failed(
            _CHECK,
            f"{_who(each, labels)}: {reason}",
            _remedy(
                reason,
                _about(ranks[each[0]], "interfaces", interfaces),
                _about(ranks[each[0]], "chosen", environment),
            ),
            ranks=each,
            reason=reason,
        )
        for reason, each in reasons.items()
    ]


def _about(found: Mapping[str, Any], what: str, otherwise: Any) -> Any:
    """What a rank told about its machine when it arrived."""
    return (found.get("arrived") or {}).get(what, otherwise)


def _sum_finding(
    results: Mapping[int, Mapping[str, Any]], labels: Mapping[int, str], interfaces: Interfaces
) -> Finding:
    world_size, nodes = len(results), len(set(labels.values()))
    first = results[0]
    latency = max(result["latency"] for result in results.values())
    seconds = max(result["large_seconds"] for result in results.values())
    speed = MEGABYTES * 1e6 / seconds
    group = f"{first['backend']}, {world_size} rank{'s' * (world_size > 1)}"
    group += f" on {nodes} nodes" if nodes > 1 else ""
    values = {
        "backend": first["backend"],
        "ranks": world_size,
        "latency_seconds": latency,
        "bytes_per_second": speed,
    }
    wrong = {rank: result["wrong"] for rank, result in results.items()}
    wrong = {rank: value for rank, value in wrong.items() if value is not None}
    if wrong:
        rank = min(wrong)
        right = world_size * (world_size + 1) // 2
        return failed(
            _CHECK,
            f"{group}: {_who(sorted(wrong), labels)} summed to {wrong[rank]:g} instead of {right}",
            "take that machine out and have its memory and network card tested; numbers computed "
            "there cannot be trusted",
            **values,
        )
    said = f"{group}: right sum; one number takes {duration(latency)}, {MEGABYTES} MB take "
    said += f"{duration(seconds)} ({speed / 1e9:.2g} GB/s)"
    if world_size > 1 and speed < SLOW:
        variable = "NCCL_SOCKET_IFNAME" if first["backend"] == "nccl" else "GLOO_SOCKET_IFNAME"
        return warning(
            _CHECK,
            f"{said}, which is slow",
            f"a faster network, if there is one: {interface_remedy(variable, interfaces)}; else "
            "give each rank larger batches (optim.accumulate), so that they talk less",
            **values,
        )
    return ok(_CHECK, said, **values)


def clock_finding(clocks: Mapping[int, Mapping[str, float]], labels: Mapping[int, str]) -> Finding:
    """The largest difference between two ranks' clocks.

    Args:
        clocks: by rank: `offset` from rank 0's node and the `error` it may have, seconds.
    """
    first = min(clocks, key=lambda rank: clocks[rank]["offset"])
    last = max(clocks, key=lambda rank: clocks[rank]["offset"])
    skew = clocks[last]["offset"] - clocks[first]["offset"]
    error = clocks[last]["error"] + clocks[first]["error"]
    said = f"at most {duration(skew + error)} apart"
    values = {"seconds": skew, "error_seconds": error, "ranks": [first, last]}
    if skew - error <= 1.0:
        return ok("clocks", said, **values)
    who = f"{_who([last], labels)} is ahead of {_who([first], labels)}"
    return warning(
        "clocks",
        f"{said}: {who}",
        "set them by one time server on every node: timedatectl set-ntp true, or chrony; till then "
        "times in logs and of checkpoints cannot be compared",
        **values,
    )


def shared_finding(shared: Mapping[int, str], labels: Mapping[int, str]) -> Finding:
    """Whether all nodes see one folder.

    Args:
        shared: what `doctor_ranks` found, by rank: own, seen, unlocked or missing.
    """
    values = {"seen": {labels.get(rank, str(rank)): found for rank, found in shared.items()}}
    if missing := sorted(rank for rank, found in shared.items() if found == "missing"):
        return failed(
            "shared folder",
            f"{_who(missing, labels)} does not see a file that rank 0 just wrote",
            "give --folder (and run.directory, data.shards) on a file system that all nodes mount "
            "at the same place",
            **values,
        )
    if unlocked := sorted(rank for rank, found in shared.items() if found == "unlocked"):
        return warning(
            "shared folder",
            f"all nodes see it, but {_who(unlocked, labels)} does not see rank 0's lock",
            "build shards into one folder from one node at a time, or have it mounted with locks "
            "between nodes (Lustre: -o flock, not localflock)",
            **values,
        )
    return ok("shared folder", "all nodes see the same files and locks", **values)


def difference_findings(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Packages whose versions are not the same on all nodes."""
    versions: dict[str, dict[str, list[str]]] = {}
    for node, findings in by_node.items():
        for finding in findings:
            if finding.check in ("Python", "packages"):
                for name, version in finding.values.items():
                    shown = "Python" if finding.check == "Python" else name
                    versions.setdefault(shown, {}).setdefault(str(version), []).append(node)
    return [
        warning(
            "versions",
            f"{name} differs: "
            + "; ".join(f"{version} on {', '.join(nodes[:4])}" for version, nodes in there.items()),
            "use one environment on all nodes, on a shared disk or from one list of versions",
        )
        for name, there in versions.items()
        if len(there) > 1
    ]


def _remedy(reason: str, interfaces: Interfaces, environment: Mapping[str, str | None]) -> str:
    """What to do about a reason that a library gave."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if environment.get(variable) and re.search(
            r"find address for|[Nn]o socket interface|Bootstrap", reason
        ):
            return interface_remedy(variable, interfaces)
    if unknown := re.search(r"(\S+) cannot be resolved|addresses of \(([^,)]+)", reason):
        name = unknown.group(1) or unknown.group(2)
        return (
            f"make the name known on every node, in DNS or /etc/hosts (on a single machine by the "
            f"line '127.0.0.1 {name}'), or give MASTER_ADDR as an address"
        )
    choose = f"export GLOO_SOCKET_IFNAME={best_interface(interfaces)}"
    for pattern, remedy in (
        (
            r"remote=\[127\.",
            f"a host's own name leads to itself only (127.x): {choose} on every node, or mend the "
            "name in /etc/hosts",
        ),
        ("SIGKILL", "the kernel or SLURM ends what takes too much memory: see dmesg and --mem"),
        ("SIGBUS", "/dev/shm is full or too small: docker run --shm-size=8g"),
        ("SIGILL", "this processor lacks what torch was compiled for: install another build"),
        ("SIG(SEGV|ABRT)", "pip install --force-reinstall torch; then see dmesg"),
        (
            "did not arrive",
            f"see what they say themselves; {_MORE_TIME}; if this shell is not to be a rank, unset "
            "RANK WORLD_SIZE MASTER_ADDR MASTER_PORT",
        ),
        ("no answer within", f"{choose} on every node, open the ports between them; {_MORE_TIME}"),
        ("sees no GPU", "--device cpu, or auto"),
        ("GPU", "start at most as many ranks a node as it has GPUs, or --device cpu"),
        ("in use|EADDRINUSE", "export MASTER_PORT=29511, or another free port"),
        (
            "not reached|refused|[Tt]imed? ?out|[Cc]onnect|resolve|No route|unreachable",
            f"every node must resolve and reach MASTER_ADDR and the others on all ports: see the "
            f"firewall; {choose} on every node where the default is wrong",
        ),
    ):
        if re.search(pattern, reason):
            return remedy
    return (
        "export TORCH_DISTRIBUTED_DEBUG=DETAIL NCCL_DEBUG=INFO, then `torchrun --nproc-per-node=2 "
        "-m trainer.train …` shows the whole story"
    )


def _follows(reason: str) -> bool:
    """Whether it is what a rank says when another one is gone."""
    return re.search(r"closed by peer|reset by peer|Broken pipe|remote process", reason) is not None


def _who(ranks: Sequence[int], labels: Mapping[int, str]) -> str:
    """rank 3 on node-b; ranks 0, 1."""
    if len(ranks) == 1:
        on = (
            f" on {labels[ranks[0]]}"
            if len(set(labels.values())) > 1 and ranks[0] in labels
            else ""
        )
        return f"rank {ranks[0]}{on}"
    listed = ", ".join(str(rank) for rank in ranks[:8])
    return f"ranks {listed}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def ranks_not_run(reason: str) -> Finding:
    return info(_CHECK, f"not tried, since {reason}")

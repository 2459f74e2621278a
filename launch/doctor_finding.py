"""What a check found, and how findings are shown: a table for people, JSON for programs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

JSON_FORMAT = 1  # raised when a key changes its meaning
STATES = ("ok", "info", "warning", "failed")
_COLOURS = {"ok": "green", "info": "blue", "warning": "yellow", "failed": "red"}
_NODES_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: what was looked at.
        result: what was found, one sentence or list.
        state: ok, info, warning or failed.
        remedy: what the user can do; every warning and every failure has one.
        values: the figures of the result, for programs.
        varies: the result holds amounts that differ from node to node by nature.
        node: on which machine; empty where there is one only, or for all of them together.
    """

    check: str
    result: str
    state: str
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    varies: bool = False
    node: str = ""

    def __post_init__(self) -> None:
        assert self.state in STATES, self.state
        assert bool(self.remedy) == (self.state in ("warning", "failed")), self

    def as_json(self) -> dict[str, Any]:
        """What a program reads; `Finding(**…)` makes a finding of it again."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def ok(check: str, result: str, **values: Any) -> Finding:
    return Finding(check, result, "ok", values=values)


def info(check: str, result: str, **values: Any) -> Finding:
    return Finding(check, result, "info", values=values)


def warning(check: str, result: str, remedy: str, **values: Any) -> Finding:
    return Finding(check, result, "warning", remedy, values)


def failed(check: str, result: str, remedy: str, **values: Any) -> Finding:
    return Finding(check, result, "failed", remedy, values)


def exit_status(findings: Iterable[Finding]) -> int:
    """1 where something failed; warnings alone are no failure."""
    return int(any(finding.state == "failed" for finding in findings))


def as_json(findings: Sequence[Finding], nodes: Sequence[str]) -> dict[str, Any]:
    """The object that `--json` prints."""
    counts = {state: _count(findings, state) for state in STATES}
    return {
        "format": JSON_FORMAT,
        "state": next((state for state in ("failed", "warning") if counts[state]), "ok"),
        "counts": counts,
        "nodes": list(nodes),
        "findings": [finding.as_json() for finding in findings],
    }


def print_table(findings: Sequence[Finding], nodes: Sequence[str], console: Console) -> None:
    """The table, a line that sums it up, and under each warning or failure its remedy.

    Args:
        nodes: by name; with more than one the table says which node a row is about.
    """
    several = len(nodes) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    if several:
        table.add_column("node", overflow="fold", max_width=24)
    table.add_column("result", overflow="fold")
    rows = merge_nodes(findings, nodes) if several else findings
    for finding in rows:
        state = Text(finding.state, style=f"bold {_COLOURS[finding.state]}")
        node = [Text(finding.node or "all")] if several else []
        table.add_row(Text(finding.check), state, *node, _result(finding))
    console.print(table)
    console.print()
    console.print(Text(summary(rows)), style="bold", soft_wrap=True)


def _result(finding: Finding) -> RenderableType:
    """What was found, and below it, behind an arrow, what to do."""
    text = Text(_printable(finding.result), overflow="fold")
    if not finding.remedy:
        return text
    remedy = Table.grid(padding=(0, 1, 0, 0))
    remedy.add_column(no_wrap=True)
    remedy.add_column(overflow="fold")
    remedy.add_row("→", Text(_printable(finding.remedy)), style=_COLOURS[finding.state])
    return Group(text, remedy)


def summary(findings: Sequence[Finding]) -> str:
    """How many checks failed or warn, in words."""
    broken, warnings = _count(findings, "failed"), _count(findings, "warning")
    if not broken and not warnings:
        return f"{len(findings)} checks, nothing to mend"
    parts = [f"{broken} failed"] if broken else []
    parts += [f"{warnings} warning{'s' * (warnings > 1)}"] if warnings else []
    return f"{len(findings)} checks: {', '.join(parts)}; what to do stands after the arrows"


def merge_nodes(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """One row for all nodes that say the same; `node` then names them, or is empty for all.

    Where a result varies by nature, its state decides, and the first node's amounts are shown.
    """
    groups: dict[tuple[str, ...], list[Finding]] = {}
    places: dict[str, int] = {}  # a check's rows stay together
    for finding in findings:
        said = "" if finding.varies else finding.result
        groups.setdefault((finding.check, finding.state, said), []).append(finding)
        places.setdefault(finding.check, len(places))
    rows = []
    for group in groups.values():
        named = [finding.node for finding in group if finding.node]
        first = group[0]
        if len({finding.result for finding in group}) > 1:
            first = replace(first, result=f"{first.result} (others alike)")
        everywhere = not named or set(named) == set(nodes)
        rows.append(replace(first, node="" if everywhere else _listed(named)))
    return sorted(rows, key=lambda row: places[row.check])


def size(count: float) -> str:
    """Bytes as people read them: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds as people read them: 120 µs, 83 ms, 4.1 s."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def _count(findings: Iterable[Finding], state: str) -> int:
    return sum(finding.state == state for finding in findings)


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _NODES_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:_NODES_NAMED])} and {len(names) - _NODES_NAMED} more"


def _printable(text: str) -> str:
    """Without what would move the cursor: results quote other programs and file names."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[^\S\n]", " ", text).translate(_CONTROL)


_CONTROL = {code: "?" for code in (*range(32), 127) if code != 10}

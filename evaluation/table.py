"""All rows of the paper's table in one: ours, network by network, with the published figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.files import atomic_write, write_json
from evaluation.published import Published
from evaluation.result import Result, mean_and_spread


@dataclass(frozen=True)
class Row:
    """One figure of one protocol.

    Attributes:
        protocol, title, measure: which.
        values: percent, one a seed, by network.
        published: what others report.
    """

    protocol: str
    title: str
    measure: str
    values: dict[str, tuple[float, ...]]
    published: tuple[Published, ...]


@dataclass(frozen=True)
class NotScored:
    """A row that could not be made.

    Attributes:
        row: its title.
        network, step: as of a `Result`.
        reason: why.
    """

    row: str
    network: str
    step: int
    reason: str

    def __str__(self) -> str:
        return f"{self.row} of the {self.network} network could not be scored: {self.reason}"


def table_rows(results: Sequence[Result]) -> list[Row]:
    """The rows of several networks' results, in the order in which protocols first appear."""
    rows: dict[tuple[str, str], Row] = {}
    for result in results:
        for measure, values in ({result.measure: result.values} | result.metrics).items():
            key = (result.protocol, measure)
            if key not in rows:
                published = tuple(one for one in result.published if one.metric == measure)
                rows[key] = Row(result.protocol, result.title, measure, {}, published)
            rows[key].values[result.network] = values
    return list(rows.values())


def write_table(
    results: Sequence[Result], missing: Sequence[NotScored], folder: Path, data_set: str
) -> Path:
    """Writes `table.json` (`DATA SET-table.json`) and `.md`; returns the Markdown's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{data_set}-table.json" if data_set else "table.json")
    rows, networks = table_rows(results), _networks(results, missing)
    value: dict[str, Any] = {
        "data_set": data_set,
        "networks": networks,
        "rows": [
            {
                "protocol": row.protocol,
                "measure": row.measure,
                "values": {
                    name: [None if np.isnan(one) else round(one, 4) for one in values]
                    for name, values in row.values.items()
                },
                "published": [{"what": one.what, "value": one.value} for one in row.published],
            }
            for row in rows
        ],
        "not_scored": [asdict(one) for one in missing],
    }
    write_json(path, value, indent=1)
    lines = [f"| | {' | '.join(networks)} | published |", "|---" * (len(networks) + 2) + "|"]
    for row in rows:
        figures = [mean_and_spread(row.values.get(name, ())) for name in networks]
        lines.append(
            f"| {row.title}: {row.measure} | {' | '.join(figures)} | {_published(row) or '–'} |"
        )
    for title, failed in _by_row(missing).items():
        cells = ["not scored" if name in failed else "" for name in networks]
        lines.append(f"| {title} | {' | '.join(cells)} | |")
    lines += ["", *(f"- {one}" for one in missing)] if missing else []
    with atomic_write(path.with_suffix(".md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path.with_suffix(".md")


def show_table(results: Sequence[Result], missing: Sequence[NotScored], console: Console) -> None:
    """Prints the table; further metrics of a protocol are indented below it."""
    networks = _networks(results, missing)
    table = Table()
    table.add_column("row")
    for name, step in networks.items():
        table.add_column(Text(f"{name}, step {step}"), justify="right")
    table.add_column("published", style="dim")
    last = ""
    for row in table_rows(results):
        named = f"{row.title}: {row.measure}" if row.protocol != last else f"  {row.measure}"
        last = row.protocol
        figures = [mean_and_spread(row.values.get(name, ())) for name in networks]
        table.add_row(Text(named), *figures, Text(_published(row)))
    for title, failed in _by_row(missing).items():
        table.add_row(Text(title), *("not scored" if name in failed else "" for name in networks))
    console.print(table)
    for one in missing:
        console.print(Text(str(one)))


def _networks(results: Sequence[Result], missing: Sequence[NotScored]) -> dict[str, int]:
    """Networks and their steps, in the order in which they first appear."""
    of_results = {one.network: one.step for one in results}
    return of_results | {one.network: one.step for one in missing}


def _by_row(missing: Sequence[NotScored]) -> dict[str, set[str]]:
    rows: dict[str, set[str]] = {}
    for one in missing:
        rows.setdefault(one.row, set()).add(one.network)
    return rows


def _published(row: Row) -> str:
    return "; ".join(f"{one.value:.1f} ({one.what})" for one in row.published)

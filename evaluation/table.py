"""All rows of the paper's table in one: ours, network by network, with the published figures."""

from collections.abc import Sequence
from dataclasses import dataclass
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


def write_table(results: Sequence[Result], folder: Path) -> Path:
    """Writes `table.json` (`DATA SET-table.json`) and `.md`; returns the Markdown's path."""
    data_set = results[0].data_set
    path = folder / (f"{data_set}-table.json" if data_set else "table.json")
    rows, networks = table_rows(results), _networks(results)
    value: dict[str, Any] = {
        "data_set": data_set,
        "networks": {name: _step(results, name) for name in networks},
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
    }
    write_json(path, value, indent=1)
    lines = [f"| | {' | '.join(networks)} | published |", "|---" * (len(networks) + 2) + "|"]
    for row in rows:
        figures = [mean_and_spread(row.values.get(name, ())) for name in networks]
        lines.append(
            f"| {row.title}: {row.measure} | {' | '.join(figures)} | {_published(row) or '–'} |"
        )
    with atomic_write(path.with_suffix(".md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return path.with_suffix(".md")


def show_table(results: Sequence[Result], console: Console) -> None:
    """Prints the table; further metrics of a protocol are indented below it."""
    networks = _networks(results)
    table = Table()
    table.add_column("row")
    for name in networks:
        table.add_column(Text(f"{name}, step {_step(results, name)}"), justify="right")
    table.add_column("published", style="dim")
    last = ""
    for row in table_rows(results):
        named = f"{row.title}: {row.measure}" if row.protocol != last else f"  {row.measure}"
        last = row.protocol
        figures = [mean_and_spread(row.values.get(name, ())) for name in networks]
        table.add_row(Text(named), *figures, Text(_published(row)))
    console.print(table)


def _networks(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.network for result in results))


def _step(results: Sequence[Result], network: str) -> int:
    return next(result.step for result in results if result.network == network)


def _published(row: Row) -> str:
    return "; ".join(f"{one.value:.1f} ({one.what})" for one in row.published)

"""Several runs side by side: every figure, the settings that differ, curves, the same pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.errors import InputError
from evaluation.report import (
    CURVES,
    NETWORK_TITLES,
    names_of,
    read_all_examples,
    write_page,
)
from evaluation.report_data import (
    Evaluation,
    data_set_title,
    read_evaluations,
    read_metrics,
    require_results,
    tell_apart,
)
from evaluation.report_figures import CHART, Metrics, overlaid_chart, overlay, png_data_uri
from evaluation.report_tables import INITIAL, Figure, Key, figure_of, network_order

MAX_COLUMNS = 8  # networks side by side: as many colours there are
MAX_PICTURES = 8
_MAX_SETTINGS = 2000  # of a configuration
_MAX_CONFIG = 1 << 20  # bytes
_DEPTH = 8
_PLACES = ("run.directory",)  # differ always and say nothing


@dataclass(frozen=True)
class Column:
    """One network of one folder.

    Attributes:
        title: of the column, different for each.
        network: as results name it.
        evaluations: of it.
        before: of the same folder's network before training.
        settings: of config.yaml, by dotted name; empty without one.
        entries: of metrics.jsonl.
        examples: by data set, this network's.
    """

    title: str
    network: str
    evaluations: list[Evaluation]
    before: list[Evaluation]
    settings: dict[str, str]
    entries: Metrics
    examples: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One figure of one protocol and data set.

    Attributes:
        title: of the protocol.
        data_set: for people, empty for shards.
        measure: of the figure.
        main: whether it is the protocol's own.
        cells: one a column.
        before: of the network before training, one a column.
        best: columns of the largest mean, where at least two have one, and not the same.
    """

    title: str
    data_set: str
    measure: str
    main: bool
    cells: list[Figure | None]
    before: list[Figure | None]
    best: frozenset[int]


def read_columns(folders: Sequence[Path]) -> list[Column]:
    """The networks of all folders; that before training only where a folder has no other.

    Raises:
        InputError: a folder holds no results, or there are too many networks.
    """
    columns = [column for folder in folders for column in _columns_of(folder, folders)]
    if len(columns) > MAX_COLUMNS:
        raise InputError(
            f"{len(columns)} networks are too many side by side; compare {MAX_COLUMNS} at most"
        )
    # a row is of one size and of the same images in all columns
    together = [one for column in columns for one in (*column.evaluations, *column.before)]
    noted = iter(tell_apart(together))
    return [
        replace(
            column,
            evaluations=list(islice(noted, len(column.evaluations))),
            before=list(islice(noted, len(column.before))),
        )
        for column in columns
    ]


def _columns_of(folder: Path, folders: Sequence[Path]) -> Iterator[Column]:
    require_results(folder)
    evaluations, examples = read_evaluations(folder), read_all_examples(folder)
    config = folder / "config.yaml"
    settings = flat_settings(config) if config.is_file() else {}
    entries, _ = read_metrics(folder / "metrics.jsonl")
    seen = [one.network for one in evaluations] + [n for of in examples.values() for n in of]
    names = [name for name in network_order(seen) if name != INITIAL] or [INITIAL]
    alone = len(names) == 1 and names[0] in NETWORK_TITLES
    for name in names:
        title = distinct_title(folder, folders)
        yield Column(
            title if alone else f"{title}: {name}",
            name,
            [one for one in evaluations if one.network == name],
            [one for one in evaluations if one.network == INITIAL != name],
            settings,
            entries,
            {data_set: of[name] for data_set, of in examples.items() if name in of},
        )


def distinct_title(folder: Path, folders: Sequence[Path]) -> str:
    """The last parts of a path that tell it from the others'."""
    parts = folder.resolve().parts
    others = [other.resolve().parts for other in folders if other.resolve() != folder.resolve()]
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return str(folder)


def flat_settings(path: Path) -> dict[str, str]:
    """Settings of a config.yaml by dotted name, as text; without where the run lies.

    Raises:
        InputError: it is no YAML of settings.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError("too large")
        value = yaml.safe_load(path.read_text("utf-8", "replace"))
        if not isinstance(value, dict):
            raise ValueError("no settings by name")
        leaves: dict[str, str] = {}
        for name, leaf in _leaves(value, "", 0):
            if len(leaves) >= _MAX_SETTINGS:
                raise ValueError(f"more than {_MAX_SETTINGS} settings")
            leaves[name] = leaf
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not the settings of a run ({error})") from error
    return {name: leaf for name, leaf in leaves.items() if name not in _PLACES}


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _DEPTH:
        raise ValueError(f"nested more than {_DEPTH} deep")
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        if any(isinstance(one, dict | list) for one in value):
            for number, one in enumerate(value):
                yield from _leaves(one, f"{name}[{number}]", depth + 1)
        else:
            yield name, ", ".join(map(str, value[:_MAX_SETTINGS]))
    else:
        yield name, str(value)


def differing_settings(columns: Sequence[Column]) -> list[tuple[str, list[str | None]]]:
    """Settings that are not the same in all columns that have a configuration; None for none."""
    configured = [column.settings for column in columns if column.settings]
    names = dict.fromkeys(name for settings in configured for name in settings)
    differing = [n for n in names if len({settings.get(n) for settings in configured}) > 1]
    return [(name, [column.settings.get(name) for column in columns]) for name in differing]


def compared_rows(columns: Sequence[Column]) -> list[Row]:
    """A row for each figure that any column has, K-means and linear classifier first."""
    measures: dict[Key, dict[str, Evaluation]] = {}
    every = [one for column in columns for one in (*column.evaluations, *column.before)]
    usual = {"kmeans": 0, "linear": 1}
    every.sort(key=lambda e: (e.data_set, usual.get(e.protocol, 2), e.protocol, e.note))
    for one in every:
        for name in (one.measure, *one.metrics):
            measures.setdefault((one.data_set, one.protocol, one.note), {}).setdefault(name, one)
    return [
        _row(key, name, one, columns) for key, of in measures.items() for name, one in of.items()
    ]


def _row(key: Key, measure: str, example: Evaluation, columns: Sequence[Column]) -> Row:
    def figure(evaluations: Iterable[Evaluation]) -> Figure | None:
        for one in evaluations:
            if (one.data_set, one.protocol, one.note) == key:
                figures = {one.measure: one.values, **one.metrics}
                return figure_of(figures.get(measure, ()))
        return None

    cells = [figure(column.evaluations) for column in columns]
    means = [cell.mean for cell in cells if cell is not None]
    best = frozenset(
        number
        for number, cell in enumerate(cells)
        if cell is not None and min(means) < cell.mean == max(means)
    )
    before = [figure(column.before) for column in columns]
    title, main = example.title, measure == example.measure
    return Row(title, data_set_title(key[0]), measure, main, cells, before, best)


def shared_pictures(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Images that at least two columns have, with each one's clusters; MAX_PICTURES at most."""
    rows: list[dict[str, Any]] = []
    for data_set in sorted({name for column in columns for name in column.examples}):
        of = {
            number: {str(key): place for place, key in enumerate(column.examples[data_set]["key"])}
            for number, column in enumerate(columns)
            if data_set in column.examples
        }
        keys = dict.fromkeys(key for places in of.values() for key in places)
        classes = next(
            (e.classes for c in columns for e in c.evaluations if e.data_set == data_set), []
        )
        for key in keys:
            having = [number for number, places in of.items() if key in places]
            if len(having) > 1 and len(rows) < MAX_PICTURES:
                first = columns[having[0]].examples[data_set]
                rows.append(_picture(key, first, of[having[0]][key], classes))
                rows[-1]["clusters"] = {
                    number: _clusters(columns[number].examples[data_set], of[number][key], classes)
                    for number in having
                }
    return rows


def _picture(key: str, arrays: Any, place: int, classes: Sequence[str]) -> dict[str, Any]:
    image, label = arrays["image"][place], arrays["label"][place]
    return {
        "key": key,
        "image": png_data_uri(image),
        "truth": png_data_uri(overlay(image, label), 128),
        "classes": names_of(label, classes),
    }


def _clusters(arrays: Any, place: int, classes: Sequence[str]) -> dict[str, str]:
    clusters = arrays["clusters"][place]
    picture = overlay(arrays["image"][place], clusters)
    return {"image": png_data_uri(picture, 128), "classes": names_of(clusters, classes)}


def show_comparison(columns: Sequence[Column], console: Console) -> None:
    """Prints the figures and the settings that differ."""
    table = Table("")
    for column in columns:
        table.add_column(Text(column.title), justify="right")
    for row in compared_rows(columns):
        name = f"{row.title}{', ' + row.data_set if row.data_set else ''}, {row.measure}"
        cells = [
            Text(_as_text(cell), style="bold" if number in row.best else "")
            for number, cell in enumerate(row.cells)
        ]
        table.add_row(Text(name if row.main else f"  {row.measure}"), *cells)
        if row.main and any(row.before):
            table.add_row(Text("  before training"), *(Text(_as_text(b)) for b in row.before))
    console.print(table)
    differing = differing_settings(columns)
    if differing:
        settings = Table("setting")
        for column in columns:
            settings.add_column(Text(column.title))
        for name, values in differing:
            settings.add_row(Text(name), *(Text("–" if v is None else v) for v in values))
        console.print(settings)


def _as_text(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    spread = "" if figure.std is None else f" ± {figure.std:.1f} ({figure.count})"
    return f"{figure.mean:.1f}{spread}"


def write_comparison(columns: Sequence[Column], target: Path) -> None:
    """Writes the page, self-contained as the report is."""
    logs: dict[int, Metrics] = {}
    for number, column in enumerate(columns):
        # the networks of one folder have one log
        if column.entries and all(column.entries is not entries for entries in logs.values()):
            logs[number] = column.entries
    charts = [overlaid_chart(logs, curve) for curve in CURVES]
    context = {
        "columns": [column.title for column in columns],
        "rows": compared_rows(columns),
        "settings": differing_settings(columns),
        "charts": [one for one in charts if one is not None],
        "pictures": shared_pictures(columns),
        "frame": CHART,
    }
    write_page("compare_template.html", context, target)

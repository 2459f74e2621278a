"""Options that messages name exist: advice that no command takes is worse than none."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from data_pipeline.cli import app as shards
from data_pipeline.masks.cli import app as masks
from evaluation.cli import build_app
from evaluation.predict_cli import app as predict
from launch.cli import app as launch
from trainer.export_cli import app as export

ROOT = Path(__file__).parent.parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def options(command: Any) -> set[str]:
    found = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    for one in getattr(command, "commands", {}).values():
        found |= options(one)
    return found


def messages(path: Path) -> Iterator[str]:
    """String literals, except those that are documentation."""
    tree = ast.parse(path.read_text())
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in documents:
            yield str(node.value)


def test_every_option_that_a_message_names_is_there() -> None:
    known = {"--help", "--check-arguments"}  # the latter is the launcher's own
    for app in (shards, masks, build_app([]), predict, launch, export):
        known |= options(typer.main.get_command(app))
    sources = [
        p
        for name in ("data_pipeline", "trainer", "evaluation")
        for p in (ROOT / name).rglob("*.py")
    ]
    for path in (ROOT / "launch").rglob("*.py"):  # what `submit` and torchrun take
        known |= set(OPTION.findall(path.read_text()))
    assert len(known) > 100
    unknown = {
        (path.name, option)
        for path in sources
        for text in messages(path)
        for option in OPTION.findall(text)
        if option not in known
    }
    assert sorted(unknown) == []

"""Imports point one way: evaluation → trainer → data_pipeline; launch imports none of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_pipeline", "trainer", "evaluation", "launch")
ALLOWED = {
    "data_pipeline": {"data_pipeline"},
    "trainer": {"trainer", "data_pipeline"},
    "evaluation": {"evaluation", "trainer", "data_pipeline"},
    "launch": {"launch"},
}


def imported_packages(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} & set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        wrong = imported_packages(file) - ALLOWED[package]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_files_and_functions_stay_small() -> None:
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            source = file.read_text(encoding="utf-8")
            assert source.count("\n") <= 450, f"{file.relative_to(ROOT)} is long"
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    length = (node.end_lineno or 0) - node.lineno
                    assert length <= 70, f"{file.relative_to(ROOT)}: {node.name} has {length} lines"

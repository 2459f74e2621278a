"""Sample keys: safe in an archive, and never the same for two names."""

import hashlib
import re

import pytest

from data_pipeline.sample import safe_key


@pytest.mark.parametrize("name", ["2007_000032", "a/b-c/D_9", "x", "-", "a" * 90])
def test_a_safe_name_is_its_own_key(name: str) -> None:
    assert safe_key(name) == name


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("café", "caf_"),
        ("图片", "__"),
        ("photo.1.final", "photo_1_final"),
        ("with space", "with_space"),
        ("../../etc/passwd", "etc/passwd"),
        ("/absolute/path", "absolute/path"),
        ("a//b", "a/b"),
        ("a/./b", "a/b"),
        ("trailing/", "trailing"),
        ("..", "sample"),
        ("", "sample"),
        ("new\nline", "new_line"),
        ("a" * 91, "a" * 81),
        ("deep/" * 40 + "end", ("deep/" * 40 + "end")[-81:]),
        ("\udcff\udcfe", "__"),
    ],
)
def test_another_name_is_changed_and_marked_with_its_hash(name: str, start: str) -> None:
    digest = hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    key = safe_key(name)
    assert key == f"{start.lstrip('/')}-{digest}"
    assert re.fullmatch(r"[A-Za-z0-9_/-]{1,90}", key)
    assert ".." not in key
    assert not key.startswith("/")
    assert "//" not in key


def test_names_that_look_alike_get_different_keys() -> None:
    names = [
        "a b",
        "a.b",
        "a_b",
        "a/b",
        "a//b",
        "/a/b",
        "ä_b",
        "ö_b",
        "a" * 91,
        "a" * 92,
        "b" + "a" * 91,
    ]
    assert len({safe_key(name) for name in names}) == len(names)

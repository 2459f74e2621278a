"""Which row a result is: other options or other images make another row, never overwrite one.

The first result of a protocol in a folder has the protocol's name. One that differs from it has
what differs in its name, as `kmeans@size=96,pca=0`; and so on against rows of that name.
"""

import hashlib
import json
import re
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import read_json
from data_pipeline.labelled import LabelledSet, ShardSet
from evaluation.result import Result

IMAGES = "images"  # option that tells which ones are scored
# what follows from network or other options, is in the protocol's name, or changes rounding only
_NO_OPTIONS = {"images_without_foreground", "bank_used", "shared", "steps", "at_once"}
_NO_OPTIONS |= {"cluster.clusters", "many_to_one"}
_LEARNING = ("linear", "finetune", "davis-classifier")  # of these the batch is part of the recipe
_LONGEST = 100  # characters of a name that say what differs


def own_row(result: Result, samples: LabelledSet, place: Path) -> Result:
    """The result as a row of its own: with the images among its options, and named so.

    Args:
        result: its protocol has the plain name.
        samples: that were scored.
        place: folder of the results of this data set.
    """
    if IMAGES in result.options:
        return result  # it is one already
    result = replace(result, options={**result.options, IMAGES: identity(samples)})
    mine = _options(result.protocol, result.options)
    told: set[str] = set()
    while True:
        protocol = _name(result.protocol, {key: mine[key] for key in mine if key in told})
        more = _differences(mine, result.protocol, protocol, place) - told
        if not more:
            return replace(result, protocol=protocol)
        told |= more


def identity(samples: LabelledSet) -> str:
    """Name of the folder, and a digest of what was scored: of shards' contents, or of keys."""
    digest = hashlib.sha256()
    if isinstance(samples, ShardSet):
        folder = samples.manifest.root.name
        for entry in samples.manifest.shards:
            digest.update(entry.sha256.encode())
    else:
        folder = Path(str(samples)).name
        for number in range(len(samples)):
            digest.update(samples.key(number).encode("utf-8", "surrogateescape") + b"\0")
    return f"{folder} {digest.hexdigest()[:8]}"


def _differences(mine: dict[str, Any], plain: str, protocol: str, place: Path) -> set[str]:
    """Options in which the results of a name, of any network, are others."""
    found: set[str] = set()
    for path in sorted(place.glob(f"{escape(protocol)}-*.json")):
        try:
            there = read_json(path, "result")
        except InputError:
            continue  # a damaged file does not count as a row; it is written again
        options = there.get("options")
        if there.get("protocol") == protocol and isinstance(options, dict):
            theirs = _options(plain, options)
            found |= {key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key]}
    return found


def _options(protocol: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those that decide what a figure means, by dotted name."""
    ignored = set(_NO_OPTIONS)
    if not protocol.startswith(_LEARNING):
        ignored.add("batch_size")
    plain = json.loads(json.dumps(options, default=str))  # as a file gives them back
    return {key: value for key, value in _flat(plain) if key not in ignored}


def _flat(options: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in sorted(options.items()):
        if isinstance(value, dict):
            pairs += _flat(value, f"{above}{name}.")
        else:
            pairs.append((above + name, value))
    return pairs


def _name(protocol: str, told: dict[str, Any]) -> str:
    if not told:
        return protocol
    words = []
    for key, value in told.items():
        shown = len(value) if isinstance(value, list) else value
        words.append(f"{key.rpartition('.')[2]}={re.sub(r'[^A-Za-z0-9.]+', '_', str(shown))}")
    text = ",".join(words)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{protocol}@{text}"

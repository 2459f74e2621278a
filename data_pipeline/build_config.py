"""What a user decides about a build of shards, and what of it decides their bytes."""

import re
from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import InputError
from data_pipeline.mask_files import MASK_MODES, MaskMode
from data_pipeline.sample import Policy

DuplicateMode = Literal["drop", "keep"]
_PREFIX = re.compile(r"[A-Za-z0-9_/-]{0,40}")


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of the shards.

    Attributes:
        samples_per_shard: planned samples a shard; those that fail make it smaller.
        mask_mode: how mask values are read, see `sample.decode_mask`.
        shuffle_seed: the samples are shuffled once over all shards; negative keeps key order.
        shard_size: bytes of source files at which a shard ends, if it is earlier; 0: no such limit.
        min_area: with `components`, smaller ones are background; share of the image.
        max_side: larger images are made smaller, to this many pixels; 0: none is.
        quality: of JPEGs that have to be encoded again.
        lenient: takes JPEGs that a decoder warns about.
        limit: only so many samples, the first in shuffled order; 0: all.
        duplicates: what becomes of a sample with the image, mask and label of another one.
        key_prefix: put before every key.
    """

    samples_per_shard: int = 1000
    mask_mode: MaskMode = "auto"
    shuffle_seed: int = 0
    shard_size: int = 0
    min_area: float = 0.01
    max_side: int = 0
    quality: int = 95
    lenient: bool = False
    limit: int = 0
    duplicates: DuplicateMode = "drop"
    key_prefix: str = ""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise InputError(f"samples per shard is {self.samples_per_shard}; need at least 1")
        if self.shuffle_seed >= 2**63:
            raise InputError(f"the shuffle seed is {self.shuffle_seed}; it must be below 2^63")
        if self.mask_mode not in MASK_MODES:
            raise InputError(
                f"--mask-mode is {self.mask_mode!r}; it can be {', '.join(MASK_MODES)}"
            )
        if min(self.shard_size, self.max_side, self.limit) < 0:
            raise InputError("shard size, largest side and limit cannot be negative; 0 means none")
        if not 0 <= self.min_area < 1:
            raise InputError(f"--min-area is {self.min_area}; it is a share of the image, 0 to 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality is {self.quality}; JPEG has 1 to 100")
        if self.duplicates not in ("drop", "keep"):
            raise InputError(f"--duplicates is {self.duplicates!r}; it can be drop or keep")
        if not _PREFIX.fullmatch(self.key_prefix):
            raise InputError(
                f"--key-prefix is {self.key_prefix!r}; up to 40 letters, digits, _, - and /"
            )

    def policy(self) -> Policy:
        """What of it concerns a single sample."""
        return Policy(self.mask_mode, self.min_area, self.max_side, self.quality, self.lenient)


@dataclass(frozen=True)
class BuildOptions:
    """What does not change the bytes.

    Attributes:
        processes: workers on this node.
        node_rank, num_nodes: this node builds every `num_nodes`-th shard.
        append: adds to a finished set what is not in it yet.
        retry_failed: tries again what failed before.
        max_failures: more failed samples than that end the build; below 1 a share of all, 0: none
            may fail, `None`: no limit.
    """

    processes: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    append: bool = False
    retry_failed: bool = False
    max_failures: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.node_rank < self.num_nodes:
            raise InputError(
                f"--node-rank is {self.node_rank} of --num-nodes {self.num_nodes}; "
                f"it can be 0 to {max(1, self.num_nodes) - 1}"
            )
        if self.append and self.retry_failed:
            raise InputError("--append and --retry-failed are two things; do one after the other")
        if self.processes < 1:
            raise InputError(f"--processes is {self.processes}; need at least 1")


def parse_max_failures(text: str) -> float | None:
    """`100`, `5%` or nothing to a limit, see `BuildOptions.max_failures`."""
    if not text:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    share = text.endswith("%")
    if value < 0 or (share and value >= 1) or (not share and value != int(value)):
        raise InputError(f"--max-failures is {text!r}; give a number as 100, or a share as 5%")
    return value


def parse_size(text: str) -> int:
    """`512MB`, `1GiB`, `1000000` to bytes; nothing to 0."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20}
    units["GIB"] = 2**30
    if not text:
        return 0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in units:
        raise InputError(f"--shard-size is {text!r}; give bytes, or a size as 500MB or 1GiB")
    return int(float(found[1]) * units[found[2].upper()])

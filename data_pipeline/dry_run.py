"""What a build would give: counts from the plan, bytes and time from a few samples of it."""

import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from data_pipeline.build_config import BuildConfig
from data_pipeline.plan import Plan, PlanReader
from data_pipeline.sample import PackedSample
from data_pipeline.sources.item import Failure, Listing
from data_pipeline.write_shards import pack_all

TRIED = 200
_OVERHEAD = 3 * 768  # bytes of tar headers and padding a sample, about
_EXAMPLES = 5


@dataclass(frozen=True)
class Estimate:
    """What would be built; `bytes` and `seconds` from the `tried` samples, `failed` of them bad."""

    samples: int
    shards: int
    unmatched: int
    bytes: int
    seconds: float
    processes: int
    tried: int
    failed: int
    examples: tuple[Failure, ...]


def estimate(listing: Listing, config: BuildConfig, processes: int) -> Estimate:
    """Plans a build and packs its first samples in memory; writes nothing."""
    start = time.perf_counter()
    with closing(Plan(listing, config)) as plan:
        planned = time.perf_counter()
        reader, size = PlanReader(plan.path), 0

        def weigh(sample: PackedSample, source: str, sizes: tuple[int, ...]) -> None:
            nonlocal size
            size += _OVERHEAD + sum(len(data) for data in sample.components.values())

        items = (item for shard in plan.planned_shards() for item in reader.items(shard.number))
        num_classes = len(listing.classes) or None
        failures = pack_all(islice(items, TRIED), config, num_classes, listing.roots, weigh)
        packing = time.perf_counter() - planned
        tried = min(TRIED, plan.samples)
        scale = plan.samples / max(1, tried)
        examples = [*islice(plan.unmatched_failures(), 3), *failures]
        return Estimate(
            plan.samples,
            plan.shards,
            plan.unmatched,
            round(size * scale),
            planned - start + packing * scale / processes,
            processes,
            tried,
            len(failures),
            tuple(examples[:_EXAMPLES]),
        )

"""What a build would give: counts from the plan, bytes and time from a few samples of it."""

import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from data_pipeline.build_config import BuildConfig
from data_pipeline.errors import SampleError
from data_pipeline.plan import Plan, PlanReader
from data_pipeline.sample import pack_sample
from data_pipeline.sources.item import Failure, Listing

TRIED = 200
_OVERHEAD = 3 * 768  # bytes of tar headers and padding a sample, about


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
        planning = time.perf_counter() - start
        size, tried, examples = 0, 0, []
        failed = 0
        start = time.perf_counter()
        items = (
            item
            for shard in plan.planned_shards()
            for item in PlanReader(plan.path).items(shard.number)
        )
        for key, item in islice(items, TRIED):
            tried += 1
            try:
                packed = pack_sample(
                    key, item.source, item.read(), config.policy(), len(listing.classes) or None
                )
                size += _OVERHEAD + sum(len(data) for data in packed.components.values())
            except (SampleError, OSError) as error:
                failed += 1
                stage, reason = (
                    (error.stage, error.reason)
                    if isinstance(error, SampleError)
                    else ("read", str(error))
                )
                examples.append(Failure(key, item.source, stage, reason))
        seconds = time.perf_counter() - start
        scale = plan.samples / max(1, tried)
        examples = [*islice(plan.unmatched_failures(), 3), *examples][:5]
        return Estimate(
            plan.samples,
            plan.shards,
            plan.unmatched,
            round(size * scale),
            planning + seconds * scale / processes,
            processes,
            tried,
            failed,
            tuple(examples),
        )

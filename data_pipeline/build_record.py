"""`build.json`: what a folder of shards was built from, so that only the same build goes on in it.

A folder has one generation of shards for the first build, and one more for each that was appended.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.build_config import BuildConfig, BuildOptions
from data_pipeline.errors import InputError
from data_pipeline.files import encode_json, parse_json
from data_pipeline.manifest import FILE_NAME as MANIFEST
from data_pipeline.plan import Plan
from data_pipeline.shard_file import DUPLICATE, Marker, read_marker, shard_stem
from data_pipeline.sources.item import Listing
from data_pipeline.store import Store

FILE_NAME = "build.json"
VERSION = 1
_REMEDY = "delete the folder and build the shards again"


@dataclass(frozen=True)
class Generation:
    """The shards of one build.

    Attributes:
        configuration: source and options that decide its bytes.
        classes: names of the label classes.
        first_shard, shards, samples: planned.
        fingerprint: of the plan.
    """

    configuration: dict[str, Any]
    classes: tuple[str, ...]
    first_shard: int
    shards: int
    samples: int
    fingerprint: str

    @property
    def numbers(self) -> range:
        """Of its shards."""
        return range(self.first_shard, self.first_shard + self.shards)


class BuildRecord:
    """The generations of a folder, and which of them this run writes.

    Attributes:
        generations: all, the one under way included once it has begun.
        numbers: of the generations that this run writes: one, unless it retries what failed.
    """

    def __init__(
        self,
        store: Store,
        generations: list[Generation],
        configuration: dict[str, Any],
        options: BuildOptions,
        finished: int,
    ) -> None:
        self.store = store
        self.generations = generations
        self.finished = finished
        self._configuration = configuration
        self._options = options
        self.numbers = self._choose()

    def plan(self, number: int, listing: Listing, config: BuildConfig) -> Plan:
        """Plans a generation: new numbers, and what others have left."""
        earlier = self.generations[:number]
        first_shard = earlier[-1].first_shard + earlier[-1].shards if earlier else 0
        only = None
        if self._options.retry_failed:
            only = _keys(self.store, self.generations[number : number + 1])
        others = [*earlier, *self.generations[number + 1 :]]
        return Plan(listing, config, first_shard, _keys(self.store, others), only)

    def begin(self, number: int, plan: Plan, classes: tuple[str, ...]) -> Generation:
        """Writes down what is going to be built, or checks that it is what was begun.

        Raises:
            InputError: the source gives other samples than when the build began, or classes than
                the shards that are there.
        """
        generation = Generation(
            self._configuration,
            classes,
            plan.first_shard,
            plan.shards,
            plan.samples,
            plan.fingerprint,
        )
        if number < len(self.generations):
            self._check_same(self.generations[number], generation)
            return generation
        if self.generations and self.generations[0].classes != classes:
            raise InputError(
                f"{self.store} has the classes {', '.join(self.generations[0].classes) or 'none'}, "
                f"what is to be appended {', '.join(classes) or 'none'}; use another folder"
            )
        if self.generations and not plan.samples:
            return self.generations[-1]  # nothing to append: that one is finished once more
        if plan.unmatched:
            with self.store.writing(f"unmatched-{number:03d}.jsonl") as file:
                for failure in plan.unmatched_failures():
                    file.write(encode_json(asdict(failure)) + b"\n")
        self.generations.append(generation)
        self._write()
        return generation

    def _choose(self) -> list[int]:
        """The number of the generation that this run writes or continues; or all to retry."""
        append, count = self._options.append, len(self.generations)
        if not count:
            if append or self._options.retry_failed:
                raise InputError(f"{self.store} holds no build yet; leave out the option")
            return [0]
        if append and self.finished == count:
            return [count]
        if append and count == 1:
            raise InputError(
                f"the build in {self.store} is not finished; run its command again first"
            )
        same = [
            number
            for number, generation in enumerate(self.generations)
            if generation.configuration == self._configuration
        ]
        if not same:
            raise InputError(self._difference(self.generations[-1].configuration))
        if self._options.retry_failed:
            return [number for number in same if self._has_failed(number)] or same[-1:]
        names = self.store.names()  # a retry that was killed leaves gaps in earlier ones
        return [number for number in same if not self._is_complete(number, names)] or same[-1:]

    def _is_complete(self, number: int, names: set[str]) -> bool:
        return all(f"{shard_stem(n)}.json" in names for n in self.generations[number].numbers)

    def _has_failed(self, number: int) -> bool:
        """Whether a generation has samples that can be tried again."""
        markers = _markers(self.store, self.generations[number])
        return any(each["stage"] != DUPLICATE for one in markers for each in one["failures"])

    def _difference(self, before: dict[str, Any]) -> str:
        """Names what was decided otherwise before."""
        now = self._configuration
        differ = [
            f"{key} is {now.get(key)!r}, was {before.get(key)!r}"
            for key in sorted({*now, *before})
            if now.get(key) != before.get(key)
        ]
        return (
            f"{self.store} holds a build with another configuration: {'; '.join(differ)}. "
            f"Give the same options to go on with it, or give --output another folder"
        )

    def _check_same(self, before: Generation, now: Generation) -> None:
        if now.fingerprint == before.fingerprint and now.classes == before.classes:
            return
        if now.classes != before.classes:
            what = "other classes"
        elif now.samples != before.samples:
            what = f"{now.samples:,} samples instead of {before.samples:,}"
        else:
            what = "as many samples, but others"
        raise InputError(
            f"the source of {self.store} has changed since the build began: it gives {what}. "
            f"Bring it back to what it was, give --output another folder, or, once the build is "
            "finished, add what is new with --append"
        )

    def _write(self) -> None:
        value = {
            "format": "maskbank-build",
            "version": VERSION,
            "generations": [asdict(generation) for generation in self.generations],
        }
        with self.store.writing(FILE_NAME) as file:
            file.write(encode_json(value, indent=1) + b"\n")


def open_record(store: Store, configuration: dict[str, Any], options: BuildOptions) -> BuildRecord:
    """Reads what a folder was built from; one without any must be empty.

    Raises:
        InputError: it holds something else, or another build.
    """
    names = store.names()
    if FILE_NAME not in names:
        # of a build of which nothing was left
        foreign = sorted(
            name for name in names - {"failures.jsonl"} if not name.startswith("unmatched-")
        )
        if foreign:
            raise InputError(
                f"{store} already holds {foreign[0]!r}, which this build would not write; "
                "give --output a new or empty folder"
            )
        return BuildRecord(store, [], configuration, options, 0)
    with store.open(FILE_NAME) as file:
        value = parse_json(file.read(), f"{store}/{FILE_NAME}", "build record", _REMEDY)
    try:
        generations = [
            Generation(**{**each, "classes": tuple(each["classes"])})
            for each in value["generations"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{store}/{FILE_NAME} is damaged: {error}; {_REMEDY}") from None
    return BuildRecord(store, generations, configuration, options, _finished(store, names))


def _finished(store: Store, names: set[str]) -> int:
    """How many generations the manifest covers."""
    if MANIFEST not in names:
        return 0
    with store.open(MANIFEST) as file:
        value = parse_json(file.read(), f"{store}/{MANIFEST}", "manifest", _REMEDY)
    return 1 + len(value.get("configuration", {}).get("appended", []))


def _keys(store: Store, generations: list[Generation]) -> Iterator[str]:
    """Keys of all samples that generations were planned with, whatever became of them."""
    for generation in generations:
        for marker in _markers(store, generation):
            for part in ("samples", "failures"):
                yield from (each["key"] for each in marker[part])


def _markers(store: Store, generation: Generation) -> Iterator[Marker]:
    for number in generation.numbers:
        marker = read_marker(store, number)
        if marker is None:
            raise InputError(
                f"{store} lacks shard {number}; run the command that built it again first"
            )
        yield marker

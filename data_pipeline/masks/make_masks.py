"""Makes masks for a folder of pictures: the same tree, `STEM.png`, 8-bit grey.

Goes on where it was stopped: a mask is written whole or not at all, and one that exists is not made
again. The same bytes for any number of processes and nodes.
"""

import heapq
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import (
    TEMPORARY,
    atomic_write,
    encode_json,
    only_writer,
    read_json,
    require_writable,
    write_json,
)
from data_pipeline.masks.mask_task import (
    Entry,
    MaskTask,
    MaskTaskDone,
    load_predictor,
    mask_path,
    run_mask_task,
)
from data_pipeline.masks.methods import Method
from data_pipeline.masks.postprocess import SKIP, PostprocessConfig
from data_pipeline.sources.folder import list_folder
from data_pipeline.sources.item import Failure, Item, share_a_stem
from data_pipeline.sources.match_trees import IMAGE_SUFFIXES, pictures
from data_pipeline.storage import Location
from data_pipeline.workers import run_tasks

RECORD = "masks.json"
VERSION = 1
_PICTURES_A_TASK = 8  # at least: a predictor may like more at a time
_ENTRIES_A_TASK = 1000  # finished ones cost nothing, but a task should not grow without end
_TEMPORARY_MASK = re.compile(r"\..*\.png" + TEMPORARY)

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class MakeOptions:
    """What does not decide the bytes.

    Attributes:
        processes: workers.
        threads: of each worker's predictor.
        node_rank, num_nodes: picture i is made by node i mod `num_nodes`.
    """

    processes: int = 1
    threads: int = 1
    node_rank: int = 0
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.node_rank < self.num_nodes:
            raise InputError(
                f"--node-rank is {self.node_rank} and --num-nodes {self.num_nodes}; "
                "nodes are numbered from 0 to one less than there are"
            )

    @property
    def failures(self) -> str:
        """Name of the file of failures of this node."""
        if self.num_nodes == 1:
            return "failures.jsonl"
        return f"failures-{self.node_rank}-of-{self.num_nodes}.jsonl"


@dataclass
class MaskReport:
    """What became of the pictures of this node.

    Attributes:
        made: masks that were written now.
        kept: masks that were there already.
        skipped: pictures in which too little is salient; they have no mask.
        failed: pictures that cannot be used.
        failures: file that names the skipped and failed.
    """

    failures: Path
    made: int = 0
    kept: int = 0
    skipped: int = 0
    failed: int = 0


def make_masks(
    images: Location,
    output: Path,
    method: Method,
    config: PostprocessConfig,
    options: MakeOptions | None = None,
    progress: Callable[[int], Progress] | None = None,
) -> MaskReport:
    """Writes a mask for every picture below `images` in which something is salient.

    Skipped and failed pictures are named in a file of failures, in the order of the pictures.
    Started again, skipped ones are skipped without a look (delete the file to have them tried
    again), failed ones are tried again.

    Args:
        images: folder, searched recursively.
        output: folder of the masks; new, empty, or holding masks of the same method and options.
        method: how saliency is estimated.
        config: how a map becomes a mask.
        options: processes and nodes.
        progress: called with the number of pictures of this node; what it returns is called with
            pictures (done, skipped, failed) since the last time.

    Raises:
        InputError: a folder is wrong or holds other masks, or the method cannot be loaded.
        OSError: a mask cannot be written.
    """
    options = options or MakeOptions()
    entries = list_folder(images).entries
    _check_apart(images, output)
    predictor = load_predictor(method, options.threads)
    record = {
        "version": VERSION,
        "images": str(images) if isinstance(images, str) else os.path.abspath(images),
        "method": predictor.name,
        **asdict(config),
    }
    if options.processes > 1:
        load_predictor.cache_clear()  # workers have their own
    pictures_a_task = max(_PICTURES_A_TASK, predictor.batch_size)
    del predictor
    with _only_maker(output, options):
        resumed = _open_record(output, record)
        maker = _Maker(images, output, method, config, options, pictures_a_task, resumed)
        total = sum(map(_is_readable, pictures(images)))
        mine = len(range(options.node_rank, total, options.num_nodes))
        return maker.run(entries, (progress or _silent)(mine))


class _Maker:
    """One run: deals out tasks, and writes down what failed in the order of the pictures."""

    def __init__(
        self,
        images: Location,
        output: Path,
        method: Method,
        config: PostprocessConfig,
        options: MakeOptions,
        pictures_a_task: int,
        resumed: bool,
    ) -> None:
        self.root = images if isinstance(images, Path) else None
        self.output, self.method, self.config, self.options = output, method, config, options
        self.report = MaskReport(output / options.failures)
        self._pictures_a_task = pictures_a_task
        self._clean_folders = resumed and options.num_nodes == 1
        self._in_work: dict[int, set[str]] = {}
        self._advance: Progress = _silent(0)

    def run(self, entries: Iterable[Entry], advance: Progress) -> MaskReport:
        self._advance = advance
        journal = self.report.failures
        previous = journal.with_name(f".{journal.name}.previous")
        _join_skipped(previous, journal)
        waiting: dict[int, MaskTaskDone] = {}
        following = 0
        try:
            with journal.open("wb") as file:
                tasks = self._tasks(entries, previous)
                for done in run_tasks(run_mask_task, tasks, self.options.processes):
                    del self._in_work[done.number]
                    waiting[done.number] = done
                    self._count(done)
                    while following in waiting:
                        for failure in waiting.pop(following).failures:
                            file.write(encode_json(asdict(failure)) + b"\n")
                        file.flush()
                        following += 1
        finally:
            for folder in set().union(*self._in_work.values()):
                _remove_temporary(self.output / folder)
        previous.unlink(missing_ok=True)
        return self.report

    def _count(self, done: MaskTaskDone) -> None:
        skipped = sum(failure.stage == SKIP for failure in done.failures)
        failed = len(done.failures) - skipped
        self.report.made += done.made
        self.report.skipped += skipped
        self.report.failed += failed
        counted = sum(_is_readable(failure.source) for failure in done.failures)
        self._advance(done.made + counted, skipped, failed)

    def _tasks(self, entries: Iterable[Entry], previous: Path) -> Iterator[MaskTask]:
        pending: list[Entry] = []
        number = pictures_pending = 0
        for entry in self._still_to_do(entries, _SkippedBefore(previous)):
            pending.append(entry)
            pictures_pending += not isinstance(entry, Failure)
            if pictures_pending == self._pictures_a_task or len(pending) == _ENTRIES_A_TASK:
                yield self._task(number, pending)
                number, pending, pictures_pending = number + 1, [], 0
        if pending:
            yield self._task(number, pending)

    def _task(self, number: int, entries: list[Entry]) -> MaskTask:
        items = [entry for entry in entries if not isinstance(entry, Failure)]
        folders = {str(mask_path(item.source).parent) for item in items}
        for folder in folders:
            (self.output / folder).mkdir(parents=True, exist_ok=True)
        self._in_work[number] = folders
        return MaskTask(
            number,
            tuple(entries),
            self.output,
            self.root,
            self.method,
            self.options.threads,
            self.config,
        )

    def _still_to_do(self, entries: Iterable[Entry], skipped: "_SkippedBefore") -> Iterator[Entry]:
        """Pictures of this node without a mask, and the failures that are known already."""
        cleaned = None
        for entry in _of_node(_one_a_stem(entries), self.options):
            if isinstance(entry, Failure):
                yield entry
                continue
            target = self.output / mask_path(entry.source)
            if self._clean_folders and target.parent != cleaned:
                _remove_temporary(target.parent)
                cleaned = target.parent
            if target.exists():
                self.report.kept += 1
                self._advance(1, 0, 0)
            else:
                yield skipped.find(entry) or entry


class _SkippedBefore:
    """The skipped pictures of an earlier run, read along with the list of pictures."""

    def __init__(self, journal: Path) -> None:
        self._lines = _read_skipped(journal)
        self._next = next(self._lines, None)

    def find(self, item: Item) -> Failure | None:
        """What was said of this picture; asked in the order of the pictures."""
        key = os.fsencode(item.key)
        while self._next is not None and os.fsencode(self._next.key) < key:
            self._next = next(self._lines, None)
        found = self._next
        return found if found is not None and found.source == item.source else None


def _is_readable(source: str) -> bool:
    return os.path.splitext(source)[1].lower() in IMAGE_SUFFIXES


def _one_a_stem(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, those that share a stem, and so a mask, turned into failures."""
    for _, group in groupby(entries, key=lambda entry: entry.key):
        alike = list(group)
        items = [entry for entry in alike if not isinstance(entry, Failure)]
        if len(items) < 2:
            yield from alike
            continue
        reason = share_a_stem([item.source for item in items[:5]], more=len(items) > 5)
        for entry in alike:
            if not isinstance(entry, Failure):
                yield Failure(entry.key, entry.source, "match", reason)
            else:
                yield entry


def _of_node(entries: Iterator[Entry], options: MakeOptions) -> Iterator[Entry]:
    """What this node has to do; files of a kind that is not read are told by node 0."""
    number = 0
    for entry in entries:
        if not _is_readable(entry.source):
            if options.node_rank == 0:
                yield entry
            continue
        if number % options.num_nodes == options.node_rank:
            yield entry
        number += 1


def _check_apart(images: Location, output: Path) -> None:
    if isinstance(images, Path):
        inner, outer = Path(os.path.realpath(output)), Path(os.path.realpath(images))
        if inner == outer or outer in inner.parents:
            raise InputError(
                f"{output} is in {images}, so masks would be taken for pictures; "
                "give --output a folder beside it"
            )


def _open_record(output: Path, record: dict[str, Any]) -> bool:
    """Writes what decides the masks, or compares it; whether masks may be there already."""
    path = output / RECORD
    used = any(not name.startswith(".") for name in os.listdir(output))
    if not path.exists():
        if used:
            raise InputError(
                f"{output} holds files, but no {RECORD} that says how masks were made; "
                "give --output a new folder"
            )
        write_json(path, record, indent=1)
        return False
    saved = read_json(path, "the description of the masks", "give --output a new folder")
    differing = [name for name in record if saved.get(name) != record[name]]
    if differing:
        told = "; ".join(
            f"{name} was {json.dumps(saved.get(name))} and is {json.dumps(record[name])} now"
            for name in differing
        )
        raise InputError(
            f"{output} holds masks made in another way: {told}. "
            "Give --output a new folder, or the options of before"
        )
    return True


@contextmanager
def _only_maker(output: Path, options: MakeOptions) -> Iterator[None]:
    """Keeps a second run out of a folder; nodes of one run share it."""
    require_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    if options.num_nodes == 1:
        with only_writer(output):
            yield
        return
    own = output / f".node-{options.node_rank}-of-{options.num_nodes}"
    own.touch()
    with only_writer(output, shared=True), only_writer(own):
        yield
        own.unlink(missing_ok=True)


def _read_skipped(journal: Path) -> Iterator[Failure]:
    with suppress(FileNotFoundError), journal.open("rb") as file:
        for line in file:
            try:
                failure = Failure(**json.loads(line))
            except (ValueError, TypeError):  # the last line of a run that was killed
                continue
            if failure.stage == SKIP:
                yield failure


def _join_skipped(previous: Path, journal: Path) -> None:
    """Adds to `previous` what the run after it skipped: if that was killed, it knows less."""
    before, after = _read_skipped(previous), _read_skipped(journal)
    joined = heapq.merge(before, after, key=lambda failure: os.fsencode(failure.key))
    with atomic_write(previous) as file:
        for _, same in groupby(joined, key=lambda failure: failure.source):
            file.write(encode_json(asdict(next(same))) + b"\n")


def _remove_temporary(folder: Path) -> None:
    """Removes what killed workers left half-written."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY_MASK.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    os.unlink(entry.path)


def _silent(total: int) -> Progress:
    return lambda done, skipped, failed: None

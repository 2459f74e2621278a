"""Batches for one rank, made in the background: order → reader → views → decoder → `Batch`."""

import importlib.util
import queue
import threading
import time
from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from data_pipeline.fetch import FetchedSample, Fetcher
from data_pipeline.index import DatasetIndex
from data_pipeline.manifest import Manifest
from data_pipeline.order import SampleOrder, batch_positions
from data_pipeline.reader import SampleReader
from data_pipeline.views import ViewConfig

LoaderName = Literal["auto", "dali", "torch"]


class Loader(Protocol):
    """What both backends do; they are compared crop by crop in the tests."""

    def load(self, samples: Sequence[FetchedSample]) -> Batch: ...

    def close(self) -> None: ...


def make_loader(
    name: str, batch_size: int, image_size: int, threads: int, device: torch.device
) -> Loader:
    """The backend of that name; `auto` takes DALI on a GPU, and on CPUs what is faster there."""
    if name == "auto":
        on_gpu = device.type == "cuda" and importlib.util.find_spec("nvidia.dali")
        name = "dali" if on_gpu else "torch"
    if name == "torch":
        from data_pipeline.torch_loader import TorchLoader

        return TorchLoader(image_size, threads, device)
    if name != "dali":
        raise InputError(f"data.loader is {name!r}; it can be auto, dali or torch")
    try:
        from data_pipeline.dali_loader import DaliLoader
    except ImportError as error:
        raise InputError(
            f"data.loader is dali, but DALI cannot be imported ({error}); "
            "pip install nvidia-dali-cuda130, or set data.loader=torch"
        ) from None
    return DaliLoader(batch_size, image_size, threads, device)


class BatchStream:
    """This rank's batches from global batch `start` on, without end.

    A background thread keeps `prefetch` batches ready. The stream's position is the number of the
    global batch alone, so any number of ranks can go on from it.

    Args:
        manifest: of the training shards.
        views: how the two views are drawn.
        loader: backend, see `make_loader`.
        batch_size: of the global batch, over all ranks.
        seed, window: of the order.
        rank, world_size: this process's part.
        start: first global batch.
        threads: for reading and for decoding.
        prefetch: batches kept ready.
        device: where batches go.

    Attributes:
        fetcher: holds the counts of bad samples and invalid views.
        wait_seconds: time spent waiting in `__next__`, in total.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: ViewConfig,
        *,
        loader: str,
        batch_size: int,
        seed: int,
        window: int,
        rank: int,
        world_size: int,
        start: int,
        threads: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        index = DatasetIndex(manifest)
        order = SampleOrder(index.counts, seed, window)
        self.fetcher = Fetcher(SampleReader(index), order, views, threads)
        self.wait_seconds = 0.0
        self._part, self._device = (batch_size, rank, world_size), device
        self._loader = make_loader(
            loader, -(-batch_size // world_size), views.image_size, threads, device
        )
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._copies: torch.cuda.Stream | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(start,), name="batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        before = time.perf_counter()
        batch = self._queue.get()
        self.wait_seconds += time.perf_counter() - before
        if isinstance(batch, BaseException):
            raise batch
        if self._device.type == "cuda":
            # its memory is not given to a later batch while this stream still reads it
            batch.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def close(self) -> None:
        """Ends the background thread and frees what it holds."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self.fetcher.close()
        self._loader.close()

    def _work(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                positions = batch_positions(step, *self._part)
                self._put(self._load(self.fetcher.fetch(positions)))
                step += 1
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _load(self, samples: Sequence[FetchedSample]) -> Batch:
        """A batch that is there; on a GPU, copies go by a stream of their own.

        On the trainer's stream they would stand behind all that it has in its queue.
        """
        if self._device.type != "cuda":
            return self._loader.load(samples)
        if self._copies is None:
            torch.cuda.set_device(self._device)  # a thread begins with GPU 0
            self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            batch = self._loader.load(samples)
        self._copies.synchronize()
        return batch

    def _put(self, value: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(value, timeout=0.1)
                return
            except queue.Full:
                continue

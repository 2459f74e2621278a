"""What training takes: speed, waiting, and the time that is left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.loader import BatchStream


class Clock:
    """Images a second and the share of time that training waits for data, between two readings.

    Args:
        batch_size: images a step, over all ranks.
        stream: whose waiting is read.
        seconds_before: of training before this start.
        step: finished steps at this start.
    """

    def __init__(
        self, batch_size: int, stream: BatchStream, seconds_before: float, step: int
    ) -> None:
        self._batch_size, self._stream, self._step = batch_size, stream, step
        self._time, self._wait = time.perf_counter(), 0.0
        self._zero = self._time - seconds_before

    @property
    def total_seconds(self) -> float:
        """Since training began, without the time between a stop and the next start."""
        return time.perf_counter() - self._zero

    def read(self, step: int, total_steps: int) -> dict[str, float]:
        now, wait = time.perf_counter(), self._stream.wait_seconds
        steps, seconds = step - self._step, max(now - self._time, 1e-9)
        speed = {
            "images_per_second": steps * self._batch_size / seconds,
            "data_wait": (wait - self._wait) / seconds,
            "eta_seconds": (total_steps - step) * seconds / steps,
            "seconds": self.total_seconds,
        }
        self._time, self._wait, self._step = now, wait, step
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no training: it counts in the total only."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._time += time.perf_counter() - begun

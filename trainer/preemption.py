"""A request to stop, agreed by all ranks at a step boundary."""

import signal
from types import FrameType

from trainer.distributed import Ranks, any_rank

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that this process was asked to stop; never acts in the middle of a step."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; a collective."""
        return any_rank(bool(self.signal_name), ranks)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

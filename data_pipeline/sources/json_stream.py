"""The lists of a large JSON object, element by element: memory is bounded by one element."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import InputError

_CHUNK = 1 << 20  # characters
_MAX_VALUE = 1 << 28  # characters of one element
_SPACE = re.compile(r"[ \t\n\r]*")


def stream_lists(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (name, element) for every element of every list of the object in a file.

    Members that are no list are passed over.

    Raises:
        InputError: the file cannot be read or is not such an object; says at which character.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _Reader(path, file).members()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); copy it here again") from None


class _Reader:
    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path = path
        self.file = file
        self.buffer = ""
        self.place = 0
        self.passed = 0  # characters before the buffer
        self.decoder = json.JSONDecoder()

    def members(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if self._take("}"):
            return
        while True:
            name = self._value()
            if not isinstance(name, str):
                raise self._damaged("a name")
            self._expect(":")
            if self._take("["):
                for element in self._elements():
                    yield name, element
            else:
                self._value()
            if self._take("}"):
                return
            self._expect(",")

    def _elements(self) -> Iterator[Any]:
        if self._take("]"):
            return
        while True:
            yield self._value()
            if self._take("]"):
                return
            self._expect(",")

    def _value(self) -> Any:
        """The next value; more is read until it is complete and something follows it."""
        self._skip_space()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.place)
                if end < len(self.buffer):
                    self.place = end
                    return value
            except json.JSONDecodeError:
                pass
            except RecursionError:
                raise self._damaged("a value that is less deeply nested") from None
            if len(self.buffer) - self.place > _MAX_VALUE or not self._read():
                raise self._damaged("a value")

    def _take(self, character: str) -> bool:
        self._skip_space()
        if self.buffer[self.place : self.place + 1] != character:
            return False
        self.place += 1
        return True

    def _expect(self, character: str) -> None:
        if not self._take(character):
            raise self._damaged(repr(character))

    def _skip_space(self) -> None:
        while True:
            found = _SPACE.match(self.buffer, self.place)
            self.place = found.end() if found else self.place
            if self.place < len(self.buffer) or not self._read():
                return

    def _read(self) -> bool:
        """Drops what is done with and appends at least as much as is left; False at the end."""
        self.passed += self.place
        self.buffer = self.buffer[self.place :]
        self.place = 0
        more = self.file.read(max(_CHUNK, len(self.buffer)))
        self.buffer += more
        return bool(more)

    def _damaged(self, expected: str) -> InputError:
        return InputError(
            f"{self.path} is damaged: expected {expected} at character "
            f"{self.passed + self.place:,}; copy it here again"
        )

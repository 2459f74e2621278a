"""Text files of one name a line."""

from pathlib import Path

from data_pipeline.errors import InputError


def read_names(path: Path, expected: str) -> list[str]:
    """Lines of a text file, stripped, without empty ones; with or without byte order mark.

    Args:
        path: the file.
        expected: what should be in it, for the message.

    Raises:
        InputError: it cannot be read, is not UTF-8, or holds nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend its rights") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; expected {expected}") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path} is empty; it should hold {expected}")
    return names

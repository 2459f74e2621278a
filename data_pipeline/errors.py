"""Errors that are the user's to mend; command lines print them as one paragraph, exit status 2."""


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where, and what to do."""


class CannotScore(InputError):
    """A figure that these images and this network do not allow; raised on every rank alike."""


class SampleError(Exception):
    """One sample cannot be used.

    Args:
        stage: where it failed: "match", "image", "mask", "label", "read".
        reason: what was wrong with it.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return type(self), (self.stage, self.reason)

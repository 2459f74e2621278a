"""Training of the pixel encoder; `load_encoder` is the door for notebooks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.encoder import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Loads torch when it is wanted: a check of settings needs none of it."""
    if name in __all__:
        from trainer import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

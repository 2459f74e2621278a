"""Training of the pixel encoder; `load_encoder` is the door for notebooks."""

from trainer.encoder import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]

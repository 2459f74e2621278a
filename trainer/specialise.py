"""A module's class is changed in place, so that its parts and their names stay as they are."""

from torch import nn

# one class for all modules of a kind: torch.compile compiles by class
_joined: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def specialise(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Puts the methods of `kind` before those of the module's own class; returns the module.

    Instead of a wrapper, which would rename parameters and break checkpoints, and instead of a
    method of the instance, whose copy would still call the original.
    """
    own = type(module)
    if (kind, own) not in _joined:
        _joined[kind, own] = type(f"{kind.__name__.strip('_')}{own.__name__}", (kind, own), {})
    module.__class__ = _joined[kind, own]
    return module

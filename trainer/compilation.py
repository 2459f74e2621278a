"""torch.compile for the parts of a network that repeat."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from data_pipeline.errors import InputError
from trainer.activation_checkpointing import find_blocks
from trainer.model import PixelEncoder

_KINDS = 64  # of blocks, by shape, with and without gradients: torch gives up after 8 of a class


def compile_network(network: PixelEncoder, backend: str = "inductor") -> int:
    """Compiles every block of the backbone, in place; returns how many there are.

    By the block, not as a whole: blocks of a kind are compiled once, which takes seconds instead
    of minutes in deep networks, and checkpointed blocks stay outside of what is compiled. Names of
    parameters and buffers stay as they are. A copy of the network is not compiled: the momentum
    encoder needs a call of its own. Compiling happens at the first step, with gradients and
    without. Rounding differs from the plain network's.

    Call it on the network's device, before DDP or DeepSpeed wraps it. What was tried, on CPUs with
    gloo and torch 2.14: ResNets, ViTs and ConvNeXts in training under DDP on 1 and 2 ranks and
    under DeepSpeed's ZeRO 1 to 3, with bfloat16 autocast, activation checkpointing, batch norm over
    all ranks, dropout, and a momentum encoder without gradients. Under ZeRO 3 it is right but of no
    use: hooks that gather each layer's weights cut the blocks to pieces. On CPUs it hardly gains
    anything, as most of the time is in oneDNN's kernels either way; nor does it on an H200 (torch
    2.11, ResNet-50 in bf16: 138 ms a step instead of 140).

    Args:
        network: on its device.
        backend: of torch.compile.

    Raises:
        InputError: what inductor needs to compile for the device is not installed.
    """
    if backend == "inductor":
        _require_compiler(next(network.parameters()).device)
    limit = max(_KINDS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.recompile_limit = limit
    blocks = find_blocks(network.backbone)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    return len(blocks)


def _require_compiler(device: torch.device) -> None:
    """Finds out before training begins what would else be a long trace in its first step."""
    missing = []
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("the package triton (pip install triton)")
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX") or default
    if shutil.which(compiler) is None:
        missing.append(f"the compiler {compiler} (install it, or name another in CXX)")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.is_file():
        missing.append(f"Python's headers, {headers} (the package python3-dev of most systems)")
    if missing:
        raise InputError(
            f"model.compile needs {' and '.join(missing)}; or leave model.compile=false"
        )

"""Files of named tensors in the safetensors format, written as a stream and checked by checksum.

The format is eight bytes of header size, a JSON header, and the tensors' bytes. safetensors' own
writer would first copy every tensor and hold the interpreter's lock while it writes, in the middle
of training; reading is safetensors'.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BLOCK = 8 << 20  # bytes that are hashed and written at a time
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileRecord(NamedTuple):
    """What a written file is known by."""

    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes tensors of the CPU, and syncs the file; holds no copy of them.

    Raises:
        OSError: as on a full disk.
    """
    header: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [size, size + tensor.nbytes],
        }
        size += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        _write(file, digest, memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            _write(file, digest, flat.numpy().data)
        os.fsync(file.fileno())
    return FileRecord(8 + len(text) + size, digest.hexdigest())


def _write(file: Any, digest: Any, data: memoryview) -> None:
    for first in range(0, len(data), _BLOCK):
        block = data[first : first + _BLOCK]
        digest.update(block)
        while block:
            block = block[file.write(block) :]


def check_file(path: Path, record: FileRecord) -> str:
    """What is wrong with a file: nothing ('') if it is what was written."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"has {size} bytes instead of {record.bytes}"
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if digest.hexdigest() == record.sha256 else "has another checksum than when written"

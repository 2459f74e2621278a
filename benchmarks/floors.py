"""What a machine could do at best: rates that are measured, and the work that they bound.

Operations are those of the code that runs, counted where it calls the library
(torch.utils.flop_counter's formulas, 2 a multiply-add); every operand and result of a product is
moved once. `benchmarks/roofline.py` compares the parts of a training step with these floors.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_SQUARES = (1024, 2048)
_LARGEST_COPY = 1 << 30
Shape = tuple[int, int, int]


@dataclass
class Work:
    """What a part has to do at the least.

    Attributes:
        formula: of the bytes, in words.
        bytes: moved; filled in when it is known.
        flops: by type of the operands.
        shapes: of matrix products, and their operations, by (type, (m, k, n)).
        seconds: of each round.
    """

    formula: str
    bytes: int = 0
    flops: Counter[torch.dtype] = field(default_factory=Counter)
    shapes: Counter[tuple[torch.dtype, Shape]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Products(TorchDispatchMode):
    """Counts operations and bytes of matrix products and convolutions, as they reach the library.

    Attributes:
        work: to which they are added.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet in flop_registry or packet is _CPU_ATTENTION:
            operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            dtype = operands[0].dtype
            if packet is _CPU_ATTENTION:
                flops = _attention_flops(*operands[:3])
            else:
                flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.work.flops[dtype] += flops
            self.work.bytes += sum(tensor.nbytes for tensor in (*operands, *results))
            if shape := _shape(str(packet), operands, results):
                self.work.shapes[dtype, shape] += flops
        return result


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of queries [B, H, N, D], keys [B, H, K, D] and values [B, H, K, V]: two products."""
    rows = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return 2 * rows * (query.shape[3] + value.shape[3])


def _shape(name: str, operands: Sequence[Tensor], results: Sequence[Tensor]) -> Shape | None:
    """The matrix product (m, k, n) that a product or forward convolution comes down to."""
    if name in ("aten.mm", "aten.addmm"):
        first, second = operands[-2:]
        return first.shape[0], first.shape[1], second.shape[1]
    if name in ("aten.convolution", "aten._convolution"):
        weight, output = operands[1], results[0]
        pixels = output.numel() // output.shape[1]
        return pixels, weight[0].numel(), weight.shape[0]
    return None


# --- what the machine can do ---


class Machine:
    """Rates of this machine, measured when they are asked for and kept."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self._budget = device, seconds
        self._copies: dict[int, float] = {}
        self.products: dict[tuple[torch.dtype, Shape], float] = {}

    def copy_rate(self, size: int) -> float:
        """Bytes a second, read and written, of a copy that moves about `size` bytes."""
        power = min(_LARGEST_COPY, 1 << max(12, (size - 1).bit_length()))
        if power not in self._copies:
            source = torch.ones(power // 2, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copies[power] = power / self._best(lambda: target.copy_(source))
        return self._copies[power]

    def product_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of the fastest product of that type so far."""
        for side in _SQUARES:
            self.measure_product(dtype, (side, side, side))
        return max(rate for (kind, _), rate in self.products.items() if kind == dtype)

    def measure_product(self, dtype: torch.dtype, shape: Shape) -> None:
        if (dtype, shape) in self.products:
            return
        m, k, n = shape
        first = torch.randn(m, k, device=self.device).to(dtype)
        second = torch.randn(k, n, device=self.device).to(dtype)
        result = torch.empty(m, n, device=self.device, dtype=dtype)
        seconds = self._best(lambda: torch.mm(first, second, out=result))
        self.products[dtype, shape] = 2 * m * k * n / seconds

    def copies(self) -> str:
        return ", ".join(
            f"{_size(size)} {rate / 1e9:.1f} GB/s" for size, rate in sorted(self._copies.items())
        )

    def _best(self, what: Callable[[], Any]) -> float:
        """Seconds of one call, at the best of the passes that fit the time."""
        stopwatch = Stopwatch(self.device)
        best, deadline = float("inf"), time.perf_counter() + self._budget
        for number in range(1000):
            seconds = stopwatch.time("rate", what, host=False)
            if number:
                best = min(best, seconds)
            if number and time.perf_counter() > deadline:
                break
        return best


class Stopwatch:
    """Seconds of a call: of the clock, or between two events of the GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: list[tuple[str, Any, Any]] = []

    def time(self, name: str, what: Callable[[], Any], host: bool) -> float:
        """Calls, waits until it is done, and returns how long it took."""
        self.run(name, what, host)
        return self.read()[name]

    def run(self, name: str, what: Callable[[], Any], host: bool) -> Any:
        """Calls; on a GPU, unless the work is the host's, without waiting for it.

        `read` gives the seconds.
        """
        if self._on_gpu and not host:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = what()
            end.record()
            self._open.append((name, begin, end))
            return result
        begin = time.perf_counter()
        result = what()
        if self._on_gpu:
            torch.cuda.synchronize()
        self._open.append((name, begin, time.perf_counter()))
        return result

    def read(self) -> dict[str, float]:
        """Seconds of all calls since the last reading, by name."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found = {}
        for name, begin, end in self._open:
            waited = isinstance(begin, float)
            found[name] = end - begin if waited else begin.elapsed_time(end) / 1000
        self._open.clear()
        return found


def floor(work: Work, machine: Machine) -> tuple[float, str]:
    """Seconds, and what binds them."""
    moving = work.bytes / machine.copy_rate(work.bytes)
    computing = {
        dtype: flops / machine.product_rate(dtype) for dtype, flops in work.flops.items() if flops
    }
    total = sum(computing.values())
    if moving >= total:
        return moving, "bytes"
    widest = max(computing, key=lambda dtype: computing[dtype])
    return total, f"products, {name_of(widest)}"


def measure_rates(parts: Iterable[Work], machine: Machine) -> None:
    """Products of the shape that has the most operations in each part and type."""
    for work in parts:
        for dtype in work.flops:
            own = {key: flops for key, flops in work.shapes.items() if key[0] == dtype}
            if own:
                machine.measure_product(*max(own, key=lambda key: own[key]))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"

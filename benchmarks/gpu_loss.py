"""The one-pass loss on a GPU: its gradient against float64, its time against its floor."""

import subprocess
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.attention import KeyChunk
from trainer.loss import pixel_contrastive_loss

DEVICE = torch.device("cuda", 0)
WIDTH = 32
_ROUNDS = 7
_EXPONENTIALS_A_CLOCK = 16  # of a multiprocessor's special-function units, from compute 7.5 to 9.0


class Row(NamedTuple):
    """One line of the result: what, its figure, and ok, FAILED or measured."""

    what: str
    figure: str
    verdict: str


class Rates(NamedTuple):
    """What the machine does a second: bytes copied (read and written), bf16 and float32 operations
    of matrix products, exponentials (counted from clock and multiprocessors, not measured)."""

    bytes: float
    bf16: float
    float32: float
    exponentials: float


def verdict(good: bool) -> str:
    return "ok" if good else "FAILED"


def seconds_of(work: Callable[[], object], rounds: int = _ROUNDS) -> float:
    """Median of CUDA events around `work`, after two rounds that do not count."""
    times = []
    for number in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if number >= 2:
            times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def measure_rates() -> Rates:
    """The ceilings, of a large copy and of large products of random matrices."""
    side = 8192
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    rates = [2 * source.nbytes / seconds_of(lambda: target.copy_(source))]
    for dtype, n in ((torch.bfloat16, side), (torch.float32, side // 2)):
        left, right = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / seconds_of(lambda a=left, b=right: a @ b))  # type: ignore[misc]
    query = ("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i", "0")
    clock = 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return Rates(*rates, multiprocessors * _EXPONENTIALS_A_CLOCK * clock)


def ceilings(rates: Rates) -> list[Row]:
    return [
        Row("copy of 2.1 GB, read and written", f"{rates.bytes / 1e12:.2f} TB/s", "measured"),
        Row("bf16 product of 8192²", f"{rates.bf16 / 1e12:.0f} TFLOP/s", "measured"),
        Row("float32 product of 4096²", f"{rates.float32 / 1e12:.1f} TFLOP/s", "measured"),
        Row("exponentials", f"{rates.exponentials / 1e12:.2f}·10¹² a second", "by the clock"),
    ]


def losses() -> list[Row]:
    """The one-pass loss and its gradient against dense float64, in every kind of keys."""
    rows = []
    kinds = ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-3))
    for pixels, entries in ((20_000, 8192), (1000, 50_000)):
        for same_image in (False, True):
            for dtype, limit in kinds:
                worst = max(
                    gradient_error(pixels, entries, dtype, temperature, same_image)
                    for temperature in (0.05, 0.07, 0.1, 0.5)
                )
                name = str(dtype).removeprefix("torch.")
                masked = ", own images passed over" if same_image else ""
                what = f"gradient error, {pixels:,} × {entries:,} {name} keys, four T{masked}"
                rows.append(Row(what, f"{worst:.1e}", verdict(worst < limit)))
    rows.append(_narrow_embeddings())
    return rows


def gradient_error(
    pixels: int, entries: int, dtype: torch.dtype, temperature: float, same_image: bool
) -> float:
    """Largest error of a component of the gradient, of the largest component; also of the loss."""
    case = Case.draw(pixels, entries, dtype)
    wide = case.queries.double().requires_grad_()
    keys = torch.cat([case.prototypes, case.bank.float()]).double()
    logits = wide @ keys.T / temperature
    if same_image:
        own = case.sample_ids[:, None] == case.bank_ids
        logits[:, len(case.prototypes) :].masked_fill_(own, -torch.inf)
    expected = F.cross_entropy(logits, case.targets, reduction="sum")
    expected.backward()  # type: ignore[no-untyped-call]
    mine = case.queries.clone().requires_grad_()
    loss = case.loss(mine, temperature, same_image)
    loss.backward()  # type: ignore[no-untyped-call]
    off = abs(float(loss.detach().double() / expected.detach()) - 1)
    return max(relative_error(mine.grad, wide.grad), off)


def _narrow_embeddings() -> Row:
    """Embeddings as autocast gives them, bf16 and not yet normalised, down to their gradient.

    What is judged is the loss: both start from the same rounded embeddings.
    """
    case = Case.draw(20_000, 8192, torch.float16)
    rounded = (3 * case.queries).bfloat16()
    gradients = []
    for dtype in (torch.float64, torch.float32):
        embeddings = rounded.to(dtype).requires_grad_()
        queries = F.normalize(embeddings, dim=1)
        if dtype == torch.float64:
            keys = torch.cat([case.prototypes, case.bank.float()]).double()
            F.cross_entropy(queries @ keys.T / 0.1, case.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
        else:
            case.loss(queries, 0.1, False).backward()  # type: ignore[no-untyped-call]
        gradients.append(embeddings.grad)
    error = relative_error(gradients[1], gradients[0])
    return Row("gradient of bf16 embeddings, float16 keys", f"{error:.1e}", verdict(error < 5e-3))


class Case(NamedTuple):
    """Pixels near their prototypes, and a bank of random keys."""

    queries: Tensor
    targets: Tensor
    prototypes: Tensor
    bank: Tensor
    sample_ids: Tensor
    bank_ids: Tensor

    @classmethod
    def draw(cls, pixels: int, entries: int, dtype: torch.dtype) -> "Case":
        prototypes, bank = unit(64), unit(entries).to(dtype)
        targets = torch.randint(64, (pixels,), device=DEVICE)
        queries = F.normalize(prototypes[targets] + 0.3 * unit(pixels), dim=1)
        # of 64 times as many images as the batch has
        bank_ids = torch.randint(4096, (entries,), device=DEVICE)
        return cls(queries, targets, prototypes, bank, targets, bank_ids)

    def loss(self, queries: Tensor, temperature: float, same_image: bool) -> Tensor:
        chunks = [
            KeyChunk(self.bank[first : first + 65_536], self.bank_ids[first : first + 65_536])
            for first in range(0, len(self.bank), 65_536)
        ]
        narrow = torch.float16 if self.bank.itemsize == 2 else None  # as the bank would say
        ids = self.sample_ids if same_image else None
        ones = torch.ones(len(queries), device=DEVICE)
        return pixel_contrastive_loss(
            queries,
            self.targets,
            self.prototypes,
            chunks,
            temperature,
            ones,
            sample_ids=ids,
            precision=narrow,
        )


def loss_speed(rates: Rates) -> list[Row]:
    """Time and extra memory of the one-pass loss, forward and backward, over its floor."""
    sizes = ((200_000, 320), (200_000, 4096), (800_000, 320), (800_000, 4096))
    large = ((200_000, 65_536), (800_000, 65_536), (200_000, 1 << 20))
    few = ((1024, 65_536), (1024, 1 << 20), (1024, 1 << 22), (4096, 65_536))
    rows = [speed_row(rates, *size, torch.float32, False) for size in sizes]
    rows += [speed_row(rates, *size, torch.float16, False) for size in (*sizes[1:2], *large, *few)]
    rows += [speed_row(rates, *size, torch.float16, True) for size in (large[1], few[0])]
    return rows


def speed_row(rates: Rates, pixels: int, entries: int, dtype: torch.dtype, same_image: bool) -> Row:
    """The floor is the larger of bytes (keys, queries and gradient, once each), operations (4·D a
    pair) and exponentials (one a pair) over the machine's rates."""
    case = Case.draw(pixels, entries, dtype)
    queries = case.queries.requires_grad_()

    def work() -> None:
        queries.grad = None
        case.loss(queries, 0.1, same_image).backward()  # type: ignore[no-untyped-call]

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = seconds_of(work)
    extra = torch.cuda.max_memory_allocated() - before
    wide = dtype == torch.float32
    pairs = pixels * entries
    floor = {
        "bytes": (case.bank.nbytes + 2 * queries.nbytes) / rates.bytes,
        "products": 4 * WIDTH * pairs / (rates.float32 if wide else rates.bf16),
        "exponentials": pairs / rates.exponentials,
    }
    bound = max(floor, key=lambda name: floor[name])
    figure = (
        f"{1000 * seconds:.2f} ms, {1e12 * seconds / pairs:.2f} ps a pair, "
        f"{seconds / floor[bound]:.1f} × floor ({1000 * floor[bound]:.2f} ms, {bound}), "
        f"{extra / 1e6:,.0f} MB"
    )
    name = str(dtype).removeprefix("torch.")
    masked = ", own images passed over" if same_image else ""
    what = f"loss, {pixels:,} pixels × {entries:,} {name} keys{masked}"
    return Row(what, figure, "measured")


def unit(count: int) -> Tensor:
    return F.normalize(torch.randn(count, WIDTH, device=DEVICE), dim=1)


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.double() - expected).abs().max() / expected.abs().max())

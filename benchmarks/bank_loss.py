"""How fast and how lean is the one-pass loss? Forward and backward, against what others do.

    python -m benchmarks.bank_loss [--cases 100000x4096,1000000x320] [--rounds 5]
        [--methods rows,maskbank] [--output FILE]

N pixels times K keys (64 prototypes of the batch, the rest from the bank), D = 32, T = 0.1:

- dense: all logits by one matrix product, then cross entropy, as published code does
- rows: the same in blocks of rows, whose logits the backward pass computes again
- linear: torch's linear_cross_entropy, which chunks the rows by its own choice
- maskbank: pixel_contrastive_loss, keys in chunks of 65,536

Times are from one process, warmed up, the methods one after another in every round; extra memory is
the peak above the inputs in a process of its own; the gradient's error is against float64 in 1,000
rows, in parts of the largest component. Dense is left out where it would hold more than --limit GB.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer.distributed import Ranks
from trainer.environment import describe_environment
from trainer.loss import pixel_contrastive_loss

DIM, PROTOTYPES, TEMPERATURE, ROWS, CHUNK = 32, 64, 0.1, 4096, 65_536
DEFAULT = "100000x320,100000x4096,1000000x320"


class Case(NamedTuple):
    """queries [N, D], targets [N] below P, keys [K, D], the P prototypes first, weights [P]."""

    queries: Tensor
    targets: Tensor
    keys: Tensor
    weights: Tensor


def dense(case: Case) -> Tensor:
    logits = case.queries @ case.keys.T / TEMPERATURE
    losses = F.cross_entropy(logits, case.targets, reduction="none")
    return (case.weights[case.targets] * losses).sum()


def rows(case: Case) -> Tensor:
    def block(queries: Tensor, targets: Tensor) -> Tensor:
        return dense(case._replace(queries=queries, targets=targets))

    parts = zip(case.queries.split(ROWS), case.targets.split(ROWS), strict=True)
    return torch.stack([checkpoint(block, *part, use_reentrant=False) for part in parts]).sum()


def linear(case: Case) -> Tensor:
    weights = F.pad(case.weights, (0, len(case.keys) - PROTOTYPES))
    return F.linear_cross_entropy(
        case.queries,
        case.keys / TEMPERATURE,
        case.targets,
        weight=weights,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def maskbank(case: Case) -> Tensor:
    prototypes, bank = case.keys[:PROTOTYPES], case.keys[PROTOTYPES:]
    chunks = bank.split(CHUNK)
    weights = case.weights[case.targets]
    return pixel_contrastive_loss(
        case.queries, case.targets, prototypes, chunks, TEMPERATURE, weights
    )


METHODS: dict[str, Callable[[Case], Tensor]] = {
    "dense": dense,
    "rows": rows,
    **({"linear": linear} if hasattr(F, "linear_cross_entropy") else {}),
    "maskbank": maskbank,
}


def make_case(num_queries: int, num_keys: int) -> Case:
    draw = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(num_queries, DIM, generator=draw), dim=1).requires_grad_()
    keys = F.normalize(torch.randn(num_keys, DIM, generator=draw), dim=1)
    targets = torch.randint(PROTOTYPES, (num_queries,), generator=draw)
    return Case(queries, targets, keys, torch.rand(PROTOTYPES, generator=draw) / num_queries)


def run(method: str, case: Case) -> Tensor:
    """The gradient [N, D]."""
    case.queries.grad = None
    METHODS[method](case).backward()
    assert case.queries.grad is not None
    return case.queries.grad


def gradient_error(case: Case, gradient: Tensor) -> float:
    """Against dense float64, in 1,000 rows; a row's gradient depends on no other row."""
    step = max(1, len(case.queries) // 1000)
    wide = Case(
        case.queries.detach()[::step].double().requires_grad_(),
        case.targets[::step],
        case.keys.double(),
        case.weights.double(),
    )
    expected = run("dense", wide)
    return float((gradient[::step].double() - expected).abs().max() / expected.abs().max())


def extra_memory(method: str, num_queries: int, num_keys: int) -> float:
    """Peak MB above the inputs, of a process that does nothing else."""
    arguments = ("--memory-of", method, "--cases", f"{num_queries}x{num_keys}")
    command = [sys.executable, "-m", "benchmarks.bank_loss", *arguments]
    return float(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def report_own_memory(method: str, num_queries: int, num_keys: int) -> None:
    run(method, make_case(100, num_keys))  # loads kernels and starts threads
    case = make_case(num_queries, num_keys)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    run(method, case)
    print(json.dumps((_status("VmHWM") - before) / 1e6))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def compare(
    num_queries: int, num_keys: int, methods: list[str], rounds: int
) -> list[dict[str, Any]]:
    """Figures of each method."""
    case = make_case(num_queries, num_keys)
    small = make_case(1000, num_keys)
    for name in methods:
        run(name, small)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, float] = {}
    for number in range(rounds):
        for name in methods:
            start = time.perf_counter()
            gradient = run(name, case)
            seconds[name].append(time.perf_counter() - start)
            if not number:
                errors[name] = gradient_error(case, gradient)
    memory = {name: extra_memory(name, num_queries, num_keys) for name in methods}
    return [
        {
            "question": "loss",
            "method": name,
            "pixels": num_queries,
            "keys": num_keys,
            "seconds": seconds[name],
            "extra_mb": memory[name],
            "gradient_error": errors[name],
        }
        for name in methods
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Rows of the table, one case."""
    dense = next((row for row in rows if row["method"] == "dense"), None)
    for row in rows:
        ratios = ""
        if row["method"] == "maskbank" and dense is not None:
            pairs = zip(dense["seconds"], row["seconds"], strict=True)
            faster = [theirs / ours for theirs, ours in pairs]
            ratios = (
                f"{statistics.median(faster):.1f} ({min(faster):.1f}–{max(faster):.1f})× faster"
            )
            ratios += f", 1/{dense['extra_mb'] / row['extra_mb']:.0f} of the memory"
        timed = row["seconds"]
        print(
            f"| {row['pixels']:,} × {row['keys']:,} | {row['method']} | "
            f"{statistics.median(timed):.2f} ({min(timed):.2f}–{max(timed):.2f}) | "
            f"{row['extra_mb']:,.0f} | {row['gradient_error']:.1e} | {ratios} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--limit", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    parser.add_argument("--memory-of", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [tuple(map(int, case.split("x"))) for case in options.cases.split(",")]
    if options.memory_of:
        report_own_memory(options.memory_of, *cases[0])
        return
    environment = describe_environment(Ranks(0, 1, torch.device("cpu")))
    print(
        f"{environment['date']}, {environment['cpu']}, {torch.get_num_threads()} threads, torch "
        f"{environment['torch']}, float32, D = {DIM}, {options.rounds} rounds\n"
    )
    print("| N × K | method | s, median (spread) | extra MB | gradient error | against dense |")
    print("|" + "---|" * 6, flush=True)
    for case in cases:
        methods = options.methods.split(",")
        logits_gb = 3 * 4 * case[0] * case[1] / 1e9  # logits, log-softmax and their gradient
        if logits_gb > options.limit and "dense" in methods:
            methods.remove("dense")
        rows = compare(*case, methods, options.rounds)
        show(rows)
        if options.output:
            with options.output.open("a") as file:
                file.writelines(json.dumps({**environment, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()

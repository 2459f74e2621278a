"""Where the time of a training step goes on a GPU: phases, kernels, waits of the host, MFU."""

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_loss import DEVICE, Rates, Row, verdict
from data_pipeline.batch import Batch
from data_pipeline.manifest import Manifest
from trainer.config import load_config
from trainer.distributed import Ranks
from trainer.objective import contrast_views
from trainer.preflight import plan_run
from trainer.state import TrainState

BATCH = 64
_WARM, _MEASURED = 8, 16
_KERNELS = 14
_BY_TRIAL = "cuDNN's algorithms by trial"
Mark = Callable[[str], None]


def settings(manifest: Manifest, run: Path, *more: str) -> list[str]:
    """ResNet-50 at 224 pixels with a bank of 65,536 entries, 64 images a GPU, bf16."""
    return [
        *(f"data.shards={manifest.root}", f"run.directory={run}", f"run.device={DEVICE.type}"),
        *(f"data.batch_size={BATCH}", "bank.capacity=65536", "bank.mask_same_image=true"),
        *("run.precision=bf16", "run.tensorboard=false", "run.steps=1000", "model.start=random"),
        *more,
    ]


def make_state(manifest: Manifest, run: Path, *more: str) -> TrainState:
    config = load_config("voc_unsupervised_saliency", None, settings(manifest, run, *more))
    return TrainState(config, plan_run(config, 1), None, Ranks(0, 1, DEVICE))


def take_batches(state: TrainState, count: int) -> list[Batch]:
    stream = state.stream()
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def one_step(state: TrainState, batch: Batch, step: int, mark: Mark) -> Tensor:
    """What `trainer.train` does in a step, with a mark after each phase."""
    engine, bank = state.engine, state.bank
    engine.update_momentum(state.config.model.momentum)
    mark("momentum")
    at = state.begin(step, 0)
    chosen = state.choose_pixels(batch, at)
    bank.prefetch(chosen.pixels_of_ranks)
    mark("choosing pixels")
    query = engine.forward(batch.query_image)
    mark("encoder forward")
    key = state.embed_keys(batch, at)
    mark("momentum encoder forward")
    losses = contrast_views(query, key, batch, chosen, bank, state.ranks, state.config.loss)
    mark("both losses")
    engine.backward(losses.total)
    mark("backward")
    state.add(losses, False)
    state.finish_step(step, False)
    mark("gradient norm and optimizer")
    return losses.total.detach()


def fill_bank(state: TrainState) -> None:
    """As after many steps, with random keys of images that do not exist."""
    count, width = state.bank.capacity, state.config.model.embedding_dim
    keys = torch.nn.functional.normalize(torch.randn(count, width, device=DEVICE), dim=1)
    state.bank.enqueue(keys, torch.full((count,), 1 << 40, device=DEVICE))


def phases(state: TrainState, batches: list[Batch]) -> tuple[dict[str, float], float, bool]:
    """Median milliseconds of each phase, seconds a step, and whether all losses were numbers."""
    table: dict[str, list[float]] = {}
    finite, start = True, 0.0
    for step in range(_WARM + _MEASURED):
        if step == _WARM:
            torch.cuda.synchronize()
            start = time.perf_counter()
        events = [("", torch.cuda.Event(enable_timing=True))]
        events[0][1].record()

        def mark(name: str, events: list[tuple[str, torch.cuda.Event]] = events) -> None:
            events.append((name, torch.cuda.Event(enable_timing=True)))
            events[-1][1].record()

        loss = one_step(state, batches[step % len(batches)], step, mark)
        if step >= _WARM:
            events[-1][1].synchronize()
            finite &= bool(loss.isfinite())
            for (_, before), (name, after) in itertools.pairwise(events):
                table.setdefault(name, []).append(before.elapsed_time(after))
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / _MEASURED
    medians = {name: sorted(times)[len(times) // 2] for name, times in table.items()}
    return medians, seconds, finite


def flops_of_image(state: TrainState) -> float:
    """Of both encoders' forward passes and the backward one, 2 a multiply-add, without the loss."""
    images = torch.randn(2, 3, 224, 224, device=DEVICE)
    counter = FlopCounterMode(display=False)
    with counter:
        output = state.engine.forward(images)
        (output.embedding.sum() + output.saliency.sum()).backward()  # type: ignore[no-untyped-call]
        state.engine.embed_keys(images)
    state.engine.network.zero_grad()
    return counter.get_total_flops() / 2


def step_parts(manifest: Manifest, folder: Path, rates: Rates) -> list[Row]:
    """The plain step: phases, MFU, memory, kernels, waits."""
    state = make_state(manifest, folder / "parts")
    batches = take_batches(state, 4)
    fill_bank(state)
    torch.cuda.reset_peak_memory_stats()
    table, seconds, finite = phases(state, batches)
    memory = torch.cuda.max_memory_allocated()
    rows = [Row(f"step: {name}", f"{ms:.1f} ms", "measured") for name, ms in table.items()]
    rows.append(_speed("step with data at hand, bf16", seconds, memory, finite))
    flops = BATCH * flops_of_image(state)
    figure = (
        f"{flops / BATCH / 1e9:.0f} GFLOP an image, {flops / seconds / 1e12:.0f} TFLOP/s: "
        f"{flops / seconds / rates.bf16:.0%} of the measured bf16 product"
    )
    rows.append(Row("MFU of the step", figure, "measured"))
    rows += kernels(state, batches[0], seconds)
    rows += waits(state, batches[0])
    return rows


def variants(manifest: Manifest, folder: Path) -> list[Row]:
    """The same step in other precisions, compiled, and with few pixels a mask."""
    rows = []
    kinds = {
        "fp16": ("run.precision=fp16",),
        "float32 (TF32 in convolutions)": ("run.precision=float32",),
        "64 pixels a mask": ("loss.pixels_per_mask=64",),
        "activations twice": ("model.checkpoint_activations=true",),
        "bank of 256 entries": ("bank.capacity=256",),
        _BY_TRIAL: (),
        "compiled": ("model.compile=true",),
    }
    for name, more in kinds.items():
        start = time.perf_counter()
        torch.backends.cudnn.benchmark = name == _BY_TRIAL
        try:
            state = make_state(manifest, folder / f"variant {name}", *more)
            batches = take_batches(state, 2)
            fill_bank(state)
            torch.cuda.reset_peak_memory_stats()
            _, seconds, finite = phases(state, batches)
        except Exception as error:  # the others are worth knowing
            rows.append(Row(f"step, {name}", f"{type(error).__name__}: {error}"[:300], "FAILED"))
            continue
        finally:
            torch.backends.cudnn.benchmark = False
        whole = time.perf_counter() - start
        memory = torch.cuda.max_memory_allocated()
        row = _speed(f"step, {name}", seconds, memory, finite)
        rows.append(row._replace(figure=f"{row.figure}; {whole:.0f} s with the start"))
        del state, batches
        torch.cuda.empty_cache()
    return rows


def kernels(state: TrainState, batch: Batch, seconds: float) -> list[Row]:
    """The kernels that take longest in a step, and the share of it in which the GPU works."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    steps = 3
    with torch.profiler.profile(activities=activities) as profile:
        for step in range(steps):
            one_step(state, batch, step, lambda name: None)
        torch.cuda.synchronize()
    kernels = [e for e in profile.key_averages() if e.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels) / steps / 1e6
    rows = [
        Row("kernels of a step", f"{1000 * total:.1f} ms, {total / seconds:.0%}", "measured"),
    ]
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:_KERNELS]:
        ms = event.self_device_time_total / steps / 1000
        figure = f"{ms:.2f} ms, {event.count / steps:.0f} calls"
        name = event.key.replace("|", "/").replace("void ", "")[:110]
        rows.append(Row(f"kernel `{name}`", figure, "measured"))
    return rows


def waits(state: TrainState, batch: Batch) -> list[Row]:
    """Where the host waits for the GPU in a step."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one_step(state, batch, 100, lambda name: None)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    root = Path(__file__).parent.parent
    places: Counter[str] = Counter()
    for warning in caught:
        if "synchroni" in str(warning.message):
            file = Path(warning.filename)
            where = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
            places[f"{where}:{warning.lineno}"] += 1
    named = ", ".join(f"{place} ×{count}" for place, count in places.items())
    return [Row("waits of the host in a step", f"{places.total()}: {named}", "measured")]


def _speed(what: str, seconds: float, memory: int, finite: bool) -> Row:
    figure = f"{1000 * seconds:.1f} ms, {BATCH / seconds:,.0f} images/s, {memory / 1e6:,.0f} MB"
    return Row(what, figure, verdict(finite))

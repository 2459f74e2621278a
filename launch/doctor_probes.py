"""Whether torch, DALI and DeepSpeed work here, each tried in a process of its own.

`python -m launch.doctor_probes torch|dali|deepspeed DEVICE SECONDS` answers with JSON; a library
that hangs or crashes takes only that process along.
"""

import contextlib
import io
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from launch.doctor_finding import Finding, duration, failed, info, size, warning
from launch.doctor_process import describe, run_probe

GIB = 1 << 30
_IN_USE = "nvidia-smi shows by whom; end that, or choose others with CUDA_VISIBLE_DEVICES"
_GREY = 128  # of the picture that DALI decodes


def torch_finding(facts: Mapping[str, Any]) -> Finding:
    """Whether torch and torchvision can be imported and have what ranks need."""
    if error := facts.get("error"):
        remedy = "pip install --force-reinstall torch torchvision"
        if "no answer" in error:
            remedy = "raise --timeout: reading it from a slow disk takes long the first time"
        return failed("torch", f"cannot be imported: {error}", remedy)
    said = f"{facts['version']}, imported in {duration(facts['seconds'])}"
    if error := facts.get("torchvision_error"):
        return failed(
            "torch",
            f"{said}, but torchvision cannot be imported: {error}",
            "install the two of one release: pip install --upgrade torch torchvision",
        )
    if not facts["gloo"]:
        return failed("torch", f"{said}, built without gloo", "pip install torch from PyPI")
    return Finding("torch", said, "ok", values=dict(facts), varies=True)


def gpu_findings(facts: Mapping[str, Any], device: str, driver: str | None) -> list[Finding]:
    """The GPUs that torch can use, one row each; or why there is none.

    Args:
        facts: of `probe_torch`.
        device: auto, cpu or cuda, as asked for.
        driver: of NVIDIA, None where there is none.
    """
    gpus = facts.get("gpus", [])
    if not gpus:
        return [_no_gpu(facts, device, driver)]
    if device == "cpu":
        return [info("GPU", f"{len(gpus)}, left alone as --device cpu was given")]
    return [_gpu_finding(number, gpu, driver) for number, gpu in enumerate(gpus)]


def _gpu_finding(number: int, gpu: Mapping[str, Any], driver: str | None) -> Finding:
    said = f"{gpu['name']}, {size(gpu['memory'])}"
    said += f", driver {driver}" if driver else ""
    if error := gpu.get("error"):
        remedy = "install a torch that is built for this GPU and driver (see pytorch.org)"
        if "memory" in error or "busy" in error:
            remedy = _IN_USE
        return failed(f"GPU {number}", f"{said}: cannot be used: {error}", remedy, **gpu)
    used = gpu["memory"] - gpu["free"]
    if used > max(2 * GIB, 0.1 * gpu["memory"]):
        return warning(
            f"GPU {number}",
            f"{said}; {size(used)} of it are in use",
            _IN_USE,
            **gpu,
        )
    return Finding(f"GPU {number}", said, "ok", values=dict(gpu))


def _no_gpu(facts: Mapping[str, Any], device: str, driver: str | None) -> Finding:
    said = "none that torch can use; training runs on the CPU"
    hidden = facts.get("visible_devices", None) in ("", "-1")
    if driver is None:
        if device != "cuda":
            return info("GPU", "none; training runs on the CPU")
        return failed("GPU", "none, and --device cuda was given", "--device cpu, or auto")
    if hidden:
        remedy = "unset CUDA_VISIBLE_DEVICES"
    elif not facts.get("cuda"):
        remedy = "this torch is built without CUDA: install one with it (see pytorch.org)"
    elif facts.get("warning"):
        remedy = f"torch says: {facts['warning']}; update the driver, or install an older torch"
    else:
        remedy = "nvidia-smi must list a GPU; in a container start it with --gpus all"
    said += f", though there is NVIDIA's driver {driver}".rstrip()
    return (failed if device == "cuda" else warning)("GPU", said, remedy)


def dali_finding(facts: Mapping[str, Any], installed: bool) -> Finding:
    """Whether DALI decodes a picture here."""
    if not installed:
        return info("DALI", "not installed; pictures are decoded with torchvision, more slowly")
    if error := facts.get("error"):
        return failed(
            "DALI",
            f"does not work here: {error}",
            "train with data.loader=torch, or pip install --upgrade --force-reinstall "
            "nvidia-dali-cuda130",
        )
    how = "on the GPU (mixed)" if facts["decoder"] == "mixed" else "on the CPU"
    if abs(facts["mean"] - _GREY) > 2 or facts["shape"] != [1, 32, 32, 3]:
        return failed(
            "DALI",
            f"decodes {how}, but wrongly: grey {facts['mean']:.0f} instead of {_GREY}",
            "train with data.loader=torch, and pip install --upgrade nvidia-dali-cuda130",
            **facts,
        )
    said = f"{facts['version']} decodes {how}; started in {duration(facts['seconds'])}"
    return Finding("DALI", said, "ok", values=dict(facts), varies=True)


def deepspeed_finding(facts: Mapping[str, Any], installed: bool) -> Finding:
    """Whether DeepSpeed can be used; training does without."""
    if not installed:
        return info("DeepSpeed", "not installed; engine.name=ddp does without")
    if error := facts.get("error"):
        remedy = "train with engine.name=ddp (the default), or pip install --upgrade deepspeed"
        if "no answer" in error:
            remedy += "; or raise --timeout where disks are slow"
        return warning("DeepSpeed", f"cannot be imported: {error}", remedy)
    said = f"{facts['version']} for {facts['accelerator']}"
    if missing := facts.get("missing"):
        return warning(
            "DeepSpeed",
            f"{said} must compile its communication, without {' and '.join(missing)}",
            f"pip install ninja, apt-get install g++ ({' and '.join(missing)} is missing), or "
            "train with engine.name=ddp (the default)",
            **facts,
        )
    compiled = "; its first start compiles for about a minute" if facts["compiles"] else ""
    imported = f"imported in {duration(facts['seconds'])}"
    return Finding(
        "DeepSpeed", f"{said}, {imported}{compiled}", "ok", values=dict(facts), varies=True
    )


def probe_torch(device: str) -> dict[str, Any]:
    """Imports torch and torchvision, and adds two numbers on each GPU."""
    start = time.perf_counter()
    import torch
    import torch.distributed as dist

    found: dict[str, Any] = {
        "version": torch.__version__,
        "seconds": time.perf_counter() - start,
        "cuda": torch.version.cuda or getattr(torch.version, "hip", None),
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": dist.is_available() and dist.is_nccl_available(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpus": [],
    }
    try:
        import torchvision  # noqa: F401  # the two are bound to each other's release
    except Exception as error:
        found["torchvision_error"] = describe(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if caught:
        found["warning"] = str(caught[-1].message).splitlines()[0][:200]
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        gpu = {
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }
        found["gpus"].append(gpu)
        if device == "cpu":
            continue
        try:
            ones = torch.ones(8, device=f"cuda:{number}")
            assert float((ones + ones).sum()) == 16.0, "1 + 1 is not 2"
            gpu["free"] = torch.cuda.mem_get_info(number)[0]
        except Exception as error:
            gpu["error"] = describe(error)
    return found


def probe_dali(device: str) -> dict[str, Any]:
    """Builds DALI's smallest real pipeline, with the operators of training, and runs it once."""
    import numpy as np
    from PIL import Image

    start = time.perf_counter()
    from nvidia import dali

    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), (_GREY,) * 3).save(buffer, "JPEG", quality=95)
    encoded = np.frombuffer(buffer.getvalue(), np.uint8)
    on_gpu = device == "cuda"
    decoder = "mixed" if on_gpu else "cpu"
    pipeline: Any = dali.Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=0 if on_gpu else None,  # None needs no driver
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    fn: Any = dali.fn
    with pipeline:
        source = fn.external_source(name="image", ndim=1, dtype=dali.types.UINT8)
        image = fn.decoders.image(source, device=decoder, output_type=dali.types.RGB)
        pipeline.set_outputs(fn.resize(image, resize_x=32, resize_y=32))
    pipeline.build()
    pipeline.feed_input("image", [encoded])
    (output,) = pipeline.run()
    pixels = np.asarray((output.as_cpu() if on_gpu else output).as_array())
    return {
        "version": dali.__version__,
        "decoder": decoder,
        "shape": list(pixels.shape),
        "mean": float(pixels.mean()),
        "seconds": time.perf_counter() - start,
    }


def probe_deepspeed(device: str) -> dict[str, Any]:
    """Imports DeepSpeed, and looks for what it compiles itself with on a CPU."""
    if device != "cuda":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it looks for GPUs otherwise, and warns
    logging.disable(logging.WARNING)
    import torch  # noqa: F401  # its time is not DeepSpeed's

    start = time.perf_counter()
    import deepspeed  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from deepspeed.accelerator import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        get_accelerator,
    )

    accelerator = get_accelerator()
    found = {
        "version": deepspeed.__version__,
        "accelerator": "the CPU" if accelerator.device_name() == "cpu" else "GPUs",
        "seconds": time.perf_counter() - start,
        "compiles": device != "cuda" and _compiles(deepspeed, accelerator),
    }
    if found["compiles"]:
        from torch.utils.cpp_extension import is_ninja_available

        compiler = os.environ.get("CXX", "c++")
        missing = [] if is_ninja_available() else ["ninja"]
        missing += [] if shutil.which(compiler) else [f"a C++ compiler ({compiler})"]
        found["missing"] = missing
    return found


def _compiles(deepspeed: Any, accelerator: Any) -> bool:
    """Whether it builds an extension for communication when it starts."""
    with contextlib.suppress(Exception):  # its insides differ between versions
        builder = accelerator.create_op_builder("ShareMemCommBuilder")
        return builder is not None and bool(deepspeed.ops.__compatible_ops__.get(builder.NAME))
    return False


_PROBES: dict[str, Callable[[str], dict[str, Any]]] = {
    "torch": probe_torch,
    "dali": probe_dali,
    "deepspeed": probe_deepspeed,
}

if __name__ == "__main__":
    run_probe(lambda: _PROBES[sys.argv[1]](sys.argv[2]))

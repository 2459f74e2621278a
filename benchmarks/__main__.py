"""Runs every benchmark: `make bench`."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if not path.stem.startswith(("_", "gpu_")) and path.stem != "nodes"
)

for script in SCRIPTS:
    print(f"benchmarks.{script}", flush=True)
    status = subprocess.call([sys.executable, "-m", f"benchmarks.{script}"])
    if status:
        sys.exit(status)

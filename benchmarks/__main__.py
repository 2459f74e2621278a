"""Runs every benchmark: `make bench`."""

import subprocess
import sys
from pathlib import Path

# imported by others; and contenders, which `side_by_side` starts
_PARTS = {
    *("comparison_data", "contender", "contender_process", "dilated_resnet", "environments"),
    *("maskbank_contender", "nodes", "plain_method"),
}
SCRIPTS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if not path.stem.startswith(("_", "gpu_", "compare_")) and path.stem not in _PARTS
)

for script in SCRIPTS:
    print(f"benchmarks.{script}", flush=True)
    status = subprocess.call([sys.executable, "-m", f"benchmarks.{script}"])
    if status:
        sys.exit(status)

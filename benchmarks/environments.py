"""A Python environment for each peer, so that its packages touch nobody else's.

Made once under `runs/peers/NAME` and used again; `rm -r runs/peers/NAME` makes it anew.
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

DEFAULT_FOLDER = Path("runs/peers")
LIMIT = 900.0  # seconds that an installation may take

# Appended after the environment's own packages: what it has itself comes first, and torch, which it
# has not, is the one that maskbank runs on, so that training code is compared and not builds of
# torch. It also saves gigabytes.
_SHARED = "packages_of_maskbank.pth"
_INSTALLED = "installed.json"  # written last, so that half an installation is not used


class NotInstalled(Exception):
    """A peer's environment cannot be made; says why in one line."""


def peer_python(
    name: str, packages: Sequence[str], folder: Path = DEFAULT_FOLDER, limit: float = LIMIT
) -> Path:
    """The interpreter of the environment that has `packages` and sees this environment's torch.

    Args:
        name: of the environment.
        packages: requirements, as pip reads them; none: this environment has all that it needs.
        folder: that holds all environments.
        limit: seconds that making it may take.

    Raises:
        NotInstalled: it could not be made.
    """
    if not packages:
        return Path(sys.executable)
    environment = (folder / name).absolute()
    python = environment / "bin/python"
    installed = environment / _INSTALLED
    if python.exists() and _read(installed) == list(packages):
        return python
    try:
        installed.unlink(missing_ok=True)
    except OSError as error:
        raise NotInstalled(f"{folder} cannot hold an environment ({error.strerror})") from None
    _run([sys.executable, "-m", "venv", str(environment)], limit)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site_packages / _SHARED).write_text("".join(f"{path}\n" for path in shared))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *packages], limit)
    installed.write_text(json.dumps(list(packages)))
    return python


def _run(command: list[str], limit: float) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{command[2]} took more than {limit:.0f} s") from None
    except OSError as error:
        raise NotInstalled(f"{command[0]} cannot be run ({error.strerror})") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        said = [line for line in errors if line.startswith("ERROR")] or errors[-1:]
        raise NotInstalled(f"{command[2]} failed: {' '.join(said[:1])[:300]}")


def _read(file: Path) -> list[str] | None:
    try:
        packages: list[str] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return packages

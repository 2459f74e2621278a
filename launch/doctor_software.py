"""Whether the packages that maskbank stands on are here, and new enough."""

import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.doctor_finding import Finding, failed, info, ok, warning

SHOWN = ("maskbank", "torch", "torchvision", "numpy", "DALI", "deepspeed", "webdataset", "timm")
_DALI = "nvidia-dali-cuda"  # one distribution for each version of CUDA
_OPERATORS: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda have, wanted: have >= wanted,
    "<=": lambda have, wanted: have <= wanted,
    ">": lambda have, wanted: have > wanted,
    "<": lambda have, wanted: have < wanted,
    "!=": lambda have, wanted: have != wanted,
    "==": lambda have, wanted: have == wanted,
    "~=": lambda have, wanted: have >= wanted and have[:-1] == wanted[:-1],
}


@dataclass(frozen=True)
class Requirement:
    """One line of the package's metadata: `timm>=1.0; extra == "masks"`.

    Attributes:
        name: of the distribution.
        versions: which it may have: ">=1.0"; empty for any.
        extra: of maskbank that asks for it; empty where maskbank itself does.
    """

    name: str
    versions: str
    extra: str


def parse_requirement(line: str) -> Requirement:
    """Reads what setuptools writes; markers other than `extra` are passed over."""
    wanted, _, marker = line.partition(";")
    name, versions = re.fullmatch(r"([\w.-]+)(?:\[.*?\])?\s*\(?([^)]*)\)?", wanted.strip()).groups()  # type: ignore[union-attr]  # every line begins with a name
    extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", marker)
    return Requirement(name, versions.replace(" ", ""), extra.group(1) if extra else "")


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=2.9,<3"; suffixes of releases do not count."""
    have = _release(version)
    for part in filter(None, wanted.split(",")):
        match = re.match(r"(>=|<=|!=|==|~=|>|<)(.+)", part)
        if match is None:
            continue
        operator, text = match.groups()
        limit = _release(text)
        length = len(limit) if "*" in text or operator == "~=" else max(len(have), len(limit))
        padded = (have + (0,) * length)[:length]
        if not _OPERATORS[operator](padded, (limit + (0,) * length)[:length]):
            return False
    return True


def software_findings() -> list[Finding]:
    """Versions of this environment against the ranges in maskbank's own metadata."""
    try:
        own = importlib.metadata.metadata("maskbank")
        lines = importlib.metadata.requires("maskbank") or []
    except importlib.metadata.PackageNotFoundError:
        unknown = warning(
            "packages",
            "maskbank is not installed, so that the versions it needs are not known",
            "pip install --editable . in the folder of the clone",
        )
        return [unknown, *version_findings([], installed_version)]
    wanted = own.json.get("requires_python", "")
    python = python_finding(platform.python_version(), str(wanted))
    return [python, *version_findings(map(parse_requirement, lines), installed_version)]


def installed_version(name: str) -> str | None:
    """Of a distribution; DALI's counts whatever its CUDA."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    if name.startswith(_DALI):
        for distribution in importlib.metadata.distributions():
            if (distribution.metadata["Name"] or "").lower().startswith(_DALI):
                return distribution.version
    return None


def python_finding(version: str, wanted: str) -> Finding:
    if satisfies(version, wanted):
        return ok("Python", version, version=version)
    return failed(
        "Python",
        f"{version}; maskbank needs {wanted}",
        "make the virtual environment with a newer Python: python3.11 -m venv .venv",
        version=version,
    )


def version_findings(
    requirements: Iterable[Requirement], installed: Callable[[str], str | None]
) -> list[Finding]:
    """One row for what is there, one for each package that is missing or of a wrong version.

    Args:
        requirements: of maskbank and its extras.
        installed: the version of a distribution, or None.
    """
    needed = {_shown_name(each.name): each for each in requirements}
    optional = [Requirement(name, "", "-") for name in ("deepspeed", "webdataset", "timm")]
    needed |= {each.name: each for each in optional if each.name not in needed}
    for name in ("torch", "torchvision", "numpy"):
        needed.setdefault(name, Requirement(name, "", ""))
    needed.setdefault("maskbank", Requirement("maskbank", "", "-"))
    needed.setdefault("DALI", Requirement(f"{_DALI}130", "", "dali"))
    versions = {name: installed(each.name) for name, each in needed.items()}
    there = [f"{name} {versions[name]}" for name in SHOWN if versions.get(name)]
    without = [name for name in SHOWN[1:] if not versions[name] and needed[name].extra]
    result = ", ".join(there) + (f"; without {', '.join(without)} (optional)" if without else "")
    known = {name: versions[name] for name in SHOWN}
    wrong = _wrong(needed, versions)
    return [(info if wrong else ok)("packages", result, **known), *wrong]


def _wrong(
    needed: Mapping[str, Requirement], versions: Mapping[str, str | None]
) -> Sequence[Finding]:
    findings = []
    for name, each in needed.items():
        version = versions[name]
        wanted = f"'{each.name}{each.versions}'"
        if version is None and not each.extra:
            findings.append(failed(name, "not installed", f"pip install {wanted}"))
        elif version is not None and not satisfies(version, each.versions):
            said = f"{version}; maskbank is made for {each.versions}"
            findings.append(warning(name, said, f"pip install --upgrade {wanted}"))
    return findings


def _shown_name(name: str) -> str:
    return "DALI" if name.startswith(_DALI) else name


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 2.10.0+cu130 is (2, 10, 0)."""
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match.group(1).split(".")) if match else ()

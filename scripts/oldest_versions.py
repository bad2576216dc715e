"""Print the oldest version that pyproject.toml promises of each package in requirements.txt, torch first, for pip.

`make test-oldest` installs them and runs the quick tests. requirements.txt says which packages the tests use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def oldest_versions() -> Iterator[str]:
    """One line `package==version` a package, with its extras and its marker. A package that pyproject.toml names
    several times, as extras do, is installed in the newest of these versions, which all of them allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    promised: dict[str, tuple[Version, Requirement]] = {}
    for requirement in map(Requirement, chain.from_iterable(groups)):
        name = canonicalize_name(requirement.name)
        version = _lower_bound(requirement)
        if name not in promised or promised[name][0] < version:
            promised[name] = (version, requirement)
    for name in _tested_packages():
        version, requirement = promised[name]
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        marker = f"; {requirement.marker}" if requirement.marker else ""
        yield f"{requirement.name}{extras}=={version}{marker}"


def _lower_bound(requirement: Requirement) -> Version:
    (version,) = (part.version for part in requirement.specifier if part.operator in (">=", "=="))
    return Version(version)


def _tested_packages() -> list[str]:
    """The packages of requirements.txt, each once, in its order, which begins with torch."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    pins = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return list(dict.fromkeys(canonicalize_name(pin.name) for pin in pins))


if __name__ == "__main__":
    print(*oldest_versions(), sep="\n")

"""Optional packages: every message and page that says how to install one names a version that fits, and works today."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from yeonma.packages import TESTED, install

ROOT = Path(__file__).resolve().parents[2]
OWN = {"torch", "transformers", "numpy", "yeonma"}
BY_IMPORT = {
    "math_verify": "math-verify",
    "mistral_common": "mistral-common",
    "compressed_tensors": "compressed-tensors",
    "yaml": "pyyaml",
}
NOT_INSTALLED_BY_US = {"triton", "vllm", "setproctitle", "__main__"}
"""Parts of torch, and what only users of these tools have: no message says to install them."""


def ranges() -> dict[str, tuple[str, bool]]:
    """Package -> its range in pyproject.toml, and whether it is optional."""
    found = {}
    is_optional = False
    for line in (ROOT / "pyproject.toml").read_text("utf-8").splitlines():
        is_optional = is_optional or line == "[project.optional-dependencies]"
        if line.startswith("[project.scripts]"):
            break
        for name, bounds in re.findall(r'"([A-Za-z0-9_.-]+)(?:\[[a-z]+\])?([<>=][^"; ]*)', line):
            if not line.startswith(("dev =", "bench =", "requires")):
                found.setdefault(name.lower(), (bounds, is_optional))
    return found


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]+", version))


def is_within(version: str, bounds: str) -> bool:
    compare = {
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
        "==": lambda a, b: a == b,
    }
    for bound in bounds.split(","):
        match = re.fullmatch("(>=|==|<)([0-9.]+)", bound)
        assert match, bound
        if not compare[match[1]](numbers(version), numbers(match[2])):
            return False
    return True


def test_ranges_are_read() -> None:
    found = ranges()
    assert found["torch"] == (">=2.11,<2.14", False) and found["openpyxl"] == (">=3.1.5,<4", True)
    assert is_within("3.1.5", ">=3.1.5,<4") and not is_within("4.0", ">=3.1.5,<4")


@pytest.mark.parametrize("package", sorted(TESTED))
def test_the_command_installs_a_version_within_the_range_of_pyproject(package: str) -> None:
    version = TESTED[package]
    assert install(package) == f'pip install "{package}=={version}"'
    declared = ranges()
    if package not in ("tiktoken", "mistral-common"):  # no extra of ours
        assert is_within(version, declared[package][0])
    pins = dict(
        re.findall(r"^([A-Za-z0-9_.-]+)==([0-9.]+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    )
    assert pins.get(package, version) == version


def test_every_optional_package_of_pyproject_has_a_tested_version() -> None:
    optional = {name for name, (_, is_optional) in ranges().items() if is_optional}
    assert len(optional) > 10
    assert optional <= set(TESTED)


def optional_imports() -> set[str]:
    """The packages that modules import or look for, and that no ordinary installation has."""
    declared = {name for name, (_, is_optional) in ranges().items() if not is_optional}
    names = set()
    for path in sorted((ROOT / "yeonma").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
                names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    tops = {BY_IMPORT.get(name.partition(".")[0], name.partition(".")[0]) for name in map(str, names)}
    return tops - declared - OWN - set(sys.stdlib_module_names) - NOT_INSTALLED_BY_US


def test_every_optional_import_has_a_command() -> None:
    found = optional_imports()
    assert {"openpyxl", "bitsandbytes", "uvicorn", "wandb"} <= found
    assert found - {"pip"} <= set(TESTED), found - set(TESTED)


def test_fault_102_no_message_or_page_names_an_extra_or_a_version_of_its_own() -> None:
    """Yeonma is on no index: a message never names its extras, and a page only with the place that it comes from."""
    pages = [ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").glob("*.md"))]
    code = [path for path in sorted((ROOT / "yeonma").rglob("*")) if path.suffix in (".py", ".yaml")]
    for path in [*pages, *code]:
        text = path.read_text("utf-8")
        if path in code and path.name != "packages.py":
            assert "yeonma[" not in text, path
            assert not re.search("pip install (?!-)", text), f"{path}: use yeonma.packages.install"
            continue
        for extras, place in re.findall(r"yeonma[\w.-]*\[([^\]]*)\](.*)", text):
            assert path in pages and place.startswith((" @ git+", '"')), f"{path}: {extras}{place}"
            assert set(extras.split(",")) <= extras_of_pyproject(), f"{path}: {extras}"
        for command in re.findall(r"pip install (?!-)(\S+)", text) if path in pages else ():
            if command.startswith(('"yeonma[', '"yeonma-')):
                continue
            match = re.match(r'"?([a-z][a-z0-9_-]*)==([0-9.]*[0-9])', command)
            assert match, f"{path}: {command}"
            assert TESTED.get(match[1], pins_of_requirements().get(match[1])) == match[2], (
                f"{path}: {command}"
            )


@pytest.mark.parametrize("page", ["README", "docs/tutorial"])
def test_every_way_to_install_begins_with_the_pinned_torch(page: str) -> None:
    """A package after it would otherwise draw in another build of PyTorch."""
    pin = f"torch=={pins_of_requirements()['torch']}"
    for ending in (".md", ".ko.md"):
        text = (ROOT / f"{page}{ending}").read_text("utf-8")
        found = [
            re.findall(r"pip install (.*)", block)
            for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
        ]
        ways = [commands for commands in found if commands]
        assert ways and all(commands[0].startswith(pin) for commands in ways), f"{page}{ending}: {ways}"


def extras_of_pyproject() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([a-z0-9-]+) = ", section, re.M))


def pins_of_requirements() -> dict[str, str]:
    text = (ROOT / "requirements.txt").read_text("utf-8")
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([0-9.]+)", text, re.M))


def test_the_oldest_versions_are_lower_bounds_of_all_packages_that_the_tests_use() -> None:
    command = [sys.executable, "scripts/oldest_versions.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    oldest = [Requirement(line) for line in done.stdout.splitlines()]
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    tested = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert oldest[0].name == "torch"
    assert {pin.name for pin in oldest} == {pin.name for pin in tested}
    newest = {pin.name: numbers(str(pin.specifier)) for pin in reversed(tested)}
    for pin in oldest:
        version = numbers(str(pin.specifier))
        assert version <= newest[pin.name], pin
        bounds, _ = ranges().get(pin.name.lower(), (f">={str(pin.specifier)[2:]}", True))
        assert is_within(str(pin.specifier)[2:], bounds) and str(pin.specifier)[2:] in bounds, pin

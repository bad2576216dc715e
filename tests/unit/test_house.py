"""The house rules: who imports whom, what is read, how fast help comes, what is declared."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from yeonma.config import settings

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "yeonma"
MOST_LINES = 700
LONGER: dict[str, str] = {}
"""Modules past MOST_LINES, each with the reason."""

HOUSE_LINE = re.compile(r"( *)(?:(\w+)\.py|(\w+)/)(?: .*)?")


def house_of(design: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rooms in the list of design section 3, in its order, and all its modules, `yeonma/__init__.py` as the empty
    name. A room is a package or a single module directly under `yeonma/`; each imports only from those above it."""
    block = design.partition("```\nyeonma/\n")[2].partition("```")[0]
    rooms: list[str] = []
    modules: list[str] = []
    packages: list[str] = []
    for line in block.splitlines():
        parts = HOUSE_LINE.fullmatch(line)
        assert parts is not None and len(parts[1]) in (2, 4, 6), line
        packages = packages[: len(parts[1]) // 2 - 1]
        name = (parts[2] or parts[3]).replace("__init__", "")
        if not packages:
            rooms.append(name)
        if parts[3]:
            packages.append(name)
        else:
            modules.append(".".join([*packages, name]))
    return tuple(rooms), tuple(modules)


ROOMS, HOUSE = house_of((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def sources() -> dict[str, str]:
    """Module name below `yeonma` -> source text. A package's own `__init__` goes by the package's name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file.read_text(encoding="utf-8")
    return found


def imports(module: str, source: str, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, in functions too; `from x import y` is x.y where that is a module."""
    is_package = any(name.startswith(f"{module}.") for name in known) or not module
    package = f"yeonma.{module}".rstrip(".").split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                yield node.lineno, whole if whole.removeprefix("yeonma.") in known else origin


def own_imports(module: str, source: str, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and name below `yeonma` of every import of the package's own modules."""
    for line, name in imports(module, source, known):
        if name == "yeonma" and "__version__" in source.splitlines()[line - 1]:
            continue  # the only thing that the modules take from the door
        if name == "yeonma" or name.startswith("yeonma."):
            yield line, name.removeprefix("yeonma").removeprefix(".")


def breaches(modules: Mapping[str, str]) -> list[str]:
    """Imports that go down the list of rooms, and modules and rooms that have no place in it."""
    found = []
    for module, source in modules.items():
        room = module.split(".")[0]
        if room not in ROOMS:
            found.append(f"{module}: its room has no place in the house")
            continue
        for line, target in own_imports(module, source, frozenset(modules)):
            there = target.split(".")[0]
            known = target in modules and there in ROOMS
            if not known or ROOMS.index(there) > ROOMS.index(room) or (target == module):
                found.append(f"{module}:{line} imports {target or 'yeonma'}, which is below it")
    return found


def circles(modules: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, directly or through others."""
    known = frozenset(modules)
    graph = {
        name: {there for _, there in own_imports(name, source, known)} for name, source in modules.items()
    }

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        following = [name]
        while following:
            new = graph.get(following.pop(), set()) - seen
            seen |= new
            following += new
        return seen

    below = {name: reached(name) for name in graph}
    in_circle = {name for name, seen in below.items() if name in seen}
    return sorted(
        {tuple(sorted(other for other in below[name] if name in below.get(other, ()))) for name in in_circle}
    )


def test_the_design_lists_just_the_modules_that_there_are() -> None:
    packages = {name.rpartition(".")[0] for name in sources() if "." in name}
    packages |= {name.rpartition(".")[0] for name in packages if "." in name}
    assert len(HOUSE) == len(set(HOUSE)) > 40
    assert sorted(HOUSE) == sorted(sources().keys() - packages)


def test_a_list_of_modules_is_read_with_its_rooms() -> None:
    block = (
        "yeonma/\n  errors.py   said\n  model/       rows -> text\n    load.py\n    kernels/ fast\n      lora.py\n"
        "    trace.py\n  demo.py\n  __init__.py  door\n"
    )
    rooms, modules = house_of(f"before\n```\n{block}```\nafter")
    assert rooms == ("errors", "model", "demo", "")
    assert modules == ("errors", "model.load", "model.kernels.lora", "model.trace", "demo", "")


def test_rooms_import_only_upwards() -> None:
    assert breaches(sources()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(sources()) == []


def test_a_circle_is_caught() -> None:
    one = {
        "data.rows": "from yeonma.data import readers",
        "data.readers": "def later():\n    import yeonma.data.rows",
    }
    assert circles(one) == [("data.readers", "data.rows")]
    assert circles(one | {"data.readers": ""}) == []


@pytest.mark.parametrize(
    "line",
    [
        "import yeonma.train.loop",
        "from yeonma.train.loop import train",
        "from yeonma.train import loop",
        "from ..train import loop",
        "from ..train.loop import train",
        "def later():\n    from yeonma.train import loop",
        "from yeonma import load",
        "from yeonma import cli",
        "from yeonma.nowhere import thing",
    ],
)
def test_a_downward_import_is_caught(line: str) -> None:
    upward = "from yeonma.errors import UserError\nfrom yeonma import __version__\nfrom . import rows"
    packages = {"data": "from .template import parse", "train": "from ..errors import UserError"}
    modules = dict.fromkeys(HOUSE, "") | packages | {"data.columns": upward}
    assert breaches(modules) == []
    assert len(breaches(modules | {"data.columns": line})) == 1


def test_a_module_without_a_place_is_caught() -> None:
    assert breaches({"utils.text": ""}) == ["utils.text: its room has no place in the house"]


def test_no_file_name_stands_twice_in_the_package() -> None:
    names = [name.rpartition(".")[2] for name in HOUSE]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def class_names(source: str) -> list[str]:
    """Classes and type aliases of a module, without the underscore of private ones; type variables are no names."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            call = node.value.func if isinstance(node.value, ast.Call) else None
            if not (isinstance(call, ast.Name) and call.id == "TypeVar"):
                names.append(node.targets[0].id)
    return [name.lstrip("_") for name in names if re.match(r"_?[A-Z][a-z]", name)]


def test_no_class_and_no_type_alias_stands_twice_in_the_package() -> None:
    assert class_names(
        "class _A1: ...\nclass Row: ...\nTokenIds = list[int]\nT2 = TypeVar('T2')\nLIMIT = 3"
    ) == [
        "Row",
        "TokenIds",
    ]
    names = [name for path in PACKAGE.rglob("*.py") for name in class_names(path.read_text("utf-8"))]
    assert sorted({name for name in names if names.count(name) > 1}) == []


PATCHES = {
    "model.kernels.last_layer": {"trim_last_layer", "trim_where_equal"},
    "model.kernels.lora": {"patch_linear"},
    "model.kernels.patch": {"patch_elementwise", "patch_kernels", "pick_kernels"},
}
"""What changes the modules of a model, by the module it lies in."""


def patchers(modules: Mapping[str, str]) -> set[str]:
    """Modules outside `model/kernels/` that import something of PATCHES, or a whole module that has it."""
    found = set()
    for module, source in modules.items():
        if module.startswith("model.kernels"):
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = {alias.name.removeprefix("yeonma.") for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                origin = node.module.removeprefix("yeonma.")
                if names & PATCHES.get(origin, set()):
                    found.add(module)
                names = {f"{origin}.{name}" for name in names}
            if names & PATCHES.keys():
                found.add(module)
    return found


def test_no_module_but_policy_patches_models() -> None:
    assert patchers(sources()) == {"policy"}


@pytest.mark.parametrize(
    "line",
    [
        "from yeonma.model.kernels.patch import patch_kernels",
        "def later():\n    from yeonma.model.kernels.lora import LoraLinear, patch_linear as faster",
        "from yeonma.model.kernels import last_layer",
        "import yeonma.model.kernels.patch",
    ],
)
def test_a_module_that_patches_models_is_caught(line: str) -> None:
    assert patchers(
        {"serve.server": line, "train.build": "from yeonma.model.kernels.linear import product"}
    ) == {"serve.server"}


def test_rows_become_text_without_torch() -> None:
    modules = sources()
    known = frozenset(modules)
    for module, source in modules.items():
        if module.split(".")[0] in ("errors", "files", "config", "data"):
            for line, name in imports(module, source, known):
                assert name.split(".")[0] not in ("torch", "transformers", "peft"), (
                    f"{module}:{line} imports {name}"
                )


def unread(names: set[str], modules: Mapping[str, str]) -> set[str]:
    """The names that no module reads as an attribute."""
    read = {
        node.attr
        for source in modules.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    return names - read


def test_every_setting_is_read_somewhere() -> None:
    names = {
        field.name
        for title, cls in vars(settings).items()
        if title.endswith("Settings") and is_dataclass(cls)
        for field in fields(cls)
    }
    readers = {name: source for name, source in sources().items() if not name.startswith("config.")}
    assert len(names) > 50
    assert sorted(unread(names, readers)) == []


def test_a_setting_that_is_only_written_counts_as_unread() -> None:
    assert unread({"lora_r", "seed"}, {"loop": "settings.lora_r = 3\nuse(run.seed)"}) == {"lora_r"}


def help_text(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "yeonma", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )


def test_help_imports_neither_torch_nor_transformers() -> None:
    done = help_text("-X", "importtime")
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line
    }
    assert "sft" in done.stdout
    assert "yeonma.cli" in imported
    assert imported.isdisjoint({"torch", "transformers", "peft", "datasets"})


def test_help_answers_in_under_half_a_second() -> None:
    def processor_seconds() -> (
        float
    ):  # of the child alone; unlike the clock, it does not count other programs' turns
        before = os.times()
        help_text()
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(processor_seconds() for _ in range(5)) < 0.5


def test_the_tables_of_settings_are_in_step() -> None:
    script = ROOT / "scripts" / "settings_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_no_file_of_the_package_is_too_long_without_a_reason() -> None:
    long = {name: lines for name, source in sources().items() if (lines := source.count("\n")) > MOST_LINES}
    assert {name: lines for name, lines in long.items() if name not in LONGER} == {}


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_the_tutorials_scripts_hand_their_arguments_to_their_verbs(verb: str) -> None:
    def refused(*command: str) -> tuple[int, str]:
        arguments = [sys.executable, *command, "--lora_rr", "8"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stderr

    status, message = refused(f"{verb}-trainer.py")
    assert status == 2
    assert "lora_rr" in message
    assert (status, message) == refused("-m", "yeonma", verb)


def declared() -> dict[str, Requirement]:
    """pyproject.toml's dependencies and extras by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, texts)}


def test_every_package_imported_is_declared() -> None:
    modules = sources()
    distributions = packages_distributions()
    missing = set()
    for module, source in modules.items():
        for line, name in imports(module, source, frozenset(modules)):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "yeonma":
                continue
            if not any(canonicalize_name(name) in declared() for name in distributions.get(top, [top])):
                missing.add(f"{module}:{line} imports {top}")
    assert missing == set()


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_torch_and_transformers_end_after_the_minor_version_that_is_pinned(name: str) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line).specifier for line in lines if re.match(rf"{name}==", line)]
    newest = max(Version(next(iter(pin)).version) for pin in pins)
    (bound,) = (part.version for part in declared()[name].specifier if part.operator == "<")
    assert bound == f"{newest.major}.{newest.minor + 1}"


def test_requirements_pin_torch_first_and_everything_within_the_declared_ranges() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("torch==")  # `make setup` installs this line by itself
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "=="
        assert version.version in declared()[canonicalize_name(pin.name)].specifier, str(pin)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = [
        *project["dependencies"],
        *extras["demo"],
        *extras["compare"],
        *extras["serve"],
        *extras["dev"],
    ]
    wanted = {Requirement(text).name for text in installed}
    assert {pin.name for pin in pins} == wanted

"""Rules for the whole code base: import layers, unique names, unused settings, start-up of --help, dependencies."""

from __future__ import annotations

import ast
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
LONG_MODULES = {"config.settings": "every option stands in one place"}
"""Modules past MOST_LINES, each with the reason."""

MODULE_LINE = re.compile(r"( *)(?:(\w+)\.py|(\w+)/)(?: .*)?")


def parse_module_list(design: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers and the modules in the list of a design page, section 3, in its order.

    A layer is a package or a single module directly under `yeonma/` (the page calls it a room). It imports only from
    the layers above it. `yeonma/__init__.py` is the empty name.
    """
    block = design.partition("```\nyeonma/\n")[2].partition("```")[0]
    layers: list[str] = []
    modules: list[str] = []
    packages: list[str] = []
    for line in block.splitlines():
        parts = MODULE_LINE.fullmatch(line)
        assert parts is not None and len(parts[1]) in (2, 4, 6), line
        packages = packages[: len(parts[1]) // 2 - 1]
        name = (parts[2] or parts[3]).replace("__init__", "")
        if not packages:
            layers.append(name)
        if parts[3]:
            packages.append(name)
        else:
            modules.append(".".join([*packages, name]))
    return tuple(layers), tuple(modules)


DESIGN, KOREAN_DESIGN = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("design.md", "design.ko.md")
)
LAYERS, MODULES = parse_module_list(DESIGN)


def test_korean_design_page_lists_the_same_modules() -> None:
    assert parse_module_list(KOREAN_DESIGN) == (LAYERS, MODULES)


def sources() -> dict[str, str]:
    """Module name below `yeonma` -> source text. The `__init__` of a package has the package's name."""
    text_of_module = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text_of_module[name] = file.read_text(encoding="utf-8")
    return text_of_module


def imports(module: str, source: str, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import, also in functions. `from x import y` gives x.y if that is a module."""
    is_package = any(name.startswith(f"{module}.") for name in known) or not module
    package = f"yeonma.{module}".rstrip(".").split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full_name = f"{origin}.{alias.name}"
                yield node.lineno, full_name if full_name.removeprefix("yeonma.") in known else origin


def own_imports(module: str, source: str, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and name below `yeonma` of every import of the package's own modules."""
    for line, name in imports(module, source, known):
        if name == "yeonma" and "__version__" in source.splitlines()[line - 1]:
            continue  # the only name that modules import from `yeonma/__init__.py`
        if name == "yeonma" or name.startswith("yeonma."):
            yield line, name.removeprefix("yeonma").removeprefix(".")


def layer_violations(modules: Mapping[str, str]) -> list[str]:
    """Imports from lower layers, and modules outside the layers."""
    violations = []
    for module, source in modules.items():
        layer = module.split(".")[0]
        if layer not in LAYERS:
            violations.append(f"{module}: its room has no place in the house")
            continue
        for line, target in own_imports(module, source, frozenset(modules)):
            target_layer = target.split(".")[0]
            known = target in modules and target_layer in LAYERS
            if not known or LAYERS.index(target_layer) > LAYERS.index(layer) or (target == module):
                violations.append(f"{module}:{line} imports {target or 'yeonma'}, which is below it")
    return violations


def import_cycles(modules: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, directly or through others."""
    known = frozenset(modules)
    graph = {
        name: {target for _, target in own_imports(name, source, known)} for name, source in modules.items()
    }

    def reachable_from(name: str) -> set[str]:
        seen: set[str] = set()
        pending = [name]
        while pending:
            new = graph.get(pending.pop(), set()) - seen
            seen |= new
            pending += new
        return seen

    reachable = {name: reachable_from(name) for name in graph}
    in_cycle = {name for name, seen in reachable.items() if name in seen}
    return sorted(
        {
            tuple(sorted(other for other in reachable[name] if name in reachable.get(other, ())))
            for name in in_cycle
        }
    )


def test_design_page_lists_exactly_the_existing_modules() -> None:
    packages = {name.rpartition(".")[0] for name in sources() if "." in name}
    packages |= {name.rpartition(".")[0] for name in packages if "." in name}
    assert len(MODULES) == len(set(MODULES)) > 40
    assert sorted(MODULES) == sorted(sources().keys() - packages)


def test_module_list_of_a_page_is_parsed_with_its_layers() -> None:
    block = (
        "yeonma/\n  errors.py   said\n  model/       rows -> text\n    load.py\n    kernels/ fast\n      lora.py\n"
        "    trace.py\n  demo.py\n  __init__.py  door\n"
    )
    layers, modules = parse_module_list(f"before\n```\n{block}```\nafter")
    assert layers == ("errors", "model", "demo", "")
    assert modules == ("errors", "model.load", "model.kernels.lora", "model.trace", "demo", "")


def test_modules_import_only_from_their_own_layer_and_those_above() -> None:
    assert layer_violations(sources()) == []


def test_modules_have_no_circular_imports() -> None:
    assert import_cycles(sources()) == []


def test_circular_import_is_detected() -> None:
    cycle = {
        "data.rows": "from yeonma.data import readers",
        "data.readers": "def later():\n    import yeonma.data.rows",
    }
    assert import_cycles(cycle) == [("data.readers", "data.rows")]
    assert import_cycles(cycle | {"data.readers": ""}) == []


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
def test_import_from_a_lower_layer_is_detected(line: str) -> None:
    upward = "from yeonma.errors import UserError\nfrom yeonma import __version__\nfrom . import rows"
    packages = {"data": "from .template import parse", "train": "from ..errors import UserError"}
    modules = dict.fromkeys(MODULES, "") | packages | {"data.columns": upward}
    assert layer_violations(modules) == []
    assert len(layer_violations(modules | {"data.columns": line})) == 1


def test_module_outside_the_layers_is_detected() -> None:
    assert layer_violations({"utils.text": ""}) == ["utils.text: its room has no place in the house"]


def test_file_names_are_unique_in_the_package() -> None:
    names = [name.rpartition(".")[2] for name in MODULES]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def class_names(source: str) -> list[str]:
    """Names of classes and type aliases, without the underscore of private ones. Type variables do not count."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            call = node.value.func if isinstance(node.value, ast.Call) else None
            if not (isinstance(call, ast.Name) and call.id == "TypeVar"):
                names.append(node.targets[0].id)
    return [name.lstrip("_") for name in names if re.match(r"_?[A-Z][a-z]", name)]


def test_class_and_type_alias_names_are_unique_in_the_package() -> None:
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


def patch_importers(modules: Mapping[str, str]) -> set[str]:
    """Modules outside `model/kernels/` that import a function of PATCHES, or a module that defines one."""
    importers = set()
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
                    importers.add(module)
                names = {f"{origin}.{name}" for name in names}
            if names & PATCHES.keys():
                importers.add(module)
    return importers


def test_only_policy_imports_the_model_patches() -> None:
    assert patch_importers(sources()) == {"policy"}


@pytest.mark.parametrize(
    "line",
    [
        "from yeonma.model.kernels.patch import patch_kernels",
        "def later():\n    from yeonma.model.kernels.lora import LoraLinear, patch_linear as faster",
        "from yeonma.model.kernels import last_layer",
        "import yeonma.model.kernels.patch",
    ],
)
def test_import_of_a_model_patch_is_detected(line: str) -> None:
    assert patch_importers(
        {"serve.server": line, "train.build": "from yeonma.model.kernels.linear import product"}
    ) == {"serve.server"}


def test_settings_and_data_modules_do_not_import_torch() -> None:
    modules = sources()
    known = frozenset(modules)
    for module, source in modules.items():
        if module.split(".")[0] in ("errors", "files", "config", "data"):
            for line, name in imports(module, source, known):
                assert name.split(".")[0] not in ("torch", "transformers", "peft"), (
                    f"{module}:{line} imports {name}"
                )


def unread_names(names: set[str], modules: Mapping[str, str]) -> set[str]:
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
    readers = {
        name: source
        for name, source in sources().items()
        if name == "config.data_sets" or not name.startswith("config.")
    }
    assert len(names) > 50
    assert sorted(unread_names(names, readers)) == []


def test_a_setting_that_is_only_written_counts_as_unread() -> None:
    assert unread_names({"lora_r", "seed"}, {"loop": "settings.lora_r = 3\nuse(run.seed)"}) == {"lora_r"}


def run_help(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "yeonma", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )


def test_help_imports_neither_torch_nor_transformers() -> None:
    done = run_help("-X", "importtime")
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line
    }
    assert "sft" in done.stdout
    assert "yeonma.cli" in imported
    assert imported.isdisjoint({"torch", "transformers", "peft", "datasets"})


def test_documented_settings_tables_are_up_to_date() -> None:
    script = ROOT / "scripts" / "settings_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_modules_over_the_line_limit_have_a_stated_reason() -> None:
    over_limit = {
        name: lines for name, source in sources().items() if (lines := source.count("\n")) > MOST_LINES
    }
    assert {name: lines for name, lines in over_limit.items() if name not in LONG_MODULES} == {}


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_trainer_scripts_pass_their_arguments_to_their_commands(verb: str) -> None:
    def run_with_unknown_option(*command: str) -> tuple[int, str]:
        arguments = [sys.executable, *command, "--lora_rr", "8"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stderr

    status, message = run_with_unknown_option(f"{verb}-trainer.py")
    assert status == 2
    assert "lora_rr" in message
    assert (status, message) == run_with_unknown_option("-m", "yeonma", verb)


def declared_requirements() -> dict[str, Requirement]:
    """The dependencies and extras of pyproject.toml by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, texts)}


def test_every_imported_package_is_a_declared_dependency() -> None:
    modules = sources()
    distributions = packages_distributions()
    missing = set()
    for module, source in modules.items():
        for line, name in imports(module, source, frozenset(modules)):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "yeonma":
                continue
            if not any(
                canonicalize_name(name) in declared_requirements() for name in distributions.get(top, [top])
            ):
                missing.add(f"{module}:{line} imports {top}")
    assert missing == set()


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_torch_and_transformers_upper_bounds_follow_the_pinned_versions(name: str) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line).specifier for line in lines if re.match(rf"{name}==", line)]
    newest = max(Version(next(iter(pin)).version) for pin in pins)
    (bound,) = (part.version for part in declared_requirements()[name].specifier if part.operator == "<")
    assert bound == f"{newest.major}.{newest.minor + 1}"


def test_requirements_pin_torch_first_and_all_packages_in_declared_ranges() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("torch==")  # `make setup` installs this line by itself
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "=="
        assert version.version in declared_requirements()[canonicalize_name(pin.name)].specifier, str(pin)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    installed = [
        *project["dependencies"],
        *extras["xlsx"],
        *extras["demo"],
        *extras["compare"],
        *extras["serve"],
        *extras["quantization"],
        *extras["compressed-tensors"],
        *extras["sentencepiece"],
        *extras["completion"],
        *extras["dev"],
    ]
    expected_names = {Requirement(text).name for text in installed}
    assert {pin.name for pin in pins} == expected_names

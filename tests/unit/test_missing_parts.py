"""Windows has no fcntl, and the next PyTorch may lack any private operator: the package imports and works anyway."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.missing_parts import POSIX_ONLY, UNSTABLE

ROOT = Path(__file__).resolve().parents[2]
POSIX_NAMES = {
    *(
        "fork",
        "getuid",
        "geteuid",
        "killpg",
        "pread",
        "pwrite",
        "sched_getaffinity",
        "setsid",
        "statvfs",
        "uname",
    ),
    *("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2"),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What Python runs as it imports a module: all but the bodies of functions, and what only type checkers see."""
    yield node
    for name, value in ast.iter_fields(node):
        if isinstance(node, FUNCTIONS) and name in ("body", "returns", "type_params"):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and name == "body":
            continue
        if isinstance(node, ast.arg | ast.AnnAssign) and name == "annotation":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from at_import(child)


def is_private(parts: list[str]) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def early(source: str) -> list[tuple[int, str]]:
    """Line and name of each private part of PyTorch, and each of POSIX alone, that a module needs to be imported."""
    found = []
    for node in at_import(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            top, *rest = name.split(".")
            private = top == "torch" and (is_private(rest) or rest[:1] == ["ops"])
            posix = top in POSIX_ONLY or (top in ("os", "signal") and rest and rest[0] in POSIX_NAMES)
            if private or posix or name in UNSTABLE:
                found.append((node.lineno, name))
    return found


def test_no_module_needs_a_private_part_of_pytorch_or_of_posix_to_be_imported() -> None:
    files = sorted((ROOT / "yeonma").rglob("*.py"))
    assert len(files) > 100
    found = {
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in files
        for line, name in early(file.read_text("utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from fcntl import flock",
        "import torch._inductor",
        "from torch.utils._pytree import tree_leaves",
        "from torch.nn.attention.varlen import varlen_attn",
        "aten = torch.ops.aten",
        "TABLE = {torch.ops.aten.mm.default: 1}",
        "@torch._dynamo.disable\ndef f(): ...",
        "def f(kernel=torch._scaled_mm): ...",
        "class A:\n    kill = signal.SIGKILL",
        "try:\n    import resource\nexcept ImportError:\n    pass",
    ],
)
def test_a_part_that_is_needed_at_import_is_caught(line: str) -> None:
    later = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nimport os, signal, torch\n"
        "if TYPE_CHECKING:\n    from torch.distributed.fsdp import FSDPModule\n"
        "def g(x: torch._C.Node) -> torch._C.Node:\n    import fcntl\n    return torch.ops.aten.mm(x, os.fork())\n"
        "_private = torch.float32\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
    )
    assert early(later) == []
    assert early(later + line) != []


def test_the_package_imports_and_trains_without_them() -> None:
    command = [sys.executable, "-m", "tests.missing_parts"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained without private operators"

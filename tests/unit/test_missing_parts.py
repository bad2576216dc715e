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


def nodes_run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that Python runs at import: all except function bodies and code for type checkers only."""
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
                yield from nodes_run_at_import(child)


def is_private(parts: list[str]) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def import_time_uses(source: str) -> list[tuple[int, str]]:
    """Line and name of each private PyTorch part and each POSIX-only part that a module needs at import."""
    uses = []
    for node in nodes_run_at_import(ast.parse(source)):
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
                uses.append((node.lineno, name))
    return uses


def test_no_module_needs_posix_or_private_pytorch_at_import() -> None:
    files = sorted((ROOT / "yeonma").rglob("*.py"))
    assert len(files) > 100
    uses = {
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in files
        for line, name in import_time_uses(file.read_text("utf-8"))
    }
    assert uses == set()


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
def test_import_time_use_of_posix_or_private_pytorch_is_detected(line: str) -> None:
    allowed = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nimport os, signal, torch\n"
        "if TYPE_CHECKING:\n    from torch.distributed.fsdp import FSDPModule\n"
        "def g(x: torch._C.Node) -> torch._C.Node:\n    import fcntl\n    return torch.ops.aten.mm(x, os.fork())\n"
        "_private = torch.float32\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
    )
    assert import_time_uses(allowed) == []
    assert import_time_uses(allowed + line) != []


@pytest.mark.slow
def test_package_imports_and_trains_without_posix_and_private_pytorch() -> None:
    command = [sys.executable, "-m", "tests.missing_parts"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained without private operators"

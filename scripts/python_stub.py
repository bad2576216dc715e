"""Write yeonma/__init__.pyi, by which editors and type checkers know the settings of `yeonma.sft` and its kin.

With --check nothing is written; the exit status is 1 if the file is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from typing import Any

from page_tables import ROOT

from yeonma.config.parse import Setting
from yeonma.language import speaking
from yeonma.python_api.calls import CALLS, PythonCall
from yeonma.python_api.signatures import docstring_of

STUB = ROOT / "yeonma" / "__init__.pyi"
HEAD = '''\
"""Written by scripts/python_stub.py from the settings (`make docs`)."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeAlias

from yeonma.data.template import Template as Template
from yeonma.errors import UserError as UserError
from yeonma.policy import Policy as Policy
from yeonma.python_api.results import ({results})
from yeonma.train.interrupt import Stopped as Stopped

StrPath: TypeAlias = str | PathLike[str]
Data: TypeAlias = StrPath | Sequence[Any] | Any
"""A path, a list of dicts, a pandas or polars DataFrame, a `datasets.Dataset`, or a list of these."""

__version__: str
Loaded = Policy

def load(
    adapter_dir: StrPath,
    *,
    base_model: StrPath | None = None,
    template: StrPath | None = None,
    data_set: str | None = None,
    adapter_weights: bool = True,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: Literal["auto", "none", "int8", "nf4", "fp8"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Policy:
    """Load an adapter folder and its base model for generation."""

'''
DATA = ("data_path", "val_data_path")
ROW = "row"
"""The settings that also take rows, and the one that also takes a dict."""
PATHS = re.compile(r".*_dir|.*_path|base_model|adapter|template|file|folder|html|output")
"""The settings that also take a `Path`."""


def stub() -> str:
    results = ", ".join(sorted({call.returns for call in CALLS.values()}))
    return HEAD.replace("{results}", results) + "\n".join(
        line for name, call in sorted(CALLS.items()) for line in _definition(name, call)
    )


def _definition(name: str, call: PythonCall) -> Iterator[str]:
    form = call.form
    yield f"def {name}("
    for number, setting in enumerate(form.settings.values()):
        if number == len(form.positional):
            yield "    *,"
        default = "" if setting.required else f" = {_literal(setting.default)}"
        yield f"    {setting.name}: {_annotation(setting)}{default},"
    yield "    config: StrPath | None = None,"
    yield f") -> {call.returns}:"
    with speaking("en"):
        docstring = docstring_of(form, call.about)
    text = docstring.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    first, *others = text.split("\n")
    yield f'    """{first}'
    yield from (f"    {line}" if line else "" for line in others)
    yield '    """'
    yield ""


def _annotation(setting: Setting) -> str:
    if setting.name in DATA:
        return "Data | None" if setting.optional else "Data"
    also = ["Mapping[str, Any]"] if setting.name == ROW else []
    parts = dict.fromkeys(_type_text(member, setting.name) for member in setting.members)
    return " | ".join([*also, *parts])


def _type_text(member: Any, name: str) -> str:
    if member is str and PATHS.fullmatch(name):
        return "StrPath"
    if member is type(None):
        return "None"
    text = member.__name__ if type(member) is type else str(member).replace("typing.", "")
    text = text.replace("'", '"')
    return text.replace("list[str]", "Sequence[StrPath]") if name == "models" else text


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = stub()
    if check:
        if STUB.read_text(encoding="utf-8") == text:
            return 0
        print(f"{STUB.relative_to(ROOT)} is out of date; run `make docs`", file=sys.stderr)
        return 1
    STUB.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

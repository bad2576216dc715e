"""Rewards that need packages of others, as functions of the kind that users write. They run in the same process as
those: a package that hangs, prints or crashes stays away from training.

This file is read as a program of its own and imports nothing of Yeonma.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


def math(row: dict[str, Any], answer: str) -> float:
    """1 if math-verify finds the answer's last mathematical expression equal to the wanted one (`row["wanted"]`), else
    0. An answer that takes longer than its limits of 5 seconds is not equal. Raises ValueError if the wanted answer has
    no expression."""
    from math_verify import parse, verify  # type: ignore[import-not-found,unused-ignore]

    wanted = parse(row["wanted"]) or parse(f"${row['wanted']}$")
    if not wanted:
        raise ValueError(f"the row's own answer, {row['wanted']!r:.100}, is no mathematical expression")
    return float(verify(wanted, parse(answer)))


def json_schema(row: dict[str, Any], answer: str) -> float:
    """1 if the answer is JSON that the schema in the file `row["schema"]` allows, else 0. Raises what jsonschema raises
    for a file that is no schema."""
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.0
    return float(_validator(row["schema"]).is_valid(value))


@cache
def _validator(path: str) -> Any:
    from jsonschema.validators import validator_for  # type: ignore[import-untyped,unused-ignore]

    schema = json.loads(Path(path).read_text(encoding="utf-8"))
    kind = validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)

"""Every model type of docs/models.json again: two steps of `sft` and `dpo`, and the forecast; of every fourth all else.

`scripts/model_table.py --try` makes all runs of all types.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families import FAMILIES
from tests.family_trials import try_family

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RESULTS: dict[str, Any] = json.loads((ROOT / "docs" / "models.json").read_text(encoding="utf-8"))[
    "model_types"
]


@pytest.mark.parametrize(("number", "model_type"), list(enumerate(FAMILIES)))
def test_model_type_does_what_the_table_says(tmp_path: Path, number: int, model_type: str) -> None:
    result = try_family(model_type, tmp_path / "trial", everything=number % 4 == 0).as_dict()
    tried = {name: value for name, value in result.items() if name in RESULTS[model_type] and value}
    assert tried == {name: RESULTS[model_type][name] for name in tried}

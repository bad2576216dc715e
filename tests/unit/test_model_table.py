"""The tables of model types are those of docs/models.json, which has every type; a few types are tried again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from tests.families import FAMILIES, NOT_TRIED
from tests.family_trials import FOREST, NO, NONE, ONE_BY_ONE, YES, FamilyResult, try_family

ROOT = Path(__file__).resolve().parents[2]
RESULTS: dict[str, Any] = json.loads((ROOT / "docs" / "models.json").read_text(encoding="utf-8"))[
    "model_types"
]


def test_tables_of_model_types_are_up_to_date() -> None:
    script = ROOT / "scripts" / "model_table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_model_type_has_its_results_and_none_is_refused() -> None:
    # with an older version of transformers than the results are of, FAMILIES has fewer
    assert [name for name in sorted(RESULTS) if name in CONFIG_MAPPING] == list(FAMILIES)
    assert len(FAMILIES) >= 85
    left_out = [name for names in NOT_TRIED.values() for name in names]
    assert len(left_out) == len(set(left_out)) and not set(left_out) & set(FAMILIES)
    fields = set(FamilyResult.__annotations__) - {"model_type"}
    for name, result in RESULTS.items():
        assert set(result) == fields, name
        assert result["computed"] in (FOREST, ONE_BY_ONE), name
        assert bool(result["why_not"]) == (result["computed"] == ONE_BY_ONE), name
        assert result["lora"] == YES, name
        assert {result[key] for key in ("experts", "dora", "int8", "nf4", "fp8", "merge", "forecast")} <= {
            YES,
            NO,
            NONE,
        }


@pytest.mark.parametrize("model_type", ["bloom", "gpt_oss", "llama"])
def test_model_type_does_what_the_table_says(tmp_path: Path, model_type: str) -> None:
    result = try_family(model_type, tmp_path / "trial", everything=False).as_dict()
    tried = {name: value for name, value in result.items() if name in RESULTS[model_type] and value}
    assert tried == {name: RESULTS[model_type][name] for name in tried}

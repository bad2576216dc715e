"""Write the tables of model types into docs/models.md and docs/models.ko.md, between the two `model types` comments.

They come from docs/models.json, the results of real runs on tiny configs. With --try the runs are made again (about
five seconds for a model type) and the file is written: `--try` for all model types, `--try llama gpt_oss` for some.
With --check nothing is written; the exit status is 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from page_tables import ROOT, write_pages

RESULTS = ROOT / "docs" / "models.json"
BEGIN, END = "<!-- model types -->", "<!-- /model types -->"
PACKAGES = ("transformers", "peft", "torch", "bitsandbytes")
COLUMNS = ("lora", "experts", "dora", "int8", "nf4", "fp8", "merge", "vllm_keys", "forecast")
"""The fields of a result that are columns, behind the one that says how it is computed."""
SIGNS = {"yes": "✓", "no": "✗", "none": "", "all but experts": "✓*"}
FOREST, ONE_BY_ONE, REFUSED = "forest", "one by one", "refused"


@dataclass(frozen=True)
class Wording:
    """What differs between the languages."""

    page: str
    summary: str
    heading: str
    computed: Mapping[str, str]
    reasons: str


ENGLISH = Wording(
    "docs/models.md",
    "{all} model types with {versions}: {forest} on forests, {one by one} one example at a time, {refused} refused.",
    "| model type | computed | LoRA | experts | DoRA | int8 | nf4 | fp8 | merge | vLLM keys | forecast |",
    {FOREST: "forest", ONE_BY_ONE: "one by one", REFUSED: "refused"},
    "| why there is no forest | model types |",
)
KOREAN = Wording(
    "docs/models.ko.md",
    "모델 종류 {all}개, {versions}: 포레스트로 {forest}개, 예제를 하나씩 {one by one}개, 거부 {refused}개.",
    "| 모델 종류 | 계산 방식 | LoRA | 전문가 | DoRA | int8 | nf4 | fp8 | 병합 | vLLM 키 | 메모리 추정 |",
    {FOREST: "포레스트", ONE_BY_ONE: "하나씩", REFUSED: "거부"},
    "| 포레스트로 계산하지 않는 까닭 | 모델 종류 |",
)


def tables(results: Mapping[str, Any], wording: Wording) -> str:
    """The counts, a row for each model type, and the reasons of those that are computed one by one or refused."""
    families: Mapping[str, Mapping[str, str]] = results["model_types"]
    computed = [family["computed"] for family in families.values()]
    counts = {kind: computed.count(kind) for kind in (FOREST, ONE_BY_ONE, REFUSED)}
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    columns = wording.heading.count("|") - 1
    lines = [
        wording.summary.format(all=len(families), versions=versions, **counts),
        "",
        wording.heading,
        "| --- " * columns + "|",
    ]
    reasons: dict[str, list[str]] = {}
    for name, family in sorted(families.items()):
        cells = [f"`{name}`", wording.computed[family["computed"]], *(SIGNS[family[key]] for key in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
        if family["why_not"]:
            reasons.setdefault(family["why_not"], []).append(f"`{name}`")
    lines += ["", wording.reasons, "| --- | --- |"]
    lines += [f"| `{reason}` | {', '.join(names)} |" for reason, names in sorted(reasons.items())]
    return "\n".join(lines)


def try_model_types(names: Sequence[str]) -> bool:
    """Makes the runs of these model types, or of all, and writes their results. Returns whether none failed."""
    from tests.families import FAMILIES
    from tests.family_trials import try_family

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if names and RESULTS.exists() else {}
    found: dict[str, Any] = results.get("model_types", {})
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or FAMILIES:
            try:
                result = try_family(name, Path(folder) / "trial").as_dict()
            except Exception:  # the point of the trial
                failed.append(name)
                print(f"{name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
                continue
            del result["model_type"]
            found[name] = result
            print(name, *result.values(), sep=" | ", flush=True)
    versions = {name: version(name) for name in PACKAGES}
    content = {"versions": versions, "model_types": dict(sorted(found.items()))}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--try", dest="names", nargs="*", metavar="TYPE", help="make the runs again")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    good = options.names is None or try_model_types(options.names)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    texts = {wording.page: tables(results, wording) for wording in (ENGLISH, KOREAN)}
    stale = write_pages(BEGIN, END, texts, "docs/models.json", check=options.check)
    return int(not good or (options.check and stale))


if __name__ == "__main__":
    sys.exit(main())

"""`yeonma verify`: whether a run's folder is whole, and its parts belong together."""

from __future__ import annotations

import json
from collections.abc import Iterator

from yeonma.config.settings import VerifySettings
from yeonma.verify.verify_folder import VerifyReport, verify

MARKS = {"well": "ok", "differs": "DIFFERS", "not checked": "not checked"}
MOST_PROBLEMS = 10


def run(settings: VerifySettings) -> int:
    """0 where nothing that could be checked differs, 1 where something does. Raises UserError as `verify`."""
    asked = settings
    report = verify(asked)
    if asked.json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print("\n".join(lines_of(report)))
    return 0 if report.is_well else 1


def lines_of(report: VerifyReport) -> Iterator[str]:
    """The report for people: what it is, a line for each check, the places that differ, and what it comes to."""
    yield f"{report.folder}: {report.what}"
    on = report.trained_on
    if on.get("data"):
        yield f"  trained on {on.get('examples'):,} examples of {on['data']}"
        yield f"  SHA-256 of the data: {on.get('data_sha256')}"
    yield ""
    width = max(len(finding.check) for finding in report.findings)
    for finding in report.findings:
        yield f"  {MARKS[finding.outcome]:11}  {finding.check:{width}}  {finding.about}"
        for problem in finding.problems[:MOST_PROBLEMS]:
            yield f"      {problem}"
        if len(finding.problems) > MOST_PROBLEMS:
            yield f"      and {len(finding.problems) - MOST_PROBLEMS} more"
    if report.remark:
        yield f"  {report.remark}"
    yield ""
    differ = sum(finding.outcome == "differs" for finding in report.findings)
    missed = sum(finding.outcome == "not checked" for finding in report.findings)
    text = f"{differ} of {len(report.findings)} checks found differences" if differ else "nothing differs"
    yield f"{text}; {missed} could not be made" if missed else text

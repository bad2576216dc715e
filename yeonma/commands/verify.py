"""`yeonma verify`: checks that a run's folder is unchanged and that its parts belong together."""

from __future__ import annotations

from collections.abc import Iterator

from yeonma.config.settings import VerifySettings
from yeonma.messages import counted, tr
from yeonma.shown import json_text
from yeonma.streams import give, log_line, say
from yeonma.verify.verify_folder import VerifyReport, verify

MARKS = {"well": "ok", "differs": "DIFFERS", "not checked": "not checked"}
MAX_PROBLEMS = 10
"""That are printed for one check."""


def run(settings: VerifySettings) -> int:
    """Returns 0 if no check found a difference, else 1. Raises UserError as `verify`."""
    report = verify(settings, log_line)
    if settings.json:
        give(json_text(report.to_json()) + "\n")
    else:
        for line in lines_of(report):
            say(line)
    return 0 if report.is_well else 1


def lines_of(report: VerifyReport) -> Iterator[str]:
    """The report for people: what was checked, a line for each check with its problems, and a summary."""
    yield f"{report.folder}: {report.what}"
    trained_on = report.trained_on
    data, examples = trained_on.get("data"), trained_on.get("examples")
    if isinstance(data, str) and type(examples) is int:
        yield f"  trained on {counted(examples, 'example')} of {data}"
        yield f"  SHA-256 of the data: {trained_on.get('data_sha256')}"
    yield ""
    width = max(len(finding.check) for finding in report.findings)
    for finding in report.findings:
        yield f"  {MARKS[finding.outcome]:11}  {finding.check:{width}}  {finding.about}"
        for problem in finding.problems[:MAX_PROBLEMS]:
            yield f"      {problem}"
        if len(finding.problems) > MAX_PROBLEMS:
            yield f"      and {len(finding.problems) - MAX_PROBLEMS} more"
    if report.remark:
        yield f"  {report.remark}"
    yield ""
    yield _summary(report)


def _summary(report: VerifyReport) -> str:
    outcomes = [finding.outcome for finding in report.findings]
    differing, skipped = outcomes.count("differs"), outcomes.count("not checked")
    text = (
        tr("{differing} of {outcomes} checks found differences", differing=differing, outcomes=len(outcomes))
        if differing
        else tr("nothing differs")
    )
    return f"{text}; {counted(skipped, 'check')} could not run" if skipped else text

"""`yeonma verify`: checks that a run's folder is unchanged and that its parts belong together."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len, set_cell_size

from yeonma.config.settings import VerifySettings
from yeonma.messages import counted, tr
from yeonma.shown import json_text
from yeonma.streams import give, log_line, say
from yeonma.verify.server_client import check_server_settings
from yeonma.verify.verify_folder import VerifyReport, verify
from yeonma.verify.verify_served import verify_served

MARKS = {"well": tr("ok"), "differs": tr("DIFFERS"), "not checked": tr("not checked")}
MAX_PROBLEMS = 10
"""That are printed for one check."""


def run(settings: VerifySettings) -> int:
    """Returns 0 if no check found a difference, else 1. Raises UserError as `verify`."""
    report = report_of(settings)
    if settings.json:
        give(json_text(report.to_json()) + "\n")
    else:
        for line in lines_of(report):
            say(line)
    return 0 if report.is_well else 1


def report_of(settings: VerifySettings) -> VerifyReport:
    """What the folder's check finds, or with `served` what a server does. Raises UserError as these, and for settings
    that go only with the other one."""
    check_server_settings(settings)
    return (verify if settings.served is None else verify_served)(settings, log_line)


def lines_of(report: VerifyReport) -> Iterator[str]:
    """The report for people: what was checked, a line for each check with its problems, and a summary."""
    yield f"{report.folder}: {report.what}"
    trained_on = report.trained_on
    data, examples = trained_on.get("data"), trained_on.get("examples")
    if isinstance(data, str) and type(examples) is int:
        count = counted(examples, "example")
        yield tr("  trained on {count} of {data}", count=count, data=data)
        yield tr("  SHA-256 of the data: {sha256}", sha256=trained_on.get("data_sha256"))
    yield ""
    columns = [
        (MARKS[finding.outcome], tr(finding.check), finding.about, finding.problems)
        for finding in report.findings
    ]
    mark_width = max(map(cell_len, MARKS.values()))
    width = max(cell_len(check) for _, check, _, _ in columns)
    for mark, check, about, problems in columns:
        yield f"  {set_cell_size(mark, mark_width)}  {set_cell_size(check, width)}  {about}"
        for problem in problems[:MAX_PROBLEMS]:
            yield f"      {problem}"
        if len(problems) > MAX_PROBLEMS:
            yield tr("      and {count} more", count=len(problems) - MAX_PROBLEMS)
    if report.remark:
        yield f"  {report.remark}"
    yield ""
    yield _summary(report)


def _summary(report: VerifyReport) -> str:
    outcomes = [finding.outcome for finding in report.findings]
    differing, skipped = outcomes.count("differs"), outcomes.count("not checked")
    found = (
        tr("{differing} of {checks} checks found differences", differing=differing, checks=len(outcomes))
        if differing
        else tr("nothing differs")
    )
    if not skipped:
        return found
    return tr("{found}; {checks} could not run", found=found, checks=counted(skipped, "check"))

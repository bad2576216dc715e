"""Whether two checkouts of Yeonma give the same results: the proof that a refactoring changed nothing.

    python -m scripts.same_results record --checkout DIR --output DIR    run everything with the package of a checkout
    python -m scripts.same_results compare BEFORE AFTER                  what differs between two recordings
    python -m scripts.same_results both --before main --after .          record two checkouts, and compare them

Short runs train, resume, ask, compare, merge, serve and verify tiny models on the CPU, through the command line alone.
Results must be equal to the byte. Some fields are no results (times, memory, words for people), and some results change
on purpose; formats.py lists both, with a reason for each. The exit status is 1 where anything else differs, or where a
run fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .comparison import KINDS, Compared, Recording, compare_recordings
from .recording import Run, record
from .runs import RUNS

MOST_SHOWN = 5
"""Differences of a run, without --all."""

say = partial(print, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    runs = _chosen(options.only)
    if options.verb == "record":
        return 0 if _record(options.checkout, options.output, runs, options.jobs) else 1
    names = [run.name for run in runs] if options.only is not None else None
    if options.verb == "compare":
        return _compare(options.before, options.after, names, options)
    with tempfile.TemporaryDirectory(prefix="same-results-") as scratch:
        folder = options.output or Path(scratch)
        before, after = folder / "before", folder / "after"
        recorded = _record(options.before, before, runs, options.jobs)
        recorded = _record(options.after, after, runs, options.jobs) and recorded
        return max(_compare(before, after, names, options), int(not recorded))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.same_results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--only", metavar="RUN[,RUN]", help=f"only these: {', '.join(run.name for run in RUNS)}"
    )
    recording = argparse.ArgumentParser(add_help=False)
    recording.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    comparing = argparse.ArgumentParser(add_help=False)
    comparing.add_argument("--words", action="store_true", help="show the words that changed, too")
    comparing.add_argument("--all", action="store_true", help=f"show all differences, not {MOST_SHOWN} a run")

    verb = verbs.add_parser(
        "record", parents=[shared, recording], help="run everything once, and keep the results"
    )
    verb.add_argument(
        "--checkout", required=True, help="a folder with the package, or a commit of this repository"
    )
    verb.add_argument("--output", required=True, type=Path, help="a new folder for the recording")
    verb = verbs.add_parser("compare", parents=[shared, comparing], help="compare two recordings")
    verb.add_argument("before", type=Path)
    verb.add_argument("after", type=Path)
    verb = verbs.add_parser("both", parents=[shared, recording, comparing], help="record twice, and compare")
    verb.add_argument(
        "--before", required=True, help="a folder with the package, or a commit of this repository"
    )
    verb.add_argument("--after", default=".", help="likewise; without it, the current folder")
    verb.add_argument("--output", type=Path, help="a folder to keep both recordings in")
    return parser


def _chosen(only: str | None) -> list[Run]:
    """The runs by these names, and those that they need, in the order of RUNS. Raises SystemExit for an unknown one."""
    names = {run.name for run in RUNS} if only is None else {name.strip() for name in only.split(",")}
    if unknown := names - {run.name for run in RUNS}:
        raise SystemExit(f"--only: there is no run {', '.join(sorted(unknown))}")
    needed = {need.name for run in RUNS if run.name in names for need in run.needs}
    return [run for run in RUNS if run.name in names | needed]


def _record(checkout: str, output: Path, runs: Sequence[Run], jobs: int) -> bool:
    say(f"recording {checkout} in {output}")
    return record(checkout, output, runs, jobs, say)


def _compare(before: Path, after: Path, names: list[str] | None, options: argparse.Namespace) -> int:
    recordings = Recording.read(before), Recording.read(after)
    for which, recording in zip(("before", "after"), recordings, strict=True):
        say(f"{which:7} {recording.about['commit']}  {recording.about['checkout']}")
    machines = [recording.about["machine"] for recording in recordings]
    for name in machines[0]:
        if machines[0][name] != machines[1].get(name):
            say(f"{name}: {machines[0][name]} and {machines[1].get(name)}: equal bytes cannot be expected")
    say()
    compared = []
    for part in compare_recordings(*recordings, names):
        compared.append(part)
        _show(part, options.words, None if options.all else MOST_SHOWN)
    say()
    for line in table(compared):
        say(line)
    different = [part.name for part in compared if not part.is_same]
    say()
    say(f"results differ: {', '.join(different)}" if different else "the results are the same")
    return 1 if different else 0


def _show(part: Compared, words: bool, most: int | None) -> None:
    say(f"{part.name}: {'same' if part.is_same else 'DIFFERS'}")
    for kind in KINDS if words else KINDS[:2]:
        differences = part.of(kind)
        for difference in differences[:most]:
            place = f"{difference.file} {difference.where}".rstrip()
            say(f"  {kind:8} {place}")
            for mark, text in (("-", difference.before), ("+", difference.after)):
                for line in text.splitlines():
                    say(f"      {mark} {line}")
        if most is not None and len(differences) > most:
            say(f"  and {len(differences) - most} more; --all shows them")


def table(compared: Sequence[Compared]) -> list[str]:
    """A line for each comparison: how many files were compared, and in how many something was found, by kind."""
    rows = [["", "files", *KINDS]]
    for part in compared:
        files = [len({difference.file for difference in part.of(kind)}) for kind in KINDS]
        rows.append([part.name, *(str(number) for number in (part.files, *files))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""A folder for a GPU machine without network: this checkout, and the wheels that such a machine lacks.

    python -m benchmarks.bundle --output gpu-bundle

Copy the folder there and run `gpu-bundle/start.sh --minutes 30`: it unpacks the wheels into folders beside it, and does
what lease.py says. The machine has a Python with PyTorch, transformers, PEFT, accelerate, pytest and pip; requirements-
bundle.txt and requirements-bundle-unsloth.txt list what is added. Nothing there is installed or replaced.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, ZipFile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = {"wheels": "requirements-bundle.txt", "wheels-unsloth": "requirements-bundle-unsloth.txt"}
"""Folder of the bundle -> the list of what is in it."""
MOST_BYTES = 60_000_000
GLIBC = (35, 34, 31, 28, 27, 24, 17)
"""Wheels for these versions of the C library, 2.N, and older names of them."""
START = """\
#!/bin/sh
# Unpacks the wheels beside this file, once, and runs the jobs of benchmarks/lease.py with the options given.
set -e
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
for part in wheels wheels-unsloth; do
    unpacked="$here/unpacked-$part"
    if [ -d "$here/$part" ] && [ ! -d "$unpacked" ]; then
        rm -rf "$unpacked.part"
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \\
            --no-cache-dir --target "$unpacked.part" "$here/$part"/*.whl
        mv "$unpacked.part" "$unpacked"
    fi
done
PYTHONPATH="$here/checkout:$here/unpacked-wheels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "$python" -m benchmarks.lease --output "$here/results" --unsloth-packages "$here/unpacked-wheels-unsloth" "$@"
"""


@dataclass(frozen=True)
class Wheel:
    """A line of a list, and the files that its wheel does without."""

    requirement: str
    without: tuple[str, ...] = ()  # patterns of paths
    only: tuple[str, tuple[str, ...]] | None = None  # of the paths of a pattern, only those with these names

    def keeps(self, path: str) -> bool:
        if any(fnmatchcase(path, pattern) for pattern in self.without):
            return False
        if self.only is None or not fnmatchcase(path, self.only[0]):
            return True
        return PurePosixPath(path).name in self.only[1]


def wheels_of(text: str) -> Iterator[Wheel]:
    """The lines of a list. A comment `without: PATTERN ...` or `only: PATTERN NAME ...` is of the line below it."""
    without: tuple[str, ...] = ()
    only: tuple[str, tuple[str, ...]] | None = None
    for line in text.splitlines():
        comment, words = line.startswith("#"), line.lstrip("# ").split()
        if comment and words[:1] == ["without:"]:
            without = tuple(words[1:])
        elif comment and words[:1] == ["only:"]:
            only = (words[1], tuple(words[2:]))
        elif line.strip() and not comment:
            yield Wheel(line.strip(), without, only)
            without, only = (), None


def trim(path: Path, wheel: Wheel) -> None:
    """Take files out of a wheel, and out of its list of files."""
    with ZipFile(path) as archive:
        names = archive.namelist()
        gone = {name for name in names if not wheel.keeps(name)}
        if not gone:
            return
        beside = path.with_suffix(".trimmed")
        with ZipFile(beside, "w", ZIP_DEFLATED) as trimmed:
            for name in names:
                if name in gone:
                    continue
                content = archive.read(name)
                if name.endswith(".dist-info/RECORD"):
                    content = without_rows(content, gone)
                trimmed.writestr(archive.getinfo(name), content, ZIP_DEFLATED)
    beside.replace(path)


def without_rows(record: bytes, gone: set[str]) -> bytes:
    rows = [row for row in csv.reader(io.StringIO(record.decode("utf-8"))) if row and row[0] not in gone]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue().encode("utf-8")


def download(wheels: Sequence[Wheel], folder: Path, python: str) -> None:
    """Raises subprocess.CalledProcessError if pip finds none for that Python on x86_64 Linux."""
    number = python.replace(".", "")
    names = [
        *(f"manylinux_2_{version}_x86_64" for version in GLIBC),
        "manylinux2014_x86_64",
        "manylinux1_x86_64",
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--abi", f"cp{number}", "--abi", "abi3"]
    command += ["--abi", "none", *(word for name in names for word in ("--platform", name))]
    folder.mkdir(parents=True)
    for wheel in wheels:
        with tempfile.TemporaryDirectory(dir=folder.parent) as alone:
            subprocess.run([*command, "--dest", alone, wheel.requirement], check=True)
            (path,) = Path(alone).glob("*.whl")
            trim(path, wheel)
            shutil.move(path, folder / path.name)


def copy_checkout(folder: Path) -> None:
    """The tracked files as they are here, which commit they are of, and the package's metadata, which Yeonma and its
    `doctor` read as if it were installed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode("utf-8").split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_file():  # a file that is deleted but not committed is not there
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    (folder / "COMMIT").write_text(f"{described_commit()}\n", "utf-8")
    add_metadata(folder)


def described_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def add_metadata(checkout: Path) -> None:
    """The `.dist-info` of the wheel that pip makes of the checkout."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        shutil.copytree(checkout, source)  # building leaves files behind
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        subprocess.run([*command, "--wheel-dir", work, str(source)], check=True)
        (wheel,) = Path(work).glob("yeonma-*.whl")
        with ZipFile(wheel) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).parts[0].endswith(".dist-info") and not name.endswith("RECORD"):
                    archive.extract(name, checkout)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-bundle"))
    parser.add_argument("--python", default="3.12", help="the version on the machine (default: 3.12)")
    parser.add_argument("--unsloth", choices=["true", "false"], default="true", help="take Unsloth along")
    arguments = parser.parse_args(given)
    output: Path = arguments.output
    if output.exists() and not (output / "start.sh").exists():
        parser.error(f"{output} is there and no bundle; name another with --output, or remove it")
    beside = output.with_name(f"{output.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    copy_checkout(beside / "checkout")
    for folder, listed in PARTS.items():
        wheels = list(wheels_of((HERE / listed).read_text("utf-8")))
        if folder == "wheels" or arguments.unsloth == "true":
            download(wheels, beside / folder, arguments.python)
    (beside / "start.sh").write_text(START, "utf-8")
    (beside / "start.sh").chmod(0o755)
    shutil.rmtree(output, ignore_errors=True)
    beside.rename(output)
    sizes = {
        part.name: size_of(part) if part.is_dir() else part.stat().st_size
        for part in sorted(output.iterdir())
    }
    for name, size in sizes.items():
        print(f"{name:20} {size / 1e6:6.1f} MB")
    whole = sum(sizes.values())
    print(f"{output}: {whole / 1e6:.1f} MB of at most {MOST_BYTES / 1e6:.0f}")
    if whole > MOST_BYTES:
        print("too large: trim a wheel, or give --unsloth false", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

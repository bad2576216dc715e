"""A recording: what the runs of one checkout left behind, as files.

DIR/recording.json      which checkout, on which machine and libraries, and which runs failed
DIR/work/               where all commands ran: models/ and data/, and a folder for what each run wrote
DIR/console/RUN/        for each command of a run its exit status, its standard output and its standard error

The package is copied before anything runs, so the checkout may be edited meanwhile. Each run has an empty cache of its
own: none gets results from another one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from re import search
from typing import Literal

from .material import write_material

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "datasets", "sacrebleu")
INHERITED = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
COMMAND_SECONDS = 600
"""A command that takes longer hangs."""
POLL_SECONDS = 0.01

Stdout = Literal["words", "jsonl", "txt"]
"""What a command prints: words for people, which may change, JSON lines, or a text that is a result itself."""


class RunFailed(Exception):
    """A command ended otherwise than the run expects. The message says how."""


@dataclass(frozen=True)
class Run:
    """A few commands that belong together, and the runs whose output folders they read."""

    act: Callable[[Console], None]
    needs: tuple[Run, ...] = ()

    @property
    def name(self) -> str:
        """That of the function, as it stands on the command line and in the paths of a recording."""
        return self.act.__name__.replace("_", "-")


@dataclass
class Console:
    """Runs `python -m yeonma` in the work folder of a recording, and keeps what each command prints."""

    run: str
    root: Path
    environment: dict[str, str]
    commands: int = field(default=0, init=False)

    @property
    def work(self) -> Path:
        """The current folder of the commands; their paths are relative to it."""
        return self.root / "work"

    def yeonma(
        self, line: str, *more: str, stdout: Stdout = "words", status: int = 0, stdin: str = ""
    ) -> None:
        """Run one command: the words of `line`, then `more` as they stand. Raises RunFailed for another exit status."""
        arguments = [*line.split(), *more]
        with self._started(arguments, stdout, stdin) as (process, _):
            try:
                ended = process.wait(COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                raise RunFailed(f"{arguments[0]} still runs after {COMMAND_SECONDS} seconds") from None
        self._check(arguments, ended, status)

    def yeonma_killed(self, line: str, *more: str, once: Path) -> None:
        """Run a command, and kill it (SIGKILL) as soon as the path `once`, relative to the work folder, is there."""
        arguments = [*line.split(), *more]
        with self._started(arguments, "words") as (process, _):
            _wait_until(lambda: (self.work / once).exists() or process.poll() is not None, f"for {once}")
            process.kill()
            ended = process.wait()
        self._check(arguments, ended, 128 + signal.SIGKILL)

    @contextmanager
    def server(self, line: str) -> Iterator[str]:
        """The URL of a server, which is stopped afterwards as by `kill`."""
        arguments = line.split()
        with self._started(arguments, "words") as (process, printed):
            _wait_until(
                lambda: _url(printed) is not None or process.poll() is not None, "for the server's URL"
            )
            url = _url(printed)
            if url is None:
                self._check(arguments, process.wait(), 0)
                raise RunFailed(f"{arguments[0]} ended before it served anything")
            yield url
            process.terminate()
            ended = process.wait(COMMAND_SECONDS)
        self._check(arguments, ended, 128 + signal.SIGTERM)

    def copy(self, source: str, target: str) -> Path:
        """Copy a folder within the work folder."""
        return Path(shutil.copytree(self.work / source, self.work / target))

    def _stem(self, verb: str) -> Path:
        return self.root / "console" / self.run / f"{self.commands:02}-{verb}"

    @contextmanager
    def _started(
        self, arguments: Sequence[str], stdout: Stdout, stdin: str = ""
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """The process, killed at the end if it still runs, and the file that its standard output goes to."""
        self.commands += 1
        stem = self._stem(arguments[0])
        stem.parent.mkdir(parents=True, exist_ok=True)
        printed, errors = Path(f"{stem}.out.{stdout}"), Path(f"{stem}.err.words")
        command = [sys.executable, "-m", "yeonma", *arguments]
        with printed.open("wb") as out, errors.open("wb") as err:
            pipe = subprocess.PIPE if stdin else subprocess.DEVNULL
            process = subprocess.Popen(
                command, cwd=self.work, env=self.environment, stdin=pipe, stdout=out, stderr=err
            )
            try:
                if process.stdin is not None:
                    process.stdin.write(stdin.encode())
                    process.stdin.close()
                yield process, printed
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def _check(self, arguments: Sequence[str], ended: int, expected: int) -> None:
        stem = self._stem(arguments[0])
        ended = ended if ended >= 0 else 128 - ended  # as a shell says it
        Path(f"{stem}.status").write_text(f"{ended}\n", encoding="utf-8")
        if ended != expected:
            errors = Path(f"{stem}.err.words").read_text(encoding="utf-8", errors="replace")
            lines = errors.strip().splitlines() or ["it says nothing"]
            raise RunFailed(f"{stem.name}: exit status {ended}, not {expected}: {lines[-1][:300]}")


def record(checkout: str, output: Path, runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> bool:
    """Run all in the new folder `output`, `jobs` at a time. Whether every command ended as expected.

    `checkout` is a folder that holds the package, or a commit of this repository. Raises SystemExit where it is
    neither, and where `output` exists.
    """
    if output.exists():
        raise SystemExit(f"{output} exists; give a new folder")
    root = output.resolve()
    about = {"format": FORMAT, "work": str(root / "work"), **copy_package(checkout, root / "package")}
    try:
        write_material(root / "work")
        failures = _run_all(root, runs, jobs, say)
    finally:
        for scratch in ("package", "cache"):
            shutil.rmtree(root / scratch, ignore_errors=True)
    about |= {"machine": machine(), "runs": [run.name for run in runs], "failures": failures}
    (root / "recording.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return not failures


def _run_all(root: Path, runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> dict[str, str]:
    """Run name -> what went wrong. A run begins when those that it needs have ended well."""
    check_package(root)
    started: dict[str, Future[float]] = {}
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for run in runs:
                needed = [started[need.name] for need in run.needs]
                started[run.name] = pool.submit(_run_one, root, run, needed)
            names = {future: name for name, future in started.items()}
            for future in as_completed(names):
                name, error = names[future], future.exception()
                if error is None:
                    say(f"{name:16} {future.result():6.1f} s")
                else:
                    failures[name] = str(error) if isinstance(error, RunFailed) else repr(error)
                    say(f"{name:16} FAILED  {failures[name]}")
        except BaseException:  # Ctrl-C: runs that have not begun do not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _run_one(root: Path, run: Run, needed: Sequence[Future[float]]) -> float:
    """Seconds. Waits for the needed runs, which were submitted before and thus have workers already."""
    for need, future in zip(run.needs, needed, strict=True):
        if future.exception() is not None:
            raise RunFailed(f"needs {need.name}, which failed")
    began = time.monotonic()
    run.act(Console(run.name, root, environment(root, root / "cache" / run.name)))
    return time.monotonic() - began


def environment(root: Path, cache: Path) -> dict[str, str]:
    """Of all commands: the copied package, one thread, no GPU, no network, and nothing else that this shell has set.

    Python's hashes stay random: a result that depends on the order of a set differs from one recording to the next.
    """
    return {
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
        "PYTHONPATH": str(root / "package"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        "YEONMA_CACHE": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "LANG": "C.UTF-8",
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }


def copy_package(checkout: str, target: Path) -> dict[str, str]:
    """Copy the package `yeonma` of a folder, or of a commit of this repository. Where it came from."""
    folder = Path(checkout)
    if (folder / "yeonma" / "__main__.py").is_file():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder / "yeonma", target / "yeonma", ignore=ignore)
        changed = _git(folder, "status", "--porcelain", "--", "yeonma")
        commit = _git(folder, "rev-parse", "HEAD").decode().strip() or "no commit"
        return {"checkout": str(folder.resolve()), "commit": commit + (", with changes" if changed else "")}
    archive = _git(ROOT, "archive", "--prefix=yeonma/", f"{checkout}:yeonma")
    if folder.exists() or not archive:
        raise SystemExit(f"{checkout}: no folder with the package yeonma, and no commit of this repository")
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(target, filter="data")
    commit = _git(ROOT, "rev-parse", checkout).decode().strip()
    return {"checkout": checkout, "commit": commit}


def _git(folder: Path, *arguments: str) -> bytes:
    """What git prints; nothing where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True)
    except OSError:
        return b""
    return done.stdout if done.returncode == 0 else b""


def check_package(root: Path) -> None:
    """Raises SystemExit where Python would import another `yeonma` than the copied one, such as an installed one."""
    code = "from importlib.util import find_spec; print(find_spec('yeonma').origin)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root / "work",
        env=environment(root, root / "cache"),
        capture_output=True,
        text=True,
    )
    if done.stdout.strip() != str(root / "package" / "yeonma" / "__init__.py"):
        raise SystemExit(f"Python imports another yeonma: {done.stdout.strip() or done.stderr.strip()}")


def machine() -> dict[str, str]:
    """What equal bytes depend on besides the package."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {capability}",
        **{library: _version(library) for library in LIBRARIES},
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except ModuleNotFoundError:  # PackageNotFoundError is one
        return "none"


def _url(printed: Path) -> str | None:
    match = search(r"http://[\w.]+:\d+", printed.read_text(encoding="utf-8"))
    return match[0] if match else None


def _wait_until(condition: Callable[[], bool], waiting: str) -> None:
    end = time.monotonic() + COMMAND_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RunFailed(f"waited {waiting} for {COMMAND_SECONDS} seconds")
        time.sleep(POLL_SECONDS)

"""All that is to be proved and measured on a GPU, by one command, as far as the time allows.

    python -m benchmarks.lease --minutes 6 --output DIR

Jobs are done in the order of worth. Each has a time limit of its own, all have one deadline together, and what comes
out lies in DIR/lease.json after every job. The same command again does what is missing. Models have known shapes and
random weights, drawn on the device: nothing is downloaded. They are kept in /dev/shm while there is room, and what
PyTorch and Triton compile in DIR, so that no job pays for them twice. `--tiny true` does the same jobs on the CPU with
a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from gpu_contenders import OURS, contenders, versions_of
from gpu_shapes import LORA_R, SEED
from gpu_workloads import WORKLOADS
from harness import HERE, TRAINERS, new_result, publish_lease, run_script, save
from lease_jobs import PREPARED, PREPARING_SECONDS, ROOT, STEPS, Job, jobs, lacking
from lease_tables import read_result, summary_table
from machine import cores, gpu
from process_group import OverLimit, Stopped, run_group, stop_all

RESULT = HERE / "results" / "lease.json"
PACKAGES = (*TRAINERS, "triton", "bitsandbytes", "liger-kernel", "unsloth")
MEMORY = Path("/dev/shm")
MODELS_BYTES = {False: 26 << 30, True: 1 << 30}
"""What the prepared models take, by whether they are tiny."""
WHOLE = "whole.json"
"""In a folder whose model and rows are there, with what they are."""
LOG_LINES = 20
LEAST_SECONDS = 5.0
"""With less than this left, nothing is begun."""


@dataclass(frozen=True)
class Place:
    output: Path
    work: Path  # prepared models
    tiny: bool
    unsloth_packages: Path | None

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def dtype(self) -> str:
        return "float32" if self.tiny else "bfloat16"

    def log_of(self, job: Job) -> Path:
        return self.output / "logs" / f"{file_name(job)}.log"


def file_name(job: Job) -> str:
    return job.name.replace("/", "_")


class OutOfTime(RuntimeError):
    """The deadline of all jobs came, not the job's own limit: it is to be done again."""


class Lease:
    """The jobs of one call. Threads share it: jobs that time nothing run side by side."""

    def __init__(
        self, place: Place, result: dict[str, Any], deadline: float, clock: Callable[[], float]
    ) -> None:
        self.place, self.result = place, result
        self._deadline, self._clock, self._started, self._lock = deadline, clock, clock(), Lock()
        self._unprepared: dict[str, str] = {}  # shape -> why

    @property
    def left(self) -> float:
        return self._deadline - self._clock()

    def expected(self, job: Job) -> float:
        """The seconds until a job's end that begins now, with those in which its model is made if it is not there."""
        if job.shape is None or (self.place.work / job.shape / WHOLE).exists():
            return job.seconds
        return job.seconds + PREPARING_SECONDS[job.shape]

    def say(self, line: str) -> None:
        print(f"[{self._clock() - self._started:4.0f} s] {line}", flush=True)

    def keep(self, name: str, entry: dict[str, Any]) -> None:
        with self._lock:
            self.result["jobs"][name] = entry
            save(self.place.output / "lease.json", self.result)

    def do(self, job: Job) -> None:
        """Do a job, and keep what comes out, or why it failed. The deadline leaves nothing behind."""
        started = self._clock()
        entry = self._begun(job)
        try:
            values = self._values(job)
            problem = values.pop("problem", "")
            entry |= {"state": "failed" if problem else "done", "values": values}
            if problem:
                entry |= {"error": problem, "log": self._end_of_log(job)}
        except (OutOfTime, Stopped) as error:
            self.say(f"{job.name}: {error}; the next call begins it anew")
            return
        except RuntimeError as error:
            entry |= {"state": "failed", "error": str(error)[:300], "log": self._end_of_log(job)}
        entry["seconds"] = round(self._clock() - started, 1)
        self.keep(job.name, entry)
        said = entry.get("error", "")
        self.say(f"{job.name}: {entry['state']}, {entry['seconds']:.0f} s{': ' if said else ''}{said}")

    def _begun(self, job: Job) -> dict[str, Any]:
        """An entry's beginning; `key` says which training it is of."""
        entry: dict[str, Any] = {"about": job.about, "commit": commit()}
        if job.script == "gpu_measure.py":
            entry["key"] = {"shape": job.shape, "contender": job.contender, **job.settings}
        return entry

    def leave_out(self, job: Job, why: str) -> None:
        self.keep(job.name, {**self._begun(job), "state": "left out", "error": why})

    def _values(self, job: Job) -> dict[str, Any]:
        limit = min(job.limit_seconds, self.left)
        log = self.place.log_of(job)
        try:
            if job.command is not None:
                status = run_group(job.command, log, os.environ, limit, folder=ROOT)
                printed = log.read_text("utf-8", errors="replace").strip().splitlines()
                if status != 0:
                    raise RuntimeError(
                        f"exit status {status}: {printed[-1] if printed else 'nothing printed'}"
                    )
                return {"printed": printed[-LOG_LINES:]}
            return self._measured(job, limit, log)
        except OverLimit as error:
            if limit < job.limit_seconds:
                raise OutOfTime("the time is over") from error
            raise

    def _measured(self, job: Job, limit: float, log: Path) -> dict[str, Any]:
        """What a script writes. In the folder of the prepared model where it has no rows and settings of its own."""
        place, script = self.place, job.script
        assert script is not None and job.shape is not None
        prepared = place.work / job.shape
        given = {"device": place.device, "dtype": place.dtype, **job.settings}
        if job.contender is not None:
            about = self.result["shapes"][job.shape]["workloads"][job.settings["workload"]]
            given |= {"folder": str(prepared), "contender": job.contender, "about": about, "shape": job.shape}
            shutil.rmtree(prepared / "output", ignore_errors=True)
        else:
            own = place.work / "own" / file_name(job)
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(parents=True)
            given |= {"folder": str(own), "prepared": str(prepared)}
        packages = place.unsloth_packages if job.own_packages else None
        try:
            values: dict[str, Any] = run_script(
                script, given, packages=packages, log=log, limit_seconds=limit
            )
        except OverLimit as error:
            part = Path(given["folder"]) / "measured.json"
            if limit < job.limit_seconds or not part.exists():
                raise
            values = {**json.loads(part.read_text("utf-8")), "problem": f"{error}; a part was measured"}
        finally:
            shutil.rmtree(prepared / "output" if job.contender is not None else own, ignore_errors=True)
        return values

    def prepare(self, shape: str) -> str:
        """Draw a model and its rows where they are not there yet; returns why that failed, or nothing. It is tried
        once a call."""
        if shape in self._unprepared:
            return self._unprepared[shape]
        folder = self.place.work / shape
        started = self._clock()
        job = {
            "folder": str(folder),
            "shape": shape,
            "dtype": self.place.dtype,
            "device": self.place.device,
            "steps": STEPS[self.place.tiny],
            "workloads": list(PREPARED[shape]),
        }
        whole = folder / WHOLE
        known = json.loads(whole.read_text("utf-8")) if whole.exists() else {}
        if known.get("job") == job:
            self._describe(shape, known["described"])
            return ""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        limit = min(2 * PREPARING_SECONDS[shape], self.left)
        log = self.place.output / "logs" / f"prepare_{shape}.log"
        try:
            described = run_script("gpu_shapes.py", job, output="prepared.json", log=log, limit_seconds=limit)
        except RuntimeError as error:
            shutil.rmtree(folder, ignore_errors=True)
            printed = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
            self.say("\n    ".join([f"{shape}: {error}", *printed[-LOG_LINES:]]))
            self._unprepared[shape] = f"{shape} could not be prepared: {error}"
            return self._unprepared[shape]
        save(whole, {"job": job, "described": described})
        self._describe(shape, described)
        self.say(f"{shape} prepared, {self._clock() - started:.0f} s")
        return ""

    def _describe(self, shape: str, described: dict[str, Any]) -> None:
        with self._lock:
            self.result["shapes"][shape] = described
            save(self.place.output / "lease.json", self.result)

    def _end_of_log(self, job: Job) -> list[str]:
        try:
            return self.place.log_of(job).read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            return []


def run_all(lease: Lease, wanted: Sequence[Job]) -> None:
    """In order, neighbours that time nothing side by side. A job that would not come to its end is passed over."""
    at = 0
    while at < len(wanted):
        if lease.left < LEAST_SECONDS:
            lease.say("the time is over")
            return
        together = [wanted[at]]
        while (
            wanted[at].alongside and at + len(together) < len(wanted) and wanted[at + len(together)].alongside
        ):
            together.append(wanted[at + len(together)])
        at += len(together)
        run_together(lease, together, ahead=wanted[at:])


def run_together(lease: Lease, together: Sequence[Job], ahead: Sequence[Job]) -> None:
    """Jobs side by side. Beside jobs that time nothing, the next model of those `ahead` is prepared as well."""
    fit = []
    for job in together:
        if lease.left < (seconds := lease.expected(job)):
            lease.say(f"{job.name}: takes about {seconds:.0f} s, and {max(0.0, lease.left):.0f} are left")
        else:
            fit.append(job)
    shapes = dict.fromkeys(job.shape for job in fit if job.shape is not None)
    with ThreadPoolExecutor(max(1, len(fit))) as threads:
        try:
            doing = [threads.submit(lease.do, job) for job in fit if job.shape is None]
            unprepared = {shape: why for shape in shapes if (why := lease.prepare(shape))}
            for job in fit:
                if job.shape in unprepared:
                    lease.say(f"{job.name}: {unprepared[job.shape]}")
                elif job.shape is not None:
                    doing.append(threads.submit(lease.do, job))
            following = next((job.shape for job in ahead if job.shape is not None), None)
            if fit and fit[0].alongside and following and lease.left > PREPARING_SECONDS[following]:
                lease.prepare(following)
            for one in doing:
                one.result()
        except BaseException:
            stop_all()  # the threads wait for their processes
            raise


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lease",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30, help="when this call ends (default: 30)")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-results"), help="results, logs, compiled kernels"
    )
    parser.add_argument("--work", type=Path, help="for models; /dev/shm while it has room, else in --output")
    parser.add_argument("--tiny", choices=["true", "false"], default="false", help="a tiny shape, on the CPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="jobs whose names begin so")
    parser.add_argument("--list", action="store_true", help="name the jobs, and do none")
    parser.add_argument("--retry", action="store_true", help="also do anew what failed")
    parser.add_argument(
        "--table-only", action="store_true", help="do nothing; the table of --output as it is"
    )
    parser.add_argument("--unsloth-packages", type=Path, help="a folder with Unsloth and what it needs")
    parser.add_argument(
        "--write-docs", action="store_true", help="put the result into benchmarks/results and the docs"
    )
    arguments = parser.parse_args(given)
    arguments.tiny = arguments.tiny == "true"
    if arguments.tiny and arguments.write_docs:
        parser.error("--write-docs: not for a tiny shape on the CPU")
    if not arguments.minutes > 0:
        parser.error("--minutes: more than 0")
    arguments.chosen = [
        job
        for job in jobs(tiny=arguments.tiny)
        if arguments.only is None or any(job.name.startswith(name) for name in arguments.only)
    ]
    if not arguments.chosen:
        parser.error(f"--only {' '.join(arguments.only)}: no job's name begins so; --list names them")
    return arguments


def place_of(arguments: argparse.Namespace) -> Place:
    output = arguments.output.resolve()
    work = arguments.work.resolve() if arguments.work else None
    if work is None:
        room = MODELS_BYTES[arguments.tiny]
        shared = MEMORY / "yeonma-lease"
        work = shared if shared.exists() or _free(MEMORY) > 2 * room else output / "work"
        work = work / ("tiny" if arguments.tiny else "models")
    own = arguments.unsloth_packages
    return Place(output, work, arguments.tiny, own.resolve() if own is not None else None)


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def fresh_result(arguments: argparse.Namespace, place: Place, given: Sequence[str] | None) -> dict[str, Any]:
    """The result of a first call, with the description of the machine."""
    script = "lease.py"
    own = place.unsloth_packages
    return {
        **new_result(script, given, PACKAGES),
        "commit": commit(),
        "gpu": None if place.tiny else gpu(),
        "own_versions": {} if own is None else {"Unsloth": versions_of(sys.executable, PACKAGES[1:], own)},
        "settings": {"dtype": place.dtype, "lora_r": LORA_R, "seed": SEED, "steps": STEPS[place.tiny]},
        "ours": OURS,
        "contenders": {
            f"{workload}/{name}": contender.label
            for workload in WORKLOADS
            for name, contender in contenders(WORKLOADS[workload].pairs).items()
        },
        "tiny": place.tiny,
        "shapes": {},
        "jobs": {},
    }


def commit() -> str:
    """Which checkout this is: bundle.py writes it down."""
    try:
        return (ROOT / "COMMIT").read_text("utf-8").strip()
    except OSError:
        return ""


def prepare_environment(place: Place) -> None:
    """For all processes: this checkout's modules, and caches that outlive a job. Set before any of them starts."""
    own = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([own] if own else [])])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.output / "compiled" / "inductor")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # a process; a dozen of them run side by side
    os.environ["TRITON_CACHE_DIR"] = str(place.output / "compiled" / "triton")
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(place.output / "compiled" / "unsloth")
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["YEONMA_CACHE"] = str(place.work / "cache")
    os.environ["YEONMA_LANG"] = "en"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    if place.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pack_logs(output: Path) -> None:
    """All logs in one file, to be copied with the results."""
    if (output / "logs").is_dir():
        with tarfile.open(output / "logs.tar.gz", "w:gz") as archive:
            archive.add(output / "logs", "logs")


def missing(chosen: Iterable[Job], result: dict[str, Any], *, retry: bool) -> list[Job]:
    """Jobs that are still to be done."""

    def is_missing(job: Job) -> bool:
        state = result["jobs"].get(job.name, {}).get("state")
        return state in (None, "left out") or (retry and state == "failed")

    return [job for job in chosen if is_missing(job)]


def main(given: Sequence[str] | None = None) -> int:
    arguments = options(given)
    started = time.monotonic()
    if arguments.list:
        for job in arguments.chosen:
            print(f"{job.name:50} about {job.seconds:3.0f} s  {job.about}")
        return 0
    place = place_of(arguments)
    file = place.output / "lease.json"
    result = read_result(file)
    if not arguments.table_only:
        if not place.tiny and gpu() is None:
            print("no CUDA device; --tiny true does the same jobs on the CPU", file=sys.stderr)
            return 2
        prepare_environment(place)
        if result is None:
            result = fresh_result(arguments, place, given)
        elif result["tiny"] != place.tiny:
            print(
                f"{file} is of --tiny {str(result['tiny']).lower()}; name another --output", file=sys.stderr
            )
            return 2
        lease = Lease(place, result, started + 60 * arguments.minutes, time.monotonic)
        to_do = []
        for job in missing(arguments.chosen, result, retry=arguments.retry):
            if why := lacking(job, tiny=place.tiny, own_packages=place.unsloth_packages):
                lease.leave_out(job, why)
            else:
                to_do.append(job)
        lease.say(f"{len(to_do)} jobs to do; models in {place.work}, cores: {cores()}")
        try:
            run_all(lease, to_do)
        except KeyboardInterrupt:
            lease.say("stopped; the same command goes on")
            return 130
        finally:
            pack_logs(place.output)
    elif result is None:
        print(f"{file}: there is no result yet", file=sys.stderr)
        return 2
    print(f"\n{summary_table(result)}")
    left = [job for job in arguments.chosen if job.name not in result["jobs"]]
    if left:
        print(f"\nnot done yet, the same command goes on: {', '.join(job.name for job in left)}")
    if all(job.name in result["jobs"] for job in jobs(tiny=place.tiny)):
        shutil.rmtree(place.work, ignore_errors=True)  # nothing needs the models any more
    if arguments.write_docs:
        save(RESULT, result)
        publish_lease(result)
    failed = any(result["jobs"].get(job.name, {}).get("state") == "failed" for job in arguments.chosen)
    return 1 if failed else 0


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())

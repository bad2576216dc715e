"""What lease.py promises: limits, a deadline, going on, a table; and what a bundle has. Jobs here are tiny commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGETS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep({seconds})
"""


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield


@pytest.fixture
def group() -> Any:
    import process_group  # type: ignore[import-not-found]

    return process_group


@pytest.fixture
def lease() -> Any:
    import lease  # type: ignore[import-not-found]

    return lease


@pytest.fixture
def tables() -> Any:
    import lease_tables  # type: ignore[import-not-found]

    return lease_tables


@pytest.fixture
def bundle() -> Any:
    import bundle  # type: ignore[import-not-found]

    return bundle


def is_running(pid: int) -> bool:
    """Not for what has ended and waits in the process table for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# Groups of processes


def test_a_command_over_its_limit_ends_with_all_that_it_started(group: Any, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    with pytest.raises(group.OverLimit, match="stopped after 1 s"):
        group.run_group(python(BEGETS.format(seconds=600)), log, os.environ, 1.0)
    assert not is_running(int(log.read_text()))


def test_a_command_leaves_no_process_behind_at_its_own_end(group: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert group.run_group(python(BEGETS.format(seconds=0) + "sys.exit(3)"), log, os.environ) == 3
    assert not is_running(int(log.read_text()))


def test_all_groups_can_be_stopped_from_another_thread(
    group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_stopping", Event())
    log, raised = tmp_path / "log", []

    def work() -> None:
        try:
            group.run_group(python(BEGETS.format(seconds=600)), log, os.environ)
        except group.Stopped as error:
            raised.append(error)

    thread = Thread(target=work)
    thread.start()
    while not log.exists() or not log.read_text().endswith("\n"):
        time.sleep(0.01)
    group.stop_all()
    thread.join()
    assert len(raised) == 1 and not is_running(int(log.read_text()))
    with pytest.raises(group.Stopped):
        group.run_group(python(""), log, os.environ)


def test_a_script_with_a_job_ends_at_its_limit(group: Any, tmp_path: Path) -> None:
    import harness  # type: ignore[import-not-found]

    script = tmp_path / "script.py"
    script.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(group.OverLimit):
        harness.run_script(str(script), {"folder": str(tmp_path)}, limit_seconds=0.5)


# The jobs of one call


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def command(name: str, code: str, *, seconds: float = 1.0, limit: float = 60.0, **fields: Any) -> Any:
    from lease_jobs import Job  # type: ignore[import-not-found]

    return Job(name, f"about {name}", seconds, limit, command=tuple(python(code)), **fields)


def one_lease(lease: Any, folder: Path, minutes: float = 10.0) -> tuple[Any, Clock]:
    clock = Clock()
    place = lease.Place(folder, folder / "work", True, None)
    result = {"jobs": {}, "shapes": {}, "gpu": None}
    return lease.Lease(place, result, 60 * minutes, clock), clock


def test_results_are_on_disk_after_every_job_and_failures_have_the_end_of_their_log(
    lease: Any, tables: Any, tmp_path: Path
) -> None:
    leased, _ = one_lease(lease, tmp_path)
    failing = command("fails", "for n in range(40): print(n)\nraise SystemExit('out of luck')")
    lease.run_all(leased, [command("a/b", "print('all well')"), failing, command("last", "print(2)")])
    jobs = tables.read_result(tmp_path / "lease.json")["jobs"]
    assert {name: entry["state"] for name, entry in jobs.items()} == {
        "a/b": "done",
        "fails": "failed",
        "last": "done",
    }
    assert jobs["a/b"]["values"] == {"printed": ["all well"]}
    assert jobs["fails"]["error"] == "exit status 1: out of luck"
    assert jobs["fails"]["log"][-1] == "out of luck" and len(jobs["fails"]["log"]) == lease.LOG_LINES
    table = tables.summary_table(leased.result)
    assert "a/b    done" in table and "all well" in table
    assert "fails ended with:" in table and "    out of luck" in table


def test_a_job_over_its_own_limit_has_failed_and_one_cut_by_the_deadline_has_not(
    lease: Any, tmp_path: Path
) -> None:
    leased, clock = one_lease(lease, tmp_path)
    lease.run_all(leased, [command("slow", "import time; time.sleep(600)", limit=0.5)])
    assert leased.result["jobs"]["slow"]["error"] == "stopped after 0 s"
    clock.now = 600 - 0.5
    leased.do(command("cut", "import time; time.sleep(600)"))
    assert "cut" not in leased.result["jobs"]


def test_a_job_that_takes_longer_than_is_left_gives_way_to_a_shorter_one(
    lease: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leased, clock = one_lease(lease, tmp_path)
    clock.now = 500.0
    lease.run_all(
        leased, [command("long", "print(1)", seconds=101), command("short", "print(2)", seconds=99)]
    )
    assert list(leased.result["jobs"]) == ["short"]
    assert "long: takes about 101 s, and 100 are left" in capsys.readouterr().out
    clock.now = 598.0
    lease.run_all(leased, [command("last", "print(3)")])
    assert list(leased.result["jobs"]) == ["short"]
    assert capsys.readouterr().out == "[ 598 s] the time is over\n"


def test_the_time_of_a_job_includes_that_of_a_model_which_is_not_there(lease: Any, tmp_path: Path) -> None:
    import lease_jobs

    leased, _ = one_lease(lease, tmp_path)
    job = command("x", "", seconds=10, shape=lease_jobs.LITTLE)
    assert leased.expected(job) == 10 + lease_jobs.PREPARING_SECONDS[lease_jobs.LITTLE]
    (leased.place.work / lease_jobs.LITTLE).mkdir(parents=True)
    (leased.place.work / lease_jobs.LITTLE / lease.WHOLE).touch()
    assert leased.expected(job) == 10


def test_a_model_that_cannot_be_prepared_is_tried_once_a_call(
    lease: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leased, clock = one_lease(lease, tmp_path)
    clock.now = 600 - 0.1
    first = leased.prepare("tiny")
    assert first == "tiny could not be prepared: stopped after 0 s"
    assert not (leased.place.work / "tiny").exists()
    assert leased.prepare("tiny") == first
    assert capsys.readouterr().out.count("stopped after 0 s") == 1


def test_a_second_call_does_what_is_missing_and_on_demand_what_failed(lease: Any) -> None:
    all_jobs = [command(name, "") for name in ("done", "failed", "left out", "never begun")]
    result = {"jobs": {name: {"state": name} for name in ("done", "failed", "left out")}}
    assert [job.name for job in lease.missing(all_jobs, result, retry=False)] == ["left out", "never begun"]
    assert [job.name for job in lease.missing(all_jobs, result, retry=True)] == [
        "failed",
        "left out",
        "never begun",
    ]


def test_jobs_that_time_nothing_run_side_by_side(lease: Any, tmp_path: Path) -> None:
    wait = (
        "import pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, {{mine!r}}).touch()\n"
        f"while not pathlib.Path({str(tmp_path)!r}, {{other!r}}).exists(): time.sleep(0.01)\n"
    )
    leased, _ = one_lease(lease, tmp_path)
    pair = [
        command("one", wait.format(mine="one", other="two"), alongside=True),
        command("two", wait.format(mine="two", other="one"), alongside=True),
    ]
    lease.run_all(leased, [*pair, command("after", "print(1)")])
    assert [entry["state"] for entry in leased.result["jobs"].values()] == ["done"] * 3


def test_jobs_are_named_once_and_have_models_rows_and_time(lease: Any) -> None:
    import lease_jobs

    for tiny in (False, True):
        found = lease_jobs.jobs(tiny=tiny)
        assert len({job.name for job in found}) == len(found) > 30
        for job in found:
            assert 0 < job.seconds < job.limit_seconds and (job.command is None) != (job.script is None)
            if job.shape is not None:
                workloads = [job.settings["workload"]] if "workload" in job.settings else []
                workloads += [pair["workload"] for pair in job.settings.get("pairs", [])]
                assert set(workloads) <= set(lease_jobs.PREPARED[job.shape])
    assert sum(len(job.settings.get("pairs", [])) for job in lease_jobs.jobs(tiny=False)) == 20
    rounds = [job.settings["round"] for job in lease_jobs.jobs(tiny=False) if "round" in job.settings]
    assert rounds == sorted(rounds) and set(rounds) == {2, 3}
    assert all((ROOT / file).is_file() for file in lease_jobs.gpu_test_files())


def test_what_is_worth_most_fits_into_two_calls_of_six_minutes() -> None:
    import lease_jobs

    waiting, calls = lease_jobs.jobs(tiny=False), []
    for _ in range(2):  # as `run_all` does it, every job as long as expected, on a machine without the models
        prepared: set[str] = set()
        seconds, done = 0.0, []
        while waiting:
            together = [waiting[0]]
            while waiting[0].alongside and waiting[len(together)].alongside:
                together.append(waiting[len(together)])
            ahead = waiting[len(together)] if len(waiting) > len(together) else None
            missing = dict.fromkeys(job.shape for job in together if job.shape and job.shape not in prepared)
            longest = max(job.seconds for job in together)
            preparing = sum(lease_jobs.PREPARING_SECONDS[shape] for shape in missing)
            if seconds + preparing + longest > 360:
                break
            if together[0].alongside and ahead is not None and ahead.shape is not None:
                missing[ahead.shape] = None  # while these run
                preparing_ahead = preparing + lease_jobs.PREPARING_SECONDS[ahead.shape]
                seconds += max(preparing_ahead, preparing + longest)
            else:
                seconds += preparing + longest
            prepared |= set(missing)
            done += [job.name for job in together]
            waiting = waiting[len(together) :]
        calls.append(done)
    first, second = calls
    large = "train/llama-3-8b"
    assert first[:2] == ["doctor", "tests"] and sum(name.startswith("equal/") for name in first) == 4
    packed = f"{large}/packed/none"
    assert first[6:] == [f"{large}/nemo/none/yeonma-2", "profile/packed", f"{packed}/yeonma"]
    assert second == [f"{packed}/trl-packing-liger", f"{packed}/unsloth-packing"]


def test_rounds_of_a_training_are_compared_by_their_median(tables: Any) -> None:
    result = measured()
    name = "train/llama-3-8b/packed/none/yeonma"
    for number, seconds in ((2, 2.0), (3, 4.0)):
        entry = training("llama-3-8b", "packed", "yeonma", seconds)
        entry["key"]["round"] = number
        result["jobs"][f"{name}/round-{number}"] = entry
    assert tables.speeds(result, "packed") == {"yeonma": 25.0, "trl-packing": 40.0, "trl-1": 25.0}
    assert [run["round"] for run in tables.trainings(result)["runs"]] == [1, 1, 1, 2, 3]


def test_jobs_whose_packages_are_missing_are_left_out(lease: Any, tmp_path: Path) -> None:
    import lease_jobs

    apart = command("unsloth", "", needs=("no_such_package",), own_packages=True)
    assert lease_jobs.lacking(apart, tiny=False, own_packages=None) == "no_such_package is not installed"
    (tmp_path / "no_such_package").mkdir()
    assert lease_jobs.lacking(apart, tiny=False, own_packages=tmp_path) == ""
    on_gpu = command("liger", "", needs_gpu="it needs a GPU")
    assert lease_jobs.lacking(on_gpu, tiny=True, own_packages=None) == "it needs a GPU"
    assert lease_jobs.lacking(on_gpu, tiny=False, own_packages=None) == ""


def test_unknown_jobs_are_refused_and_a_machine_without_a_gpu_too(
    lease: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lease.main(["--only", "nothing"])
    assert "--only nothing: no job's name begins so; --list names them" in capsys.readouterr().err
    assert lease.main(["--list", "--only", "equal"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "equal/sft",
        "equal/compiled",
        "equal/dpo",
        "equal/nf4",
        "equal/recurrent",
    ]
    assert lease.main(["--table-only", "--output", str(tmp_path)]) == 2
    assert "there is no result yet" in capsys.readouterr().err


# Tables


def training(shape: str, workload: str, contender: str, seconds: float, **values: Any) -> dict[str, Any]:
    return {
        "about": "x",
        "state": "done",
        "seconds": 60.0,
        "key": {"shape": shape, "workload": workload, "quantization": "none", "contender": contender},
        "values": {
            "seconds": [60.0, seconds, seconds],
            "tokens": [10, 50, 50],
            "losses": [4.0, 2.0, 1.0],
            "trained_tokens": [1, 1, 1],
            "reference_seconds": 0.0,
            "peak_memory_bytes": 2_000_000_000,
            "matrix_rates": [3e5, 3e5],
            **values,
        },
    }


def measured() -> dict[str, Any]:
    step = {"tokens": 100, "trained_tokens": 5, "squares": 2000}
    works = {
        name: {"about": name, "batch": 8, "steps": [step], "pairs": False} for name in ("packed", "nemo")
    }
    model = {"non_embedding_parameters": 1000, "layers": 2, "attention_width": 8}
    prefix = "train/llama-3-8b/packed/none"
    pair = {"forecast_bytes": 103, "peak_bytes": 100, "forecast_tokens_per_second": 8.0}
    return {
        "date": "2000-01-01",
        "command": "python x",
        "machine": {"cpu": "CPU", "cores": 2, "memory_bytes": 2**34},
        "gpu": {"name": "H200", "memory_bytes": 2**37, "driver": "1", "cuda": "13"},
        "versions": {"torch": "1"},
        "settings": {"dtype": "bfloat16", "lora_r": 16},
        "ours": "yeonma",
        "contenders": {f"packed/{name}": name for name in ("yeonma", "trl-packing", "trl-1")},
        "shapes": {"llama-3-8b": {"model": model, "workloads": works}},
        "jobs": {
            f"{prefix}/yeonma": training("llama-3-8b", "packed", "yeonma", 1.0),
            f"{prefix}/trl-packing": training("llama-3-8b", "packed", "trl-packing", 1.25),
            f"{prefix}/trl-1": training("llama-3-8b", "packed", "trl-1", 2.0),
            "forecast/x": {
                "state": "done",
                "values": {"pairs": [{**pair, "tokens_per_second": 10.0}, {"error": "bad"}]},
            },
            "equal/sft": {"state": "failed", "error": "the run that was killed differs", "log": ["end"]},
            "profile/packed": {
                "state": "done",
                "values": {
                    "step_seconds": 2.0,
                    "busy_seconds": 1.5,
                    "idle_share": 0.25,
                    "launches": 1234,
                    "kernels": [{"name": "gemm|x", "kind": "products", "seconds": 0.75, "calls": 12}],
                    "kinds": [
                        {"kind": "products", "seconds": 0.75, "calls": 12},
                        {"kind": "elementwise", "seconds": 0.6, "calls": 9},
                        {"kind": "attention", "seconds": 0.15, "calls": 3},
                    ],
                    "shape": "llama-3-8b",
                    "step_tokens": 50,
                    "step_trained_tokens": 0,
                    "matrix_rate": 4e5,
                    "copies_to_host": 1,
                    "waits": 3,
                },
            },
            "decoding": {
                "state": "done",
                "values": {
                    "rows": [
                        {
                            "rows": 64,
                            "tokens_per_second": 600.0,
                            "fixed_tokens_per_second": 800.0,
                            "fixed_steps": 60,
                            "replayed_steps": 58,
                            "equal_answers": 64,
                            "most_tokens_per_second": 1000.0,
                        }
                    ]
                },
            },
        },
    }


def test_goals_compare_with_the_fastest_setting_and_say_what_was_missed(tables: Any) -> None:
    found = {goal.words["en"].partition(",")[0]: goal for goal in tables.goals(measured())}
    ratio = found["packed: times TRL's fastest"]
    assert (ratio.measured, ratio.verdict("en"), ratio.verdict("ko")) == (1.25, "missed", "미달")
    assert found["packed: part of the matrix rate"].measured == pytest.approx(
        50 * (4 * 1000 + 6 * 2 * 8 * 2000 / 100) / 3e5
    )
    assert found["packed: times Unsloth's fastest"].verdict("en") == "not measured"
    assert found["forecast of memory: largest error"].verdict("en") == "met"
    assert found["forecast of time: largest error"].measured == pytest.approx(0.25)
    assert found["packed: idle part of a step"].verdict("en") == "missed"
    assert found["decoding 64 rows: part of what memory allows"].verdict("en") == "met"
    assert tables.goals({**measured(), "gpu": None}) == []


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_section_has_goals_jobs_trainings_and_kernels(tables: Any, language: str) -> None:
    section = tables.lease_section(measured(), language)
    assert "| llama-3-8b | packed | bfloat16 | trl-packing | 40 | 1.25x as fast |" in section
    assert "| `equal/sft` | the run that was killed differs |" in section
    assert "| `gemm\\|x` | 12 | 50.0% |" in section
    assert "idle 25.0% of 2.00 s, 1,234 launches, 3 waits, 1 copies to the host" in section
    # products: 0.75 s, of which 4 * 1000 * 50 operations need 0.5 at the device's rate
    tries = [line for line in section.splitlines() if line.endswith((" 30.0% |", " 25.0% |", " 12.5% |"))]
    assert len(tries) == 2 and tries[0].endswith(" 30.0% |") and tries[1].endswith(" 25.0% |")
    assert ("waits: 4" if language == "en" else "대기 4번") in tries[1]
    assert "800 with fixed shapes (58 of 60 steps replayed, 64 equal answers)" in section
    assert tables.lease_section(None, language) == tables.NOT_MEASURED[language]


def test_the_head_of_trained_tokens_is_among_the_products_that_a_step_needs(tables: Any) -> None:
    result = measured()
    values = result["jobs"]["profile/packed"]["values"]
    values["matrix_rate"] = 8 * 4096 * 128256  # 0.5 s a trained token; the rest is next to nothing
    values["step_trained_tokens"] = 1
    saved = {one.what: one.seconds for one in tables.next_tries(values, 0.5)}
    by_least = {one.what: one.seconds for one in tables.next_two(result, values, "en")}
    assert {what: saved[what] for what in by_least} == pytest.approx(by_least, abs=1e-3)
    assert 0.25 in [pytest.approx(seconds, abs=1e-3) for seconds in saved.values()]  # of 0.75 s of products


def test_results_of_an_earlier_checkout_are_still_shown(tables: Any) -> None:
    result = measured()
    assert "what to try next:" in tables.summary_table(result)
    del result["jobs"]["profile/packed"]["values"]["kinds"]
    (row,) = result["jobs"]["decoding"]["values"]["rows"]
    del row["fixed_tokens_per_second"]
    table = tables.summary_table(result)
    assert "64 rows: 600 tokens/s, 60% of what memory allows" in table and "what to try next" not in table
    assert "what to try next" not in tables.lease_section(result)


def test_pages_show_the_stored_result_or_that_there_is_none(lease: Any, tables: Any) -> None:
    from tables import cpu_profile_section, put  # type: ignore[import-not-found]

    stored = tables.read_result(lease.RESULT)
    profile = tables.read_result(lease.RESULT.with_name("cpu_profile.json"))
    for language, name in (("en", "benchmarks.md"), ("ko", "benchmarks.ko.md")):
        page = (ROOT / "docs" / name).read_text("utf-8")
        assert put(page, "lease", tables.lease_section(stored, language)) == page
        assert put(page, "cpu_profile", cpu_profile_section(profile, language)) == page


# One measurement


def test_device_time_is_the_union_of_the_kernels_times() -> None:
    from types import SimpleNamespace

    import one_profile  # type: ignore[import-not-found]

    assert one_profile.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4

    def event(name: str, start: float, end: float, *, device: str = "gpu", named: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=named)

    events = [
        event("gemm", 0, 400_000),
        event("gemm", 300_000, 500_000),
        event("Memcpy DtoH (Device -> Pageable)", 600_000, 700_000),
        event("Optimizer.step", 0, 900_000, named=True),
        event("cudaStreamSynchronize", 0, 1, device="cpu"),
        event("cudaDeviceSynchronize", 0, 1, device="cpu"),
    ]
    found = one_profile.summary(events, "gpu", 1.0)
    assert found["busy_seconds"] == pytest.approx(0.6) and found["idle_share"] == pytest.approx(0.4)
    assert (found["launches"], found["waits"], found["copies_to_host"]) == (3, 1, 1)
    assert found["kernels"][0] == {
        "name": "gemm",
        "kind": "products",
        "seconds": pytest.approx(0.6),
        "calls": 2,
    }
    assert [(kind["kind"], kind["calls"]) for kind in found["kinds"]] == [("products", 2), ("copies", 1)]


def test_a_profile_on_the_cpu_sorts_every_operator_by_its_own_time() -> None:
    import one_profile
    import torch
    from profile_kinds import Widths, shares  # type: ignore[import-not-found]
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    x, weight, low, head = (torch.ones(96, width) for width in (96, 96, 8, 200))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        started = time.perf_counter()
        for _ in range(5):
            torch.nn.functional.linear(x, weight)
        for _ in range(3):
            x @ low
        (x @ head).softmax(1)
        x * x
        x.index_select(0, torch.arange(4))
        x.t().contiguous()
        seconds = time.perf_counter() - started
    found = one_profile.summary(profiler.events(), DeviceType.CPU, seconds, Widths(8, 200))
    calls = {
        (kernel["kind"], kernel["name"]): kernel["calls"]
        for kernel in found["kernels"]
        if kernel["name"] in ("aten::mm", "aten::mul", "aten::index_select", "aten::_softmax")
    }
    assert calls == {
        ("products", "aten::mm"): 5,
        ("lora", "aten::mm"): 3,
        ("head", "aten::mm"): 1,
        ("head", "aten::_softmax"): 1,
        ("elementwise", "aten::mul"): 1,
        ("indexing", "aten::index_select"): 1,
    }
    # operators call each other, and no time counts twice
    assert (
        0 < sum(kind["seconds"] for kind in found["kinds"]) == pytest.approx(found["busy_seconds"], rel=0.05)
    )
    assert sum(shares(found).values()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("triton_poi_fused_mul_silu_0", "elementwise"),
        ("triton_red_fused__to_copy_mean_mul_pow_rsqrt_1", "reductions"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16>", "indexing"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("Memset (Device)", "allocation"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward", "reductions"),
        ("void mystery()", "other"),
    ],
)
def test_kernels_of_a_gpu_are_sorted_by_their_names(name: str, kind: str) -> None:
    from profile_kinds import kind_of

    assert kind_of(name) == kind


def test_decoding_is_bounded_by_weights_read_once_and_keys_and_values_of_each_row() -> None:
    import one_decoding  # type: ignore[import-not-found]

    assert one_decoding.most_tokens_per_second(1000.0, 100, 0.0, 4) == 40
    assert one_decoding.most_tokens_per_second(1000.0, 100, 25.0, 4) == 20


def test_two_runs_differ_from_the_first_step_whose_numbers_do() -> None:
    import one_equality  # type: ignore[import-not-found]

    run = {"sha256": "a", "steps": [[1.0, 2.0], [0.5, 2.0]]}
    assert one_equality.difference(run, run) == ""
    other = {"sha256": "b", "steps": [[1.0, 2.0], [0.5, 2.5]]}
    assert one_equality.difference(run, other).startswith("from step 2 on")
    assert (
        one_equality.difference(run, {**run, "sha256": "b"})
        == "in the adapter's bytes, and in no step's numbers"
    )
    assert "number of steps" in one_equality.difference(run, {**run, "steps": []})


# The bundle


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


def test_the_lists_of_a_bundle_pin_every_wheel_and_name_what_they_leave_out(bundle: Any) -> None:
    for listed in bundle.PARTS.values():
        wheels = list(bundle.wheels_of((ROOT / "benchmarks" / listed).read_text("utf-8")))
        assert wheels and all("==" in wheel.requirement for wheel in wheels)
    ours, unsloth = (
        {wheel.requirement.partition("==")[0]: wheel for wheel in bundle.wheels_of(text)}
        for text in ((ROOT / "benchmarks" / listed).read_text("utf-8") for listed in bundle.PARTS.values())
    )
    kept = [
        name
        for name in (
            "nn.py",
            "libbitsandbytes_cuda130.so",
            "libbitsandbytes_cuda118.so",
            "libbitsandbytes_cpu.so",
        )
        if ours["bitsandbytes"].keeps(f"bitsandbytes/{name}")
    ]
    assert kept == ["nn.py", "libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so"]
    assert not unsloth["unsloth"].keeps("studio/backend/x.py") and unsloth["unsloth"].keeps("unsloth/x.py")
    assert ours["trl"].keeps("studio/backend/x.py")


def test_versions_of_a_bundle_are_those_that_yeonma_is_tested_with(bundle: Any) -> None:
    tested = {
        line.partition(";")[0].strip().partition("==")[0].partition("[")[0].lower(): line
        for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()
        if "==" in line and "3.11" not in line.partition("<")[2]
    }
    for wheel in bundle.wheels_of((ROOT / "benchmarks" / bundle.PARTS["wheels"]).read_text("utf-8")):
        name, _, version = wheel.requirement.partition("==")
        if name in tested:
            assert f"=={version}" in tested[name], name


def test_a_trimmed_wheel_and_its_record_lack_the_same_files(bundle: Any, tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "small", {"small/a.py": "A = 1\n", "studio/b.py": "B = 2\n"})
    bundle.trim(path, bundle.Wheel("small==1.0", without=("studio/*",)))
    with ZipFile(path) as archive:
        names = archive.namelist()
        record = archive.read("small-1.0.dist-info/RECORD").decode()
    assert "studio/b.py" not in names and "small/a.py" in names
    assert [row.partition(",")[0] for row in record.splitlines()] == names


def test_the_start_script_unpacks_wheels_and_runs_the_lease_of_its_checkout(
    bundle: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "a bundle"
    write_wheel(folder / "wheels", "small", {"small/__init__.py": "A = 1\n"})
    scripts = folder / "checkout" / "benchmarks"
    scripts.mkdir(parents=True)
    (scripts / "__init__.py").touch()
    (scripts / "lease.py").write_text("import sys, small\nprint(small.A, sys.argv[1:])\n")
    (folder / "start.sh").write_text(bundle.START)
    for _ in range(2):
        done = subprocess.run(
            ["sh", str(folder / "start.sh"), "--minutes", "6"],
            env={**os.environ, "PYTHON": sys.executable},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        own = [str(folder / "results"), str(folder / "unpacked-wheels-unsloth")]
        given = ["--output", own[0], "--unsloth-packages", own[1], "--minutes", "6"]
        assert done.stdout.strip() == f"1 {given}"
    assert [path.name for path in sorted(folder.glob("unpacked*"))] == ["unpacked-wheels"]


def test_a_folder_that_is_no_bundle_is_not_replaced(
    bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bundle.main(["--output", str(tmp_path)])
    assert "is there and no bundle" in capsys.readouterr().err

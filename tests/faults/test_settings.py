"""Faults of the settings, by their numbers in the list of faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import yeonma
from tests.faults.conftest import Accepted, Refused, Write, everything_in
from tests.runs import SETTINGS, TEMPLATE, Done, arguments, articles, model_folder, sft, trained, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
LINE = '{"document": "a b", "title": "t"}\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", articles(6))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "'1e-4'", "0.0001", "1.0e-4"])
def test_fault_42_learning_rate_that_yaml_reads_as_text_is_accepted(
    write: Write, accepted: Accepted, data: Path, text: str
) -> None:
    config = write("run.yaml", f"learning_rate: {text}\nwarmup_steps: 0\n")
    run = accepted(data, config=config, learning_rate=None, lr_scheduler="constant")
    assert run.done.steps[0]["learning_rate"] == 1e-4


def test_fault_43_unknown_setting(
    write: Write, refused: Refused, data: Path, tmp_path: Path, base: Path
) -> None:
    assert refused(data, lora_rr=8, **{"learning-rat": 1, "zzz": 2}) == [
        '--lora_rr: unknown setting; did you mean "lora_r"?',
        '--learning-rat: unknown setting; did you mean "learning_rate"?',
        "--zzz: unknown setting; see yeonma sft --help",
    ]
    config = write("run.yaml", "seed: 1\nlora_rr: 8\nlearning-rat: 1\n")
    assert refused(data, config=config) == [
        'run.yaml:2: unknown setting lora_rr; did you mean "lora_r"?',
        'run.yaml:3: unknown setting learning-rat; did you mean "learning_rate"?',
    ]
    with pytest.raises(yeonma.UserError) as caught:
        yeonma.sft(base_model=base, data_path=data, output_dir=tmp_path / "out", lora_rr=8, learning_rat=1)  # type: ignore[call-arg]
    assert str(caught.value).splitlines() == [
        'lora_rr: unknown setting; did you mean "lora_r"?',
        'learning_rat: unknown setting; did you mean "learning_rate"?',
    ]
    assert not (tmp_path / "out").exists()


OUT_OF_RANGE = {
    "lora_r": ("0", "-4"),
    "lora_alpha": ("0", "-1"),
    "lora_dropout": ("1.5", "-0.1", "1"),
    "learning_rate": ("-0.001", "0"),
    "cutoff_len": ("0", "-1"),
    "batch_size": ("0",),
    "num_epochs": ("0", "-1"),
    "max_steps": ("0",),
    "val_set_size": ("-1",),
    "warmup_ratio": ("1.5",),
}
RANGES = {
    "lora_r": "a whole number of at least 1",
    "lora_alpha": "a number above 0",
    "lora_dropout": "a number of at least 0 and below 1",
    "learning_rate": "a number above 0",
    "cutoff_len": "a whole number of at least 1",
    "batch_size": "a whole number of at least 1",
    "num_epochs": "a number above 0",
    "max_steps": "a whole number of at least 1",
    "val_set_size": "a number of at least 0",
    "warmup_ratio": "a number of at least 0 and at most 1",
}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_fault_44_numbers_out_of_their_range(write: Write, refused: Refused, data: Path, at: int) -> None:
    wrong = {name: values[at] for name, values in OUT_OF_RANGE.items() if at < len(values)}
    lines = refused(data, **wrong)
    assert sorted(lines) == sorted(
        f"{name}: {value} is out of range; give {RANGES[name]}" for name, value in wrong.items()
    )
    config = write("run.yaml", "".join(f"{name}: {value}\n" for name, value in wrong.items()))
    assert refused(data, config=config, **dict.fromkeys(SETTINGS)) == [
        f"run.yaml:{line}: {name}: {value} is out of range; give {RANGES[name]}"
        for line, (name, value) in enumerate(wrong.items(), start=1)
    ]


MEANINGLESS = {
    "max_steps": ("1000000000000000000", "1,000,000,000"),
    "num_epochs": ("1e300", "1,000,000"),
    "batch_size": ("1000000000000", "1,000,000"),
    "micro_batch_size": ("1000000000000", "1,000,000"),
    "cutoff_len": ("100000000000", "100,000,000"),
    "lora_r": ("1000000000", "65,536"),
    "save_steps": ("99999999999999999999999999", "1,000,000,000"),
    "warmup_steps": ("1000000000000000000", "1,000,000,000"),
    "learning_rate": ("1e300", "1,000,000,000"),
    "nproc": ("1000000", "1,024"),
    "max_rows": ("1000000000000000000", "1,000,000,000,000"),
}


def test_fault_93_numbers_that_no_run_can_mean(refused: Refused, data: Path) -> None:
    lines = refused(data, **{name: value for name, (value, _) in MEANINGLESS.items()})
    assert sorted(line.partition("; ")[0] for line in lines) == sorted(
        f"{name}: {value} is more than any run can mean (at most {most})"
        for name, (value, most) in MEANINGLESS.items()
    )


def test_fault_93_epochs_of_more_steps_than_a_run_can_have(refused: Refused, write: Write) -> None:
    rows = "".join(f'{{"document": "{number}", "title": "{number}"}}\n' for number in range(1500))
    lines = refused(write("many.jsonl", rows), num_epochs="1e6", batch_size=1)
    assert lines == [
        "num_epochs: the run would have 1.5e+09 steps, and 1,000,000,000 are the most; lower it, or give max_steps"
    ]


def test_fault_44_values_that_are_not_valid_numbers(refused: Refused, data: Path) -> None:
    assert sorted(refused(data, lora_r="nan", learning_rate="inf", cutoff_len="2.5")) == [
        "cutoff_len: 2.5 is not valid; give a whole number of at least 1",
        "learning_rate: inf is not valid; give a number above 0",
        "lora_r: nan is not valid; give a whole number of at least 1",
    ]


def test_fault_45_max_steps_wins_over_num_epochs_with_a_warning(
    tmp_path: Path, base: Path, data: Path
) -> None:
    both = trained(tmp_path / "out", base, data, num_epochs=50, max_steps=2)
    assert both.err == "yeonma: warning: num_epochs and max_steps are both given: max_steps (2) wins\n"
    assert len(both.steps) == 2
    only_max_steps = trained(tmp_path / "alone", base, data, max_steps=2)
    assert only_max_steps.err == ""
    with pytest.warns(UserWarning, match="max_steps .2. wins"):
        yeonma.sft(
            base_model=base,
            data_path=data,
            output_dir=tmp_path / "python",
            **{**SETTINGS, "num_epochs": 50, "max_steps": 2},
        )
    assert len(Done(0, tmp_path / "python", "", "").steps) == 2


def test_fault_47_duplicate_key_in_yaml(write: Write, refused: Refused, data: Path) -> None:
    for text, place, key, first in (
        ("seed: 1\nlora_r: 8\nseed: 1\n", "run.yaml:3", "seed", 1),
        ("columns:\n  document: a\n  document: b\n", "run.yaml:3", "document", 2),
        ("columns: {title: a, title: b}\n", "run.yaml:1", "title", 1),
    ):
        assert refused(data, config=write("run.yaml", text)) == [
            f'{place}: "{key}" is given twice, first in line {first}; remove one of them'
        ]
    one_name = refused(data, config=write("run.yaml", "lora-r: 8\nlora_r: 8\n"))
    assert one_name == ['run.yaml:2: "lora_r" is given twice; remove one of them']
    on_command_line = refused(data, columns="{title: a, title: b}")
    assert len(on_command_line) == 1 and '"title" is given twice' in on_command_line[0]


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/object/new:os.system ['touch ran']",
        "!!python/object:collections.Counter {a: 1}",
        "!!python/name:os.system",
        "!!python/module:os",
        "!anything else",
    ],
)
def test_fault_48_python_objects_in_yaml(
    tmp_path: Path, write: Write, refused: Refused, data: Path, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = tag.split(" ")[0]
    for text, place in ((f"seed: {tag}\n", "1:7"), (f"columns:\n  title: {tag}\n", "2:10")):
        assert refused(data, config=write("run.yaml", text)) == [
            f"run.yaml:{place}: the tag {shown} is refused; write a plain value"
        ]
    on_command_line = refused(data, columns=f"{{title: {tag}}}")
    assert len(on_command_line) == 1 and on_command_line[0].startswith("columns: ")
    assert not (tmp_path / "ran").exists()


def test_fault_49_model_folder_as_output_folder(tmp_path: Path, refused: Refused, data: Path) -> None:
    base = model_folder(tmp_path / "model")
    (tmp_path / "link").symlink_to(base)
    for name in ("model", "link", "model/../model"):
        for overwrite in (False, True):
            lines = refused(data, base_model=base, output_dir=tmp_path / name, overwrite=overwrite)
            assert lines == [f"output_dir {name}: it is the folder of the base model; give another folder"]


def test_fault_50_unknown_lora_target_layers(refused: Refused, data: Path) -> None:
    known_layers = "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    for targets, name, cure in (
        ("gate_prj", "gate_prj", 'did you mean "gate_proj"?'),
        ("[q_proj, gate_prj]", "gate_prj", 'did you mean "gate_proj"?'),
        ("[query_key_value]", "query_key_value", "or use all-linear"),
        ("['.*_proj']", ".*_proj", ""),
    ):
        (line,) = refused(data, lora_target_modules=targets)
        what = f'lora_target_modules: no layer of the model is called "{name}"; {known_layers}; '
        assert line.startswith(what + cure)


def test_fault_50_lora_dropout_on_fused_experts(tmp_path: Path, refused: Refused, data: Path) -> None:
    base = model_folder(tmp_path / "model", "qwen3_moe")
    (line,) = refused(
        data, base_model=base, lora_dropout=0.1, lora_target_modules="[gate_proj, up_proj, down_proj]"
    )
    assert line.startswith("lora_dropout: PEFT has none for the routed experts")
    assert line.endswith("; use --lora_dropout 0, or use --lora_experts false")


def test_fault_51_bfloat16_on_a_device_without_it_is_refused(
    refused: Refused, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fake CUDA device without bfloat16. Nothing else of it is used before the refusal.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    cure = "use --dtype float32 or float16"
    for device in ("auto", "cuda"):
        assert refused(data, dtype="bfloat16", device=device) == [
            f"dtype: the device has no bfloat16; {cure}"
        ]


def test_fault_51_bfloat16_on_the_cpu_is_accepted(tmp_path: Path, base: Path, data: Path) -> None:
    done = trained(tmp_path / "out", base, data, dtype="bfloat16", device="cpu", max_steps=1)
    assert "frozen, torch.bfloat16 on cpu" in done.out


@pytest.mark.gpu
def test_fault_51_bfloat16_on_a_gpu_is_accepted_only_if_supported(
    tmp_path: Path, base: Path, data: Path
) -> None:
    done = sft(tmp_path / "out", base, data, dtype="bfloat16", device="cuda", max_steps=1)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert (done.status, done.err) == (0, "")
    else:
        assert (done.status, done.folder.exists()) == (2, False)


@pytest.mark.slow
def test_fault_52_fewer_rows_per_step_than_processes_gives_equal_losses(
    tmp_path: Path, base: Path, data: Path
) -> None:
    settings: dict[str, object] = {**SETTINGS, "batch_size": 1, "num_epochs": 1}
    one_process = trained(tmp_path / "one", base, data, **settings)
    keywords = {"base_model": base, "data_path": data, "output_dir": tmp_path / "two", **settings, "nproc": 2}
    command = [sys.executable, "-m", "yeonma", "sft", *arguments(keywords)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    two_processes = Done(process.returncode, tmp_path / "two", process.stdout, process.stderr)
    assert (two_processes.status, two_processes.err) == (0, "")
    assert [step["examples"] for step in two_processes.steps] == [1] * 6
    assert two_processes.losses == pytest.approx(one_process.losses, abs=1e-5)


@pytest.mark.parametrize(
    "resume", [{}, {"resume_from_checkpoint": "out/checkpoint-1"}], ids=["latest", "named"]
)
def test_fault_46_resume_refuses_only_settings_that_change_the_result(
    tmp_path: Path,
    refused: Refused,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    resume: dict[str, object],
) -> None:
    """Resume of a killed run: settings that change the result are refused by name, those of speed are accepted."""
    monkeypatch.chdir(tmp_path)
    uninterrupted = trained(tmp_path / "whole", base, data, max_steps=3, save_steps=1, cutoff_len=200)
    with monkeypatch.context() as patch:
        patch.setattr("yeonma.train.run.folder.install", _killed)
        run_settings = {"max_steps": 3, "save_steps": 1, "cutoff_len": 200}
        assert sft(tmp_path / "out", base, data, **run_settings).status == 130
    lines = refused(data, **run_settings, **resume, learning_rate=1e-4, lora_alpha=32, batch_size=3, seed=7)
    cure = "give the earlier settings to continue it, another output_dir, or --overwrite true"
    assert lines == [
        "out: batch_size was 4 and is now 3",
        "out: learning_rate was 0.003 and is now 0.0001",
        "out: lora_alpha was 8.0 and is now 32.0",
        "out: seed was 42 and is now 7",
        f"out: the folder holds another run; {cure}",
    ]
    other_speed = {
        **run_settings,
        "micro_batch_size": 1,
        "share_prefix": False,
        "logging_steps": 2,
        "save_steps": 2,
    }
    done = trained(tmp_path / "out", base, data, **other_speed, **resume)
    assert "continuing after step " in done.out
    assert done.losses == pytest.approx(uninterrupted.losses, rel=1e-5)


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_fault_53_folder_of_another_run_is_refused_without_overwrite(
    tmp_path: Path, refused: Refused, base: Path, data: Path
) -> None:
    first = trained(tmp_path / "out", base, data, max_steps=1)
    lines = refused(data, max_steps=1, lora_r=5, seed=7)
    cure = "give the earlier settings to continue it, another output_dir, or --overwrite true"
    assert lines == [
        "out: lora_r was 4 and is now 5",
        "out: seed was 42 and is now 7",
        f"out: the folder holds another run; {cure}",
    ]
    rerun = sft(tmp_path / "out", base, data, max_steps=1)
    assert (rerun.status, rerun.err) == (0, "")
    assert "holds this run, which is finished" in rerun.out
    overwritten = sft(tmp_path / "out", base, data, max_steps=1, lora_r=5, overwrite=True)
    assert (overwritten.status, overwritten.err) == (0, "")
    assert first.weights.keys() == overwritten.weights.keys()
    assert {weight.shape for weight in overwritten.weights.values()} != {(4, 32), (32, 4)}


def test_fault_53_output_folder_with_foreign_files_is_refused(
    tmp_path: Path, write: Write, refused: Refused, data: Path
) -> None:
    write("out/adapter_model.safetensors", "mine")
    cure = "give another folder, or --overwrite true"
    assert refused(data) == [
        f"output_dir out: it holds files that are not from a run (adapter_model.safetensors); {cure}"
    ]
    (tmp_path / "file").write_text("mine")
    assert refused(data, output_dir=tmp_path / "file") == ["output_dir file: it is a file; give a folder"]


def test_several_settings_errors_are_reported_together(write: Write, refused: Refused, data: Path) -> None:
    config = write("run.yaml", "lora_rr: 8\nlr_scheduler: lineer\nbatch_size: many\n")
    lines = refused(data, config=config, lora_r=0, batch_size=None, zzz=1)
    assert [line.partition(" ")[0] for line in lines] == [
        "--zzz:",
        "run.yaml:1:",
        "run.yaml:2:",
        "run.yaml:3:",
        "lora_r:",
    ]
    assert lines[2].endswith('; did you mean "linear"?')


WITHOUT_TORCH = """
import sys
from yeonma.cli import main
status = main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "peft", "datasets"} & set(sys.modules))
print(status, *heavy)
"""


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_r": 0},
        {"data_path": "no.jsonl"},
        {"data_path": "wrong.jsonl"},
        {"template": "{document\n{title}"},
        {"template": "{documnt}\n{title}"},
        {"base_model": "./nowhere"},
        {"base_model": "code"},
        {"output_dir": "model"},
    ],
)
def test_errors_are_reported_before_heavy_libraries_are_imported(
    tmp_path: Path, write: Write, base: Path, wrong: dict[str, object]
) -> None:
    write("wrong.jsonl", LINE + LINE.strip() + LINE)
    write("code/config.json", '{"auto_map": {}}')
    (tmp_path / "model").symlink_to(base)
    good = {"base_model": "model", "data_path": write("rows.jsonl", LINE), "output_dir": "out"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "sft", *arguments({**good, "template": TEMPLATE, **wrong})],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr.count("\n") >= 1) == ("2\n", True), done.stderr
    assert "Traceback" not in done.stderr
    assert everything_in(tmp_path / "out") is None

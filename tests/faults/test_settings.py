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
def test_fault_42_a_learning_rate_that_yaml_takes_for_text(
    write: Write, accepted: Accepted, data: Path, text: str
) -> None:
    config = write("run.yaml", f"learning_rate: {text}\nwarmup_steps: 0\n")
    taken = accepted(data, config=config, learning_rate=None, lr_scheduler="constant")
    assert taken.done.steps[0]["learning_rate"] == 1e-4


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
        yeonma.sft(base_model=base, data_path=data, output_dir=tmp_path / "out", lora_rr=8, learning_rat=1)
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


def test_fault_44_what_is_no_number(refused: Refused, data: Path) -> None:
    assert sorted(refused(data, lora_r="nan", learning_rate="inf", cutoff_len="2.5")) == [
        "cutoff_len: 2.5 is not valid; give a whole number of at least 1",
        "learning_rate: inf is not valid; give a number above 0",
        "lora_r: nan is not valid; give a whole number of at least 1",
    ]


def test_fault_45_epochs_and_steps_both(tmp_path: Path, base: Path, data: Path) -> None:
    done = trained(tmp_path / "out", base, data, num_epochs=50, max_steps=2)
    assert done.err == "yeonma: warning: num_epochs and max_steps are both given: max_steps (2) wins\n"
    assert len(done.steps) == 2
    alone = trained(tmp_path / "alone", base, data, max_steps=2)
    assert alone.err == ""
    with pytest.warns(UserWarning, match="max_steps .2. wins"):
        yeonma.sft(
            base_model=base,
            data_path=data,
            output_dir=tmp_path / "python",
            **{**SETTINGS, "num_epochs": 50, "max_steps": 2},
        )
    assert len(Done(0, tmp_path / "python", "", "").steps) == 2


def test_fault_47_a_key_twice_in_yaml(write: Write, refused: Refused, data: Path) -> None:
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


def test_fault_49_the_models_folder_as_output(tmp_path: Path, refused: Refused, data: Path) -> None:
    base = model_folder(tmp_path / "model")
    (tmp_path / "link").symlink_to(base)
    for name in ("model", "link", "model/../model"):
        for overwrite in (False, True):
            lines = refused(data, base_model=base, output_dir=tmp_path / name, overwrite=overwrite)
            assert lines == [f"output_dir {name}: it is the folder of the base model; give another folder"]


def test_fault_50_lora_on_layers_that_are_not_there(refused: Refused, data: Path) -> None:
    known = "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    for targets, name, cure in (
        ("gate_prj", "gate_prj", 'did you mean "gate_proj"?'),
        ("[q_proj, gate_prj]", "gate_prj", 'did you mean "gate_proj"?'),
        ("[query_key_value]", "query_key_value", "or use all-linear"),
        ("['.*_proj']", ".*_proj", ""),
    ):
        (line,) = refused(data, lora_target_modules=targets)
        what = f'lora_target_modules: no layer of the model is called "{name}"; {known}; '
        assert line.startswith(what + cure)


def test_fault_50_layers_of_fused_experts_take_no_dropout(
    tmp_path: Path, refused: Refused, data: Path
) -> None:
    base = model_folder(tmp_path / "model", "qwen3_moe")
    (line,) = refused(
        data, base_model=base, lora_dropout=0.1, lora_target_modules="[gate_proj, up_proj, down_proj]"
    )
    assert line.startswith("lora_target_modules: PEFT cannot put LoRA on these layers (")
    assert line.endswith("; use --lora_dropout 0")


def test_fault_51_bfloat16_where_the_device_has_none(
    refused: Refused, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A device that says that it is there and has no bfloat16: all that is asked of it before the refusal.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    cure = "use --dtype float32 or float16"
    for device in ("auto", "cuda"):
        assert refused(data, dtype="bfloat16", device=device) == [
            f"dtype: the device has no bfloat16; {cure}"
        ]


def test_fault_51_bfloat16_where_the_device_has_it(tmp_path: Path, base: Path, data: Path) -> None:
    done = trained(tmp_path / "out", base, data, dtype="bfloat16", device="cpu", max_steps=1)
    assert "frozen, torch.bfloat16 on cpu" in done.out


@pytest.mark.gpu
def test_fault_51_bfloat16_on_a_gpu(tmp_path: Path, base: Path, data: Path) -> None:
    done = sft(tmp_path / "out", base, data, dtype="bfloat16", device="cuda", max_steps=1)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert (done.status, done.err) == (0, "")
    else:
        assert (done.status, done.folder.exists()) == (2, False)


@pytest.mark.slow
def test_fault_52_fewer_rows_a_step_than_processes(tmp_path: Path, base: Path, data: Path) -> None:
    settings: dict[str, object] = {**SETTINGS, "batch_size": 1, "num_epochs": 1}
    one = trained(tmp_path / "one", base, data, **settings)
    keywords = {"base_model": base, "data_path": data, "output_dir": tmp_path / "two", **settings, "nproc": 2}
    command = [sys.executable, "-m", "yeonma", "sft", *arguments(keywords)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    two = Done(ended.returncode, tmp_path / "two", ended.stdout, ended.stderr)
    assert (two.status, two.err) == (0, "")
    assert [step["examples"] for step in two.steps] == [1] * 6
    assert two.losses == pytest.approx(one.losses, abs=1e-5)


@pytest.mark.parametrize(
    "resume", [{}, {"resume_from_checkpoint": "out/checkpoint-1"}], ids=["latest", "named"]
)
def test_fault_46_a_checkpoint_of_other_settings(
    tmp_path: Path,
    refused: Refused,
    base: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    resume: dict[str, object],
) -> None:
    """A run that was killed; what changes the result is listed, what is only speed goes on."""
    monkeypatch.chdir(tmp_path)
    whole = trained(tmp_path / "whole", base, data, max_steps=3, save_steps=1, cutoff_len=200)
    with monkeypatch.context() as patch:
        patch.setattr("yeonma.train.run.folder.install", _killed)
        run = {"max_steps": 3, "save_steps": 1, "cutoff_len": 200}
        assert sft(tmp_path / "out", base, data, **run).status == 130
    lines = refused(data, **run, **resume, learning_rate=1e-4, lora_alpha=32, batch_size=3, seed=7)
    cure = "give the earlier settings to continue it, another output_dir, or --overwrite true"
    assert lines == [
        "out: batch_size was 4 and is now 3",
        "out: learning_rate was 0.003 and is now 0.0001",
        "out: lora_alpha was 8.0 and is now 32.0",
        "out: seed was 42 and is now 7",
        f"out: the folder holds another run; {cure}",
    ]
    faster = {**run, "micro_batch_size": 1, "share_prefix": False, "logging_steps": 2, "save_steps": 2}
    done = trained(tmp_path / "out", base, data, **faster, **resume)
    assert "continuing after step " in done.out
    assert done.losses == pytest.approx(whole.losses, rel=1e-5)


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_fault_53_a_folder_that_holds_another_run(
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
    again = sft(tmp_path / "out", base, data, max_steps=1)
    assert (again.status, again.err) == (0, "")
    assert "holds this run, which is finished" in again.out
    over = sft(tmp_path / "out", base, data, max_steps=1, lora_r=5, overwrite=True)
    assert (over.status, over.err) == (0, "")
    assert first.weights.keys() == over.weights.keys()
    assert {weight.shape for weight in over.weights.values()} != {(4, 32), (32, 4)}


def test_fault_53_a_folder_that_holds_what_no_run_left(
    tmp_path: Path, write: Write, refused: Refused, data: Path
) -> None:
    write("out/adapter_model.safetensors", "mine")
    cure = "give another folder, or --overwrite true"
    assert refused(data) == [
        f"output_dir out: it holds files that are not from a run (adapter_model.safetensors); {cure}"
    ]
    (tmp_path / "file").write_text("mine")
    assert refused(data, output_dir=tmp_path / "file") == ["output_dir file: it is a file; give a folder"]


def test_several_faults_of_the_settings_come_together(write: Write, refused: Refused, data: Path) -> None:
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
def test_errors_come_before_anything_heavy_is_imported(
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

"""Whole runs: which files they write, what they refuse and when, and which adapters they can continue."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from tests.runs import TEMPLATE, Done, articles, command, model_folder, sft, trained, write_jsonl
from yeonma import __version__
from yeonma.train import run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(17))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """12 training and 5 validation rows; two epochs of three steps. The loss still falls at the end. The run is that of
    a checkout that is not installed: Python knows nothing of a package `yeonma`."""
    settings = {"val_set_size": 5, "num_epochs": 2, "card_rows": 2}
    find = Distribution.from_name

    def find_another(name: str) -> Distribution:
        if name == "yeonma":
            raise PackageNotFoundError(name)
        return find(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distribution, "from_name", find_another)
        return trained(tmp_path_factory.mktemp("done") / "out", base, data, **settings)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Files that a run writes


ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "template.txt", "yeonma.json", "samples.json"}
TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "base_chat_template.jinja",
}


def test_run_folder_and_checkpoint_hold_exactly_the_expected_files(done: Done) -> None:
    run_files = {
        "settings.yaml",
        "metrics.jsonl",
        "trained_rows.jsonl",
        "log.txt",
        "loss.svg",
        "README.md",
        "sample_answers.json",
        "run.json",
        "manifest.json",
    }
    assert names_in(done.folder) == ADAPTER | TOKENIZER | run_files | {"checkpoint-3", "checkpoint-6"}
    checkpoint_files = {"optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"}
    assert names_in(done.folder / "checkpoint-3") == ADAPTER | TOKENIZER | checkpoint_files


def test_manifest_has_the_sha256_of_every_other_file(done: Done) -> None:
    checkpoint = done.folder / "checkpoint-6"
    hashes = json.loads((checkpoint / "manifest.json").read_text())["sha256"]
    assert set(hashes) == names_in(checkpoint) - {"manifest.json"}
    for name, expected in hashes.items():
        assert sha256((checkpoint / name).read_bytes()).hexdigest() == expected


def test_yeonma_json_records_base_template_rules_and_training_data(
    done: Done, base: Path, data: Path
) -> None:
    details = json.loads((done.folder / "yeonma.json").read_text())
    assert details["format"] == 1
    assert details["base"]["name"] == str(base)
    assert details["base"]["parameters"] == 21728
    assert re.fullmatch("[0-9a-f]{64}", details["base"]["config_sha256"])
    assert details["template"]["sha256"] == sha256(f"{TEMPLATE}\n".encode()).hexdigest()
    assert (done.folder / "template.txt").read_text() == f"{TEMPLATE}\n"
    assert details["rules"] == {
        "cutoff_len": 2048,
        "shrink": None,
        "shrink_side": "end",
        "over_limit": "drop",
        "train_on_inputs": False,
        "add_eos_token": True,
        "thinking": "auto",
        "train_on": "all",
        "row_weights": None,
        "chat_template_kwargs": None,
        "parse_special_tokens": False,
    }
    steps = done.steps[:3]
    assert details["trained_on"] == {
        "data": str(data),
        "data_sha256": details["trained_on"]["data_sha256"],
        "examples": 12,
        "trained_tokens": sum(step["trained_tokens"] for step in steps),
        "left_out": 0,
        "shortened": 0,
    }
    assert (details["versions"]["yeonma"], details["versions"]["torch"]) == (__version__, version("torch"))


@pytest.mark.parametrize("subfolder", [".", "checkpoint-3"])
def test_plain_peft_gives_the_recorded_loss_for_folder_and_checkpoint(
    done: Done, data: Path, subfolder: str
) -> None:
    folder = done.folder / subfolder
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluation = next(
        line for line in done.looks if line["step"] == (3 if subfolder == "checkpoint-3" else 6)
    )
    total = count = 0.0
    for row in held_out(done, data):
        prompt = tokenizer(TEMPLATE.partition("{title}")[0].replace("{document}", row["document"]))[
            "input_ids"
        ]
        answer = [*tokenizer(row["title"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(answer)
        count += len(answer)
    assert total / count == pytest.approx(evaluation["loss"], abs=1e-5)


def held_out(done: Done, data: Path) -> list[dict[str, str]]:
    """The validation rows of `done`, selected by the same function as in the run."""
    from yeonma.data.rows import draw_validation

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    return [rows[i] for i in draw_validation(len(rows), 5, 42)[1]]


def test_rerun_from_the_settings_file_gives_the_same_bytes(done: Done, tmp_path: Path) -> None:
    config, output = done.folder / "settings.yaml", tmp_path / "again"
    rerun = command(output, "sft", "--config", str(config), "--output_dir", str(output))
    assert (rerun.status, rerun.err) == (0, "")
    assert rerun.weight_bytes == done.weight_bytes
    for name in ADAPTER | TOKENIZER:
        assert (rerun.folder / name).read_bytes() == (done.folder / name).read_bytes(), name


def test_card_shows_loss_and_answers_before_and_after_training(done: Done) -> None:
    card = (done.folder / "README.md").read_text()
    before, after = done.looks[0], done.looks[-1]
    assert f"| before | {before['loss']:.4f} | {before['perplexity']:.4f} | 0 |" in card
    assert f"| after | {after['loss']:.4f} | {after['perplexity']:.4f} | 6 |" in card
    assert card.count("### Row ") == card.count("\nwith the adapter:\n") == card.count("\nbase model:\n") == 2
    assert "on 12 examples" in card
    assert "in 6 steps" in card
    assert TEMPLATE in card


def test_card_shortens_only_prompts_that_leave_no_room_for_an_answer(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "gpt2", "gpt2")  # 128 learned positions, which cannot be extended
    prompt = TEMPLATE.partition("{title}")[0]
    document_length = 128 - len(prompt.replace("{document}", "")) - len("a title") - 1
    rows = [{"document": "a" * document_length, "title": "a title"}, {"document": "b", "title": "b"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = trained(tmp_path / "out", base, data, card_rows=2)
    assert (done.steps[0]["tokens"], done.err) == (128 + 128 - document_length + 1 - len("a title") + 1, "")
    card = (done.folder / "README.md").read_text()
    shown = [len(match) for match in re.findall(r"\n(a+|b)\n(?=```\n\nreference:)", card.lower())]
    assert shown == [document_length, 1]
    first, second = card.partition("### Row 1")[2].split("### Row 2")
    assert "asked with a shortened text" in first and "shortened text" not in second


def test_examples_longer_than_the_model_has_positions_are_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "gpt2", "gpt2")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"document": "a" * 200, "title": "b"}])
    length = len(TEMPLATE.format(document="a" * 200, title="b")) + 1
    refused = sft(tmp_path / "out", base, data)
    what = f"the longest example has {length} tokens, but the model only 128 positions"
    assert (refused.status, refused.err) == (2, f"yeonma: cutoff_len: {what}; use --cutoff_len 128\n")
    assert trained(tmp_path / "out", base, data, cutoff_len=128).steps[0]["tokens"] == 128


def test_console_has_one_line_per_step_and_no_library_output(done: Done, base: Path, data: Path) -> None:
    patterns = [
        re.escape(f"{data}: 17 rows, 17 examples, ") + r"[\d,]+ tokens, \d+ of them trained",
        "warning: only 12 examples to train on: .*",
        r"forecast: needs [\d.]+ [MG]B of [\d.]+ [MG]B on cpu: fits(; .*)?",
        re.escape(f"{base}: ") + "3,712 parameters trained, 21,728 frozen, torch.float32 on cpu",
        "adapter on attention 2/2, MLP 2/2",
        r"kernels: RMSNorm 5/5, SwiGLU 2/2, rotary 2/2, LoRA (\d+)/\1, .*last layer 1/1, attention cpu_cascade",
        *(["step 0/6 .* validation loss .*"]),
        *([r"step \d/6  epoch .*  loss .*  lr .* tokens/s .* left .*"] * 3),
        *(["step 3/6 .* validation loss .*"]),
        *([r"step \d/6  epoch .*  loss .*  lr .* tokens/s .* left .*"] * 3),
        *(["step 6/6 .* validation loss .*"]),
        r"answering the card's rows with base and adapter: 0 of 4(, \d+s left)?",
        r"the trained model keeps [\d.]+% of the tokens that the base itself answers to 12 general prompts .*",
        r"General questions \(English, Korean\): the base answers them by chance, .*",
        r"took \S+s(: .*)?",
        re.escape(f"Adapter saved to {done.folder}"),
    ]
    lines = [line for line in done.out.splitlines() if not line.startswith("tokenised ")]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert done.err == ""


def test_template_is_chosen_by_the_columns_if_none_is_given(tmp_path: Path, base: Path, data: Path) -> None:
    chosen = trained(tmp_path / "out", base, data, template=None, max_steps=1)
    assert 'template "title"' in chosen.out or "title" in chosen.out.splitlines()[0]
    assert (chosen.folder / "template.txt").read_text().rstrip().endswith("{title}")


# Refusals, which change no files


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if weights are read."""

    def load(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(run.load, "load_base", load)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "checkpoint-7/x",
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_output_folder_with_files_that_a_run_would_replace_is_refused(
    tmp_path: Path, base: Path, data: Path, name: str
) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    refused = sft(tmp_path / "mine", base, data)
    cure = "give another folder, or --overwrite true"
    what = f"it holds files that are not from a run ({name.partition('/')[0]})"
    assert (refused.status, refused.err) == (2, f"yeonma: output_dir {tmp_path / 'mine'}: {what}; {cure}\n")
    assert everything_in(tmp_path / "mine") == {name: b"mine"}


def test_unrelated_files_in_the_output_folder_are_kept(tmp_path: Path, base: Path, data: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    trained(tmp_path / "out", base, data, max_steps=1)
    trained(tmp_path / "out", base, data, max_steps=2, overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_weights")
def test_base_model_folder_is_refused_as_output_even_by_another_path(
    tmp_path: Path, base: Path, data: Path
) -> None:
    before = everything_in(base)
    (tmp_path / "link").symlink_to(base)
    for output in (base, tmp_path / "link", base / "x" / ".."):
        refused = sft(output, base, data, overwrite=True)
        assert refused.status == 2
        assert "it is the folder of the base model; give another folder" in refused.err
    assert everything_in(base) == before


@pytest.mark.usefixtures("no_weights")
def test_folder_of_the_continued_adapter_is_refused_as_output(base: Path, data: Path, done: Done) -> None:
    before = everything_in(done.folder)
    for settings in ({"adapter": done.folder}, {"base_model": done.folder}):
        refused = sft(done.folder, base, data, overwrite=True, **settings)
        assert refused.status == 2
        assert "it is the folder of the adapter to continue; give another folder" in refused.err
    assert everything_in(done.folder) == before


@pytest.mark.usefixtures("no_weights")
def test_output_path_that_is_or_lies_below_a_file_is_refused(tmp_path: Path, base: Path, data: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused = sft(tmp_path / "file", base, data)
    assert (refused.status, refused.err) == (
        2,
        f"yeonma: output_dir {tmp_path / 'file'}: it is a file; give a folder\n",
    )
    below = sft(tmp_path / "file" / "out", base, data)
    assert below.status == 2
    assert f"{tmp_path / 'file'}: cannot be written" in below.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("no_weights")
def test_unwritable_output_folder_is_refused(tmp_path: Path, base: Path, data: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused = sft(tmp_path / "locked" / "out", base, data)
    assert refused.status == 2
    assert f"{tmp_path / 'locked'}: cannot be written" in refused.err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    "settings",
    [
        {"data_path": "/nowhere.jsonl"},
        {"template": "{documents}\n{title}"},
        {"val_set_size": 17},
        {"cutoff_len": 5},
        {"columns": {"document": "no such column"}},
        {"report_to": "mlflow"},
    ],
)
def test_wrong_settings_are_refused_before_weights_are_loaded(
    tmp_path: Path, base: Path, data: Path, settings: dict[str, object]
) -> None:
    refused = sft(tmp_path / "out", base, data, **settings)
    assert refused.status == 2
    assert refused.err.startswith("yeonma: ")
    assert "Traceback" not in refused.err
    assert not refused.folder.exists()


def test_unknown_lora_target_is_refused_without_changing_files(
    tmp_path: Path, base: Path, data: Path
) -> None:
    first = trained(tmp_path / "out", base, data, max_steps=1)
    before = everything_in(first.folder)
    refused = sft(tmp_path / "out", base, data, lora_target_modules=["gate_prj"], overwrite=True)
    assert refused.status == 2
    assert 'did you mean "gate_proj"?' in refused.err
    assert everything_in(first.folder) == before
    fresh = sft(tmp_path / "fresh", base, data, lora_target_modules=["gate_prj"])
    assert not fresh.folder.exists()


def test_damaged_run_json_is_reported_with_its_path(tmp_path: Path, base: Path, data: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{")
    refused = sft(tmp_path / "out", base, data)
    assert refused.status == 2
    assert f"{tmp_path / 'out' / 'run.json'}: damaged" in refused.err


# Overwriting a run


def test_overwrite_leaves_no_files_of_the_previous_run(tmp_path: Path, base: Path, data: Path) -> None:
    settings = {"max_steps": 2, "save_steps": 1}
    trained(tmp_path / "out", base, data, **{**settings, "max_steps": 4, "val_set_size": 5})
    (tmp_path / "out" / "chat_template.jinja").write_text("of another tokenizer")
    overwritten = trained(tmp_path / "out", base, data, **settings, overwrite=True)
    fresh = trained(tmp_path / "fresh", base, data, **settings)
    assert names_in(overwritten.folder) == names_in(fresh.folder)
    assert overwritten.weight_bytes == fresh.weight_bytes
    assert overwritten.losses == fresh.losses


# Continuing an adapter


def test_continued_adapter_starts_from_its_trained_weights(
    tmp_path: Path, base: Path, data: Path, done: Done
) -> None:
    continued = trained(tmp_path / "on", base, data, adapter=done.folder, val_set_size=5, num_epochs=2)
    assert continued.looks[0]["loss"] == pytest.approx(done.looks[-1]["loss"], abs=1e-6)
    assert continued.looks[-1]["loss"] < done.looks[-1]["loss"]
    assert {name: weight.shape for name, weight in continued.weights.items()} == {
        name: weight.shape for name, weight in done.weights.items()
    }


def test_adapter_given_as_base_model_is_continued(tmp_path: Path, base: Path, data: Path, done: Done) -> None:
    by_adapter = trained(tmp_path / "a", base, data, adapter=done.folder, max_steps=2)
    by_base = trained(tmp_path / "b", base, data, base_model=done.folder, max_steps=2)
    assert by_base.weight_bytes == by_adapter.weight_bytes
    details = json.loads((by_base.folder / "yeonma.json").read_text())
    assert details["base"]["name"] == str(base)


def test_continued_adapter_uses_the_dropout_of_the_settings(
    tmp_path: Path, base: Path, data: Path, done: Done
) -> None:
    plain, dropped = (
        trained(tmp_path / str(rate), base, data, adapter=done.folder, max_steps=2, lora_dropout=rate)
        for rate in (0.0, 0.5)
    )
    assert plain.losses != pytest.approx(dropped.losses, abs=1e-4)
    assert json.loads((dropped.folder / "adapter_config.json").read_text())["lora_dropout"] == 0.5


def test_two_adapters_at_once_are_refused(tmp_path: Path, base: Path, data: Path, done: Done) -> None:
    refused = sft(tmp_path / "out", done.folder, data, adapter=done.folder / "checkpoint-3")
    assert refused.status == 2
    assert f"base_model {done.folder} is an adapter too; give --base_model {base}" in refused.err


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, data: Path, done: Done, base: Path) -> None:
    other = model_folder(tmp_path / "qwen", "qwen3")
    refused = sft(tmp_path / "out", other, data, adapter=done.folder)
    assert refused.status == 2
    assert f"it was trained on {base}, which is not {other}: " in refused.err
    assert refused.err.endswith(f"; use --base_model {base}\n")
    assert not refused.folder.exists()


def test_rerun_is_refused_if_the_continued_adapter_has_changed(
    tmp_path: Path, base: Path, data: Path, done: Done
) -> None:
    first = trained(tmp_path / "first", base, data, max_steps=1)
    settings: dict[str, object] = {"adapter": first.folder, "max_steps": 1}
    trained(tmp_path / "out", base, data, **settings)
    assert "finished" in trained(tmp_path / "out", base, data, **settings).out
    (first.folder / "adapter_model.safetensors").write_bytes(done.weight_bytes)
    refused = sft(tmp_path / "out", base, data, **settings)
    assert refused.status == 2
    assert "the content of the adapter continued has changed" in refused.err

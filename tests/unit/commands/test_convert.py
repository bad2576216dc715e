"""Settings files of other tools. The files here are ours, with keys as those tools document them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yeonma.cli import main
from yeonma.commands.convert import converted
from yeonma.config.axolotl import SAME as AXOLOTL_SAME
from yeonma.config.conversion import Conversion, own_settings
from yeonma.config.foreign_names import (
    IN_OTHER_WORDS,
    NOT_NEEDED,
    RENAMED,
    WITHOUT_COUNTERPART,
    foreign_name_cure,
)
from yeonma.config.llama_factory import SAME as LLAMA_FACTORY_SAME
from yeonma.config.parse import read_config, settings_dict
from yeonma.config.settings import ADAPTER_SETTINGS, TRAINING, RunConfig
from yeonma.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
LLAMA_FACTORY = {
    "model_name_or_path": "some/base",
    "stage": "sft",
    "finetuning_type": "lora",
    "dataset": "letters",
    "output_dir": "out",
}
AXOLOTL = {
    "base_model": "some/base",
    "adapter": "lora",
    "datasets": [{"path": "letters.jsonl", "type": "alpaca"}],
    "output_dir": "out",
    "learning_rate": 1e-4,
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def conversion(content: dict[str, Any], processes: int = 1) -> Conversion:
    Path("theirs.yaml").write_text(json.dumps(content))
    return converted("theirs.yaml", None, processes)


def describe_data(**sets: dict[str, Any]) -> None:
    Path("data").mkdir(exist_ok=True)
    Path("data/dataset_info.json").write_text(json.dumps(sets))


def remarks(run: Conversion) -> dict[str, str]:
    return {remark.key: remark.why for remark in run.different}


def test_every_given_key_is_a_setting_or_has_a_remark() -> None:
    describe_data(letters={"file_name": "letters.json"})
    unknown = {"made_up": 3, "flash_attn": "fa2", "neftune_noise_alpha": 5, "bf16": True, "pref_beta": None}
    run = conversion({**LLAMA_FACTORY, **unknown, "optim": "lion", "seed": 7})
    assert run.settings["dtype"] == "bfloat16" and run.settings["seed"] == 7
    assert remarks(run) == {
        "optim": "there are adamw, adamw_8bit, paged_adamw_8bit",
        "made_up": "not known to yeonma convert: look at what it does",
        "neftune_noise_alpha": "no noise is added to embeddings",
    }
    assert [remark.key for remark in run.not_needed] == ["flash_attn"]
    text = run.text()
    assert "#   made_up: 3  (not known to yeonma convert: look at what it does)\n" in text
    run = conversion({**AXOLOTL, "made_up": 3, "off": False})
    assert "made_up" in remarks(run) and [remark.key for remark in run.not_needed] == ["off"]


def test_defaults_of_the_other_tool_that_differ_are_written_out() -> None:
    describe_data(letters={"file_name": "letters.json"})
    made = conversion(LLAMA_FACTORY).settings
    assert {name: made[name] for name in ("lora_r", "lora_alpha", "learning_rate", "batch_size")} == {
        "lora_r": 8,
        "lora_alpha": 16,
        "learning_rate": 5e-5,
        "batch_size": 8,
    }
    made = conversion({**LLAMA_FACTORY, "lora_rank": 32}).settings
    assert (made["lora_r"], made["lora_alpha"]) == (32, 64)
    made = conversion(AXOLOTL).settings
    assert {name: made[name] for name in ("num_epochs", "cutoff_len", "lr_scheduler", "warmup_ratio")} == {
        "num_epochs": 1,
        "cutoff_len": 512,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
    }


def test_a_step_has_the_examples_of_all_passes_and_processes() -> None:
    batch = {"gradient_accumulation_steps": 4}
    describe_data(letters={"file_name": "letters.json"})
    made = conversion({**LLAMA_FACTORY, **batch, "per_device_train_batch_size": 2}, processes=8).settings
    assert (made["batch_size"], made["micro_batch_size"]) == (64, 2)
    run = conversion({**AXOLOTL, **batch, "micro_batch_size": 2, "sample_packing": True})
    assert run.settings["batch_size"] == 8
    assert "8 packs of up to 512 tokens" in remarks(run)["sample_packing"]


def test_data_sets_are_looked_up_in_dataset_info(place: Path) -> None:
    describe_data(
        letters={"file_name": "letters.json"},
        talks={
            "hf_hub_url": "some/talks",
            "subset": "de",
            "split": "test",
            "formatting": "sharegpt",
            "columns": {"messages": "dialog", "system": "rules", "images": "photos"},
            "tags": {"role_tag": "speaker", "content_tag": "content", "user_tag": "user"},
        },
        pairs={
            "file_name": "p.json",
            "ranking": True,
            "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        },
    )
    made = conversion(LLAMA_FACTORY).settings
    assert made["data_path"] == "data/letters.json" and made["template"] == "alpaca-turns"
    run = conversion({**LLAMA_FACTORY, "dataset": "letters, talks"})
    assert run.settings["data_path"] == [
        {"path": "data/letters.json", "template": "alpaca-turns"},
        {
            "path": "some/talks:de",
            "split": "test",
            "template": "chat",
            "columns": {"messages": "dialog", "system": "rules"},
        },
    ]
    whys = [remark.why for remark in run.different if remark.key == "dataset"]
    assert any("speaker" in why for why in whys) and any("images" in why for why in whys)
    run = conversion(
        {**LLAMA_FACTORY, "stage": "dpo", "dataset": "pairs", "pref_loss": "simpo", "simpo_gamma": 0.7}
    )
    assert run.verb == "dpo" and run.settings["loss"] == "simpo" and run.settings["simpo_gamma"] == 0.7
    assert run.settings["columns"] == {"instruction": "ask", "chosen": "good", "rejected": "bad"}
    run = conversion({**LLAMA_FACTORY, "dataset": "letters,nosuch"})
    assert remarks(run)["dataset"].startswith("nosuch: not in data/dataset_info.json")
    assert "# data_path: still to be written\n" in run.text()
    (place / "data" / "dataset_info.json").write_text("[1")
    with pytest.raises(UserError, match=r"dataset_info\.json: cannot be read"):
        conversion(LLAMA_FACTORY)


def test_shares_of_data_sets_are_weights() -> None:
    describe_data(one={"file_name": "1.json"}, two={"file_name": "2.json"})
    both = {
        **LLAMA_FACTORY,
        "dataset": "one,two",
        "mix_strategy": "interleave_under",
        "interleave_probs": "0.7,0.3",
    }
    assert [entry["weight"] for entry in conversion(both).settings["data_path"]] == [0.7, 0.3]


def test_axolotls_data_sets_are_entries() -> None:
    chats = {"path": "c.jsonl", "type": "chat_template", "field_messages": "talk", "roles_to_train": ["user"]}
    texts = {"path": "some/texts", "name": "ko", "split": "train[:10]", "type": "completion", "field": "body"}
    run = conversion({**AXOLOTL, "datasets": [*AXOLOTL["datasets"], chats, texts]})
    assert run.settings["data_path"] == [
        {"path": "letters.jsonl", "template": "alpaca"},
        {"path": "c.jsonl", "template": "chat", "columns": {"messages": "talk"}},
        {"path": "some/texts:ko", "split": "train[:10]", "template": "text", "columns": {"text": "body"}},
    ]
    assert "no counterpart for roles_to_train" in remarks(run)["datasets"]


@pytest.mark.parametrize(
    ("loss", "kind", "template", "columns"),  # template: or the fields of its turns
    [
        ("kto", "llama3.ultra", ("prompt", "completion"), None),
        ("kto", "chatml.argilla", ("instruction", "completion"), None),
        ("kto", "chatml.argilla_chat", "chat", {"messages": "completion"}),
        ("dpo", "chatml.intel", ("question", "answer"), None),
        ("orpo", "llama3.icr", ("input", "answer"), None),
        ("dpo", "chatml.ultra", "chat", None),
        ("dpo", "chat_template.default", "chat", None),
        ("kto", "chatml.made_up", None, None),
        ("dpo", "zephyr.nectar", None, None),
    ],
)
def test_preference_rows_of_axolotl_have_the_columns_of_their_type(
    loss: str, kind: str, template: str | tuple[str, str] | None, columns: dict[str, str] | None
) -> None:
    if isinstance(template, tuple):
        turns = "[user]\n{{{}}}\n[assistant]\n{{{}}}\n".format(*template)
        template = f"[system]\n{{system}}\n{turns}---\n{turns}"
    run = conversion({**AXOLOTL, "rl": loss, "datasets": [{"path": "p.jsonl", "type": kind}]})
    assert (run.settings.get("template"), run.settings.get("columns")) == (template, columns)
    assert ("datasets" in remarks(run)) == (template is None)


def test_texts_of_pretraining_are_whole_texts() -> None:
    texts = {"path": "some/texts", "name": "en", "type": "pretrain", "text_column": "body"}
    given = {key: value for key, value in AXOLOTL.items() if key != "datasets"}
    made = conversion({**given, "pretraining_dataset": [texts], "max_steps": 5}).settings
    assert (made["data_path"], made["template"], made["columns"]) == (
        "some/texts:en",
        "text",
        {"text": "body"},
    )
    assert conversion({**given, "pretraining_dataset": "some/texts"}).settings["data_path"] == "some/texts"


def test_the_last_weights_are_kept_unless_the_file_asks_for_the_best() -> None:
    describe_data(letters={"file_name": "letters.json"})
    held_out = {"val_size": 0.1, "val_set_size": 0.1}
    for theirs in (LLAMA_FACTORY, AXOLOTL):
        assert "keep_best" not in conversion(theirs).settings  # no validation rows to choose by
        run = conversion({**theirs, **held_out})
        assert run.settings["keep_best"] is False and "keep_best: false  # the last weights" in run.text()
        assert "keep_best" not in conversion({**theirs, **held_out, "load_best_model_at_end": True}).settings
    stops = {**AXOLOTL, **held_out, "early_stopping_patience": 3}
    assert "keep_best" not in conversion(stops).settings


def test_one_set_of_test_rows_is_the_validation_data() -> None:
    rows = {"path": "held.jsonl", "type": "alpaca", "split": "test"}
    made = conversion({**AXOLOTL, "test_datasets": [rows]}).settings
    assert (made["val_data_path"], made["val_split"], made["keep_best"]) == ("held.jsonl", "test", False)
    for others in ([rows, rows], [{**rows, "type": "completion"}]):
        run = conversion({**AXOLOTL, "test_datasets": others})
        assert "val_data_path" not in run.settings and "test_datasets" in remarks(run)


def test_what_only_saves_time_or_memory_needs_no_setting() -> None:
    plugins = ["axolotl.integrations.liger.LigerPlugin"]
    faster = {"plugins": plugins, "liger_rope": True, "torch_compile": True, "activation_offloading": True}
    run = conversion({**AXOLOTL, **faster})
    assert {remark.key for remark in run.not_needed} == set(faster) and not set(faster) & set(remarks(run))
    run = conversion(
        {**AXOLOTL, "plugins": [*plugins, "axolotl.integrations.made_up.Plugin"], "qat": {"a": 1}}
    )
    assert {"plugins", "qat"} <= set(remarks(run))


def test_names_of_a_setting_are_taken_with_their_meaning() -> None:
    describe_data(letters={"file_name": "letters.json"})
    assert conversion({**AXOLOTL, "rl": "orpo", "orpo_alpha": 0.3}).settings["beta"] == 0.3
    assert conversion({**AXOLOTL, "rl": "orpo", "orpo_alpha": 0.3, "rl_beta": 0.2}).settings["beta"] == 0.2
    made = conversion({**LLAMA_FACTORY, "use_dft_loss": True, "cutoff_len": 100})
    assert made.settings["token_loss"] == "dft" and made.settings["cutoff_len"] == 100
    assert "here a prompt field is shortened" in remarks(made)["cutoff_len"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**LLAMA_FACTORY, "stage": "ppo"}, "theirs.yaml:1: stage: ppo is not among the trainings here"),
        ({**LLAMA_FACTORY, "finetuning_type": "oft"}, "finetuning_type: oft is not among the methods here"),
        ({**LLAMA_FACTORY, "stage": "dpo", "pref_loss": "kto_pair"}, "pref_loss: kto_pair is not among"),
        ({**AXOLOTL, "diffusion": {"eps": 1}}, "diffusion: diffusion models are not trained here"),
        (
            {**AXOLOTL, "plugins": ["axolotl.integrations.diffusion.DiffusionPlugin"]},
            "plugins: diffusion models are not trained here",
        ),
        ({**AXOLOTL, "rl": "grpo"}, "rl: grpo is not among the trainings here"),
        ({**AXOLOTL, "adapter": "llama-adapter"}, "adapter: llama-adapter is not among the methods here"),
        ({**AXOLOTL, "datasets": "letters"}, "datasets: not a list of data sets"),
        ({**AXOLOTL, "weight_decay": -1}, "theirs.yaml: weight_decay: -1 is out of range"),
        ({"learning_rate": 1}, "theirs.yaml: neither LLaMA-Factory's nor Axolotl's"),
    ],
)
def test_what_no_run_stands_for_is_refused(content: dict[str, Any], message: str) -> None:
    describe_data(letters={"file_name": "letters.json"})
    with pytest.raises(UserError) as caught:
        conversion(content)
    assert message in str(caught.value)


def test_the_written_file_is_read_back_equal(capsys: pytest.CaptureFixture[str]) -> None:
    described = {**AXOLOTL, "load_in_4bit": True, "wandb_project": "a\nb", "hub_model_id": "x\x1b[2J"}
    Path("theirs.yaml").write_text(json.dumps(described))
    assert main(["convert", "theirs.yaml", "--output", "ours.yaml"]) == 0
    run = converted("theirs.yaml", None, 1)
    parsed = read_config(RunConfig, ["--config", "ours.yaml"], verb="sft", groups=TRAINING).config
    made = settings_dict(parsed)
    assert {name: made[name] for name in run.settings} == run.settings
    assert parsed.model.quantization == "nf4" and parsed.run.report_to == "wandb"
    assert "\x1b" not in Path("ours.yaml").read_text()
    error = capsys.readouterr().err
    assert "theirs.yaml: hub_model_id: not known" in error and error.endswith("may change the result\n")
    assert main(["convert", "theirs.yaml", "--output", "theirs.yaml"]) == 2


@pytest.mark.parametrize("page", ["settings.md", "settings.ko.md"])
def test_the_example_of_the_docs(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    theirs, ours = re.findall(r"`(?:theirs|run)\.yaml`:\n\n```yaml\n(.*?)```", text, re.DOTALL)
    describe_data(letters={"file_name": "letters.json"})
    Path("theirs.yaml").write_text(theirs)
    # In a process of its own, because some texts are chosen when they are imported.
    environment = {
        **os.environ,
        "YEONMA_LANG": "ko" if page.endswith(".ko.md") else "en",
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-m", "yeonma", "convert", "theirs.yaml", "--output", "run.yaml"]
    assert subprocess.run(words, env=environment).returncode == 0
    assert Path("run.yaml").read_text(encoding="utf-8") == ours


def test_a_continued_adapter_keeps_its_own_shape() -> None:
    run = conversion({**AXOLOTL, "lora_model_dir": "earlier", "lora_r": 4})
    assert run.settings["adapter"] == "earlier" and "lora_r" not in run.settings


def test_full_fine_tuning_has_no_shape_of_an_adapter() -> None:
    describe_data(letters={"file_name": "letters.json"})
    for theirs in ({**LLAMA_FACTORY, "finetuning_type": "full"}, {**AXOLOTL, "adapter": None}):
        made = conversion(theirs).settings
        assert made["train"] == "full" and not ADAPTER_SETTINGS & set(made)


def test_a_share_of_the_steps_may_stand_for_warmup_steps() -> None:
    assert conversion({**AXOLOTL, "warmup_steps": 0.1}).settings["warmup_ratio"] == 0.1
    assert conversion({**AXOLOTL, "warmup_steps": 10}).settings["warmup_steps"] == 10


def test_parts_beside_the_adapter() -> None:
    describe_data(letters={"file_name": "letters.json"})
    beside = {"additional_target": "norm,lm_head", "add_tokens": "<a>, <b>", "loraplus_lr_ratio": 16}
    made = conversion({**LLAMA_FACTORY, **beside}).settings
    assert (made["modules_to_save"], made["new_tokens"]) == (["norm", "lm_head"], ["<a>", "<b>"])
    assert made["loraplus_ratio"] == 16
    made = conversion(
        {**AXOLOTL, "lora_modules_to_save": ["lm_head"], "peft_layers_to_transform": [0, 2]}
    ).settings
    assert (made["modules_to_save"], made["lora_layers"]) == (["lm_head"], "0,2")


def test_tables_of_names_agree_with_our_settings() -> None:
    ours = own_settings("dpo")
    assert set(RENAMED.values()) <= set(ours)
    assert set(LLAMA_FACTORY_SAME) <= set(ours) and set(AXOLOTL_SAME) <= set(ours)
    tables = [set(RENAMED), set(IN_OTHER_WORDS), set(NOT_NEEDED), set(WITHOUT_COUNTERPART)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert not set().union(*tables) & set(ours)


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--lr", "1e-4"], "--lr: unknown setting; here it is --learning_rate"),
        (["--per-device-train-batch-size", "2"], "batch_size is all examples of a step"),
        (["--flash_attn", "fa2"], "leave it out: chosen when the model is loaded"),
        (["--pref_beta", "1"], "--pref_beta: unknown setting; see yeonma sft --help"),
        (["--lerning_rate", "1"], 'did you mean "learning_rate"?'),
    ],
)
def test_names_of_other_tools_are_explained(
    arguments: list[str], cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", *arguments]) == 2
    assert cure in capsys.readouterr().err


def test_names_of_other_tools_are_explained_in_files() -> None:
    Path("run.yaml").write_text("seed: 1\nnum_train_epochs: 2\n")
    with pytest.raises(
        UserError, match=r"run\.yaml:2: unknown setting num_train_epochs; here it is num_epochs"
    ):
        read_config(RunConfig, ["--config", "run.yaml"], verb="sft", groups=TRAINING)
    assert foreign_name_cure("pref_beta", own_settings("dpo"), "--{}") == "here it is --beta"

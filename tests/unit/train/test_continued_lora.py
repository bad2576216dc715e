"""LoRA settings beside an adapter to continue: its own are used, others refused, the records say what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from tests.models import tiny_model
from tests.pairs import dpo, pairs, tuned
from tests.runs import articles, command, model_folder, sft, trained, write_jsonl
from yeonma.adapter.adapter_folder import read_adapter_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", articles(8))


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs(8))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    """An adapter of rank 2 with rsLoRA and dropout on two of the layers."""
    output = tmp_path_factory.mktemp("first") / "first"
    names = "[q_proj, v_proj]"
    shape = {"lora_r": 2, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1}
    return trained(output, base, data, max_steps=1, lora_target_modules=names, **shape).folder


OWN = {
    "lora_r": 2,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "v_proj"],
    "use_rslora": True,
    "use_dora": False,
}


def continued(output: Path, base: Path, data: Path, first: Path, *more: str) -> tuple[int, str, str]:
    words = ["--base_model", str(base), "--data_path", str(data), "--output_dir", str(output)]
    words += ["--adapter", str(first), "--max_steps", "2", "--card_rows", "1", "--batch_size", "4"]
    done = command(output, "dpo", *words, "--template", "{prompt}{chosen}", *more)
    return done.status, done.out, done.err


def test_settings_that_differ_from_the_adapters_are_refused_by_name(
    tmp_path: Path, base: Path, preferences: Path, first: Path
) -> None:
    status, _, error = continued(
        tmp_path / "out",
        base,
        preferences,
        first,
        *("--lora_r", "4", "--lora_alpha", "99", "--lora_target_modules", "[q_proj]"),
        *("--use_rslora", "false", "--use_dora", "true"),
    )
    assert status == 2
    expected = [
        f"lora_r: it is 4, but {first} has 2",
        f"lora_alpha: it is 99, but {first} has 6",
        f"lora_target_modules: it is [q_proj], but {first} has [q_proj, v_proj]",
        f"use_rslora: it is false, but {first} has true",
        f"use_dora: it is true, but {first} has false",
    ]
    lines = error.splitlines()
    assert [line.partition("; leave it out")[0] for line in lines] == [f"yeonma: {one}" for one in expected]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", ["all-linear", "[q_proj, v_proj, o_proj]"])
def test_names_that_reach_more_than_the_adapter_has_are_refused(
    tmp_path: Path, base: Path, preferences: Path, first: Path, names: str
) -> None:
    status, _, error = continued(tmp_path / "out", base, preferences, first, "--lora_target_modules", names)
    assert status == 2
    assert (
        f"lora_target_modules: it reaches other layers than the adapter in {first} has (attention 2/2"
        in error
    )


@pytest.mark.parametrize("given", [(), ("--lora_r", "2", "--lora_target_modules", "[v_proj, q_proj]")])
def test_records_say_what_is_trained_and_the_written_settings_continue_the_run(
    tmp_path: Path, base: Path, preferences: Path, first: Path, given: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    status, out, error = continued(output, base, preferences, first, *given)
    assert status == 0, error
    assert "adapter on attention 2/2 (q_proj, v_proj; not k_proj, o_proj), MLP 0/2" in out
    written = yaml.safe_load((output / "settings.yaml").read_text())
    identity = json.loads((output / "run.json").read_text())["identity"]
    for name, value in OWN.items():
        for record in (written, identity):
            kept = record[name]
            assert (sorted(kept) if isinstance(kept, list) else kept) == value, name
    assert (
        "Rank 2, alpha 6, rsLoRA, dropout 0.1. The adapter is on attention"
        in (output / "README.md").read_text()
    )
    lora = read_adapter_folder(output).details["lora"]
    assert (lora["r"], lora["alpha"], lora["use_rslora"]) == (2, 6, True)
    again = command(output, "dpo", "--config", str(output / "settings.yaml"))
    assert again.status == 0, again.err
    assert "which is finished" in again.out
    changed = command(output, "dpo", "--config", str(output / "settings.yaml"), "--lora_r", "16")
    assert changed.status == 2
    assert f"lora_r: it is 16, but {first} has 2" in changed.err


def test_layers_by_choice_are_those_of_the_adapter(tmp_path: Path, base: Path, data: Path) -> None:
    chosen: dict[str, object] = {"lora_layers": 1, "exclude_modules": ["mlp"]}
    first = trained(tmp_path / "first", base, data, max_steps=1, **chosen)
    assert "adapter on attention 1/2, MLP 0/2" in first.out
    for number, given in enumerate([{}, chosen, {"lora_layers": [1]}, {"lora_layers": "1-"}]):
        done = trained(tmp_path / f"next{number}", base, data, max_steps=1, adapter=first.folder, **given)
        assert "adapter on attention 1/2, MLP 0/2" in done.out
        written = yaml.safe_load((done.folder / "settings.yaml").read_text())
        assert {name: written[name] for name in chosen} == {**chosen, **given}
    for name, value in {"lora_layers": "0-1", "exclude_modules": "[o_proj]"}.items():
        done = sft(tmp_path / "other", base, data, max_steps=1, adapter=first.folder, **{name: value})
        assert done.status == 2
        assert f"{name}: it reaches other layers than the adapter in {first.folder} has" in done.err


def test_dropout_may_be_changed_and_is_what_the_records_say(
    tmp_path: Path, base: Path, preferences: Path, first: Path
) -> None:
    output = tmp_path / "out"
    status, _, error = continued(output, base, preferences, first, "--lora_dropout", "0")
    assert status == 0, error
    assert yaml.safe_load((output / "settings.yaml").read_text())["lora_dropout"] == 0
    assert json.loads((output / "adapter_config.json").read_text())["lora_dropout"] == 0


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*\.(q_proj|down_proj)"])
def test_adapter_of_plain_peft_gives_its_settings_too(
    tmp_path: Path, base: Path, data: Path, targets: list[str] | str
) -> None:
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    )
    model.save_pretrained(str(tmp_path / "plain"), save_embedding_layers=False)
    output = tmp_path / "out"
    refused = sft(output, base, data, adapter=tmp_path / "plain", max_steps=1)  # with rank 4 and alpha 8
    assert refused.status == 2
    assert f"lora_r: it is 4, but {tmp_path / 'plain'} has 3" in refused.err
    assert f"lora_alpha: it is 8, but {tmp_path / 'plain'} has 5" in refused.err
    done = trained(output, base, data, adapter=tmp_path / "plain", max_steps=1, lora_r=3, lora_alpha=5)
    assert "adapter on attention 2/2 (q_proj; not k_proj, v_proj, o_proj), MLP 2/2 (down_proj;" in done.out
    written = yaml.safe_load((output / "settings.yaml").read_text())
    kept = written["lora_target_modules"]
    assert kept == targets or sorted(kept) == sorted(targets)
    again = command(output, "sft", "--config", str(output / "settings.yaml"))
    assert again.status == 0, again.err


def test_adapter_folder_that_peft_could_not_read_is_an_error(
    tmp_path: Path, base: Path, preferences: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"r": "many"}')
    done = dpo(tmp_path / "out", base, preferences, adapter=tmp_path / "broken")
    assert done.status == 2
    assert "adapter_config.json: it has no peft_type" in done.err


def test_preference_training_uses_the_adapters_rank(
    tmp_path: Path, base: Path, preferences: Path, first: Path
) -> None:
    done = tuned(
        tmp_path / "out", base, preferences, adapter=first, max_steps=1, lora_r=2, lora_alpha=6,
        template="{prompt}{chosen}",
    )  # fmt: skip
    assert json.loads((done.folder / "adapter_config.json").read_text())["r"] == 2

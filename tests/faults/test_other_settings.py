"""Repeats a command with each setting changed: refused if the result would differ, otherwise accepted.

A setting that is missing from the list fails the test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from tests.faults.conftest import everything_in
from tests.pairs import dpo, labelled, pairs
from tests.runs import Done, articles, model_folder, sft, write_jsonl
from yeonma.cli import VERBS
from yeonma.config.settings import TRAINING

RUN: dict[str, object] = {"val_set_size": 5, "lr_scheduler": "cosine_with_restarts"}
OTHER = "OTHER"
"""Stands for a base, rows, a folder and so on beside those of the run."""


@dataclass(frozen=True)
class Change:
    """Changed settings and part of the expected error, or None if they are accepted."""

    settings: Mapping[str, object]
    message: str | None
    loss: str = "sigmoid"  # the loss of the `dpo` run that reads the setting


def refused(name: str, value: object, message: str | None = None, **more: object) -> tuple[str, Change]:
    return name, Change({name: value, **more}, f"{name} was " if message is None else message)


def accepted(name: str, value: object) -> tuple[str, Change]:
    return name, Change({name: value}, None)


CHANGES: dict[str, Change] = dict(
    [
        # DataSettings
        refused("data_path", OTHER, "the content of data_path has changed"),
        accepted("data_split", "test"),  # has no effect on a local file
        accepted("data_revision", "x"),
        refused("encoding", "ascii", "the content of data_path has changed"),
        refused("delimiter", ";", "the content of data_path has changed"),
        refused("columns", OTHER),
        refused("template", OTHER, "the content of the template has changed"),
        refused("val_set_size", 4),
        refused("val_data_path", OTHER, "the content of the validation rows has changed", val_set_size=0),
        refused("val_split", "train[:5]", "the content of the validation rows has changed", val_set_size=0),
        refused("max_rows", 30, "the content of data_path has changed"),
        accepted("bad_rows", "skip"),  # there are none
        refused("replay", OTHER, "the content of data_path has changed"),
        ("replay_share", Change({"replay": OTHER, "replay_share": 0.5}, "share of data set 2 was ")),
        # TokenSettings
        refused("cutoff_len", 300),
        refused("shrink", OTHER),
        refused("shrink_side", "start"),
        refused("over_limit", "error"),
        refused("train_on_inputs", True, "train_on_inputs"),
        refused("add_eos_token", False),
        refused("train_on", "last"),
        refused("row_weights", "short", "row_weights"),
        refused("thinking", "drop"),
        refused("chat_template_kwargs", {"enable_thinking": False}),
        refused("parse_special_tokens", True),
        accepted("cache_dir", OTHER),
        # ModelSettings
        refused("base_model", OTHER),
        accepted("model_revision", "x"),  # of a folder, whose content is the same
        refused("adapter", OTHER, "the content of the adapter continued has changed"),
        accepted("trust_remote_code", True),
        refused("train", "full", lora_r=None, lora_alpha=None),
        refused("dtype", "float32"),
        refused("quantization", "fp8"),
        accepted("device", "cpu"),
        accepted("gradient_checkpointing", True),
        accepted("torch_compile", False),
        accepted("shard", True),
        # LoraSettings
        refused("lora_r", 8),
        refused("lora_alpha", 9),
        refused("lora_dropout", 0.1),
        refused("lora_target_modules", ["q_proj"]),
        refused("lora_experts", False),
        refused("lora_layers", "0"),
        refused("exclude_modules", ["down_proj"]),
        refused("new_tokens", ["<new>"]),
        refused("modules_to_save", ["norm"]),
        refused("use_rslora", True),
        refused("use_dora", True),
        # StepSettings
        refused("batch_size", 5),
        accepted("micro_batch_size", 3),
        accepted("micro_batch_tokens", 100),
        accepted("share_prefix", False),
        refused("num_epochs", 2, "steps was "),
        refused("max_steps", 2, "steps was "),
        refused("learning_rate", 1e-3),
        refused("token_loss", "dft", "token_loss"),
        refused("optimizer", "adamw_8bit", "optimizer adamw_8bit: "),  # it needs CUDA; see the last test
        refused("loraplus_ratio", 16),
        refused("lr_scheduler", "linear"),
        refused("lr_scheduler_kwargs", {"num_cycles": 2}),
        refused("warmup_steps", 2),
        refused("warmup_ratio", 0.5),
        refused("weight_decay", 0.1),
        refused("adam_beta1", 0.8),
        refused("adam_beta2", 0.99),
        refused("adam_epsilon", 1e-6),
        refused("max_grad_norm", 0.5),
        refused("group_by_length", True),
        refused("seed", 7),
        # PreferenceSettings
        refused("loss", "hinge"),
        refused("beta", 0.2),
        refused("label_smoothing", 0.1),
        refused("sft_weight", 0.5),
        refused("f_divergence", "js"),
        ("f_alpha", Change({"f_divergence": "alpha", "f_alpha": 0.7}, "f_alpha was ")),
        refused("wpo_weights", True),
        ("discopop_tau", Change({"discopop_tau": 0.5}, "discopop_tau was ", "discopop")),
        ("simpo_gamma", Change({"simpo_gamma": 0.7}, "simpo_gamma was ", "simpo")),
        ("kto_desirable_weight", Change({"kto_desirable_weight": 1.5}, "kto_desirable_weight was ", "kto")),
        (
            "kto_undesirable_weight",
            Change({"kto_undesirable_weight": 1.5}, "kto_undesirable_weight was ", "kto"),
        ),
        # EvaluationSettings
        refused("eval_steps", 2),
        refused("keep_best", False),
        refused("answer_metrics", "exact"),
        ("answer_rows", Change({"answer_metrics": "exact", "answer_rows": 3}, "answer_rows was ")),
        refused("early_stopping_patience", 2),
        refused("early_stopping_threshold", 0.1),
        accepted("card_rows", 2),
        accepted("general_questions", 6),
        # RunSettings
        accepted("save_steps", 2),
        accepted("save_total_limit", 2),
        accepted("logging_steps", 2),
        accepted("report_to", "tensorboard"),
        accepted("run_name", "x"),
        accepted("time_limit", "9h"),
    ]
)
NEW_RUN: dict[str, object] = {"output_dir": OTHER, "overwrite": True, "resume_from_checkpoint": "none"}
"""What says that the run is to be done anew, or elsewhere."""
PROCESSES = "nproc"
"""tests/slow/test_processes.py goes on with other numbers of processes."""


PREFERENCE = VERBS["dpo"].groups


def names_of(groups: tuple[type, ...]) -> list[str]:
    return [field.name for group in groups for field in fields(group)]


def test_every_setting_is_listed_once() -> None:
    assert sorted([*CHANGES, *NEW_RUN, PROCESSES]) == sorted(names_of(PREFERENCE))
    assert set(names_of(TRAINING)) < set(names_of(PREFERENCE))


class FinishedRuns:
    """Finished runs, one for each verb and loss. `rerun` repeats their commands with changed settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, model_folder(folder / "model")
        self.finished: dict[str, Done] = {}
        rows = {
            "sft": articles(17),
            "sigmoid": pairs(17),
            "simpo": pairs(17),
            "discopop": pairs(17),
            "kto": labelled(17),
        }
        self.rows = {
            name: write_jsonl(
                folder / f"{name}.jsonl", [{**row, "short": f"{i}"} for i, row in enumerate(values)]
            )
            for name, values in rows.items()
        }
        self.others: dict[str, dict[str, object]] = {
            "sft": {
                "data_path": write_jsonl(folder / "other.jsonl", articles(17, seed=1)),
                "columns": {"title": "short"},
                "template": "{document}\n{title}",
                "shrink": "document",
            },
            "dpo": {
                "data_path": write_jsonl(folder / "other-pairs.jsonl", pairs(17, seed=1)),
                "columns": {"chosen": "short"},
                "template": "write. {prompt}{completion}",
                "shrink": "prompt",
            },
        }
        base = model_folder(folder / "other-model", seed=1)
        for verb, values in self.others.items():
            values |= {
                "val_data_path": values["data_path"],
                "replay": {"path": str(values["data_path"]), "template": values["template"]},
                "base_model": base,
                "cache_dir": folder / "cache",
            }
            output = folder / f"adapter-{verb}"
            run = (sft if verb == "sft" else dpo)(output, self.base, self.rows[LOSSES[verb]], max_steps=1)
            assert run.status == 0, run.err
            values |= {"adapter": output, "output_dir": folder / f"elsewhere-{verb}"}

    def rerun(self, verb: str, kind: str, **changed: object) -> Done:
        """Runs the command of a finished run with changed settings. `kind` is 'sft' or the loss of `dpo`."""
        settings = {
            name: self.others[verb][name] if value is OTHER else value for name, value in changed.items()
        }
        fixed = {"output_dir": self.folder / f"out-{kind}", "base": self.base, "data": self.rows[kind]}
        output = Path(str(settings.pop("output_dir", fixed["output_dir"])))
        base = Path(str(settings.pop("base_model", fixed["base"])))
        data = Path(str(settings.pop("data_path", fixed["data"])))
        keywords = {**RUN, **({} if verb == "sft" else {"loss": kind}), **settings}
        return (sft if verb == "sft" else dpo)(output, base, data, **keywords)

    def finished_run(self, verb: str, loss: str) -> Done:
        if loss not in self.finished:
            self.finished[loss] = self.rerun(verb, loss)
            assert self.finished[loss].status == 0, self.finished[loss].err
        return self.finished[loss]


LOSSES = {"sft": "sft", "dpo": "sigmoid"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> FinishedRuns:
    return FinishedRuns(tmp_path_factory.mktemp("settings"))


def cases() -> list[tuple[str, str]]:
    return [
        (verb, name)
        for verb, groups in (("sft", TRAINING), ("dpo", PREFERENCE))
        for name in names_of(groups)
        if name in CHANGES
    ]


@pytest.mark.parametrize(("verb", "name"), cases())
def test_fault_46_only_settings_that_change_the_result_are_refused(
    runs: FinishedRuns, verb: str, name: str
) -> None:
    change = CHANGES[name]
    loss = change.loss if verb == "dpo" else "sft"
    finished = runs.finished_run(verb, loss)
    before = everything_in(finished.folder)
    done = runs.rerun(verb, loss, **change.settings)
    if change.message is None:
        assert (done.status, done.err) == (0, "")
        assert f"{finished.folder} holds this run, which is finished" in done.out
    else:
        assert done.status == 2, done.out
        assert change.message in done.err
    assert everything_in(finished.folder) == before


@pytest.mark.parametrize("verb", LOSSES)
@pytest.mark.parametrize("name", NEW_RUN)
def test_overwrite_resume_none_or_another_output_dir_trains_again(
    runs: FinishedRuns, verb: str, name: str
) -> None:
    finished = runs.finished_run(verb, LOSSES[verb])
    done = runs.rerun(verb, LOSSES[verb], **{name: NEW_RUN[name]})
    assert (done.status, done.err) == (0, "")
    assert "finished; --overwrite" not in done.out and "continuing" not in done.out
    assert done.weight_bytes == finished.weight_bytes


def test_identity_of_a_run_contains_the_optimizer(runs: FinishedRuns) -> None:
    for verb, loss in LOSSES.items():
        run = json.loads((runs.finished_run(verb, loss).folder / "run.json").read_text())
        assert run["identity"]["optimizer"] == "adamw"

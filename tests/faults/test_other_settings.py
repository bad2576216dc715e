"""Repeats a command with every setting changed: refused if the result would differ, else accepted.

A setting that is not in the list fails the test.
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
    """Changed settings and the expected message, or None if they are accepted and the run is the same."""

    settings: Mapping[str, object]
    said: str | None
    loss: str = "sigmoid"  # of `dpo`, whose run reads the setting


def matters(name: str, value: object, said: str | None = None, **more: object) -> tuple[str, Change]:
    return name, Change({name: value, **more}, f"{name} was " if said is None else said)


def harmless(name: str, value: object) -> tuple[str, Change]:
    return name, Change({name: value}, None)


CHANGES: dict[str, Change] = dict(
    [
        # DataSettings
        matters("data_path", OTHER, "the content of data_path has changed"),
        harmless("data_split", "test"),  # of data that has some: other rows are other data
        harmless("data_revision", "x"),
        matters("encoding", "ascii", "the content of data_path has changed"),
        matters("columns", OTHER),
        matters("template", OTHER, "the content of the template has changed"),
        matters("val_set_size", 4),
        matters("val_data_path", OTHER, "the content of the validation rows has changed", val_set_size=0),
        # TokenSettings
        matters("cutoff_len", 300),
        matters("shrink", OTHER),
        matters("shrink_side", "start"),
        matters("over_limit", "error"),
        matters("train_on_inputs", True, "train_on_inputs"),
        matters("add_eos_token", False),
        harmless("cache_dir", OTHER),
        # ModelSettings
        matters("base_model", OTHER),
        matters("model_revision", "x"),
        matters("adapter", OTHER, "the content of the adapter continued has changed"),
        harmless("trust_remote_code", True),
        matters("dtype", "float32"),
        matters("quantization", "fp8"),
        harmless("device", "cpu"),
        harmless("gradient_checkpointing", True),
        harmless("torch_compile", False),
        harmless("shard", True),
        # LoraSettings
        matters("lora_r", 8),
        matters("lora_alpha", 9),
        matters("lora_dropout", 0.1),
        matters("lora_target_modules", ["q_proj"]),
        matters("use_rslora", True),
        matters("use_dora", True),
        # StepSettings
        matters("batch_size", 5),
        harmless("micro_batch_size", 3),
        harmless("micro_batch_tokens", 100),
        harmless("share_prefix", False),
        matters("num_epochs", 2, "steps was "),
        matters("max_steps", 2, "steps was "),
        matters("learning_rate", 1e-3),
        matters("optimizer", "adamw_8bit", "optimizer adamw_8bit: "),  # refused for want of CUDA; see below
        matters("lr_scheduler", "linear"),
        matters("lr_scheduler_kwargs", {"num_cycles": 2}),
        matters("warmup_steps", 2),
        matters("warmup_ratio", 0.5),
        matters("weight_decay", 0.1),
        matters("adam_beta1", 0.8),
        matters("adam_beta2", 0.99),
        matters("adam_epsilon", 1e-6),
        matters("max_grad_norm", 0.5),
        matters("group_by_length", True),
        matters("seed", 7),
        # PreferenceSettings
        matters("loss", "hinge"),
        matters("beta", 0.2),
        matters("label_smoothing", 0.1),
        matters("sft_weight", 0.5),
        ("simpo_gamma", Change({"simpo_gamma": 0.7}, "simpo_gamma was ", "simpo")),
        ("kto_desirable_weight", Change({"kto_desirable_weight": 1.5}, "kto_desirable_weight was ", "kto")),
        (
            "kto_undesirable_weight",
            Change({"kto_undesirable_weight": 1.5}, "kto_undesirable_weight was ", "kto"),
        ),
        # EvaluationSettings
        matters("eval_steps", 2),
        matters("keep_best", False),
        matters("early_stopping_patience", 2),
        matters("early_stopping_threshold", 0.1),
        harmless("card_rows", 2),
        # RunSettings
        harmless("save_steps", 2),
        harmless("save_total_limit", 2),
        harmless("logging_steps", 2),
        harmless("report_to", "tensorboard"),
        harmless("run_name", "x"),
        harmless("time_limit", "9h"),
    ]
)
ANEW: dict[str, object] = {"output_dir": OTHER, "overwrite": True, "resume_from_checkpoint": "none"}
"""What says that the run is to be done anew, or elsewhere."""
PROCESSES = "nproc"
"""tests/slow/test_processes.py goes on with other numbers of processes."""


PREFERENCE = VERBS["dpo"].groups


def names_of(groups: tuple[type, ...]) -> list[str]:
    return [field.name for group in groups for field in fields(group)]


def test_every_setting_is_in_one_of_the_lists() -> None:
    assert sorted([*CHANGES, *ANEW, PROCESSES]) == sorted(names_of(PREFERENCE))
    assert set(names_of(TRAINING)) < set(names_of(PREFERENCE))


class Place:
    """Finished runs, one for each verb and loss, and the same commands with other settings."""

    def __init__(self, place: Path) -> None:
        self.place, self.base = place, model_folder(place / "model")
        self.finished: dict[str, Done] = {}
        rows = {"sft": articles(17), "sigmoid": pairs(17), "simpo": pairs(17), "kto": labelled(17)}
        self.rows = {
            name: write_jsonl(
                place / f"{name}.jsonl", [{**row, "short": f"{i}"} for i, row in enumerate(values)]
            )
            for name, values in rows.items()
        }
        self.others: dict[str, dict[str, object]] = {
            "sft": {
                "data_path": write_jsonl(place / "other.jsonl", articles(17, seed=1)),
                "columns": {"title": "short"},
                "template": "{document}\n{title}",
                "shrink": "document",
            },
            "dpo": {
                "data_path": write_jsonl(place / "other-pairs.jsonl", pairs(17, seed=1)),
                "columns": {"chosen": "short"},
                "template": "write. {prompt}{completion}",
                "shrink": "prompt",
            },
        }
        base = model_folder(place / "other-model", seed=1)
        for verb, values in self.others.items():
            values |= {"val_data_path": values["data_path"], "base_model": base, "cache_dir": place / "cache"}
            output = place / f"adapter-{verb}"
            run = (sft if verb == "sft" else dpo)(output, self.base, self.rows[LOSSES[verb]], max_steps=1)
            assert run.status == 0, run.err
            values |= {"adapter": output, "output_dir": place / f"elsewhere-{verb}"}

    def again(self, verb: str, of: str, **changed: object) -> Done:
        """The command of the finished run with changed settings."""
        settings = {
            name: self.others[verb][name] if value is OTHER else value for name, value in changed.items()
        }
        fixed = {"output_dir": self.place / f"out-{of}", "base": self.base, "data": self.rows[of]}
        output = Path(str(settings.pop("output_dir", fixed["output_dir"])))
        base = Path(str(settings.pop("base_model", fixed["base"])))
        data = Path(str(settings.pop("data_path", fixed["data"])))
        keywords = {**RUN, **({} if verb == "sft" else {"loss": of}), **settings}
        return (sft if verb == "sft" else dpo)(output, base, data, **keywords)

    def done(self, verb: str, loss: str) -> Done:
        if loss not in self.finished:
            self.finished[loss] = self.again(verb, loss)
            assert self.finished[loss].status == 0, self.finished[loss].err
        return self.finished[loss]


LOSSES = {"sft": "sft", "dpo": "sigmoid"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("settings"))


def cases() -> list[tuple[str, str]]:
    return [
        (verb, name)
        for verb, groups in (("sft", TRAINING), ("dpo", PREFERENCE))
        for name in names_of(groups)
        if name in CHANGES
    ]


@pytest.mark.parametrize(("verb", "name"), cases())
def test_fault_46_a_setting_that_changes_the_result_is_refused_and_no_other(
    place: Place, verb: str, name: str
) -> None:
    change = CHANGES[name]
    loss = change.loss if verb == "dpo" else "sft"
    finished = place.done(verb, loss)
    before = everything_in(finished.folder)
    done = place.again(verb, loss, **change.settings)
    if change.said is None:
        assert (done.status, done.err) == (0, "")
        assert f"{finished.folder} holds this run, which is finished" in done.out
    else:
        assert done.status == 2, done.out
        assert change.said in done.err
    assert everything_in(finished.folder) == before


@pytest.mark.parametrize("verb", LOSSES)
@pytest.mark.parametrize("name", ANEW)
def test_a_run_is_done_anew_or_elsewhere_where_that_is_said(place: Place, verb: str, name: str) -> None:
    finished = place.done(verb, LOSSES[verb])
    done = place.again(verb, LOSSES[verb], **{name: ANEW[name]})
    assert (done.status, done.err) == (0, "")
    assert "finished; --overwrite" not in done.out and "continuing" not in done.out
    assert done.weight_bytes == finished.weight_bytes


def test_the_optimizer_is_part_of_what_a_run_is(place: Place) -> None:
    for verb, loss in LOSSES.items():
        run = json.loads((place.done(verb, loss).folder / "run.json").read_text())
        assert run["identity"]["optimizer"] == "adamw"

"""A panel's numbers are those of its sequences; a base is asked once; card and report say what was kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runs import articles, command, model_folder, trained, write_jsonl
from yeonma.batch.batch import Batch
from yeonma.forgetting import panel as panels
from yeonma.forgetting.panel import GeneralPanel, make_panel, needs_model, own_answers, panel_scores
from yeonma.forgetting.panel_cache import panel_cache
from yeonma.model.forest_support import attention
from yeonma.model.load import load_tokenizer
from yeonma.model.source import find_base
from yeonma.policy import Policy, build_policy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def policy(base: Path) -> Policy:
    return build_policy(find_base(str(base)), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(find_base(str(base)))


@pytest.fixture(scope="module")
def panel(tokenizer: Any) -> GeneralPanel:
    return make_panel(tokenizer, (2,), 512, 8)


def test_a_question_is_asked_as_plain_text_without_a_chat_template(
    panel: GeneralPanel, tokenizer: Any
) -> None:
    assert (len(panel.questions), len(panel.prompts)) == (8, 4)
    question, option = panel.questions[0], panel.options[0][0]
    text = tokenizer.decode(option.token_ids[option.prompt_length :].tolist())
    assert text == question.options[0].lower() or "<unk>" in text


def test_scores_are_those_of_each_sequence_alone(panel: GeneralPanel, policy: Policy, tokenizer: Any) -> None:
    answers = own_answers(policy, tokenizer, panel, {})
    scores = panel_scores(policy, panel, answers, {})
    for options, logprobs in zip(panel.options, scores.option_logprobs, strict=True):
        for option, logprob in zip(options, logprobs, strict=True):
            alone = policy.logprobs(Batch.of([option]))
            assert logprob == pytest.approx(float(alone.sum()), abs=1e-3)
    for prompt, answer, chosen, logprob in zip(
        panel.prompts, answers, scores.chosen, scores.logprobs, strict=True
    ):
        assert chosen == len(answer)  # which it wrote itself, greedily
        ids = torch.from_numpy(np.concatenate([prompt, np.array(answer, dtype=np.int32)]).astype(np.int64))
        model = policy.transformers_model
        with torch.no_grad(), attention(model, policy.support.plain_attention):
            logits = model(ids.unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1).gather(1, ids[len(prompt) :, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=1e-3)


def test_a_model_without_forests_gives_the_same(panel: GeneralPanel, policy: Policy, tokenizer: Any) -> None:
    answers = own_answers(policy, tokenizer, panel, {})
    alone = replace(policy, support=replace(policy.support, forest=False))
    first, second = (panel_scores(each, panel, answers, {}) for each in (policy, alone))
    assert first.chosen == second.chosen
    for some, others in zip(first.option_logprobs, second.option_logprobs, strict=True):
        assert some == pytest.approx(others, abs=1e-3)


def test_the_end_of_an_option_is_not_scored(panel: GeneralPanel) -> None:
    option = panel.options[0][0]
    ended = replace(
        option,
        token_ids=np.concatenate([option.token_ids, np.array([2, 9], dtype=np.int32)]),
        trained=np.concatenate([option.trained, [True, True]]),
    )
    assert panels._text_of(ended, (2,)).tolist() == [*option.trained.tolist(), False, False]


def test_groups_change_nothing(
    panel: GeneralPanel, policy: Policy, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = own_answers(policy, tokenizer, panel, {})
    whole = panel_scores(policy, panel, answers, {})
    monkeypatch.setattr(panels, "FOREST_TOKENS", 1)
    alone = panel_scores(policy, panel, answers, {})
    assert alone.chosen == whole.chosen
    assert alone.logprobs == pytest.approx(whole.logprobs, abs=1e-3)


def test_what_was_asked_is_asked_once(
    panel: GeneralPanel, policy: Policy, tokenizer: Any, tmp_path: Path
) -> None:
    with panel_cache(tmp_path, "model") as known:
        assert needs_model(panel, known, None)
        answers = own_answers(policy, tokenizer, panel, known)
        first = panel_scores(policy, panel, answers, known)
    with panel_cache(tmp_path, "model") as known:
        assert own_answers(None, None, panel, known) == answers
        assert panel_scores(None, panel, answers, known) == first
    with panel_cache(tmp_path, "another model") as known:
        assert needs_model(panel, known, answers)
    (path,) = tmp_path.glob("*.general")
    for damage in ("", "[1]", path.read_text("utf-8").replace("[", "[{},", 3)):
        path.write_text(damage, encoding="utf-8")
        with panel_cache(tmp_path, "model") as known:
            assert needs_model(panel, known, None)


def test_questions_that_do_not_fit_into_the_models_positions_are_left_out(tokenizer: Any) -> None:
    small = make_panel(tokenizer, (2,), 70, 24)
    assert 0 < len(small.questions) < 24 and len(small.prompts) < 12
    assert all(len(option.token_ids) <= 70 for options in small.options for option in options)
    assert make_panel(tokenizer, (2,), 8, 24).questions == ()


def test_card_run_and_report_say_what_was_kept(base: Path, tmp_path: Path) -> None:
    data, cache = write_jsonl(tmp_path / "rows.jsonl", articles(12)), tmp_path / "cache"
    settings = {"general_questions": 8, "cache_dir": cache}
    done = trained(tmp_path / "out", base, data, **settings, learning_rate=0.3)
    card = (done.folder / "README.md").read_text("utf-8")
    line = next(line for line in done.out.splitlines() if line.startswith("the trained model keeps "))
    assert "of the tokens that the base itself answers to 4 general prompts" in line
    assert f"## What was kept\n\n- {line}\n" in card
    assert "(English, Korean): the base answers them by chance" in card
    assert "This is a loss of general abilities." in card
    assert len([*cache.glob("*.general")]) == 1
    report = tmp_path / "report"
    words = ["--models", str(base), str(done.folder), "--data_path", str(data), "--output_dir", str(report)]
    compared = command(
        report, "compare", *words, "--rows", "2", "--max_new_tokens", "8", "--general_questions", "8"
    )
    assert compared.status == 0, compared.err
    (kept,) = json.loads((report / "report.json").read_text("utf-8"))["kept"]
    assert kept["models"] == [0, 1] and kept["is_lost"]
    assert f"{kept['answers']['share']:.1%} of the tokens" in card
    assert f"out keeps {kept['answers']['share']:.1%}" in compared.out
    assert "What was kept" in (report / "report.html").read_text("utf-8")
    again = command(
        report, "compare", *words, "--rows", "2", "--max_new_tokens", "8", "--general_questions", "8"
    )
    assert again.status == 0 and "loading" not in again.out and "asking" not in again.out
    assert json.loads((report / "report.json").read_text("utf-8"))["kept"] == [kept]


def test_full_fine_tuning_asks_its_base_before_the_weights_change(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    settings = {"train": "full", "lora_r": None, "lora_alpha": None, "general_questions": 8}
    done = trained(tmp_path / "out", base, data, **settings, cache_dir=tmp_path / "cache", learning_rate=0.05)
    share = (done.folder / "README.md").read_text("utf-8").partition("keeps ")[2].partition("%")[0]
    assert 0 <= float(share) < 100


def test_without_rows_on_the_card_nothing_is_asked(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    done = trained(tmp_path / "out", base, data, card_rows=0, cache_dir=tmp_path / "cache")
    assert "keeps" not in done.out and not [*(tmp_path / "cache").glob("*.general")]

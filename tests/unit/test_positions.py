"""Prompts and answers stay within the model's positions in every verb, for learned and for rotary positions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.adapters import adapter_on, tiny_base
from tests.tokenizers import byte_level
from yeonma.adapter.prompt_builder import PromptBuilder, open_prompt_builder
from yeonma.batch.batch import Batch
from yeonma.cli import main
from yeonma.data.rows import Row
from yeonma.errors import UserError
from yeonma.generation.sampling import SamplingParams
from yeonma.policy import Policy, load_policy
from yeonma.serve.app import _prompts
from yeonma.serve.openai_api import ChatRequest, RequestError, TextRequest, read_request
from yeonma.tokenization.example import Example

POSITIONS = 120
NEW_TOKENS = 8
LONG = {"document": "storm over the harbour " * 40, "title": "Storm"}
SHORT = {"document": "wind", "title": "Wind"}
TEMPLATE = "Article: {document}\n\nTitle: {title}"


def gpt2_base(folder: Path) -> Path:
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["learned", "rotary"])
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a cutoff_len of 2048 on a base of fewer positions."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "learned":
        base = gpt2_base(root / "base")
    else:
        base = tiny_base(root / "base", byte_level(), positions=POSITIONS)
    return adapter_on(base, root / "OUT", TEMPLATE)


@pytest.fixture(scope="module")
def policy(adapter: Path) -> Policy:
    return load_policy(adapter)


def written(folder: Path, *rows: dict[str, str]) -> str:
    place = folder / "rows.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def test_a_prompt_is_shortened_as_by_a_cutoff_len_of_the_positions(adapter: Path) -> None:
    builder = open_prompt_builder(adapter)
    assert builder.adapter.rules.cutoff_len == 2048
    rows = [Row(1, LONG, "row 1"), Row(2, SHORT, "row 2")]
    long, short = builder.prompts(rows, max_new_tokens=NEW_TOKENS)
    assert (long.shortened, short.shortened) == (True, False)
    assert POSITIONS - NEW_TOKENS - 10 < len(long.token_ids) <= POSITIONS - NEW_TOKENS
    text = builder.tokenizer.decode(long.token_ids)
    assert text.startswith("Article: storm over the harbour") and text.endswith("\n\nTitle: ")
    assert same_prompts_with_cutoff(builder, rows) == [long.token_ids.tolist(), short.token_ids.tolist()]


def same_prompts_with_cutoff(builder: PromptBuilder, rows: list[Row]) -> list[list[int]]:
    rules = replace(builder.adapter.rules, cutoff_len=POSITIONS)
    trained = replace(builder, adapter=replace(builder.adapter, rules=rules), positions=None)
    return [prompt.token_ids.tolist() for prompt in trained.prompts(rows, max_new_tokens=NEW_TOKENS)]


def test_generate_answers_long_rows_and_says_so(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, LONG, SHORT)
    options = ["--data_path", data, "--max_new_tokens", str(NEW_TOKENS), "--batch_size", "2"]
    assert main(["generate", str(adapter), *options]) == 0
    captured = capsys.readouterr()
    assert f"1 of 2 rows is shortened to fit the model's {POSITIONS} positions: 1\n" in captured.err
    assert len(captured.out.splitlines()) == 2


def test_compare_answers_long_rows_and_measures_their_loss(adapter: Path, tmp_path: Path) -> None:
    data = written(tmp_path, LONG, SHORT)
    options = ["--data_path", data, "--max_new_tokens", str(NEW_TOKENS), "--output_dir", str(tmp_path / "c")]
    assert main(["compare", "--models", f"[{adapter}]", *options]) == 0
    report = (tmp_path / "c" / "report.html").read_text()
    assert "Storm" in report


def test_python_calls_answer_long_rows(policy: Policy) -> None:
    long, short = policy.generate([LONG, SHORT], max_new_tokens=NEW_TOKENS)
    assert policy.generate(LONG, max_new_tokens=NEW_TOKENS) == long
    assert policy.generate(SHORT, max_new_tokens=NEW_TOKENS) == short
    assert len(policy.prompt_ids(LONG, max_new_tokens=NEW_TOKENS)) <= POSITIONS - NEW_TOKENS


def test_no_room_for_a_prompt_is_an_error_that_names_the_positions(adapter: Path) -> None:
    builder = open_prompt_builder(adapter)
    message = (
        f"{POSITIONS} new tokens leave no room for a prompt in the model's {POSITIONS} positions; lower it"
    )
    with pytest.raises(UserError, match=message):
        builder.prompts([Row(1, SHORT, "row 1")], max_new_tokens=POSITIONS)


def test_text_and_ids_beyond_the_positions_are_errors(policy: Policy) -> None:
    tokens = f"{POSITIONS - 3} tokens and {NEW_TOKENS} new ones exceed the model's {POSITIONS} positions"
    ids = np.full(POSITIONS - 3, 40)
    with pytest.raises(UserError, match=tokens):
        policy.generate_from_ids([ids], byte_level(), SamplingParams((), NEW_TOKENS))
    (answer,) = policy.generate_from_ids([ids], byte_level(), SamplingParams((), 3))
    assert len(answer.token_ids) == 3
    with pytest.raises(UserError, match=f"exceed the model's {POSITIONS} positions"):
        policy.complete("storm " * 60, max_new_tokens=NEW_TOKENS)


def test_logprobs_beyond_the_positions_are_an_error(policy: Policy) -> None:
    def batch(length: int) -> Any:
        ids = np.full(length, 40, dtype=np.int32)
        return Batch.of([Example(ids, np.arange(length) > 0, 1, 1, 0, 0, False, 0)])

    assert len(policy.logprobs(batch(POSITIONS))) == POSITIONS - 1
    with pytest.raises(UserError, match=f"{POSITIONS + 1} tokens, but the model only {POSITIONS} positions"):
        policy.logprobs(batch(POSITIONS + 1))


def test_generate_refuses_a_long_text_before_it_loads_weights(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("yeonma.commands.generate.load_policy", lambda *_, **__: pytest.fail("it was loaded"))
    assert main(["generate", str(adapter), "--prompt", "storm " * 60, "--max_new_tokens", "8"]) == 2
    assert f"new ones exceed the model's {POSITIONS} positions" in capsys.readouterr().err


def test_a_server_shortens_rows_and_refuses_long_texts(adapter: Path) -> None:
    builder = open_prompt_builder(adapter).by_field_names()

    def prompts(kind: Any, **body: Any) -> Any:
        request = read_request(json.dumps({"model": "OUT", **body}).encode(), kind)
        return _prompts(request, NEW_TOKENS, builder, builder.positions)

    messages = [{"role": "user", "content": LONG["document"]}]
    (prompt,) = prompts(ChatRequest, messages=messages)
    assert prompt.shortened and len(prompt.token_ids) <= POSITIONS - NEW_TOKENS
    with pytest.raises(RequestError, match=f"exceed the model's {POSITIONS} positions"):
        prompts(TextRequest, prompt=LONG["document"])

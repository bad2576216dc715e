"""Weights of turns and of rows in the loss of their tokens, from the row to the gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import plain_logprobs
from tests.runs import write_jsonl
from tests.steps import llama_with_lora, step_state
from tests.tokenizers import byte_level
from yeonma.batch.batch import TOKEN_WEIGHT, Batch
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.data.rows import Row, Rows
from yeonma.data.template import Template, load_template
from yeonma.errors import UserError
from yeonma.tokenization.cache import build_store
from yeonma.tokenization.dataset import prepare_dataset
from yeonma.tokenization.example import WEIGHTLESS, Example, LeftOut, TokenRules
from yeonma.tokenization.example_encoder import encode
from yeonma.tokenization.store import TokenStore
from yeonma.train.losses import SFT
from yeonma.train.step import evaluate, train_step

CHAT = load_template("chat")
WEIGHTS = [(None, None), (0.25, 1), (0.5, 0.75), (0, 0.125), (1, None)]


def rows_with(weights: list[tuple[Any, Any]]) -> list[Row]:
    rows = []
    for number, (first, second) in enumerate(weights, start=1):
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": "a" * number, "weight": first},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "b b" * number, "weight": second},
        ]
        rows.append(Row(number, {"messages": turns}, f"data:{number}"))
    return rows


def examples_with(weights: list[tuple[Any, Any]]) -> list[Example]:
    rows = rows_with(weights)
    results = encode([CHAT.render(row) for row in rows], rows, byte_level(), TokenRules(4096))
    assert all(isinstance(result, Example) for result in results)
    return [result for result in results if isinstance(result, Example)]


def in_vocabulary(examples: list[Example]) -> list[Example]:
    """The examples with ids that the tiny model knows."""
    return [replace(example, token_ids=example.token_ids % 97) for example in examples]


def token_weights(example: Example) -> np.ndarray:
    weights = np.ones(len(example.token_ids)) if example.weights is None else example.weights
    return np.asarray(weights, dtype=np.float64)


def test_tokens_of_a_turn_have_its_weight() -> None:
    tokenizer = byte_level()
    examples = examples_with(WEIGHTS)
    assert [example.weights is None for example in examples] == [True, False, False, False, True]
    for example, (first, second) in zip(examples, WEIGHTS, strict=True):
        trained = example.token_ids[example.trained]
        weights = token_weights(example)[example.trained]
        for part, weight in (("a", first), ("b", second)):
            of_turn = [part in tokenizer.decode([token]) for token in trained]
            expected = 1.0 if weight is None else weight
            assert set(weights[of_turn].tolist()) == ({expected} if expected else set())


def test_weights_survive_the_store(tmp_path: Path) -> None:
    rows = rows_with(WEIGHTS)
    source = Rows("data", "weights", ("messages",), lambda: iter(rows))
    store = build_store(source, CHAT, None, byte_level(), TokenRules(4096), tmp_path)
    examples = examples_with(WEIGHTS)
    for index, example in enumerate(examples):
        stored = store.example(index).weights
        assert (stored is None) == (example.weights is None)
        if stored is not None:
            assert stored[example.trained].tolist() == token_weights(example)[example.trained].tolist()
    units = np.array([3, 0, 1])
    from_store, in_memory = Batch.from_store(store, units), Batch.of([examples[unit] for unit in units])
    expected = np.concatenate([token_weights(examples[u])[examples[u].trained] for u in units])
    for batch in (from_store, in_memory):
        assert batch.token_extras[TOKEN_WEIGHT].tolist() == expected.tolist()
        assert batch.trained_weight == pytest.approx(expected.sum())
    assert Batch.from_store(store, np.array([0, 4])).token_extras == {}


def weighted_mean(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """The loss, computed sequence by sequence with transformers alone."""
    logprob_N = torch.cat([plain_logprobs(model, example) for example in examples])
    weights = [token_weights(example)[example.trained] for example in examples]
    weight_N = torch.from_numpy(np.concatenate(weights))
    return -(logprob_N * weight_N).sum() / weight_N.sum()


@pytest.mark.parametrize("most_examples", [1, 2, 5])
def test_step_is_the_weighted_mean_over_tokens_for_any_micro_batch(most_examples: int) -> None:
    examples = in_vocabulary(examples_with(WEIGHTS))
    model, parameters = llama_with_lora()
    loss = weighted_mean(model, examples)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    state, gradients = step_state(model, parameters, SFT, most_examples)
    batch = Batch.of(examples)
    evaluation = evaluate(state, {"rows": batch}, step=0, epoch=0.0)
    state.model.train()
    result = train_step(state, batch)
    assert evaluation is not None
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert evaluation.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, check_dtype=False)


def test_equal_weights_are_no_weights() -> None:
    losses = []
    for weights in ([(None, None)] * 3, [(0.5, 0.5)] * 3):
        state, _ = step_state(*llama_with_lora(), SFT, 2)
        losses.append(train_step(state, Batch.of(in_vocabulary(examples_with(weights)))).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_weights_and_training_on_inputs_contradict() -> None:
    rows = rows_with([(0.5, 1)])
    rules = TokenRules(4096, train_on_inputs=True)
    with pytest.raises(
        UserError, match="data:1: turns have weights, and --train_on_inputs trains every token"
    ):
        encode([CHAT.render(row) for row in rows], rows, byte_level(), rules)


# Weights of rows


TITLE = Template.parse("{document}\n{title}")


def weighed(values: list[Any], rules: TokenRules, template: Template = TITLE) -> list[Example | LeftOut]:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]
    rows = [
        Row(number, {"document": "a b", "title": "c", "messages": turns, "w": value}, f"data:{number}")
        for number, value in enumerate(values, 1)
    ]
    return list(encode([template.render(row) for row in rows], rows, byte_level(), rules))


def test_a_rows_weight_is_that_of_its_trained_tokens() -> None:
    rules = TokenRules(4096, row_weights="w")
    results = weighed([2.5, 1, "0.25", True], rules)
    for result, weight in zip(results, (2.5, 1, 0.25, 1), strict=True):
        assert isinstance(result, Example)
        assert set(token_weights(result)[result.trained].tolist()) == {weight}
    (whole,) = weighed([3], replace(rules, train_on_inputs=True))
    assert isinstance(whole, Example) and set(token_weights(whole)[whole.trained].tolist()) == {3}
    (plain,) = weighed([3], TokenRules(4096))
    assert isinstance(plain, Example) and plain.weights is None


def test_a_rows_weight_multiplies_those_of_its_turns() -> None:
    (result,) = weighed([3], TokenRules(4096, row_weights="w"), CHAT)
    assert isinstance(result, Example)
    assert set(token_weights(result)[result.trained].tolist()) == {1.5}


def test_rows_of_weight_0_are_left_out_with_their_reason() -> None:
    for template in (TITLE, CHAT):
        first, second = weighed([0, 1], TokenRules(4096, row_weights="w"), template)
        assert isinstance(first, LeftOut) and (first.row, first.reason) == (1, WEIGHTLESS)
        assert isinstance(second, Example)
    with pytest.raises(UserError, match="no row is left of 2: weight 0 in the column"):
        stored([0, 0])


def stored(values: list[Any]) -> TokenStore:
    rows = [Row(n, {"document": "a", "title": "b", "w": v}, f"data:{n}") for n, v in enumerate(values, 1)]
    data = Rows("data", "id", ("document", "title", "w"), lambda: iter(rows))
    with TemporaryDirectory() as place:
        rules = TokenRules(4096, row_weights="w")
        return build_store(data, TITLE, None, byte_level(), rules, Path(place))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-1, "a number (-1)"),
        (float("nan"), "a number (nan)"),
        (float("inf"), "a number (inf)"),
        (None, "null"),
        ("heavy", '"heavy"'),
        ([1], "a list"),
    ],
)
def test_what_is_no_weight_of_a_row_is_an_error_with_its_place(value: Any, shown: str) -> None:
    with pytest.raises(UserError) as caught:
        stored([1, value])
    assert str(caught.value) == f'data:2: field "w" is {shown}, not a weight; write a number from 0 up'


def test_the_loss_is_the_mean_weighted_by_rows() -> None:
    rules = TokenRules(4096, row_weights="w")
    with_weights = in_vocabulary([e for e in weighed([2, 0.5], rules) if isinstance(e, Example)])
    batch = Batch.of(with_weights)
    counts = [int(example.trained.sum()) for example in with_weights]
    assert batch.trained_weight == 2 * counts[0] + 0.5 * counts[1]


def test_a_column_of_weights_is_named_where_it_is_not_used_and_must_exist(tmp_path: Path) -> None:
    rows = [{"document": "a", "title": "b", "weight": 2, "id": 1}] * 2
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    settings = DataSettings(data_path=data, template="{document}\n{title}")

    def lines(**tokens: Any) -> list[str]:
        told: list[str] = []
        options = TokenSettings(cache_dir=str(tmp_path / "cache"), **tokens)
        prepare_dataset(settings, options, byte_level(), 0, told.append, lambda _: None)
        return told

    hint = "(--row_weights weight makes it the weight of the rows in the loss)"
    assert lines() == [f"columns not used: weight, id {hint}"]
    assert lines(row_weights="weight") == ["columns not used: id"]
    with pytest.raises(
        UserError, match='row_weights: the data has no column "wieght"; did you mean "weight"'
    ):
        lines(row_weights="wieght")

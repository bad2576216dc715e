"""Generation: answers do not depend on their batch, end at stop tokens, and are sampled from prompt and seed alone.

Most tests run twice: with forest generation, and one prompt at a time by transformers' own loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from tests.models import FOREST_FAMILIES, OTHER_FAMILIES, VOCABULARY, tiny_model
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.errors import UserError
from yeonma.generation.completion import Answer, continued_text, generate
from yeonma.generation.sampling import SamplingParams
from yeonma.model.attention.dispatch import FOREST
from yeonma.model.forest_support import check_forest_support
from yeonma.tokenization.text_encoder import TextEncoder

LENGTHS = (3, 17, 9, 1, 30, 12)
TOKENIZER = byte_level()
BOTH_WAYS = pytest.mark.parametrize("by_forest", [True, False], ids=["forest", "transformers"])


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


def answers(
    model: Any,
    inputs: Sequence[Any],
    *,
    by_forest: bool,
    batch_size: int = 8,
    stop_ids: Sequence[int] = (2,),
    max_new_tokens: int = 16,
    **options: Any,
) -> list[Answer]:
    results: dict[int, Answer] = {}
    returned = generate(
        model,
        TOKENIZER,
        inputs,
        SamplingParams(tuple(stop_ids), max_new_tokens, **options),
        by_forest=by_forest,
        batch_size=batch_size,
        on_answer=results.__setitem__,
    )
    assert returned == [results[index] for index in range(len(inputs))]
    return returned


def forest_model(family: str, seed: int = 0) -> Any:
    """A model with the forest attention that loading sets."""
    model = tiny_model(family, seed)
    assert check_forest_support(model).forest
    return model


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding by the model's plain forward of the full sequence."""
    ids = [int(number) for number in prompt]
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", [*FOREST_FAMILIES, *OTHER_FAMILIES])
def test_greedy_answers_are_the_most_likely_tokens_for_any_batch_size(family: str) -> None:
    model = tiny_model(family)
    inputs = prompts()
    expected = [tuple(greedy(model, prompt, 8)) for prompt in inputs]
    one_by_one = answers(model, inputs, stop_ids=[], max_new_tokens=8, by_forest=False)
    assert [answer.token_ids for answer in one_by_one] == expected
    by_forest = check_forest_support(model).forest
    for batch_size in (1, 4, 6):
        results = answers(
            model, inputs, stop_ids=[], max_new_tokens=8, batch_size=batch_size, by_forest=by_forest
        )
        assert [answer.token_ids for answer in results] == expected


@pytest.mark.parametrize("family", FOREST_FAMILIES)
@pytest.mark.parametrize("shared", [0, 20])
def test_forest_generation_is_greedy_with_and_without_a_shared_prefix(family: str, shared: int) -> None:
    model = tiny_model(family)
    prefix = prompts([shared], seed=7)[0]
    inputs = [np.concatenate([prefix, prompt]) for prompt in prompts()]
    expected = [tuple(greedy(model, prompt, 8)) for prompt in inputs]
    assert check_forest_support(model).forest
    for batch_size in (1, 2, 6):
        results = answers(model, inputs, stop_ids=[], max_new_tokens=8, batch_size=batch_size, by_forest=True)
        assert [answer.token_ids for answer in results] == expected
    assert model.config._attn_implementation == FOREST


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 40}, {"repetition_penalty": 1.5}])
def test_forest_generation_matches_transformers_generation(options: dict[str, Any]) -> None:
    model = tiny_model("qwen3")
    prefix = prompts([19], seed=7)[0]
    inputs = [np.concatenate([prefix, prompt]) for prompt in prompts() * 3]
    stops = [answers(model, inputs[:1], stop_ids=[], by_forest=False, **options)[0].token_ids[9]]
    expected = answers(model, inputs, stop_ids=stops, by_forest=False, **options)
    assert len({len(answer.token_ids) for answer in expected}) > 1
    assert {answer.ended for answer in expected} == {True, False}
    check_forest_support(model)
    for batch_size in (2, 18):
        options["batch_size"] = batch_size
        assert answers(model, inputs, stop_ids=stops, by_forest=True, **options) == expected


def test_forest_generation_computes_each_token_once() -> None:
    model = tiny_model("llama")
    prefix = prompts([40], seed=7)[0]
    inputs = [np.concatenate([prefix, prompt]) for prompt in prompts()]
    check_forest_support(model)
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: counts.append(keywords["input_ids"].numel()), with_kwargs=True
    )
    results = answers(model, inputs, stop_ids=[], max_new_tokens=5, batch_size=3, by_forest=True)
    generated = sum(len(answer.token_ids) for answer in results)
    # the last token of each answer is never read
    assert sum(counts) == 40 + sum(LENGTHS) + generated - len(inputs)
    assert len(counts) < generated


def test_out_of_memory_halves_the_rows_of_forest_generation() -> None:
    model = tiny_model("llama")
    check_forest_support(model)
    expected = answers(model, prompts(), by_forest=True)
    row_counts: list[int] = []

    def refuse(module: Any, args: Any, keywords: Any) -> None:
        rows = len(keywords["logits_to_keep"])
        row_counts.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("no")

    hook = model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert answers(model, prompts(), by_forest=True, batch_size=6) == expected
    assert max(row_counts) == 6
    hook.remove()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(UserError, match="prompt of 30 tokens"):
        answers(model, prompts(), by_forest=True)


@BOTH_WAYS
def test_answer_ends_before_its_first_stop_token_while_others_continue(by_forest: bool) -> None:
    model = forest_model("llama") if by_forest else tiny_model("llama")
    full_answers = [
        list(answer.token_ids) for answer in answers(model, prompts(), stop_ids=[], by_forest=by_forest)
    ]
    stops = [full_answers[0][4], full_answers[2][9]]
    for batch_size in (1, 6):
        results = answers(model, prompts(), stop_ids=stops, batch_size=batch_size, by_forest=by_forest)
        for ids, answer in zip(full_answers, results, strict=True):
            end = next((at for at, number in enumerate(ids) if number in stops), None)
            assert answer.token_ids == tuple(ids[:end])
            assert answer.ended == (end is not None)
        assert {answer.ended for answer in results} == {True, False}


@BOTH_WAYS
def test_models_own_generation_config_is_ignored_and_kept(by_forest: bool) -> None:
    model = forest_model("llama") if by_forest else tiny_model("llama")
    expected = answers(model, prompts(), by_forest=by_forest)
    config = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=3.0,
        max_length=4,
        eos_token_id=7,
        suppress_tokens=[5],
    )
    model.generation_config, model.config.use_cache = config, False
    model.train()
    assert answers(model, prompts(), by_forest=by_forest) == expected
    assert model.generation_config is config
    assert model.training


def test_forest_attention_gives_the_answers_of_plain_attention_and_stays_set() -> None:
    model = tiny_model("gpt_oss")
    expected = answers(model, prompts(), by_forest=False)
    assert check_forest_support(model).forest
    assert model.config._attn_implementation == FOREST
    assert answers(model, prompts(), by_forest=True) == expected
    assert model.config._attn_implementation == FOREST


def test_forest_generation_feeds_no_padding_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens of prompts and answers go through the model, and transformers' loop is not used."""
    model = forest_model("llama")
    fed: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: fed.append(keywords["input_ids"][0].tolist()), with_kwargs=True
    )
    monkeypatch.setattr(GenerationMixin, "generate", None)
    results = answers(model, prompts(), stop_ids=[], max_new_tokens=3, batch_size=6, by_forest=True)
    generated = [number for answer in results for number in answer.token_ids[:-1]]  # the last is never read
    assert sorted(number for ids in fed for number in ids) == sorted(
        np.concatenate(prompts()).tolist() + generated
    )


@BOTH_WAYS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repetition_penalty_uses_only_the_rows_own_tokens(temperature: float, by_forest: bool) -> None:
    model = forest_model("llama") if by_forest else tiny_model("llama")

    def favour(module: Any, arguments: Any, output: Any) -> None:
        output.logits[..., 0] += 3

    model.register_forward_hook(favour)
    inputs = [prompt for seed in range(3) for prompt in prompts(seed=seed)]
    options: dict[str, Any] = {"repetition_penalty": 2.0, "temperature": temperature, "stop_ids": []}
    one_by_one = answers(model, inputs, batch_size=1, by_forest=by_forest, **options)
    assert answers(model, inputs, batch_size=len(inputs), by_forest=by_forest, **options) == one_by_one
    assert sum(0 in answer.token_ids for answer in one_by_one) > 6
    assert one_by_one != answers(model, inputs, temperature=temperature, stop_ids=[], by_forest=by_forest)


@BOTH_WAYS
def test_sampling_depends_only_on_prompt_and_seed(by_forest: bool) -> None:
    model = forest_model("qwen2") if by_forest else tiny_model("qwen2")
    inputs = prompts()
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "by_forest": by_forest}
    first = answers(model, inputs, seed=1, batch_size=6, **options)
    assert answers(model, inputs[::-1], seed=1, batch_size=4, **options) == first[::-1]
    assert answers(model, inputs[2:3], seed=1, **options) == first[2:3]
    torch.manual_seed(123)
    assert answers(model, inputs, seed=1, batch_size=6, **options) == first
    assert answers(model, inputs, seed=2, batch_size=6, **options) != first


@BOTH_WAYS
def test_sampling_follows_the_models_probabilities(by_forest: bool) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # several tokens are likely
    (prompt,) = prompts([5])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0, -1]
    temperature, top_k, top_p, samples = 0.7, 12, 0.9, 600
    probability = torch.softmax(logits / temperature, dim=0)
    probability[probability < probability.sort(descending=True).values[top_k - 1]] = 0
    probability /= probability.sum()
    likeliest = probability.sort(descending=True)
    nucleus = likeliest.indices[likeliest.values.cumsum(0) - likeliest.values < top_p]
    expected = torch.zeros_like(probability)
    expected[nucleus] = probability[nucleus] / probability[nucleus].sum()

    if by_forest:
        assert check_forest_support(model).forest
    options: dict[str, Any] = {
        "by_forest": by_forest,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_new_tokens": 1,
    }
    counts = torch.zeros_like(expected)
    for seed in range(samples):
        (answer,) = answers(model, [prompt], seed=seed, stop_ids=[], **options)
        counts[answer.token_ids[0]] += 1
    assert 1 < len(nucleus) < top_k
    assert counts[expected == 0].sum() == 0
    assert float((counts / samples - expected).abs().max()) < 0.07  # over three standard deviations


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-30}, {"temperature": 2.0, "top_k": 1}, {"temperature": 2.0, "top_p": 1e-9}]
)
@BOTH_WAYS
def test_sampling_from_a_single_candidate_token_is_greedy(options: dict[str, Any], by_forest: bool) -> None:
    model = forest_model("llama") if by_forest else tiny_model("llama")
    expected = answers(model, prompts(), by_forest=by_forest)
    assert answers(model, prompts(), by_forest=by_forest, **options) == expected


@pytest.mark.parametrize("text", [" 제목 1\n서울 2", "서울, 첫 영하", "  two blanks", "x"])
@pytest.mark.parametrize(
    "tokenizer", [byte_level(), sentencepiece_bpe(), unigram()], ids=["bpe", "sentencepiece", "unigram"]
)
@pytest.mark.parametrize("before", ["### 제목:\n", "a" * 200 + " 제목:"])
def test_answer_text_is_what_it_adds_to_the_prompts_text(tokenizer: Any, before: str, text: str) -> None:
    encoder = TextEncoder.of(tokenizer)
    prompt = encoder.batch([before])[0]
    ids = encoder.continuation(prompt, text)
    expected = encoder.decode(prompt + ids)[len(encoder.decode(prompt)) :]
    assert continued_text(tokenizer, prompt, ids) == expected
    assert (
        continued_text(tokenizer, prompt, [*ids, tokenizer.eos_token_id]) == expected
    )  # special tokens have no text
    assert expected == text


@BOTH_WAYS
def test_streamed_text_equals_the_answer_without_partial_characters(by_forest: bool) -> None:
    model = forest_model("llama") if by_forest else tiny_model("llama")
    text = "서울의 아침 기온이 영하로"
    ids = TextEncoder.of(TOKENIZER).batch([text])[0]
    next_ids = iter([*ids, TOKENIZER.eos_token_id, *[0] * 99])

    # A vocabulary as large as the tokenizer's, and a model that writes the text.
    model.resize_token_embeddings(len(TOKENIZER))

    def force_next_id(module: Any, arguments: Any, output: Any) -> None:
        output.logits.zero_()
        output.logits[..., next(next_ids)] = 1

    model.register_forward_hook(force_next_id)
    parts: list[str] = []
    sampling = SamplingParams((TOKENIZER.eos_token_id,), 99)
    (answer,) = generate(model, TOKENIZER, prompts([4]), sampling, by_forest=by_forest, on_text=parts.append)
    assert answer.text == text
    assert "".join(parts) == text
    assert len(parts) > 3
    assert all("\ufffd" not in part for part in parts)


def test_finished_rows_are_not_generated_again_after_out_of_memory() -> None:
    model = forest_model("llama")
    inputs = prompts([12, 12, 12, 12])
    expected = answers(model, inputs, stop_ids=[], max_new_tokens=4, by_forest=True)
    passes: list[int] = []

    def refuse_once(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        passes.append(keywords["input_ids"].shape[1])
        if len(passes) == 6:  # two rows have ended, two others are being generated
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(refuse_once, with_kwargs=True)
    assert answers(model, inputs, stop_ids=[], max_new_tokens=4, batch_size=2, by_forest=True) == expected
    assert passes == [24, 2, 2, 2, 24, 2, *[12, 1, 1, 1] * 2]


@BOTH_WAYS
def test_single_prompt_that_does_not_fit_into_memory_is_an_error(by_forest: bool) -> None:
    model = forest_model("llama") if by_forest else tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(UserError, match="a prompt of 17 tokens and its answer do not fit"):
        generate(model, TOKENIZER, prompts([17]), SamplingParams((2,), 16), by_forest=by_forest)


@BOTH_WAYS
def test_longest_prompts_are_generated_first(by_forest: bool) -> None:
    model = forest_model("llama") if by_forest else tiny_model("llama")
    prompt_lengths: list[int] = []
    inputs = prompts()
    generate(
        model, TOKENIZER, inputs, SamplingParams((2,), 2), by_forest=by_forest, batch_size=2,
        on_answer=lambda index, _: prompt_lengths.append(len(inputs[index])),
    )  # fmt: skip
    assert prompt_lengths == sorted(LENGTHS, reverse=True)

"""Generation: an answer does not depend on its batch, answers end where they should, draws follow from prompt and seed.

Most tests run twice: over a growing forest, and one prompt at a time by transformers' own loop.
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


def for_forests(family: str, seed: int = 0) -> Any:
    """A model with the attention implementation that loading sets."""
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
def test_greedy_answers_are_the_models_likeliest_tokens_for_any_batch_size(family: str) -> None:
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
def test_a_growing_forest_gives_the_models_likeliest_tokens(family: str, shared: int) -> None:
    model = tiny_model(family)
    frame = prompts([shared], seed=7)[0]
    inputs = [np.concatenate([frame, prompt]) for prompt in prompts()]
    expected = [tuple(greedy(model, prompt, 8)) for prompt in inputs]
    assert check_forest_support(model).forest
    for batch_size in (1, 2, 6):
        results = answers(model, inputs, stop_ids=[], max_new_tokens=8, batch_size=batch_size, by_forest=True)
        assert [answer.token_ids for answer in results] == expected
    assert model.config._attn_implementation == FOREST


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 40}, {"repetition_penalty": 1.5}])
def test_a_growing_forest_answers_as_transformers_does(options: dict[str, Any]) -> None:
    model = tiny_model("qwen3")
    frame = prompts([19], seed=7)[0]
    inputs = [np.concatenate([frame, prompt]) for prompt in prompts() * 3]
    stops = [answers(model, inputs[:1], stop_ids=[], by_forest=False, **options)[0].token_ids[9]]
    expected = answers(model, inputs, stop_ids=stops, by_forest=False, **options)
    assert len({len(answer.token_ids) for answer in expected}) > 1
    assert {answer.ended for answer in expected} == {True, False}
    check_forest_support(model)
    for batch_size in (2, 18):
        options["batch_size"] = batch_size
        assert answers(model, inputs, stop_ids=stops, by_forest=True, **options) == expected


def test_a_growing_forest_computes_no_token_twice() -> None:
    model = tiny_model("llama")
    frame = prompts([40], seed=7)[0]
    inputs = [np.concatenate([frame, prompt]) for prompt in prompts()]
    check_forest_support(model)
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: counts.append(keywords["input_ids"].numel()), with_kwargs=True
    )
    results = answers(model, inputs, stop_ids=[], max_new_tokens=5, batch_size=3, by_forest=True)
    written = sum(len(answer.token_ids) for answer in results)
    assert sum(counts) == 40 + sum(LENGTHS) + written - len(inputs)  # the last token of each is never read
    assert len(counts) < written


def test_too_little_memory_halves_the_rows_of_a_growing_forest() -> None:
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
def test_an_answer_ends_before_the_first_stop_token_and_others_go_on(by_forest: bool) -> None:
    model = for_forests("llama") if by_forest else tiny_model("llama")
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
def test_the_models_own_generation_settings_play_no_part_and_stay(by_forest: bool) -> None:
    model = for_forests("llama") if by_forest else tiny_model("llama")
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


def test_a_model_set_up_for_forests_generates_as_with_its_plain_attention_and_stays_so() -> None:
    model = tiny_model("gpt_oss")
    expected = answers(model, prompts(), by_forest=False)
    assert check_forest_support(model).forest
    assert model.config._attn_implementation == FOREST
    assert answers(model, prompts(), by_forest=True) == expected
    assert model.config._attn_implementation == FOREST


def test_the_answers_of_many_prompts_are_never_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens of prompts and answers go through the model, and transformers' loop is not used."""
    model = for_forests("llama")
    fed: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: fed.append(keywords["input_ids"][0].tolist()), with_kwargs=True
    )
    monkeypatch.setattr(GenerationMixin, "generate", None)
    results = answers(model, prompts(), stop_ids=[], max_new_tokens=3, batch_size=6, by_forest=True)
    written = [number for answer in results for number in answer.token_ids[:-1]]  # the last is never read
    assert sorted(number for ids in fed for number in ids) == sorted(
        np.concatenate(prompts()).tolist() + written
    )


@BOTH_WAYS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_repetition_penalty_sees_the_rows_own_tokens_alone(temperature: float, by_forest: bool) -> None:
    model = for_forests("llama") if by_forest else tiny_model("llama")

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
def test_draws_follow_from_prompt_and_seed_alone(by_forest: bool) -> None:
    model = for_forests("qwen2") if by_forest else tiny_model("qwen2")
    inputs = prompts()
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "by_forest": by_forest}
    first = answers(model, inputs, seed=1, batch_size=6, **options)
    assert answers(model, inputs[::-1], seed=1, batch_size=4, **options) == first[::-1]
    assert answers(model, inputs[2:3], seed=1, **options) == first[2:3]
    torch.manual_seed(123)
    assert answers(model, inputs, seed=1, batch_size=6, **options) == first
    assert answers(model, inputs, seed=2, batch_size=6, **options) != first


@BOTH_WAYS
def test_draws_have_the_models_probabilities(by_forest: bool) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # several tokens are likely
    (prompt,) = prompts([5])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0, -1]
    temperature, top_k, top_p, draws = 0.7, 12, 0.9, 600
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
    counted = torch.zeros_like(expected)
    for seed in range(draws):
        (answer,) = answers(model, [prompt], seed=seed, stop_ids=[], **options)
        counted[answer.token_ids[0]] += 1
    assert 1 < len(nucleus) < top_k
    assert counted[expected == 0].sum() == 0
    assert float((counted / draws - expected).abs().max()) < 0.07  # over three standard deviations


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-30}, {"temperature": 2.0, "top_k": 1}, {"temperature": 2.0, "top_p": 1e-9}]
)
@BOTH_WAYS
def test_a_draw_from_one_token_is_greedy(options: dict[str, Any], by_forest: bool) -> None:
    model = for_forests("llama") if by_forest else tiny_model("llama")
    expected = answers(model, prompts(), by_forest=by_forest)
    assert answers(model, prompts(), by_forest=by_forest, **options) == expected


@pytest.mark.parametrize("text", [" 제목 1\n서울 2", "서울, 첫 영하", "  two blanks", "x"])
@pytest.mark.parametrize(
    "tokenizer", [byte_level(), sentencepiece_bpe(), unigram()], ids=["bpe", "sentencepiece", "unigram"]
)
@pytest.mark.parametrize("before", ["### 제목:\n", "a" * 200 + " 제목:"])
def test_the_text_of_an_answer_is_what_it_adds_to_the_prompts(tokenizer: Any, before: str, text: str) -> None:
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
def test_streamed_text_adds_up_to_the_answer_and_never_shows_half_a_character(by_forest: bool) -> None:
    model = for_forests("llama") if by_forest else tiny_model("llama")
    letters = "서울의 아침 기온이 영하로"
    ids = TextEncoder.of(TOKENIZER).batch([letters])[0]
    spelled = iter([*ids, TOKENIZER.eos_token_id, *[0] * 99])

    # A vocabulary as large as the tokenizer's, and a model that writes the letters.
    model.resize_token_embeddings(len(TOKENIZER))

    def spell(module: Any, arguments: Any, output: Any) -> None:
        output.logits.zero_()
        output.logits[..., next(spelled)] = 1

    model.register_forward_hook(spell)
    shown: list[str] = []
    sampling = SamplingParams((TOKENIZER.eos_token_id,), 99)
    (answer,) = generate(model, TOKENIZER, prompts([4]), sampling, by_forest=by_forest, on_text=shown.append)
    assert answer.text == letters
    assert "".join(shown) == letters
    assert len(shown) > 3
    assert all("\ufffd" not in part for part in shown)


def test_rows_that_had_ended_before_memory_was_short_are_not_asked_again() -> None:
    model = for_forests("llama")
    inputs = prompts([12, 12, 12, 12])
    expected = answers(model, inputs, stop_ids=[], max_new_tokens=4, by_forest=True)
    passes: list[int] = []

    def refuse_once(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        passes.append(keywords["input_ids"].shape[1])
        if len(passes) == 6:  # two rows have ended, two others are at work
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(refuse_once, with_kwargs=True)
    assert answers(model, inputs, stop_ids=[], max_new_tokens=4, batch_size=2, by_forest=True) == expected
    assert passes == [24, 2, 2, 2, 24, 2, *[12, 1, 1, 1] * 2]


@BOTH_WAYS
def test_a_prompt_that_does_not_fit_into_memory_by_itself_is_an_error(by_forest: bool) -> None:
    model = for_forests("llama") if by_forest else tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(UserError, match="a prompt of 17 tokens and its answer do not fit"):
        generate(model, TOKENIZER, prompts([17]), SamplingParams((2,), 128), by_forest=by_forest)


@BOTH_WAYS
def test_the_longest_prompts_go_first(by_forest: bool) -> None:
    model = for_forests("llama") if by_forest else tiny_model("llama")
    prompt_lengths: list[int] = []
    answers_of = prompts()
    generate(
        model, TOKENIZER, answers_of, SamplingParams((2,), 2), by_forest=by_forest, batch_size=2,
        on_answer=lambda index, _: prompt_lengths.append(len(answers_of[index])),
    )  # fmt: skip
    assert prompt_lengths == sorted(LENGTHS, reverse=True)

"""Answers from an adapter folder: prompts equal those of training, and the folder alone is enough to load the model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import yeonma
from tests.adapters import Folders, adapter_on, tiny_adapter, tiny_base
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.batch.batch import Batch
from yeonma.cli import main
from yeonma.data.rows import Row, open_rows
from yeonma.errors import UserError
from yeonma.generation.sampling import SamplingParams
from yeonma.model.adapter_weights import load_adapter
from yeonma.model.attention.dispatch import FOREST
from yeonma.model.load import LoraShape, load_base
from yeonma.model.logprobs import sequence_logprobs
from yeonma.model.source import find_base
from yeonma.policy import Policy, adapter_names, build_policy, load_policy
from yeonma.tokenization.example import Example
from yeonma.tokenization.example_encoder import encode
from yeonma.tokenization.text_encoder import TextEncoder

ROOT = Path(yeonma.__file__).parents[1]
SAMPLES = ROOT / "yeonma" / "samples"
KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
}
CHAT_TEMPLATE = "[system]\nYou write titles.\n[user]\n{document}\n[assistant]\n{title}\n"
DOCUMENT = {"document": "월요일에 폭풍이 항구를 닫았다."}


@pytest.fixture(scope="module")
def titles(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """With the title template and a byte-level tokenizer."""
    return tiny_adapter(tmp_path_factory.mktemp("titles"), byte_level())


@pytest.fixture(scope="module")
def loaded(titles: Folders) -> Policy:
    return load_policy(titles.adapter)


def ids_fed_to_model(loaded: Policy, call: Callable[[], object]) -> list[list[int]]:
    """The token ids of each prompt that the model reads during `call`, including the shared prefix."""
    prompts: list[list[int]] = []
    prefix: list[int] = []

    def record(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        ids, cache = keywords["input_ids"][0].tolist(), keywords["forest_cache"]
        if not cache.lengths:
            prefix[:] = ids
            return
        assert cache.shared in (0, len(prefix))
        start = cache.continuing
        for length in cache.lengths[start:]:
            prompts.append(prefix[: cache.shared] + ids[start : start + length])
            start += length

    hook = loaded.model.get_base_model().register_forward_pre_hook(record, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return prompts


@pytest.mark.parametrize("template", ["title", CHAT_TEMPLATE], ids=["plain", "turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_sample_rows_get_the_prompt_tokens_of_training(kind: str, template: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    loaded = load_policy(tiny_adapter(tmp_path, tokenizer, template=template, cutoff_len=4096).adapter)
    prompt_builder = loaded.prompt_builder
    for name in ("news_en", "news_ko"):
        rows = list(open_rows(str(SAMPLES / f"{name}.jsonl")))
        rendered = [prompt_builder.adapter.template.render(row) for row in rows]
        trained = encode(rendered, rows, tokenizer, prompt_builder.adapter.rules)
        prompts = prompt_builder.prompts(rows, max_new_tokens=128)
        assert len(trained) == len(rows) > 50
        for example, prompt in zip(trained, prompts, strict=True):
            assert isinstance(example, Example)
            assert prompt.token_ids.tolist() == example.token_ids[: example.prompt_length].tolist()
            assert not prompt.shortened
        first_rows = [dict(row.values) for row in rows[:3]]
        fed = ids_fed_to_model(
            loaded, lambda first_rows=first_rows: loaded.generate(first_rows, max_new_tokens=1)
        )
        expected = [example.token_ids[: example.prompt_length].tolist() for example in trained[:3]]
        assert sorted(fed) == sorted(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_gives_the_same_greedy_text(kind: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    tokenizer = KINDS[kind]()
    folder = tiny_adapter(tmp_path, tokenizer).adapter
    loaded = load_policy(folder)
    ids = loaded.prompt_ids(DOCUMENT)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor(ids[None].astype(np.int64))
    generated = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
    )
    answer = [
        number for number in generated[0, len(ids) :].tolist() if number not in tokenizer.all_special_ids
    ]
    decode = TextEncoder.of(tokenizer).decode
    # decoded together with the prompt: decoding the answer alone loses SentencePiece's first space
    expected = decode([*ids.tolist(), *answer])[len(decode(ids.tolist())) :]
    text = loaded.generate(DOCUMENT, max_new_tokens=24)
    assert text == expected
    assert text


def test_disabled_adapter_weights_give_the_base_models_answers(titles: Folders, loaded: Policy) -> None:
    base = AutoModelForCausalLM.from_pretrained(titles.base)
    ids = torch.tensor(loaded.prompt_ids(DOCUMENT)[None].astype(np.int64))
    expected = base.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    base_policy = dataclasses.replace(loaded, adapter_weights=False)
    tokenizer = byte_level()
    expected_ids = (
        expected[: expected.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in expected else expected
    )
    tuned = loaded.generate(DOCUMENT, max_new_tokens=12)
    assert base_policy.generate(DOCUMENT, max_new_tokens=12) == tokenizer.decode(expected_ids) != tuned
    assert loaded.generate(DOCUMENT, max_new_tokens=12) == tuned
    assert load_policy(titles.adapter, adapter_weights=False).generate(DOCUMENT, max_new_tokens=12) != tuned


def test_rows_in_a_batch_get_the_same_answers_as_alone(loaded: Policy) -> None:
    rows = [dict(row.values) for row in open_rows(str(SAMPLES / "news_ko_validation.jsonl"))][:5]
    for options in ({"max_new_tokens": 10}, {"max_new_tokens": 10, "temperature": 1.0, "seed": 3}):
        together = loaded.generate(rows, batch_size=3, **options)
        assert together == [loaded.generate(row, **options) for row in rows]
    assert loaded.generate(rows, max_new_tokens=10, temperature=1.0, seed=4) != together
    assert loaded.generate([], max_new_tokens=10) == []


def test_complete_feeds_the_text_as_the_whole_prompt(loaded: Policy) -> None:
    ids = ids_fed_to_model(loaded, lambda: loaded.complete("<|im_start|>서울\n", max_new_tokens=3))
    assert ids == [byte_level()("<|im_start|>서울\n")["input_ids"]]
    with pytest.raises(UserError, match="prompt: it is empty"):
        loaded.complete("")
    with pytest.raises(UserError, match="1 token and 4096 new ones exceed the model's 4096 positions"):
        loaded.complete("서울", max_new_tokens=4096)


def test_long_field_is_shortened_as_in_training_and_marked(tmp_path: Path) -> None:
    prompt_builder = load_policy(tiny_adapter(tmp_path, byte_level(), cutoff_len=200).adapter).prompt_builder
    long, short = ({"document": "가나다라 " * count} for count in (100, 2))
    rows = [Row(number, values, f"row {number}") for number, values in enumerate([long, short], start=1)]
    first, second = prompt_builder.prompts(rows, max_new_tokens=20)
    assert (first.shortened, second.shortened) == (True, False)
    assert 170 < len(first.token_ids) <= 180
    decoded = byte_level().decode(first.token_ids)
    assert decoded.startswith("당신은") and decoded.endswith("\n\n### 제목:\n")
    with pytest.raises(UserError, match="200 new tokens leave no room"):
        prompt_builder.prompts(rows, max_new_tokens=200)


@pytest.mark.parametrize(
    ("template", "model_text", "answer"),
    [
        ("title", "  Storm\n \n", "  Storm\n \n"),
        ('Title of {document}: "{title}"', 'Storm "x""', 'Storm "x"'),
        ('Title of {document}: "{title}"', "Storm", "Storm"),
        (CHAT_TEMPLATE, " Storm ", " Storm "),
        ("[user]\n{document}\n[assistant]\nTitle: <{title}>\n", "Title: <Storm>", "Storm"),
    ],
)
def test_answer_excludes_the_template_text_around_the_field(
    template: str, model_text: str, answer: str, tmp_path: Path
) -> None:
    prompt_builder = load_policy(
        tiny_adapter(tmp_path, byte_level(), template=template).adapter
    ).prompt_builder
    (prompt,) = prompt_builder.prompts([Row(1, DOCUMENT, "row 1")], max_new_tokens=10)
    assert prompt.answer(model_text) == answer


def test_rows_may_use_trained_column_names_or_field_names(tmp_path: Path) -> None:
    columns = {"document": "body", "answer": "headline"}
    loaded = load_policy(tiny_adapter(tmp_path, byte_level(), columns=columns).adapter)
    expected = loaded.prompt_ids({"body": "서울"}).tolist()
    assert loaded.prompt_ids({"document": "서울"}).tolist() == expected
    assert loaded.prompt_ids({"body": "서울", "document": "부산"}).tolist() == expected
    assert loaded.prompt_ids({"text": "서울"}, columns={"document": "text"}).tolist() == expected
    row = Row(1, {"body": "서울", "headline": "제목"}, "row 1")
    assert loaded.prompt_builder.reference(row) == "제목"
    with pytest.raises(UserError, match=r'row 1: field "document" \(column "body"\) is missing'):
        loaded.prompt_ids({"bodi": "서울"})


def test_rows_may_hold_the_fields_within_a_column_as_in_training(tmp_path: Path) -> None:
    columns = {"document": "input.body", "answer": "json(made)"}
    loaded = load_policy(tiny_adapter(tmp_path, byte_level(), columns=columns).adapter)
    expected = loaded.prompt_ids({"document": "서울"}).tolist()
    assert loaded.prompt_ids({"input": {"body": ["서울"]}}).tolist() == expected
    assert loaded.prompt_ids({"input.body": "서울"}).tolist() == expected
    assert (
        loaded.prompt_ids({"texts": ["부산", "서울"]}, columns={"document": "texts[1]"}).tolist() == expected
    )
    row = Row(1, {"input": {"body": "서울"}, "made": {"title": "제목"}}, "row 1")
    assert loaded.prompt_builder.reference(row) == '{"title":"제목"}'


def test_turn_list_prompt_ends_before_its_last_answer(tmp_path: Path) -> None:
    tokenizer = byte_level()
    loaded = load_policy(tiny_adapter(tmp_path, tokenizer, template="chat").adapter)
    turns = [{"role": "user", "content": "서울은?"}, {"role": "assistant", "content": "수도"}]
    expected = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert loaded.prompt_ids({"messages": turns}).tolist() == expected
    assert loaded.prompt_ids({"messages": turns[:1]}).tolist() == expected
    assert loaded.prompt_builder.reference(Row(1, {"messages": turns}, "row 1")) == "수도"
    assert loaded.prompt_builder.reference(Row(1, {"messages": turns[:1]}, "row 1")) is None
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(loaded.prompt_builder.stop_ids) == {tokenizer.eos_token_id, end}


def test_wrong_rows_are_reported_together_and_wrong_options_refused(loaded: Policy) -> None:
    with pytest.raises(UserError) as caught:
        loaded.generate([{"document": "x"}, {"documant": "x"}, {"document": ["x"]}])
    assert [problem.place for problem in caught.value.problems] == ["row 2", "row 3"]
    with pytest.raises(UserError, match="max_new_token: unknown setting; did you mean"):
        loaded.generate(DOCUMENT, max_new_token=3)
    with pytest.raises(UserError, match="temperature: -1 is out of range"):
        loaded.generate(DOCUMENT, temperature=-1)
    with pytest.raises(UserError, match="a row is a mapping of fields, not str"):
        loaded.generate(["text"])  # type: ignore[list-item]


# ---------------------------------------------------------------- building a policy, and its log-probabilities

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def examples(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three examples, of which two share a prefix, and the masks of their trained tokens."""
    rng = np.random.default_rng(seed)
    prefix, *suffixes = (rng.integers(4, 500, length).astype(np.int32) for length in (20, 9, 6, 7))
    token_ids = [np.concatenate([prefix, suffixes[0]]), np.concatenate([prefix, suffixes[1]]), suffixes[2]]
    return token_ids, [np.arange(len(ids)) >= 3 for ids in token_ids]


def batch() -> Batch:
    return Batch.of(
        [
            Example(ids, trained, 3, row, 0, 0, False, 0)
            for row, (ids, trained) in enumerate(zip(*examples(), strict=True), start=1)
        ]
    )


def plain_logprobs(base: Path, adapter: Path | None) -> torch.Tensor:
    """Log-probabilities computed with transformers and PEFT alone, one sequence at a time."""
    model: Any = load_base(find_base(str(base)), **CPU)
    if adapter is not None:
        model = load_adapter(model, str(adapter), trainable=False).eval().get_base_model()
    with torch.no_grad():
        parts = [
            sequence_logprobs(model, torch.from_numpy(ids).long(), torch.from_numpy(trained))
            for ids, trained in zip(*examples(), strict=True)
        ]
    return torch.cat(parts)


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() < 1e-4)


@pytest.fixture(scope="module")
def second(titles: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter on the same base."""
    return adapter_on(titles.base, tmp_path_factory.mktemp("second") / "OUT", "title", seed=1)


def test_logprobs_equal_those_of_transformers_and_peft(titles: Folders, loaded: Policy) -> None:
    with torch.no_grad():
        assert close(loaded.logprobs(batch()), expected := plain_logprobs(titles.base, titles.adapter))
        base_logprobs = dataclasses.replace(loaded, adapter_weights=False).logprobs(batch())
    assert close(base_logprobs, plain_logprobs(titles.base, None))
    assert not close(base_logprobs, expected)


def test_adapters_on_one_base_are_selected_by_name(titles: Folders, second: Path) -> None:
    folders = [titles.adapter, second]
    policy = build_policy(find_base(str(titles.base)), [str(folder) for folder in folders], **CPU)
    views = [dataclasses.replace(policy, adapter_name=name) for name in adapter_names(2)]
    base = dataclasses.replace(policy, adapter_weights=False)
    sampling = SamplingParams((), 6)
    prompts = [ids.tolist() for ids in examples()[0]]
    expected = [load_policy(folder).generate_from_ids(prompts, byte_level(), sampling) for folder in folders]
    assert expected[0] != expected[1]
    with torch.no_grad():
        for _ in range(2):  # switching back and forth
            for view, folder, answers in zip(views, folders, expected, strict=True):
                assert close(view.logprobs(batch()), plain_logprobs(titles.base, folder))
                assert view.generate_from_ids(prompts, byte_level(), sampling) == answers
            assert close(base.logprobs(batch()), plain_logprobs(titles.base, None))


def test_with_adapters_replaces_the_adapter_and_keeps_the_base_weights(titles: Folders, second: Path) -> None:
    policy = build_policy(find_base(str(titles.base)), [str(titles.adapter)], **CPU)
    weights = policy.transformers_model.get_input_embeddings().weight
    with torch.no_grad():
        for folder in (second, None, titles.adapter):
            policy = policy.with_adapters([] if folder is None else [str(folder)])
            assert policy.transformers_model.get_input_embeddings().weight is weights
            assert close(policy.logprobs(batch()), plain_logprobs(titles.base, folder))
            assert policy.transformers_model.config._attn_implementation == FOREST
            assert policy.support.plain_attention != FOREST


def test_direct_model_call_gives_the_logits_of_transformers_and_peft(titles: Folders) -> None:
    policy = load_policy(titles.adapter, device="cpu", dtype="float32")
    token_ids, _ = examples()
    ids = torch.from_numpy(np.stack([token_ids[0], token_ids[0]]).astype(np.int64))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    base = AutoModelForCausalLM.from_pretrained(titles.base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, titles.adapter)
    with torch.no_grad():
        logits = policy.model(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, expected(ids, attention_mask=mask).logits, rtol=1e-5, atol=5e-5)
        assert close(policy.logprobs(batch()), plain_logprobs(titles.base, titles.adapter))


def test_trainable_policy_has_a_fresh_seeded_adapter_and_gradients(titles: Folders) -> None:
    shape = LoraShape(4, 8, 0.0, "all-linear")
    policy = build_policy(find_base(str(titles.base)), shape, trainable=True, seed=3, **CPU)
    logprob_N = policy.logprobs(batch())
    assert close(logprob_N.detach(), plain_logprobs(titles.base, None))  # a fresh adapter changes nothing
    logprob_N.sum().backward()
    trained = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(weight.grad is not None for weight in trained.values())
    rebuilt = build_policy(find_base(str(titles.base)), shape, trainable=True, seed=3, **CPU)
    rebuilt_weights = dict(rebuilt.model.named_parameters())
    assert all(torch.equal(weight, rebuilt_weights[name]) for name, weight in trained.items())
    with pytest.raises(ValueError, match="has no prompt builder"):
        policy.generate(DOCUMENT)


def test_model_without_forest_support_gets_one_prompt_at_a_time(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bloom", vocab_size=len(byte_level()), hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    policy = build_policy(find_base(str(tmp_path)), **CPU)
    assert not policy.support.forest
    shapes: list[tuple[int, ...]] = []
    policy.model.register_forward_pre_hook(
        lambda module, args, keywords: shapes.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    prompts = [ids.tolist() for ids in examples()[0]]
    answers = policy.generate_from_ids(prompts, byte_level(), SamplingParams((), 3), batch_size=8)
    assert [len(answer.token_ids) for answer in answers] == [3, 3, 3]
    assert shapes == [(1, length) for prompt in (29, 26, 7) for length in (prompt, 1, 1)]


# ---------------------------------------------------------------- the base model


def test_moved_base_model_is_an_error_until_its_new_folder_is_given(tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, byte_level())
    expected = load_policy(folders.adapter).generate(DOCUMENT, max_new_tokens=5)
    moved = tmp_path / "moved"
    folders.base.rename(moved)
    with pytest.raises(UserError) as caught:
        load_policy(folders.adapter)
    assert str(caught.value) == (
        f"{folders.adapter}: its base model is no longer at {folders.base}; give its new place with --base_model"
    )
    assert (
        load_policy(folders.adapter, base_model=str(moved)).generate(DOCUMENT, max_new_tokens=5) == expected
    )
    other = tiny_base(tmp_path / "other", byte_level(), layers=3)
    with pytest.raises(UserError, match=f"it was trained on {folders.base}, which is not {other}"):
        load_policy(folders.adapter, base_model=str(other))


def test_unreachable_base_on_the_hub_is_an_error_with_a_cure(tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, byte_level())
    manifest = folders.adapter / "yeonma.json"
    manifest.write_text(manifest.read_text().replace(str(folders.base), "nobody/nothing"))
    with pytest.raises(
        UserError,
        match=r"nobody/nothing: no such folder, .* or name a folder that has it with --base_model",
    ):
        load_policy(folders.adapter)


@pytest.mark.parametrize("missing", ["yeonma.json", "adapter_model.safetensors", "template.txt"])
def test_adapter_folder_with_a_missing_file_is_refused(missing: str, titles: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(titles.adapter, tmp_path / "OUT"))
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (None, "base", []),
        ("base", "name", 5),
        ("base", "parameters", None),
        (None, "columns", {"title": ["a"]}),
        (None, "columns", ["title"]),
        (None, "trust_remote_code", "yes"),
        (None, "template", "title"),
        ("rules", "cutoff_len", "512"),
        ("rules", "shrink_side", "left"),
        ("rules", "over_limit", {}),
    ],
)
def test_yeonma_json_with_a_value_of_the_wrong_type_is_refused_as_damaged(
    group: str | None, name: str, value: object, titles: Folders, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(titles.adapter, tmp_path / "OUT"))
    manifest = folder / "yeonma.json"
    details = json.loads(manifest.read_text())
    (details[group] if group else details)[name] = value
    manifest.write_text(json.dumps(details))
    with pytest.raises(UserError, match=r"yeonma\.json: damaged \("):
        load_policy(folder)


def test_checkpoint_folder_can_be_loaded_as_an_adapter(
    titles: Folders, loaded: Policy, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(titles.adapter, tmp_path / "OUT" / "checkpoint-3"))
    assert load_policy(folder).generate(DOCUMENT, max_new_tokens=8) == loaded.generate(
        DOCUMENT, max_new_tokens=8
    )


# ---------------------------------------------------------------- yeonma generate


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_generate_writes_answers_and_the_references_that_rows_have(
    titles: Folders, loaded: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    table = [{"document": f"서울 {number} " * number, "title": "제목"} for number in range(1, 8)]
    del table[2]["title"]
    table[3]["title"] = ""
    data.write_text("".join(json.dumps(row) + "\n" for row in table))
    options = ["--max_new_tokens", "6", "--batch_size", "2", "--device", "cpu"]
    assert main(["generate", str(titles.adapter), "--data_path", str(data), *options]) == 0
    captured = capsys.readouterr()
    answers = loaded.generate(table, max_new_tokens=6)
    expected: list[dict[str, object]] = [
        {"row": number, "answer": answer, "reference": "제목"}
        for number, answer in enumerate(answers, start=1)
    ]
    del expected[2]["reference"], expected[3]["reference"]
    assert lines(captured.out) == expected
    assert "answered 7 of 7 rows" in captured.err

    output = tmp_path / "answers.jsonl"
    options += ["--output", str(output), "--limit", "3"]
    assert main(["generate", str(titles.adapter), "--data_path", str(data), *options]) == 0
    assert lines(output.read_text("utf-8")) == expected[:3]
    assert capsys.readouterr().out == ""


def test_generate_writes_answers_before_all_are_computed(titles: Folders, tmp_path: Path) -> None:
    data, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text('{"document": "서울"}\n' * 20)
    from yeonma.commands import generate as verb

    line_counts: list[int] = []

    def record(*_: Any) -> None:
        line_counts.append(output.read_text("utf-8").count("\n"))

    load_unwatched = verb.load_policy
    with pytest.MonkeyPatch.context() as patch:

        def load_watched(*arguments: Any, **options: Any) -> Policy:
            policy = load_unwatched(*arguments, **options)
            policy.model.get_base_model().register_forward_pre_hook(record)
            return policy

        patch.setattr(verb, "load_policy", load_watched)
        command = ["generate", str(titles.adapter), "--data_path", str(data), "--output", str(output)]
        assert main([*command, "--max_new_tokens", "1", "--batch_size", "1"]) == 0
    assert sorted(set(line_counts)) == [0, 4, 8, 12, 16]  # a chunk is four batches


def test_generate_prints_the_answer_to_a_row_or_a_prompt_as_text(
    titles: Folders, loaded: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(titles.adapter), "--max_new_tokens", "7"]
    assert main([*command, "--row", json.dumps(DOCUMENT)]) == 0
    answer = loaded.generate(DOCUMENT, max_new_tokens=7)
    assert capsys.readouterr().out == f"{answer}\n"
    assert main([*command, "--row", json.dumps(DOCUMENT), "--adapter_weights", "false"]) == 0
    base_policy = dataclasses.replace(loaded, adapter_weights=False)
    assert capsys.readouterr().out == f"{base_policy.generate(DOCUMENT, max_new_tokens=7)}\n" != f"{answer}\n"
    output = tmp_path / "answer.jsonl"
    assert main([*command, "--row", json.dumps({**DOCUMENT, "title": "폭풍"}), "--output", str(output)]) == 0
    assert lines(output.read_text("utf-8")) == [{"row": 1, "answer": answer, "reference": "폭풍"}]
    capsys.readouterr()
    assert main([*command, "--prompt", "서울의 아침"]) == 0
    assert capsys.readouterr().out == f"{loaded.complete('서울의 아침', max_new_tokens=7)}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to answer; give one of --data_path, --row and --prompt"),
        (["--row", "{}", "--prompt", "x"], "--row and --prompt are both given"),
        (["--row", "{'document': 'x'}"], "--row: not JSON"),
        (["--row", '{"document": "x"} x'], "--row: more text after the row, at character 19"),
        (["--row", '["x"]'], "--row: a row must be an object, not a list"),
        (["--row", '{"title": "x"}'], '--row: field "document" is missing'),
        (["--prompt", ""], "--prompt: it is empty"),
        (["--prompt", "x", "--output", "nowhere/x"], "--output nowhere/x: no such folder"),
        (["--data_path", "rows.jsonl", "--output", "rows.jsonl"], "this is the data file itself"),
        (["--data_path", "bad.jsonl"], "bad.jsonl: there are more"),
        (["--data_path", "bad.jsonl", "--limit", "2"], 'bad.jsonl:2: field "document" is missing'),
    ],
)
def test_generate_refuses_wrong_options_before_loading_the_model(
    options: list[str],
    message: str,
    titles: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"document": "x"}\n')
    Path("bad.jsonl").write_text('{"document": "x"}\n' + '{"documant": "x"}\n' * 30)

    def no_loading(*_: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("yeonma.model.load.load_base", no_loading)
    assert main(["generate", str(titles.adapter), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert Path("rows.jsonl").read_text() == '{"document": "x"}\n'


def test_generate_lists_the_rows_that_are_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_adapter(tmp_path, byte_level(), cutoff_len=150).adapter
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"document": "가 " * count}) + "\n" for count in (300, 1, 300)))
    assert main(["generate", str(folder), "--data_path", str(data), "--max_new_tokens", "2"]) == 0
    assert "2 of 3 rows are shortened to fit cutoff_len 150: 1, 3\n" in capsys.readouterr().err


# ---------------------------------------------------------------- Python


def test_import_yeonma_does_not_import_torch_transformers_or_peft() -> None:
    code = (
        "import sys, yeonma\n"
        "names = set(dir(yeonma)) >= set(yeonma.__all__)\n"
        "print(names, yeonma.Template.parse('{a} {b}').answer_field, yeonma.UserError.__name__)\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True b UserError\n[]\n"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        yeonma.lod  # noqa: B018


def test_yeonma_load_returns_a_policy_for_an_adapter_folder(titles: Folders, loaded: Policy) -> None:
    answer = yeonma.load(titles.adapter, device="cpu").generate(DOCUMENT, max_new_tokens=4)
    assert answer == loaded.generate(DOCUMENT, max_new_tokens=4)
    assert yeonma.Loaded is Policy


def test_yeonma_sft_takes_settings_as_keywords_and_returns_the_folder(
    titles: Folders, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="batchsize: unknown setting; did you mean"):
        yeonma.sft(base_model="x", data_path="y", output_dir="z", batchsize=3)  # type: ignore[call-arg]
    data = tmp_path / "rows.jsonl"
    data.write_text('{"document": "서울의 아침", "title": "첫 영하"}\n' * 4)
    folder = yeonma.sft(
        base_model=titles.base,
        data_path=data,
        output_dir=tmp_path / "OUT",
        max_steps=1,
        batch_size=2,
        card_rows=0,
    )
    assert folder.folder == tmp_path / "OUT"
    assert (folder.steps, folder.card) == (1, tmp_path / "OUT" / "README.md")
    assert isinstance(yeonma.load(folder).generate(DOCUMENT, max_new_tokens=3), str)

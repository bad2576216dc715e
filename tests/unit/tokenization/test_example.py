from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tokenizers import CHATML, CORPUS, byte_level, sentencepiece_bpe, unigram
from yeonma.bounded import template_text
from yeonma.data.rows import Row
from yeonma.data.template import Template, answer_text, load_template, prompt_text
from yeonma.errors import UserError
from yeonma.tokenization.example import Example, LeftOut, TokenRules, answer_tokens, check_rules
from yeonma.tokenization.example_encoder import encode, encode_prompt, encode_prompts, largest_keep
from yeonma.tokenization.text_encoder import TextEncoder

Make = Callable[[], PreTrainedTokenizerFast]

TOKENIZERS: dict[str, Make] = {
    "byte-level": byte_level,
    "sentencepiece-first": sentencepiece_bpe,
    "sentencepiece-always": lambda: sentencepiece_bpe("always"),
    "unigram": unigram,
}
each_tokenizer = pytest.mark.parametrize("make", list(TOKENIZERS.values()), ids=list(TOKENIZERS))

PLAIN = load_template("title")
STRADDLING = Template.parse("Write a title.\n\n{document}\n\nTitle: {title}")
TURNS = Template.parse("[system]\nWrite a title.\n[user]\n본문: {document}\n[assistant]\n{title}\n")
TURN_LIST = load_template("chat")
each_template = pytest.mark.parametrize(
    "template", [PLAIN, STRADDLING, TURNS], ids=["plain", "straddling", "turns"]
)

RULES = TokenRules(cutoff_len=4096)

TEXTS = [
    ("A storm closed the harbour on Monday, and forty boats waited.", "Storm closes harbour"),
    ("월요일에 폭풍이 항구를 닫았고, 배 마흔 척이 기다렸다.", "폭풍에 닫힌 항구"),
    ("서울의 아침 기온이\n영하로 떨어졌다. {title} {{x}}", "서울, 올겨울 첫 영하"),
    ("The town council voted to keep the old library.\n", " leading space kept, 한 해 더"),
    ("시의회는 오래된 도서관을 한 해 더 열어 두기로 했다. ", "\nA line before"),
]


def rows_of(*pairs: tuple[str, str]) -> list[Row]:
    return [
        Row(number, {"document": document, "title": title}, f"train.jsonl:{number}")
        for number, (document, title) in enumerate(pairs, start=1)
    ]


def articles(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    sentences = [text.replace("\n", " ") for text in CORPUS[:3] + CORPUS[5:8]]
    return rows_of(
        *(
            (" ".join(rng.choices(sentences, k=rng.randint(15, 60))), f"제목 {n}, title {n}")
            for n in range(count)
        )
    )


def turn_list(*turns: tuple[str, str], number: int = 1) -> Row:
    messages = [{"role": role, "content": text} for role, text in turns]
    return Row(number, {"messages": messages}, f"chat.jsonl:{number}")


def encoded(
    template: Template, rows: list[Row], tokenizer: PreTrainedTokenizerBase, rules: TokenRules = RULES
) -> list[Example | LeftOut]:
    return encode([template.render(row) for row in rows], rows, tokenizer, rules)


def examples(
    template: Template, rows: list[Row], tokenizer: PreTrainedTokenizerBase, rules: TokenRules = RULES
) -> list[Example]:
    actual = encoded(template, rows, tokenizer, rules)
    assert not [outcome for outcome in actual if isinstance(outcome, LeftOut)]
    return [outcome for outcome in actual if isinstance(outcome, Example)]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    """Decoded text without the start token (SentencePiece decoders put a space after it)."""
    return (
        str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)).removeprefix("<s>").removeprefix(" ")
    )


def trained_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode(example.token_ids[example.trained].tolist()))


# Prompts: generation gets the same tokens as training


@each_tokenizer
@each_template
def test_generation_prompt_ids_equal_training_prompt_ids(make: Make, template: Template) -> None:
    tokenizer, rows = make(), rows_of(*TEXTS)
    without_answer = [template.render(row, with_answer=False) for row in rows]
    prompts = encode_prompts(without_answer, rows, tokenizer, RULES, 20)
    for example, prompt in zip(examples(template, rows, tokenizer), prompts, strict=True):
        assert example.token_ids[: example.prompt_length].tolist() == prompt.tolist()
        assert example.trained.tolist() == [False] * len(prompt) + [True] * (
            len(example.token_ids) - len(prompt)
        )


@each_tokenizer
def test_prompt_ids_equal_the_tokenizers_without_eos(make: Make) -> None:
    tokenizer, rows = make(), rows_of(*TEXTS)
    for row, example in zip(rows, examples(PLAIN, rows, tokenizer), strict=True):
        expected = tokenizer(prompt_text(PLAIN.render(row)))["input_ids"]
        expected = expected[:-1] if expected[-1] == tokenizer.eos_token_id else expected
        assert example.token_ids[: example.prompt_length].tolist() == expected


@each_tokenizer
def test_chat_prompt_ids_equal_the_rendered_chat_template(make: Make) -> None:
    tokenizer, (row,) = make(), rows_of(TEXTS[1])
    (example,) = examples(TURNS, [row], tokenizer)
    messages = [
        {"role": "system", "content": "Write a title."},
        {"role": "user", "content": f"본문: {TEXTS[1][0]}"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.token_ids[: example.prompt_length].tolist() == expected


# Answers: lossless decoding and end tokens


@each_tokenizer
@pytest.mark.parametrize("template", [PLAIN, STRADDLING], ids=["plain", "straddling"])
def test_decoded_example_is_prompt_answer_and_eos(make: Make, template: Template) -> None:
    tokenizer, rows = make(), rows_of(*TEXTS[:3])
    for row, example in zip(rows, examples(template, rows, tokenizer), strict=True):
        rendered = template.render(row)
        whole = prompt_text(rendered) + answer_text(rendered) + tokenizer.eos_token
        if "<unk>" in tokenizer.decode(tokenizer(whole)["input_ids"]):
            continue  # characters outside the vocabulary are lost
        assert text_of(tokenizer, example.token_ids) == whole


@each_tokenizer
def test_every_answer_ends_with_one_trained_end_token(make: Make) -> None:
    tokenizer, rows = make(), rows_of(*TEXTS)
    for template in (PLAIN, STRADDLING, TURNS):
        for example in examples(template, rows, tokenizer):
            end_ids = set(answer_tokens(tokenizer, RULES if template is TURNS else None).stop_ids)
            assert example.trained[-1]
            assert [int(number) in end_ids for number in example.token_ids[example.trained]].count(True) == 1
            assert int(example.token_ids[-1]) in end_ids


def test_add_eos_token_false_adds_no_eos() -> None:
    tokenizer, rows = byte_level(), rows_of(TEXTS[0])
    rules = TokenRules(cutoff_len=4096, add_eos_token=False)
    assert trained_text(tokenizer, examples(PLAIN, rows, tokenizer, rules)[0]) == "Storm closes harbour"
    assert (
        trained_text(tokenizer, examples(TURNS, rows, tokenizer, rules)[0])
        == "Storm closes harbour<|im_end|>"
    )


def test_eos_written_in_the_template_is_not_added_again() -> None:
    tokenizer, rows = sentencepiece_bpe(), rows_of(TEXTS[0])
    template = Template.parse("{document}\nTitle:{title}</s>")
    assert trained_text(tokenizer, examples(template, rows, tokenizer)[0]) == "Storm closes harbour</s>"


def test_train_on_inputs_trains_all_but_the_first_token() -> None:
    rules = TokenRules(cutoff_len=4096, train_on_inputs=True)
    for template in (PLAIN, TURNS):
        (example,) = examples(template, rows_of(TEXTS[0]), byte_level(), rules)
        assert example.trained.tolist() == [False] + [True] * (len(example.token_ids) - 1)


def test_a_tokenizer_without_eos_is_an_error() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encoded(PLAIN, rows_of(TEXTS[0]), tokenizer)


# Straddling tokens


@pytest.mark.parametrize("make", [byte_level, unigram])
def test_straddling_answer_keeps_the_prompt_ids(make: Make) -> None:
    tokenizer = make()
    template = {"▁": Template.parse("{document}\n### 본문:\n{title}")}.get(
        tokenizer.convert_ids_to_tokens(2), STRADDLING
    )
    (row,) = rows_of((TEXTS[0][0], "서울의 title"))
    (example,) = examples(template, [row], tokenizer)
    prompt, whole = (tokenizer(text)["input_ids"] for text in _prompt_and_whole(template, row))
    prompt = prompt[:-1] if prompt[-1] == tokenizer.eos_token_id else prompt
    assert whole[: len(prompt)] != prompt  # a token does straddle the border of prompt and answer
    assert example.straddles
    assert example.token_ids[: example.prompt_length].tolist() == prompt
    assert trained_text(tokenizer, example) == "서울의 title" + str(tokenizer.eos_token)


def _prompt_and_whole(template: Template, row: Row) -> tuple[str, str]:
    rendered = template.render(row)
    return prompt_text(rendered), prompt_text(rendered) + answer_text(rendered)


@each_tokenizer
def test_decoded_continuation_is_prefix_plus_text(make: Make) -> None:
    encoder = TextEncoder.of(make())
    texts = ["서울, 올겨울", " a storm", "\n\nboats", "x", "0 9", "  two spaces", "<s> </s>", "를"]
    for prompt, text in product(["### 제목: ", "Title:", "본문\n", "x"], texts):
        (prefix_ids,) = encoder.batch([prompt])
        ids = prefix_ids + encoder.continuation(prefix_ids, text)
        assert encoder.decode(ids) == encoder.decode(prefix_ids) + text


def test_continuation_that_fuses_with_every_prefix_is_spelled_out() -> None:
    # Here, "a" fuses with every prefix that a continuation is tried after.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fused = ["Ċa", "xa", "0a", ".a", "Ģa"]
    merges = [(pair[0], pair[1]) for pair in fused]
    vocabulary = {token: number for number, token in enumerate([*letters, *fused, "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    encoder = TextEncoder.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))
    prefix_ids = encoder.batch(["x"])[0]
    ids = encoder.continuation(prefix_ids, "a 가", as_text=True)
    assert encoder.decode(prefix_ids + ids) == "xa 가"
    assert ids[0] == vocabulary["a"]


# Special-token text inside data


@each_tokenizer
@each_template
def test_special_token_text_in_data_is_encoded_as_ordinary_text(make: Make, template: Template) -> None:
    tokenizer = make()
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    special.remove("<unk>") if "<unk>" in special else None
    (row,) = rows_of(("A storm " + " ".join(special) + " closed the harbour", f"Storm {special[-1]} boats"))
    (example,) = examples(template, [row], tokenizer)
    (without_special,) = examples(template, rows_of(("A storm closed the harbour", "Storm boats")), tokenizer)
    special_ids = {tokenizer.convert_tokens_to_ids(token) for token in special}

    def special_ids_in(example: Example) -> list[int]:
        return [number for number in example.token_ids.tolist() if number in special_ids]

    assert example.special_text == len(special) + 1
    assert special_ids_in(example) == special_ids_in(without_special)
    prompt = encode_prompt(template.render(row, with_answer=False), row, tokenizer, RULES, 1)
    assert example.token_ids[: example.prompt_length].tolist() == prompt.tolist()
    if "<unk>" not in tokenizer.decode(example.token_ids.tolist()):
        text = text_of(tokenizer, example.token_ids)
        assert row.values["document"] in text
        assert str(row.values["title"]) in text


@each_tokenizer
def test_decoding_keeps_text_around_special_token_text(make: Make) -> None:
    tokenizer = make()
    (row,) = rows_of(("</s>a</s> b</s>\nc", "</s>d</s>"))
    (example,) = examples(Template.parse("{document} Title:{title}"), [row], tokenizer)
    assert text_of(tokenizer, example.token_ids) == "</s>a</s> b</s>\nc Title:</s>d</s>" + str(
        tokenizer.eos_token
    )


def test_special_tokens_written_in_the_template_stay_special() -> None:
    tokenizer, (row,) = byte_level(), rows_of(("a <|im_end|> b", "c"))
    template = Template.parse(
        "<|im_start|>user\n{document}<|im_end|>\n<|im_start|>assistant\n{title}<|im_end|>"
    )
    (example,) = examples(template, [row], tokenizer)
    special_ids = [number for number in example.token_ids.tolist() if number < 3]
    assert special_ids == [1, 2, 1, 2, 0]
    assert example.special_text == 1


def test_special_token_text_across_template_and_data_is_ordinary_text() -> None:
    tokenizer, (row,) = sentencepiece_bpe(), rows_of(("/s> and more", "c"))
    (example,) = examples(Template.parse("a <{document}\n{title}"), [row], tokenizer)
    assert example.token_ids.tolist().count(2) == 1  # only EOS
    assert example.special_text == 1


def test_turns_of_only_special_token_text_are_encoded_as_text() -> None:
    tokenizer = byte_level()
    row = turn_list(
        ("user", "<|im_start|>"), ("assistant", "user"), ("user", "user"), ("assistant", "<|im_end|>")
    )
    (example,) = examples(TURN_LIST, [row], tokenizer)
    assert example.token_ids[0] == 1
    assert [number for number in example.token_ids.tolist() if number < 3] == [1, 2, 1, 2, 1, 2, 1, 2]
    assert example.special_text == 2
    assert trained_text(tokenizer, example) == "user<|im_end|><|im_end|><|im_end|>"


@each_tokenizer
def test_special_token_text_in_the_prompt_does_not_change_answer_ids(make: Make) -> None:
    tokenizer = make()
    rows = rows_of(("서울 🙂 아침", "storm 제목"), ("</s> 서울 🙂 <unk> <|im_end|> 아침", "storm 제목"))
    without_special, with_special = (
        example.token_ids[example.trained].tolist() for example in examples(PLAIN, rows, tokenizer)
    )
    assert with_special == without_special


def test_text_that_the_tokenizer_normalises_keeps_its_merged_tokens() -> None:
    tokenizer = byte_level()
    rows = rows_of(("cafe\u0301 storm <|im_end|> cafe\u0301 storm", "x"))
    (example,) = examples(PLAIN, rows, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(example.token_ids.tolist())
    assert "caf\u00e9 storm <|im_end|> caf\u00e9 storm" in text_of(tokenizer, example.token_ids)
    assert tokens.count("orm") == 2


# unigram has no byte fallback for this syllable
@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
def test_continuation_after_a_long_prefix_of_byte_tokens_is_lossless(make: Make) -> None:
    encoder = TextEncoder.of(make())
    (prefix_ids,) = encoder.batch(["storm 서울 " * 50 + "뷁뷁뷁뷁뷁뷁뷁뷁뷁뷁뷁뷁뷁뷁뷁"])
    ids = encoder.continuation(prefix_ids, "뷁 title")
    assert encoder.decode(prefix_ids + ids) == encoder.decode(prefix_ids) + "뷁 title"


def test_continuation_has_no_dummy_prefix_if_newline_is_an_added_token() -> None:
    tokenizer = sentencepiece_bpe("always")
    tokenizer.add_tokens(["\n"])  # as in Gemma: the text after it is encoded like a new text
    encoder = TextEncoder.of(tokenizer)
    (prefix_ids,) = encoder.batch(["Title:"])
    ids = prefix_ids + encoder.continuation(prefix_ids, "storm")
    assert encoder.decode(ids) == encoder.decode(prefix_ids) + "storm"


# BOS


@pytest.mark.parametrize("written", ["", "<s>", "<s><s>"])
def test_example_has_exactly_one_bos(written: str) -> None:
    tokenizer, rows = sentencepiece_bpe(), rows_of(TEXTS[1])
    template = Template.parse(written + "{document}\n{title}")
    (example,) = examples(template, rows, tokenizer)
    assert example.token_ids.tolist().count(1) == 1
    assert example.token_ids[0] == 1
    tokenizer.chat_template = written + "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (example,) = examples(TURNS, rows, tokenizer)
    assert example.token_ids.tolist().count(1) == 1


# Turn lists


def test_a_turn_list_trains_exactly_its_assistant_turns() -> None:
    tokenizer = byte_level()
    row = turn_list(
        ("system", "x"),
        ("user", "a"),
        ("assistant", "boats"),
        ("user", "b"),
        ("assistant", "항구"),
        ("user", "c"),
    )
    (example,) = examples(TURN_LIST, [row], tokenizer)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    start, end, newline = 1, 2, ids("\n")
    expected = [
        (False, [start, *ids("system\nx"), end, *newline, start, *ids("user\na"), end, *newline]),
        (False, [start, *ids("assistant\n")]),
        (True, [*ids("boats"), end]),
        (False, [*newline, start, *ids("user\nb"), end, *newline, start, *ids("assistant\n")]),
        (True, [*ids("항구"), end]),
    ]
    assert example.token_ids.tolist() == [number for _, part in expected for number in part]
    assert example.trained.tolist() == [trained for trained, part in expected for _ in part]
    assert example.prompt_length == len(example.token_ids) - len(expected[-1][1])


def test_each_turns_prompt_ids_equal_those_of_generation() -> None:
    for tokenizer in (byte_level(), sentencepiece_bpe(), unigram()):
        turns = [("user", "A storm"), ("assistant", "서울"), ("user", "boats"), ("assistant", "제목")]
        actual = examples(TURN_LIST, [turn_list(*turns)], tokenizer)
        prompts = [
            example.token_ids[:at].tolist()
            for example in actual
            for at in np.flatnonzero(np.diff(example.trained.astype(int), prepend=0) == 1)
        ]
        for turn_count, expected in zip((1, 3), prompts, strict=True):
            row = turn_list(*turns[:turn_count])
            prompt = encode_prompt(TURN_LIST.render(row, with_answer=False), row, tokenizer, RULES, 8)
            assert expected == prompt.tolist()


def test_chat_template_without_end_tokens_gives_one_example_with_eos_per_answer() -> None:
    tokenizer = unigram()
    row = turn_list(("user", "a"), ("assistant", "boats"), ("user", "b"), ("assistant", "storm"))
    actual = examples(TURN_LIST, [row], tokenizer)
    assert [trained_text(tokenizer, example) for example in actual] == ["boats</s>", "storm</s>"]
    assert [example.row for example in actual] == [1, 1]
    assert int(actual[1].token_ids.tolist().count(1)) == 1


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('/think')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n[think]\n' }}{% endif %}"
)


def test_chat_template_that_rewrites_earlier_turns_gives_one_example_per_answer() -> None:
    tokenizer = byte_level(THINKING)
    row = turn_list(("user", "a"), ("assistant", "why /think m"), ("user", "b"), ("assistant", "user x"))
    first, second = examples(TURN_LIST, [row], tokenizer)
    assert trained_text(tokenizer, first) == "why /think m<|im_end|>"
    assert trained_text(tokenizer, second) == "user x<|im_end|>"
    assert text_of(tokenizer, second.token_ids[: second.prompt_length]) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nm<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[think]\n"
    )


def test_chat_template_text_between_prompt_and_answer_is_trained() -> None:
    stub = CHATML.replace(
        "message['content']", "('[final]' if message['role'] == 'assistant' else '') + message['content']"
    )
    tokenizer = byte_level(stub)
    (example,) = examples(TURNS, rows_of(TEXTS[0]), tokenizer)
    assert trained_text(tokenizer, example) == "[final]Storm closes harbour<|im_end|>"


def test_assistant_turn_at_the_start_is_not_trained() -> None:
    tokenizer = byte_level()
    row = turn_list(("assistant", "storm"), ("user", "a"), ("assistant", "boats"))
    (example,) = examples(TURN_LIST, [row], tokenizer)
    assert trained_text(tokenizer, example) == "boats<|im_end|>"


def test_chat_template_gets_a_fixed_date() -> None:
    dated = "\n{% if true %}\n{{ strftime_now('%d %b %Y') }}{% endif %}"
    tokenizer = byte_level(dated + CHATML)
    (example,) = examples(TURNS, rows_of(TEXTS[0]), tokenizer)
    assert text_of(tokenizer, example.token_ids).startswith("\n26 Jul 2024<|im_start|>")


# Malicious, failing and missing chat templates


def test_endless_chat_template_times_out_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_text, "CHAT_TEMPLATE", replace(template_text.CHAT_TEMPLATE, seconds=0.1))
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="did not end within"):
        encoded(TURNS, rows_of(TEXTS[0]), byte_level(endless))


@pytest.mark.parametrize(
    "chat_template",
    [
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no system role') }}",
        "{{ ''.__class__.__mro__[1] }}",
        "{% if %}",
    ],
)
def test_failing_chat_template_error_names_all_rows(chat_template: str) -> None:
    with pytest.raises(UserError) as caught:
        encoded(TURNS, rows_of(*TEXTS[:2]), byte_level(chat_template))
    assert [problem.place for problem in caught.value.problems] == ["train.jsonl:1", "train.jsonl:2"]


def test_a_chat_template_that_drops_the_answer_is_an_error() -> None:
    with pytest.raises(UserError, match="does not write the assistant's text"):
        encoded(
            TURNS,
            rows_of(TEXTS[0]),
            byte_level("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"),
        )


def test_missing_chat_template_is_an_error_only_for_turns() -> None:
    tokenizer = byte_level(None)
    assert examples(PLAIN, rows_of(TEXTS[0]), tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        encoded(TURNS, rows_of(TEXTS[0]), tokenizer)


# The token limit


@each_tokenizer
@pytest.mark.parametrize("template", [PLAIN, STRADDLING, TURNS], ids=["plain", "straddling", "turns"])
def test_shortening_cuts_only_the_document(make: Make, template: Template) -> None:
    tokenizer, rows = make(), articles(50)
    rules = TokenRules(cutoff_len=200)
    whole, short = examples(template, rows, tokenizer), examples(template, rows, tokenizer, rules)
    empty = examples(template, rows_of(("항구", "x")), tokenizer)[0]
    frame = text_of(tokenizer, empty.token_ids[: empty.prompt_length]).split("항구")
    assert len(frame) == 2
    for row, before, after in zip(rows, whole, short, strict=True):
        assert len(after.token_ids) <= 200 < len(before.token_ids)
        assert after.token_ids[after.trained].tolist() == before.token_ids[before.trained].tolist()
        text = text_of(tokenizer, after.token_ids[: after.prompt_length])
        assert text.startswith(frame[0]) and text.endswith(frame[1])
        document = str(row.values["document"])
        remaining = text[len(frame[0]) : len(text) - len(frame[1])]
        assert document[: len(document) - after.cut_characters].strip() == remaining.strip()


@each_tokenizer
@pytest.mark.parametrize("template", [PLAIN, TURNS], ids=["plain", "turns"])
def test_shortened_prompt_is_the_same_in_generation_and_training(make: Make, template: Template) -> None:
    tokenizer, rows, rules = make(), articles(8), TokenRules(cutoff_len=230)
    for row, example in zip(rows, examples(template, rows, tokenizer, rules), strict=True):
        answer = len(example.token_ids) - example.prompt_length
        prompt = encode_prompt(template.render(row, with_answer=False), row, tokenizer, rules, answer)
        assert example.cut_characters > 0
        assert example.token_ids[: example.prompt_length].tolist() == prompt.tolist()


@pytest.mark.parametrize(("side", "rest"), [("end", "0123"), ("start", "6789"), ("middle", "0189")])
def test_shrink_side_loses_only_as_many_characters_as_needed(side: str, rest: str) -> None:
    tokenizer, (row,) = byte_level(), rows_of(("0123456789", "x"))
    template = Template.parse("{document}\n{title}")
    rules = TokenRules(cutoff_len=7, shrink_side=side)  # type: ignore[arg-type]
    (example,) = examples(template, [row], tokenizer, rules)
    assert text_of(tokenizer, example.token_ids) == f"{rest}\nx<|endoftext|>"
    assert (len(example.token_ids), example.cut_characters) == (7, 6)


def test_longest_prompt_field_is_cut_unless_shrink_names_another() -> None:
    tokenizer, template = byte_level(), Template.parse("{a}|{b}\n{title}")
    row = Row(1, {"a": "0" * 20, "b": "9" * 10, "title": "x"}, "a:1")
    texts = {}
    for shrink in (None, "b"):
        (example,) = examples(template, [row], tokenizer, TokenRules(cutoff_len=26, shrink=shrink))
        texts[shrink] = text_of(tokenizer, example.token_ids)
    assert texts == {
        None: "0" * 12 + "|" + "9" * 10 + "\nx<|endoftext|>",
        "b": "0" * 20 + "|" + "99" + "\nx<|endoftext|>",
    }


def test_turn_list_is_shortened_in_its_longest_non_assistant_turn() -> None:
    tokenizer = byte_level()
    turns = [("user", "0" * 40), ("assistant", "1" * 60), ("user", "2" * 50), ("assistant", "x")]
    (example,) = examples(TURN_LIST, [turn_list(*turns)], tokenizer, TokenRules(cutoff_len=150))
    text = text_of(tokenizer, example.token_ids)
    assert len(example.token_ids) == 150
    assert "0" * 40 in text and "1" * 60 in text and "2" * 50 not in text and "2" in text
    assert trained_text(tokenizer, example) == "1" * 60 + "<|im_end|>x<|im_end|>"


def test_long_turn_list_split_per_answer_trains_each_answer_once() -> None:
    tokenizer = byte_level(THINKING)
    turns = [("user", "0" * 90), ("assistant", "1 /think 2"), ("user", "3" * 90), ("assistant", "4")]
    turns += [("user", "5"), ("assistant", "6")]
    actual = examples(TURN_LIST, [turn_list(*turns)], tokenizer, TokenRules(cutoff_len=140))
    assert [trained_text(tokenizer, example) for example in actual] == [
        "1 /think 2<|im_end|>",
        "4<|im_end|>",
        "6<|im_end|>",
    ]
    assert [example.cut_characters + example.dropped_turns > 0 for example in actual] == [False, True, True]


def test_row_that_cannot_be_shortened_to_fit_is_left_out_or_an_error() -> None:
    tokenizer = byte_level()
    rows = rows_of(("0123", "x"), ("0123", "x" * 30))
    template, rules = Template.parse("{document}\n{title}"), TokenRules(cutoff_len=20)
    first, second = encoded(template, rows, tokenizer, rules)
    assert isinstance(first, Example)
    assert isinstance(second, LeftOut)
    assert (second.row, second.place) == (2, "train.jsonl:2")
    with pytest.raises(UserError, match=r"train\.jsonl:2: 36 tokens"):
        encoded(template, rows, tokenizer, TokenRules(cutoff_len=20, over_limit="error"))


def test_shortened_field_keeps_at_least_one_character() -> None:
    tokenizer, rows = byte_level(), rows_of(("0123", "x"))
    template = Template.parse("{document}\n{title}")
    (example,) = examples(template, rows, tokenizer, TokenRules(cutoff_len=4))
    assert text_of(tokenizer, example.token_ids) == "0\nx<|endoftext|>"
    (left_out,) = encoded(template, rows, tokenizer, TokenRules(cutoff_len=3))
    assert isinstance(left_out, LeftOut)


def test_generation_prompt_that_cannot_fit_is_an_error() -> None:
    tokenizer, (row,) = byte_level(), rows_of(TEXTS[0])
    prompt = PLAIN.render(row, with_answer=False)
    with pytest.raises(UserError, match=r"train\.jsonl:1: too long"):
        encode_prompt(prompt, row, tokenizer, TokenRules(cutoff_len=40), 20)
    with pytest.raises(UserError, match="leave no room"):
        encode_prompt(prompt, row, tokenizer, TokenRules(cutoff_len=40), 40)


def test_invalid_shrink_fields_are_errors() -> None:
    check_rules(PLAIN, TokenRules(cutoff_len=10, shrink="document"))
    with pytest.raises(UserError, match=r'"documnt".*did you mean "document"'):
        check_rules(PLAIN, TokenRules(cutoff_len=10, shrink="documnt"))
    with pytest.raises(UserError, match="not a prompt field"):
        check_rules(PLAIN, TokenRules(cutoff_len=10, shrink="title"))
    with pytest.raises(UserError, match="turn list"):
        check_rules(TURN_LIST, TokenRules(cutoff_len=10, shrink="messages"))


def test_largest_keep_is_exact_for_growing_counts_in_at_most_16_evaluations() -> None:
    rng = random.Random(3)
    for _ in range(200):
        length = rng.randint(1, 4000)
        token_counts = np.cumsum([rng.choice((0, 0, 1, 1, 2)) for _ in range(length)]) + rng.randint(0, 30)
        evaluated: list[int] = []

        def count(
            keep: int, token_counts: np.ndarray = token_counts, evaluated: list[int] = evaluated
        ) -> int:
            evaluated.append(keep)
            return int(token_counts[keep - 1])

        budget = rng.randint(0, int(token_counts[-1]) - 1) if token_counts[-1] > 0 else -1
        fitting = [keep for keep in range(1, length) if token_counts[keep - 1] <= budget]
        assert largest_keep(count, length, int(token_counts[-1]), budget) == max(fitting, default=0)
        assert len(evaluated) <= 16


# The tokenizer's own state


def test_truncation_and_padding_set_on_the_tokenizer_are_ignored() -> None:
    tokenizer, rows = byte_level(), rows_of(*TEXTS)
    before = [example.token_ids.tolist() for example in examples(PLAIN, rows, tokenizer)]
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer(["a", "b b b"], padding=True, truncation=True, max_length=2)
    after = [example.token_ids.tolist() for example in examples(PLAIN, rows, tokenizer)]
    assert before == after


def test_slow_tokenizer_works_except_for_special_token_text_in_data() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    rows = rows_of(("서울 storm", "제목"), ("a </s> b", "x"))
    (example,) = examples(PLAIN, rows[:1], tokenizer)
    assert text_of(tokenizer, example.token_ids) == _prompt_and_whole(PLAIN, rows[0])[1] + "</s>"
    with pytest.raises(UserError, match=r"train\.jsonl:2: special-token text"):
        encoded(PLAIN, rows, tokenizer)


def test_batches_and_single_rows_give_the_same_examples() -> None:
    for make in TOKENIZERS.values():
        tokenizer, rows = make(), rows_of(*TEXTS, ("a </s> b", "<|im_end|>"))
        for template in (PLAIN, STRADDLING, TURNS):
            together = examples(template, rows, tokenizer)
            alone = [example for row in rows for example in examples(template, [row], tokenizer)]
            assert [example.token_ids.tolist() for example in together] == [
                example.token_ids.tolist() for example in alone
            ]


def test_start_tokens_other_than_bos_are_added_once() -> None:
    tokenizer, rows = byte_level(), rows_of(TEXTS[0])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|im_end|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2), ("<|endoftext|>", 0)],
    )
    for template in (PLAIN, Template.parse("<|im_start|><|im_end|>{document}\n{title}")):
        (example,) = examples(template, rows, tokenizer)
        assert example.token_ids[:2].tolist() == [1, 2]
        assert [number for number in example.token_ids.tolist() if number < 3] == [1, 2, 0]


# Stop ids


def test_stop_ids_are_eos_and_the_end_of_a_turn() -> None:
    assert answer_tokens(byte_level(), None, [7, 0]).stop_ids == (0, 7)
    assert answer_tokens(byte_level(), None).stop_ids == (0,)
    assert answer_tokens(byte_level(), RULES).stop_ids == (0, 2)
    assert answer_tokens(sentencepiece_bpe(), RULES).stop_ids == (2,)
    assert answer_tokens(unigram(), RULES).stop_ids == (1,)

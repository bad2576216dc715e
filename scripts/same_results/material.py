"""What the runs of same_results are made on: two tiny models with their tokenizers, rows of every kind, a template.

Everything is drawn from fixed seeds, by the libraries alone: the same versions of them write the same bytes.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ENGLISH = (
    "A storm closed the harbour on Monday",
    "Forty boats waited for the wind to fall",
    "The town council keeps the old library open",
    "Nine beekeepers moved their hives to the roof",
    "Researchers taught a small model to write titles",
    "The night train to the coast runs again",
    "A baker won the prize for the longest loaf",
    "Rain filled the reservoir for the first time in years",
)
KOREAN = (
    "월요일에 폭풍이 항구를 닫았다",
    "배 마흔 척이 바람이 잦아들기를 기다렸다",
    "시의회는 오래된 도서관을 열어 두기로 했다",
    "양봉가 아홉 명이 벌통을 옥상으로 옮겼다",
    "연구진은 작은 모델에게 제목 쓰는 법을 가르쳤다",
    "바다로 가는 밤 기차가 다시 달린다",
    "서울의 아침 기온이 영하로 떨어졌다",
    "몇 해 만에 처음으로 저수지가 가득 찼다",
)
FRAMES = (
    "당신은 주어진 본문으로부터 적절한 제목을 생성하는 제목 생성기입니다. 본문이 주어지면 제목을 만드세요.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\n### Input:\n### Response:\n### 본문:\n### 제목:\nsystem user assistant 0123456789 {}[]<>|",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>' + message['content'] + '<</SYS>>' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)

HEADLINE = """[system]
You write headlines for the {desk} desk.
[user]
{body}
[assistant]
{headline}
"""
"""A template with turns, which the model's own chat template writes, for columns that no built-in template knows."""

VOCABULARY = 600
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

Row = Mapping[str, object]


def write_material(folder: Path) -> None:
    """Two models in `models/`, rows and a template in `data/`."""
    write_model(folder / "models" / "llama", "llama", metaspace_tokenizer(), num_key_value_heads=4)
    write_model(folder / "models" / "qwen", "qwen3", byte_level_tokenizer(), num_key_value_heads=2)
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "headline.txt").write_text(HEADLINE, encoding="utf-8")
    (data / "damaged.jsonl").write_text('{"document": "a text", "title": \n', encoding="utf-8")
    for name, rows in {
        "titles": titles(),
        "unseen": titles(count=6, seed=1),
        "headlines": headlines(),
        "instructions": instructions(),
        "chats": chats(),
        "pairs": pairs(),
        "dialogues": dialogues(),
        "labels": labels(),
    }.items():
        write_rows(data / f"{name}.jsonl", rows)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_model(folder: Path, family: str, tokenizer: Any, **shape: int) -> None:
    """Weights are drawn wide, so that a token that sees one token too many moves the results by far more than
    rounding does."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = AutoConfig.for_model(family, **SHAPE, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05 if "lm_head" in name else 0.15, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_level_tokenizer() -> Any:
    """Byte-level BPE like Qwen's: no start token, and an end of text that is not the end of a turn."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((*ENGLISH, *KOREAN, *FRAMES), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|endoftext|>", chat_template=CHATML
    )


def metaspace_tokenizer() -> Any:
    """BPE like Llama 2's: `<s>` in front, also in its chat template, blanks as `▁`, and bytes for what it lacks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rough = Tokenizer(models.BPE())
    rough.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=340, show_progress=False)
    rough.train_from_iterator((*ENGLISH, *KOREAN, *FRAMES), trainer)
    trained = json.loads(rough.to_str())["model"]
    special = ("<unk>", "<s>", "</s>")
    pieces = [piece for piece in sorted(trained["vocab"], key=trained["vocab"].get) if "\n" not in piece]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(merge) for merge in trained["merges"] if "\n" not in "".join(merge)]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=INSTRUCT,
    )


def article(draw: random.Random, number: int) -> tuple[str, str]:
    """A text of one to five sentences, Korean or English in turn, and its first sentence's words as a title."""
    sentences = (KOREAN, ENGLISH)[number % 2]
    chosen = [draw.choice(sentences) for _ in range(draw.randint(1, 5))]
    return f"{number}. " + " ".join(f"{sentence}." for sentence in chosen), chosen[0]


def titles(count: int = 20, seed: int = 0) -> list[Row]:
    """`document` and `title`; those of the training data end with rows that ask for a rule each."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for number in range(count):
        document, title = article(draw, number)
        rows.append({"document": document, "title": title})
    if seed == 0:
        long = " ".join(f"{sentence}." for sentence in KOREAN * 2)
        rows += [
            {"document": long, "title": "the document is shortened"},
            {"document": "short", "title": long * 2},  # left out: the answer alone is over the limit
            {"document": "markers </s> and <|im_end|> in a text", "title": "special tokens as text <s>"},
            {"document": unicodedata.normalize("NFD", KOREAN[0]), "title": "decomposed\u200b Hangul"},
            rows[0],
        ]
    return rows


def headlines() -> list[Row]:
    draw = random.Random(2)
    rows: list[Row] = []
    for number in range(10):
        body, headline = article(draw, number)
        rows.append({"desk": draw.choice(("city", "경제")), "body": body, "headline": headline})
    return rows


def instructions() -> list[Row]:
    """Alpaca's columns; every other row has no input and takes the other variant of the template."""
    draw = random.Random(3)
    rows: list[Row] = []
    for number in range(8):
        text, answer = article(draw, number)
        rows.append({"instruction": "Name the news.", "input": text if number % 2 else "", "output": answer})
    return rows


def chats() -> list[Row]:
    """Lists of turns, from one question to three, half of them behind a system message."""
    draw = random.Random(4)
    rows: list[Row] = []
    for number in range(12):
        turns = [{"role": "system", "content": "Answer in a sentence."}] if number % 2 else []
        for _ in range(draw.randint(1, 3)):
            question, answer = article(draw, draw.randint(0, 99))
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    return rows


def pairs() -> list[Row]:
    """A document with a title that is preferred and one that is not; some of the two begin alike."""
    draw = random.Random(5)
    rows: list[Row] = []
    for number in range(16):
        document, title = article(draw, number)
        rejected = f"{title}, they say" if number % 3 == 0 else "About: " + draw.choice(ENGLISH)
        rows.append({"document": document, "chosen": title, "rejected": rejected})
    return rows


def dialogues() -> list[Row]:
    """Pairs whose prompt is a list of turns."""
    draw = random.Random(6)
    rows: list[Row] = []
    for number in range(6):
        question, answer = article(draw, number)
        prompt = [{"role": "user", "content": question}]
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": answer}],
                "rejected": [{"role": "assistant", "content": draw.choice(KOREAN)}],
            }
        )
    return rows


def labels() -> list[Row]:
    """Single answers that are wanted or not."""
    draw = random.Random(7)
    rows: list[Row] = []
    for number in range(16):
        document, title = article(draw, number)
        good = draw.random() < 0.5
        rows.append({"document": document, "title": title if good else draw.choice(ENGLISH), "label": good})
    return rows

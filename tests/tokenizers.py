"""Tiny tokenizers of the three kinds in use, trained in the process on a little Korean and English text.

All are small (at most 600 tokens), deterministic and built once a process; each call gives a copy of its own.
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "A storm closed the harbour on Monday, and forty boats waited for the wind to fall.",
    "The town council voted to keep the old library open for another year.",
    "Researchers taught a small model to write titles; it took an afternoon.",
    "### User:\nWrite a title for this article.\n\n### Assistant:\nStorm closes harbour\n",
    "Below is an instruction that describes a task. Write a response.\n\n### Response:\n",
    "월요일에 폭풍이 항구를 닫았고, 배 마흔 척이 바람이 잦아들기를 기다렸다.",
    "시의회는 오래된 도서관을 한 해 더 열어 두기로 했다.",
    "연구진은 작은 모델에게 제목 쓰는 법을 가르쳤다. 반나절이 걸렸다.",
    "당신은 주어진 본문으로부터 적절한 제목을 생성하는 제목 생성기입니다. 본문이 주어지면 제목을 만드세요.",
    "### 본문:\n서울의 아침 기온이 영하로 떨어졌다.\n\n### 제목:\n서울, 올겨울 첫 영하\n",
    "system user assistant [INST] [/INST] 0 1 2 3 4 5 6 7 8 9 < > / | { } x",
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only system, user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
PLAIN_CHAT = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def byte_level(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE like Qwen's: no BOS; EOS `<|endoftext|>`, which is not the chat template's end token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_byte_level()), eos_token="<|endoftext|>", chat_template=chat_template
    )


def sentencepiece_bpe(
    prepend_scheme: str = "first", chat_template: str | None = LLAMA2_CHAT
) -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE like Llama 2's: dummy prefix, byte fallback, BOS, also in its chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_sentencepiece_bpe(prepend_scheme)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def unigram(chat_template: str | None = PLAIN_CHAT) -> PreTrainedTokenizerFast:
    """Unigram with a dummy prefix like T5's: appends EOS of itself; its chat template writes no special token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_unigram()),
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


@lru_cache
def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@lru_cache
def _sentencepiece_bpe(prepend_scheme: str) -> Tokenizer:
    rough = Tokenizer(models.BPE())
    rough.pre_tokenizer = pre_tokenizers.Metaspace()
    rough.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, limit_alphabet=150, show_progress=False)
    )
    trained = json.loads(rough.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in sorted(trained["vocab"], key=trained["vocab"].__getitem__) if name != "\n"]
    merges = [tuple(merge) for merge in trained["merges"] if "\n" not in "".join(merge)]
    names = [name for name in names if "\n" not in name]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@lru_cache
def _unigram() -> Tokenizer:
    rough = Tokenizer(models.Unigram())
    rough.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", show_progress=False)
    rough.train_from_iterator(CORPUS, trainer)
    trained = json.loads(rough.to_str())["model"]["vocab"]
    # The trainer leaves the order of about equal pieces, and their last digits, to chance.
    pieces = sorted(
        ((name, round(score, 1)) for name, score in trained if name != "<unk>"),
        key=lambda it: (-it[1], it[0]),
    )
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *pieces], unk_id=0))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer

"""Tokenizers whose only vocabulary file is tokenizer.model or tekken.json."""

from __future__ import annotations

import base64
import json
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.runs import model_folder
from tests.tokenizers import CORPUS, byte_level
from yeonma.errors import UserError
from yeonma.model import native_tokenizers
from yeonma.model.load import load_tokenizer
from yeonma.model.native_tokenizers import TRIALS, native_tokenizer_file
from yeonma.model.source import find_base
from yeonma.packages import install

needs_sentencepiece = pytest.mark.skipif(
    find_spec("sentencepiece") is None, reason="sentencepiece is not installed"
)
TEXTS = (*CORPUS, *TRIALS, "def f(x):\n    return  x\n\n\n        y = 3\t\t4   5")


def vocabulary_file(kind: str = "bpe", **options: Any) -> bytes:
    """What sentencepiece writes for a vocabulary that it has made of a little text."""
    from sentencepiece import SentencePieceTrainer

    written = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=written,
        vocab_size=700,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return written.getvalue()


def folder_with(tmp_path: Path, name: str, content: bytes, config: dict[str, object] | None = None) -> Path:
    folder = model_folder(tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / name).write_bytes(content)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@needs_sentencepiece
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["[INST]", "[/INST]"]},
        {"control_symbols": ["[TOOL]"]},
        {"split_digits": True, "allow_whitespace_only_pieces": True},
    ],
)
def test_ids_and_texts_are_those_of_sentencepiece(tmp_path: Path, options: dict[str, Any]) -> None:
    from sentencepiece import SentencePieceProcessor

    content = vocabulary_file(**options)
    tokenizer = load_tokenizer(find_base(str(folder_with(tmp_path, "tokenizer.model", content))))
    pieces = SentencePieceProcessor(model_proto=content)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    marks = [*options.get("control_symbols", []), *options.get("user_defined_symbols", [])]
    for text in (text for text in TEXTS if not any(mark in text for mark in marks)):
        ids = tokenizer(text)["input_ids"]
        assert ids == [pieces.bos_id(), *pieces.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == pieces.decode(ids)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert set(marks) <= set(tokenizer.all_special_tokens) | set(tokenizer.added_tokens_encoder)


@needs_sentencepiece
def test_settings_of_the_folder_are_kept(tmp_path: Path) -> None:
    config = {
        "add_bos_token": False,
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
        "pad_token": "<unk>",
        "added_tokens_decoder": {"700": {"content": "<|end|>", "special": True}},
        "chat_template": "{{ messages[0].content }}",
    }
    folder = folder_with(tmp_path, "tokenizer.model", vocabulary_file(), config)
    tokenizer = load_tokenizer(find_base(str(folder)))
    assert tokenizer.eos_token_id == 700 and tokenizer.pad_token == "<unk>"
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    assert tokenizer.chat_template == "{{ messages[0].content }}"


@needs_sentencepiece
def test_a_conversion_that_gives_other_ids_is_an_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "tokenizer.model", vocabulary_file("word", hard_vocab_limit=False))
    with pytest.raises(UserError, match=r"tokenizer\.model: .* does not give the ids of sentencepiece"):
        load_tokenizer(find_base(str(folder)))


@pytest.mark.parametrize(
    ("name", "content", "package"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece"),
        ("tokenizer.model", base64.b64encode(b"!") + b" 0\n" + base64.b64encode(b'"') + b" 1\n", "tiktoken"),
        ("tekken.json", b"{}", "mistral_common"),
    ],
)
def test_a_missing_package_is_the_right_one_with_its_tested_version(
    tmp_path: Path, name: str, content: bytes, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path, name, content)
    monkeypatch.setattr(native_tokenizers, "find_spec", lambda _: None)
    with pytest.raises(UserError) as error:
        load_tokenizer(find_base(str(folder)))
    shown = package.replace("_", "-")
    what = f"the tokenizer is this file alone, and the package {shown} is not installed"
    assert str(error.value) == f"{folder / name}: {what}; {install(shown)}"


def test_a_folder_with_tokenizer_json_is_read_as_before(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "tokenizer.model", b"not read")
    byte_level().save_pretrained(folder)
    assert native_tokenizer_file(find_base(str(folder))) is None
    assert load_tokenizer(find_base(str(folder))).get_vocab() == byte_level().get_vocab()

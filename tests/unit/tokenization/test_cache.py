from __future__ import annotations

import errno
import gc
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import yeonma.tokenization.cache
from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma.data.rows import Row, Rows
from yeonma.data.template import Template, load_template
from yeonma.errors import Problem, UserError
from yeonma.files import default_cache_dir
from yeonma.tokenization.cache import build_store, store_key, tokenizer_identity
from yeonma.tokenization.example import Example, TokenRules
from yeonma.tokenization.example_encoder import ExampleEncoder, encode
from yeonma.tokenization.store import TokenStore, open_store

TEMPLATE = Template.parse("{document}\n\nTitle:{title}")
RULES = TokenRules(cutoff_len=64)


def data(count: int = 5, *, identity: str = "data", read: Callable[[], Iterator[Row]] | None = None) -> Rows:
    def rows() -> Iterator[Row]:
        for number in range(1, count + 1):
            text = f"폭풍 {number} closed the harbour. " * (number % 3 + 1)
            yield Row(number, {"document": text, "title": f"Storm {number}"}, f"train.jsonl:{number}")

    return Rows("train.jsonl", identity, ("document", "title"), read or rows)


def build(folder: Path, rows: Rows, rules: TokenRules = RULES, template: Template = TEMPLATE) -> TokenStore:
    return build_store(rows, template, None, byte_level(), rules, folder)


def same_examples(store: TokenStore, examples: list[Example]) -> bool:
    def values(example: Example) -> dict[str, object]:
        ids, trained = example.token_ids.tolist(), example.trained.tolist()
        return {**vars(example), "token_ids": ids, "trained": trained}

    return [values(store[index]) for index in range(len(store))] == [values(example) for example in examples]


@pytest.fixture
def encoded_row_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row count of every call of ExampleEncoder.encode."""
    calls: list[int] = []
    original_encode = ExampleEncoder.encode

    def counting_encode(encoder: ExampleEncoder, rendered: list, rows: list) -> list:
        calls.append(len(rows))
        return original_encode(encoder, rendered, rows)

    monkeypatch.setattr(ExampleEncoder, "encode", counting_encode)
    return calls


# What a store holds


def test_store_returns_the_encoded_examples_and_left_out_rows(tmp_path: Path) -> None:
    rules = TokenRules(cutoff_len=40)
    rows = list(data(20))
    rows.append(Row(21, {"document": "a <|im_end|> b", "title": "x" * 20}, "train.jsonl:21"))
    rows.append(Row(22, {"document": "a", "title": "0" * 99}, "train.jsonl:22"))
    expected = encode([TEMPLATE.render(row) for row in rows], rows, byte_level(), rules)
    examples = [outcome for outcome in expected if isinstance(outcome, Example)]
    store = build(tmp_path, data(read=lambda: iter(rows)), rules)
    assert same_examples(store, examples)
    assert store.left_out == [outcome for outcome in expected if not isinstance(outcome, Example)]
    assert [left_out.place for left_out in store.left_out] == ["train.jsonl:22"]
    assert store.lengths.tolist() == [len(example.token_ids) for example in examples]
    assert store.prompt_lengths.tolist() == [example.prompt_length for example in examples]
    assert store.trained_counts.tolist() == [int(example.trained.sum()) for example in examples]
    assert store.row_numbers.tolist() == list(range(1, 22))


def test_store_counts_left_out_shortened_and_special_token_rows(tmp_path: Path) -> None:
    rows = [
        Row(1, {"a": "boats", "b": "storm", "c": "x"}, "a:1"),
        Row(2, {"a": "</s> <|im_end|>", "c": "x"}, "a:2"),
        Row(3, {"a": "0" * 50, "c": "x"}, "a:3"),
        Row(4, {"a": "0", "c": "0" * 50}, "a:4"),
    ]
    template = Template.parse("{a}{b}\n{c}\n---\n{a}\n{c}")
    counts = build(tmp_path, data(read=lambda: iter(rows)), TokenRules(cutoff_len=30), template).counts
    assert (counts.rows, counts.examples, counts.left_out) == (4, 3, 1)
    assert (counts.shortened, counts.cut_characters, counts.special_text) == (1, 23, 1)
    assert counts.variants == (1, 2)
    assert counts.trained_tokens == 3 * len(["x", "eos"])
    store = build(tmp_path, data(read=lambda: iter(rows)), TokenRules(cutoff_len=30), template)
    assert counts == store.counts
    assert counts.tokens == len(store.token_ids) == int(store.lengths.sum())


def test_stored_arrays_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        build(tmp_path, data())[0].token_ids[0] = 1
    with pytest.raises(IndexError):
        build(tmp_path, data())[5]


def test_rows_are_read_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yeonma.tokenization.cache, "ROWS_A_CHUNK", 7)
    read: list[int] = []

    def rows() -> Iterator[Row]:
        for row in data(20):
            read.append(row.number)
            yield row

    progress: list[tuple[int, int]] = []
    store = build_store(
        data(read=rows),
        TEMPLATE,
        None,
        byte_level(),
        RULES,
        tmp_path,
        lambda done: progress.append((done, len(read))),
    )
    assert progress == [(7, 7), (14, 14), (20, 20)]
    monkeypatch.setattr(yeonma.tokenization.cache, "ROWS_A_CHUNK", 2000)
    one_chunk_store = build(tmp_path / "whole", data(20))
    assert same_examples(store, [one_chunk_store[index] for index in range(len(one_chunk_store))])


# Once for each key


@pytest.mark.parametrize("fails", [False, True])
def test_while_rows_are_tokenised_the_garbage_collector_leaves_old_objects_alone(
    fails: bool, tmp_path: Path
) -> None:
    frozen: list[int] = []

    def rows() -> Iterator[Row]:
        frozen.append(gc.get_freeze_count())
        yield from data(3)
        if fails:
            raise UserError("no more", place="train.jsonl:4")

    if fails:
        with pytest.raises(UserError):
            build(tmp_path, data(read=rows))
    else:
        build(tmp_path, data(read=rows))
    assert frozen and min(frozen) > 1000
    assert gc.get_freeze_count() == 0


def test_objects_that_the_caller_froze_stay_frozen(tmp_path: Path) -> None:
    gc.freeze()
    try:
        build(tmp_path, data(3))
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_second_build_with_the_same_key_tokenizes_nothing(
    tmp_path: Path, encoded_row_counts: list[int]
) -> None:
    first = build(tmp_path, data())

    def fail_if_read() -> Iterator[Row]:
        raise AssertionError("the rows were read again")

    second = build(tmp_path, data(read=fail_if_read))
    assert encoded_row_counts == [5]
    assert same_examples(second, [first[index] for index in range(len(first))])


def test_store_key_changes_with_data_template_tokenizer_and_rules() -> None:
    def key(
        rows: Rows | None = None,
        template: Template = TEMPLATE,
        columns: dict[str, str] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        rules: TokenRules = RULES,
    ) -> str:
        return store_key(rows or data(), template, columns, tokenizer or byte_level(), rules)

    def changed(change: Callable[[PreTrainedTokenizerFast], object]) -> PreTrainedTokenizerFast:
        tokenizer = byte_level()
        change(tokenizer)
        return tokenizer

    bos = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    keys = [
        key(),
        key(data(identity="other")),
        key(template=Template.parse("{document}\nTitle:{title}")),
        key(columns={"document": "body"}),
        key(columns={"document": "text"}),
        key(tokenizer=sentencepiece_bpe()),
        key(tokenizer=byte_level(None)),
        key(tokenizer=changed(lambda tokenizer: tokenizer.add_tokens(["storm"]))),
        key(tokenizer=changed(lambda tokenizer: setattr(tokenizer, "eos_token", "<|im_end|>"))),
        key(tokenizer=changed(lambda tokenizer: setattr(tokenizer.backend_tokenizer, "post_processor", bos))),
        key(rules=replace(RULES, cutoff_len=65)),
        key(rules=replace(RULES, shrink="document")),
        key(rules=replace(RULES, shrink_side="start")),
        key(rules=replace(RULES, over_limit="error")),
        key(rules=replace(RULES, train_on_inputs=True)),
        key(rules=replace(RULES, add_eos_token=False)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]
    assert key(columns={}) == keys[0]


def test_tokenizer_identity_depends_only_on_its_content(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_identity(loaded) == tokenizer_identity(tokenizer)
    loaded(["a", "b c d e"], truncation=True, max_length=2)
    assert tokenizer_identity(loaded) == tokenizer_identity(tokenizer)


def test_concurrent_builds_of_one_key_tokenize_once(tmp_path: Path, encoded_row_counts: list[int]) -> None:
    # A file lock is held by an open file, so threads contend for it as processes do.
    rows_opened, lengths = threading.Event(), []

    def rows() -> Iterator[Row]:
        rows_opened.set()
        yield from data(50)

    def build_and_count() -> None:
        lengths.append(len(build(tmp_path, data(read=rows))))

    threads = [threading.Thread(target=build_and_count) for _ in range(3)]
    for thread in threads:
        thread.start()
        rows_opened.wait(10)
    for thread in threads:
        thread.join()
    assert lengths == [50, 50, 50]
    assert encoded_row_counts == [50]


# Damage


def test_fault_95_a_disk_without_locks_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes may then build one store at once. Each writes a folder of its own, and both read a whole store."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with_locks = build(tmp_path / "other", data())
    monkeypatch.setattr("fcntl.flock", refuse)
    stores: list[TokenStore] = []

    def read_while_another_builds() -> Iterator[Row]:
        if not stores:
            stores.append(build(tmp_path / "cache", data()))
        yield from data()

    stores.append(build(tmp_path / "cache", data(read=read_while_another_builds)))
    assert len(stores) == 2
    for store in stores:
        assert same_examples(store, [with_locks[index] for index in range(len(with_locks))])
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [stores[0].key]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_fault_89_a_lock_of_the_cache_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    key = build(tmp_path / "other", data()).key
    place = tmp_path / "cache" / f"{key}.lock"
    place.parent.mkdir()
    os.mkfifo(place) if kind == "pipe" else place.symlink_to(precious)
    with pytest.raises(
        UserError, match=r"\.lock: it is a (symbolic link|pipe) where a file belongs; remove it"
    ):
        build(tmp_path / "cache", data())
    assert precious.read_text() == "as it was"


def files_of(store: TokenStore) -> list[Path]:
    return sorted(path for path in store.folder.iterdir() if path.stat().st_size)


def test_store_with_any_damaged_file_is_rebuilt(tmp_path: Path, encoded_row_counts: list[int]) -> None:
    rows = data(3)
    stored = [build(tmp_path, rows)[index] for index in range(3)]
    expected = [
        replace(example, token_ids=example.token_ids.copy(), trained=example.trained.copy())
        for example in stored
    ]
    names = [path.name for path in files_of(build(tmp_path, rows))]
    assert len(names) == 20
    for name in names:
        path = build(tmp_path, rows).folder / name
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (content[:-1], bytes(flipped), None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert open_store(path.parent, path.parent.name) is None
            encoded_row_counts.clear()
            assert same_examples(build(tmp_path, rows), expected)
            assert encoded_row_counts == [3]


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    key = store_key(data(), TEMPLATE, None, byte_level(), RULES)
    (tmp_path / f"{key}.tmp").mkdir()
    (tmp_path / f"{key}.tmp" / "token_ids.bin").write_bytes(b"half")
    assert len(build(tmp_path, data())) == 5
    assert not (tmp_path / f"{key}.tmp").exists()


def test_a_build_that_fails_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yeonma.tokenization.cache, "ROWS_A_CHUNK", 2)

    def rows() -> Iterator[Row]:
        yield from data(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, data(read=rows))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_only_plain_arrays_and_json_are_written(tmp_path: Path) -> None:
    store = build(tmp_path, data())
    assert {path.suffix for path in store.folder.iterdir()} == {".bin", ".json", ".jsonl"}
    assert json.loads((store.folder / "meta.json").read_text())["meta"]["key"] == store.key
    assert (store.folder / "token_ids.bin").stat().st_size == 4 * store.counts.tokens


# Problems of the rows


def test_problems_of_many_rows_are_reported_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yeonma.tokenization.cache, "ROWS_A_CHUNK", 4)

    def rows() -> Iterator[Row]:
        for row in data(12):
            yield row if row.number % 5 else Row(row.number, {"title": "x"}, row.place)
        raise UserError("malformed", place="train.jsonl:13")

    with pytest.raises(UserError) as caught:
        build(tmp_path, data(read=rows))
    assert [problem.place for problem in caught.value.problems] == [
        "train.jsonl:5",
        "train.jsonl:10",
        "train.jsonl:13",
    ]


def test_reading_stops_after_twenty_reported_problems(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        for number in range(1, 10_000):
            assert number <= 2000  # one chunk
            yield Row(number, {"title": "x"}, f"train.jsonl:{number}")

    with pytest.raises(UserError) as caught:
        build(tmp_path, data(read=rows))
    assert len(caught.value.problems) == 21
    assert caught.value.problems[20] == Problem("there are more such problems", "train.jsonl")


def test_data_with_no_usable_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row is left of 5: each is over cutoff_len 4"):
        build(tmp_path, data(), TokenRules(cutoff_len=4))
    with pytest.raises(UserError, match="no rows"):
        build(tmp_path, data(0))
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


def test_over_limit_error_names_the_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl:1: .* cutoff_len is 4"):
        build(tmp_path, data(), TokenRules(cutoff_len=4, over_limit="error"))


def test_invalid_rules_are_reported_before_any_row_is_read(tmp_path: Path) -> None:
    def fail_if_read() -> Iterator[Row]:
        raise AssertionError("a row was read")

    with pytest.raises(UserError, match="did you mean"):
        build(tmp_path, data(read=fail_if_read), TokenRules(cutoff_len=64, shrink="documents"))


def test_unwritable_cache_folder_error_names_cache_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        build(tmp_path / "file", data())


def test_default_cache_dir_uses_yeonma_cache_or_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("YEONMA_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/yeonma")


def test_built_in_chat_template_builds_a_store(tmp_path: Path) -> None:
    rows = [
        Row(1, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a:1")
    ]
    store = build(tmp_path, data(read=lambda: iter(rows)), template=load_template("chat"))
    assert store.counts.examples == 1

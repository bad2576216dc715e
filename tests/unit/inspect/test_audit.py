"""The audit's numbers, compared with an independent computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runs import articles, characters, write_jsonl
from tests.tokenizers import unigram
from yeonma.batch.plan import Plan, make_plan
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.inspect.audit import Audit, audit_of, lengths_of
from yeonma.tokenization.dataset import Dataset, prepare_dataset

TEMPLATE = (
    "below is an article of the news.\n{document}\ntitle:\n{title}\n---\nno article\n{topic}\ntitle:\n{title}"
)


def prepared(
    folder: Path, rows: list[dict[str, str]], tokenizer: object = None, **settings: object
) -> Dataset:
    data = DataSettings(
        data_path=str(write_jsonl(folder / "rows.jsonl", rows)), template=TEMPLATE, **settings
    )  # type: ignore[arg-type]
    tokens = TokenSettings(cutoff_len=120, cache_dir=str(folder / "cache"))
    return prepare_dataset(data, tokens, tokenizer or characters(), 42, lambda _: None, lambda _: None)


def plan_of(dataset: Dataset, batch_size: int = 4) -> Plan:
    positions = dataset.train.positions
    lengths = dataset.train.store.lengths[positions]
    return make_plan(positions, lengths, batch_size=batch_size, seed=1, num_epochs=2, max_steps=None)


def audited(dataset: Dataset, *, share_prefix: bool = True, unknown_id: int | None = 3) -> Audit:
    return audit_of(
        dataset,
        plan_of(dataset),
        micro_batch_size=2,
        micro_batch_tokens=None,
        share_prefix=share_prefix,
        unknown_id=unknown_id,
        tokenizer=characters(),
    )


def test_counts_equal_those_of_the_examples(tmp_path: Path) -> None:
    rows = articles(23)
    rows[4] = {"topic": "a topic", "title": "of the second variant"}
    rows[6]["title"] = "a title of far more letters than there is room for" * 3
    dataset = prepared(tmp_path, rows, val_set_size=5)
    audit = audited(dataset)
    assert audit.validation is not None
    for part, part_audit in ((dataset.train, audit.train), (dataset.sets[0].validation, audit.validation)):
        assert part is not None
        examples = [part.store.example(int(position)) for position in part.positions]
        assert part_audit.rows == len({example.row for example in examples})
        assert part_audit.tokens == sum(len(example.token_ids) for example in examples)
        assert part_audit.trained_tokens == sum(int(example.trained.sum()) for example in examples)
        assert part_audit.shortened == sum(example.cut_characters > 0 for example in examples)
        assert part_audit.cut_characters == sum(example.cut_characters for example in examples)
        assert part_audit.prompt_tokens.most == max(example.prompt_length for example in examples)
        assert part_audit.answer_tokens.most == max(int(example.trained.sum()) for example in examples)
        for lengths in (part_audit.prompt_tokens, part_audit.answer_tokens):
            assert sum(bin_.count for bin_ in lengths.bins) == part_audit.examples == len(examples)
    assert sum(audit.train.variants) + sum(audit.validation.variants) == 22
    assert audit.train.variants[1] + audit.validation.variants[1] == 1
    assert [left_out.row for left_out in audit.sources[0].left_out_rows] == [7]
    assert audit.steps == 2 * audit.steps_per_epoch == 2 * -(-audit.train.examples // 4)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_work_equals_the_token_counts_of_the_planned_micro_batches(
    tmp_path: Path, share_prefix: bool
) -> None:
    dataset = prepared(tmp_path, articles(22))
    work = audited(dataset, share_prefix=share_prefix).work
    plan = plan_of(dataset)
    store = dataset.train.store
    padded = unpadded = 0
    for _, positions in zip(range(plan.steps_per_epoch), plan.steps(), strict=False):
        for start in range(0, len(positions), 2):
            lengths = store.lengths[positions[start : start + 2]]
            padded += len(lengths) * int(lengths.max())
            unpadded += int(lengths.sum())
    assert (work.padded, work.unpadded, work.steps) == (padded, unpadded, plan.steps_per_epoch)
    assert (work.forest < unpadded) is share_prefix
    assert share_prefix or work.forest == unpadded
    assert work.saved == 1 - work.forest / padded


def test_rows_with_unknown_tokens_are_remarked(tmp_path: Path) -> None:
    rows = articles(8)
    rows[2]["document"] = "漢字 and more"
    rows[5]["title"] = "漢"
    tokenizer = unigram()
    dataset = prepared(tmp_path, rows, tokenizer)
    known = {chr(code) for code in range(0x4E00, 0x9FFF)} & set(tokenizer.get_vocab())
    assert not known
    warnings = {warning.kind: warning.rows for warning in audited(dataset, unknown_id=0).train.remarks}
    assert warnings["unknown"] == tuple(
        number
        for number, example in enumerate((dataset.train.store.example(i) for i in range(8)), start=1)
        if 0 in example.token_ids.tolist()
    )
    assert {3, 6} <= set(warnings["unknown"])
    assert "unknown" not in {warning.kind for warning in audited(dataset, unknown_id=None).train.remarks}


def test_rows_are_grouped_by_their_combination_of_scripts(tmp_path: Path) -> None:
    rows = articles(6)
    rows[1]["title"], rows[2]["title"], rows[3]["title"] = "서울의 아침", "AI 시대", "42"
    scripts = {group.names: group.rows for group in audited(prepared(tmp_path, rows)).train.scripts}
    assert scripts == {("Latin",): (1, 5, 6), ("Hangul",): (2,), ("Latin", "Hangul"): (3,), (): (4,)}


@pytest.mark.parametrize("spread", [1, 7, 30, 231, 40_000])
def test_every_length_falls_into_one_bin(spread: int) -> None:
    counts = np.random.default_rng(0).integers(5, 5 + spread, 500)
    lengths = lengths_of(counts)
    assert len(lengths.bins) <= 12
    for bin_ in lengths.bins:
        assert bin_.count == int(np.count_nonzero((counts >= bin_.least) & (counts <= bin_.most)))
    assert sum(bin_.count for bin_ in lengths.bins) == 500
    assert (lengths.least, lengths.most) == (counts.min(), counts.max())
    assert int(np.count_nonzero(counts <= lengths.p95)) >= 475
    assert (
        int(np.count_nonzero(counts < lengths.median))
        <= 250
        <= int(np.count_nonzero(counts <= lengths.median))
    )

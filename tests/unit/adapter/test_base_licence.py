"""The licence of a base on the cards of what is derived from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import articles, command, model_folder, trained, write_jsonl
from yeonma.adapter.base_licence import TABLE, base_licence, licence_note

README = "---\nlanguage:\n- ko\nlicense: other\nlicense_name: {name}\nlicense_link: LICENSE\n---\n# A model\n"


@pytest.mark.parametrize(
    ("base", "name", "asks"),
    [
        (
            "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct",
            "EXAONE AI Model License Agreement 1.1 - NC",
            "no commercial use",
        ),
        ("LGAI-EXAONE/EXAONE-4.0-1.2B", "EXAONE AI Model License Agreement 1.2 - NC", "no commercial use"),
        ("LGAI-EXAONE/K-EXAONE-236B-A23B", "K-EXAONE AI Model License Agreement", "begins with K-EXAONE"),
        ("naver-hyperclovax/HyperCLOVAX-SEED-Think-14B", "HyperCLOVA X SEED Model License Agreement", ""),
        ("kakaocorp/kanana-2-3b-instruct", "Kanana Open License Agreement", "Powered by Kanana"),
        ("kakaocorp/kanana-1.5-8b-instruct-2505", "Apache-2.0", ""),
        ("kakaocorp/kanana-1.5-v-3b-instruct", "Kanana licence", ""),
        ("skt/A.X-4.0-Light", "Apache-2.0", ""),
        ("skt/A.X-4.0", "Qwen licence", ""),
        ("skt/A.X-K1", "Apache-2.0", ""),
        ("skt/A.X-K2", "Apache-2.0", ""),
        ("upstage/Solar-Open-100B", "Upstage Solar License", ""),
        ("upstage/SOLAR-10.7B-Instruct-v1.0", "CC-BY-NC-4.0", "no commercial use"),
        ("K-intelligence/Midm-2.0-Base-Instruct", "MIT", ""),
        ("MLP-KTLim/llama-3-Korean-Bllossom-8B", "Llama 3 Community License", "Built with Meta Llama 3"),
    ],
)
def test_korean_families_have_a_licence_by_their_names(base: str, name: str, asks: str) -> None:
    found = base_licence(base)
    assert found is not None and found.name.startswith(name) and asks in found.asks
    assert found.where.startswith("https://")
    (note, _) = licence_note(base)
    assert base in note


def test_names_that_the_table_does_not_have_get_no_note() -> None:
    assert licence_note("someone/model") == []
    assert base_licence("kanana-1.5-8b") is None
    assert len({pattern for pattern, _ in TABLE}) == len(TABLE)


def test_what_the_base_says_comes_before_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "EXAONE-4.0-1.2B"
    folder.mkdir()
    by_name = base_licence(str(folder))
    assert by_name is not None and "1.2 - NC" in by_name.name
    (folder / "LICENSE").write_text("\n# EXAONE AI Model License Agreement 2.0\n\nLong text\n")
    by_file = base_licence(str(folder))
    assert by_file is not None
    assert (by_file.name, by_file.where) == ("EXAONE AI Model License Agreement 2.0", "LICENSE")
    (folder / "README.md").write_text(README.format(name="kanana-open-license"))
    by_card = base_licence(str(folder))
    assert by_card is not None
    assert (by_card.name, by_card.where) == ("kanana-open-license", "README.md, LICENSE")
    assert "Powered by Kanana" in by_card.asks
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_note(str(folder))[0].startswith("The base's licence is mit (README.md).")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no front matter",
        "---\nlicense: [mit]\n---\n",
        "---\nlicense: &a *a\n---\n",
        "---\n: :\n\t\n---\n",
    ],
)
def test_cards_that_say_nothing_are_passed_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert base_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert base_licence(str(tmp_path)) is None


def test_cards_of_adapter_and_merged_model_name_the_licence(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    (base / "README.md").write_text(README.format(name="hyperclovax-seed *x*"))
    data = write_jsonl(tmp_path / "rows.jsonl", articles(6))
    run = trained(tmp_path / "OUT", base, data, max_steps=1)
    note = "The base's licence is hyperclovax-seed \\*x\\* (README.md, LICENSE)."
    assert note in (run.folder / "README.md").read_text("utf-8")
    assert command(run.folder, "merge", str(run.folder), "--output_dir", str(tmp_path / "M")).status == 0
    assert note in (tmp_path / "M" / "README.md").read_text("utf-8")

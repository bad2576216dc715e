"""`sample:NAME` reads the samples that come with Yeonma wherever a data path or a template is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import command, model_folder
from tests.tables import error_of, values
from yeonma.cli import main
from yeonma.data.bundled_samples import FOLDER
from yeonma.data.rows import glance, open_rows
from yeonma.data.template import load_template
from yeonma.errors import UserError

NAMES = sorted(path.stem for path in FOLDER.glob("*.jsonl"))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_has_the_rows_of_its_file(name: str) -> None:
    of_name, of_file = open_rows(f"sample:{name}"), open_rows(str(FOLDER / f"{name}.jsonl"))
    assert values(of_name) == values(of_file) != []
    assert of_name.identity == of_file.identity
    assert next(iter(of_name)).place == f"sample:{name}:1"
    looked_at = glance(f"sample:{name}", split="train[:3]")
    assert looked_at is not None and len(values(looked_at)) == 3


def test_a_template_may_be_a_sample() -> None:
    of_name, of_file = load_template("sample:title_en"), load_template(str(FOLDER / "title_en.txt"))
    assert of_name.text == of_file.text and of_name.fields == {"document", "title"}
    assert load_template("sample: {document}\n{title}").fields == {"document", "title"}  # a text


def test_an_unknown_sample_is_an_error_that_lists_the_samples() -> None:
    assert error_of("sample:news_xx").startswith("sample:news_xx: no sample with rows has this name; ")
    listed = error_of("sample:")
    assert all(f"sample:{name}" in listed for name in NAMES) and "./sample:" in listed
    with pytest.raises(UserError, match="the samples are sample:title_en"):
        load_template("sample:q")


def test_the_prefix_means_samples_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample:mine").mkdir()
    (tmp_path / "sample:mine" / "rows.jsonl").write_text('{"a": "b"}\n', encoding="utf-8")
    assert len(values(open_rows("sample:news_ko"))) == 70
    assert "./sample:mine" in error_of("sample:mine")
    assert values(open_rows("./sample:mine")) == [{"a": "b"}]


def test_a_run_on_samples_resumes_and_is_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data is identified by its content, so that the file of the sample continues the same run."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "base")
    settings = [
        *("sft", "--base_model", "base", "--template", "sample:title_en", "--val_data_path"),
        *("sample:news_en_validation", "--output_dir", "titles", "--max_steps", "1", "--card_rows", "0"),
        *("--over_limit", "drop", "--cutoff_len", "512", "--batch_size", "2"),
    ]
    done = command(tmp_path, *settings, "--data_path", "sample:news_en")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "titles" / "yeonma.json").read_text(encoding="utf-8"))
    assert record["trained_on"]["data"] == "sample:news_en"
    again = command(tmp_path, *settings, "--data_path", str(FOLDER / "news_en.jsonl"))
    assert again.status == 0 and "finished" in again.err + again.out
    other = command(tmp_path, *settings, "--data_path", "sample:news_en_validation")
    assert other.status == 2 and "content of data_path" in other.err
    capsys.readouterr()
    assert main(["verify", "titles", "--data_path", "sample:news_en"]) == 0
    assert "trained on sample:news_en" in capsys.readouterr().out
    answers = ["generate", "titles", "--limit", "2", "--max_new_tokens", "2", "--data_path"]
    assert command(tmp_path, *answers, "sample:news_en_validation").status == 0

"""Runs on several data sets: shares in every step, losses told apart, resume, and asking with each template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Done, articles, command, left_behind, model_folder, sft, trained, write_jsonl
from yeonma.train import loop

TEMPLATES = {
    "titles.jsonl": "{document}\n{title}",
    "classes.jsonl": "text: {text}\nclass: {label}",
    "talk.jsonl": "{prompt}{completion}",
}
CLASSES = [{"text": f"boats {number}", "label": "ab"[number % 2]} for number in range(10)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("data")
    titles = write_jsonl(folder / "titles.jsonl", articles(21))
    classes = write_jsonl(folder / "classes.jsonl", CLASSES)
    talk = write_jsonl(
        folder / "talk.jsonl", [{"prompt": f"say {i} ", "completion": f"said {i}"} for i in range(8)]
    )
    return [
        {"path": str(titles), "weight": 4, "template": TEMPLATES["titles.jsonl"]},
        {"path": str(classes), "weight": 2, "template": TEMPLATES["classes.jsonl"]},
        {"path": str(talk), "weight": 1, "template": "prompt-completion"},
    ]


SETTINGS: dict[str, Any] = {
    "batch_size": 5,
    "val_set_size": 2,
    "eval_steps": 3,
    "max_steps": 7,
    "save_steps": 3,
    "card_rows": 3,
}


def train(output: Path, base: Path, data_path: list[Any], **settings: Any) -> Done:
    return trained(output, base, data_path, **{**SETTINGS, **settings})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path, data_path: list[Any]) -> Done:
    return train(tmp_path_factory.mktemp("runs") / "mixed", base, data_path)


def rows_of(folder: Path) -> list[dict[str, list[int]]]:
    lines = (folder / "trained_rows.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["rows"] for line in lines]


def test_every_step_has_each_data_sets_share_to_rounding(done: Done) -> None:
    totals = {"titles.jsonl": 0, "classes.jsonl": 0, "talk.jsonl": 0}
    for rows in rows_of(done.folder):
        for (name, weight), bounds in zip(
            {"titles.jsonl": 4, "classes.jsonl": 2, "talk.jsonl": 1}.items(),
            ((2, 3), (1, 2), (0, 1)),
            strict=True,
        ):
            count = len(rows.get(name, ()))
            assert bounds[0] <= count <= bounds[1], (name, weight)
            totals[name] += count
    assert totals == {"titles.jsonl": 20, "classes.jsonl": 10, "talk.jsonl": 5}


def test_the_losses_of_the_data_sets_add_up_to_the_loss(done: Done) -> None:
    for look in done.looks:
        assert list(look["losses"]) == ["titles.jsonl", "classes.jsonl", "talk.jsonl"]
        assert min(look["losses"].values()) < look["loss"] < max(look["losses"].values())
    card = (done.folder / "README.md").read_text("utf-8")
    for name, loss in done.looks[-1]["losses"].items():
        assert f"  {name}  validation loss {loss:.4f}" in done.out
        assert f"| `{name}` | {done.looks[0]['losses'][name]:.4f} | {loss:.4f} |" in card
    assert " of `titles.jsonl`, `classes.jsonl`, `talk.jsonl` in 7 steps." in card
    for name, template in TEMPLATES.items():
        assert card.count(f" of {name}\n") == 1
        assert template in card


def test_a_data_sets_loss_is_that_of_a_run_on_it_alone(
    done: Done, base: Path, data_path: list[Any], tmp_path: Path
) -> None:
    """Before the first step both models are the base."""
    alone = train(tmp_path / "alone", base, [data_path[1]], max_steps=1)
    assert "losses" not in alone.looks[0]
    assert done.looks[0]["losses"]["classes.jsonl"] == alone.looks[0]["loss"]


@pytest.mark.parametrize("stop_after", [2, 4, 6])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    stop_after: int,
    done: Done,
    base: Path,
    data_path: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = 0
    train_step = loop.train_step

    def killed(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > stop_after:
            raise KeyboardInterrupt
        return train_step(*arguments)

    output = tmp_path / "mixed"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", killed)
        assert sft(output, base, data_path, **SETTINGS).status == 130  # type: ignore[arg-type]
    train(output, base, data_path)
    assert left_behind(output) == left_behind(done.folder)


@pytest.mark.parametrize(
    "settings", [{"micro_batch_size": 1}, {"micro_batch_tokens": 40, "share_prefix": False}]
)
def test_micro_batches_are_only_speed(
    settings: dict[str, Any], done: Done, base: Path, data_path: list[Any], tmp_path: Path
) -> None:
    other = train(tmp_path / "other", base, data_path, **settings)
    assert rows_of(other.folder) == rows_of(done.folder)
    assert other.losses == pytest.approx(done.losses, abs=1e-5)


def test_other_weights_are_another_run(done: Done, base: Path, data_path: list[Any]) -> None:
    changed = [{**data_path[0], "weight": 5}, *data_path[1:]]
    refused = sft(done.folder, base, changed, **SETTINGS)  # type: ignore[arg-type]
    assert refused.status == 2
    assert "weight" in refused.err


def test_group_by_length_does_not_go_with_weights(base: Path, data_path: list[Any], tmp_path: Path) -> None:
    refused = sft(tmp_path / "out", base, data_path, **SETTINGS, group_by_length=True)  # type: ignore[arg-type]
    assert refused.status == 2
    assert "give repeats instead of weights" in refused.err


def test_the_adapter_is_asked_with_the_template_of_any_data_set(done: Done) -> None:
    row = '{"text": "boats 3"}'
    first = command(done.folder, "generate", str(done.folder), "--row", row)
    assert (first.status, "document" in first.err) == (2, True)
    asked = command(done.folder, "generate", str(done.folder), "--row", row, "--data_set", "classes.jsonl")
    assert asked.status == 0, asked.err
    wrong = command(done.folder, "generate", str(done.folder), "--row", row, "--data_set", "clases.jsonl")
    assert 'did you mean "classes.jsonl"?' in wrong.err


def test_compare_asks_with_the_template_of_a_data_set(
    done: Done, base: Path, data_path: list[Any], tmp_path: Path
) -> None:
    words = ["--data_path", data_path[1]["path"], "--data_set", "classes.jsonl", "--rows", "3"]
    compared = command(
        done.folder,
        "compare",
        "--models",
        str(base),
        str(done.folder),
        *words,
        "--output_dir",
        str(tmp_path),
        "--max_new_tokens",
        "4",
    )
    assert compared.status == 0, compared.err
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [model["template"] for model in report["models"]] == ["text: {text}\nclass: {label}\n"] * 2


def test_verify_knows_each_data_set(done: Done, data_path: list[Any], tmp_path: Path) -> None:
    for entry in data_path:
        verified = command(done.folder, "verify", str(done.folder), "--data_path", entry["path"])
        assert verified.status == 0, verified.out + verified.err
    other = write_jsonl(tmp_path / "other.jsonl", articles(3))
    assert command(done.folder, "verify", str(done.folder), "--data_path", str(other)).status == 1


def test_inspect_shows_and_audits_each_data_set(base: Path, data_path: list[Any], tmp_path: Path) -> None:
    words = [
        "--base_model",
        str(base),
        "--data_path",
        json.dumps(data_path),
        "--batch_size",
        "5",
        "--max_steps",
        "7",
    ]
    words += ["--val_set_size", "2", "--rows", "2", "--json"]
    done = command(tmp_path, "inspect", *words)
    assert done.status == 0, done.err
    *views, last = [json.loads(line) for line in done.out.splitlines()]
    assert [(view["data_set"], view["row"]) for view in views] == [
        ("titles.jsonl", 2),
        ("classes.jsonl", 2),
        ("talk.jsonl", 2),
    ]
    audit = last["audit"]
    assert [(one["name"], one["train"]["rows"], one["validation"]["rows"]) for one in audit["sets"]] == [
        ("titles.jsonl", 19, 2),
        ("classes.jsonl", 8, 2),
        ("talk.jsonl", 6, 2),
    ]
    assert audit["train"]["tokens"] == sum(one["train"]["tokens"] for one in audit["sets"])
    assert [source["template"] for source in audit["sources"]][2] == "prompt-completion"


def test_rows_and_paths_mix_in_python(base: Path, data_path: list[Any], tmp_path: Path) -> None:
    import yeonma

    settings: dict[str, Any] = {
        "base_model": str(base),
        "batch_size": 3,
        "max_steps": 2,
        "card_rows": 0,
        "lora_r": 4,
    }
    rows = [{"text": f"boats {number}", "label": "b"} for number in range(4)]
    sets = [Path(data_path[0]["path"]), {"path": rows, "template": TEMPLATES["classes.jsonl"], "weight": 2}]
    output = yeonma.sft(
        data_path=sets, output_dir=str(tmp_path / "out"), template=TEMPLATES["titles.jsonl"], **settings
    )
    names = list(json.loads((output / "trained_rows.jsonl").read_text("utf-8").splitlines()[0])["rows"])
    assert names[0] == "titles.jsonl"
    assert names[1].startswith("<list of 4 rows, SHA-256 ")
    loaded = yeonma.load(output, data_set=names[1], device="cpu")
    assert isinstance(loaded.generate({"text": "boats 1"}, max_new_tokens=2), str)


def test_a_list_of_paths_in_python_is_a_mixture(base: Path, tmp_path: Path) -> None:
    import yeonma

    paths = [write_jsonl(tmp_path / f"{name}.jsonl", articles(4, seed)) for seed, name in enumerate("ab")]
    output = yeonma.sft(
        base_model=str(base), data_path=paths, template=TEMPLATES["titles.jsonl"], output_dir=str(tmp_path / "out"),
        batch_size=8, max_steps=1, card_rows=0,
    )  # fmt: skip
    (line,) = (output / "trained_rows.jsonl").read_text("utf-8").splitlines()
    rows = json.loads(line)["rows"]
    assert {name: sorted(numbers) for name, numbers in rows.items()} == {
        "a.jsonl": [1, 2, 3, 4],
        "b.jsonl": [1, 2, 3, 4],
    }

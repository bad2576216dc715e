"""Adapters that other tools made: in every verb the same numbers as by PEFT alone, or an error."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters import adapter_on, tiny_base
from tests.foreign import KINDS, NEW, by_peft, change_config, change_tensors, foreign_adapter
from tests.tokenizers import byte_level
from yeonma import load
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.batch.batch import Batch
from yeonma.bounded.expressions import EXPRESSION
from yeonma.cli import main
from yeonma.config.settings import MergeSettings, ServeSettings
from yeonma.errors import UserError
from yeonma.export.merged_model import merge, prepare_merge
from yeonma.model.load import load_base
from yeonma.model.source import find_base
from yeonma.policy import Policy, load_policy
from yeonma.serve.server import load_served_models, open_adapters
from yeonma.tokenization.example import Example

PACKAGE = Path(__file__).resolve().parents[3] / "yeonma"
SHARED = 20
"""Tokens that both sequences begin with: enough for a forest."""
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bases: `base`, and `tied`, whose head is its embedding."""
    folder = tmp_path_factory.mktemp("foreign")
    base = tiny_base(folder / "base", byte_level(), layers=2)
    model = load_base(find_base(str(base)), torch.device("cpu"), torch.float32)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder / "tied")
    for path in base.glob("*token*"):
        shutil.copy(path, folder / "tied")
    return folder


def sequences(rows: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    common = torch.randint(5, rows, (SHARED,), generator=draw)
    both = [torch.cat([common, torch.randint(3, rows, (more,), generator=draw)]) for more in (7, 12)]
    both[0][3:6] = torch.tensor([5, 6, 7])
    both[1][-3:] = torch.tensor([rows - 2, rows - 1, 5])
    return both


def plain(model: Any, ids: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of what follows the shared tokens, one sequence after the other."""
    with torch.no_grad():
        logprobs = [torch.log_softmax(model(one[None]).logits[0, :-1].float(), -1) for one in ids]
    return torch.cat(
        [scores.gather(1, one[1:, None])[SHARED - 1 :, 0] for scores, one in zip(logprobs, ids, strict=True)]
    )


def ours(policy: Policy, ids: list[torch.Tensor], *, share: bool = True) -> torch.Tensor:
    examples = [
        Example(
            row=number,
            token_ids=one.numpy().astype(np.int32),
            trained=np.arange(len(one)) >= SHARED,
            prompt_length=SHARED,
            variant=0,
            cut_characters=0,
            straddles=False,
            special_text=0,
        )
        for number, one in enumerate(ids, start=1)
    ]
    with torch.no_grad():
        return policy.logprobs(Batch.of(examples), share_prefix=share)


@pytest.mark.parametrize("base", ["base", pytest.param("tied", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_numbers_that_peft_alone_gives(
    kind: str, base: str, home: Path, tmp_path: Path
) -> None:
    folder = foreign_adapter(home / base, tmp_path / "A", kind)
    model = by_peft(home / base, folder, kind)
    ids = sequences(model.get_base_model().config.vocab_size)
    expected = plain(model, ids)
    policy = load_policy(folder, device="cpu")
    assert policy.support.forest
    for share in (True, False):
        torch.testing.assert_close(ours(policy, ids, share=share), expected, atol=1e-5, rtol=0)
    if not kind.startswith("new"):  # the base itself is as it was
        alone = load_base(find_base(str(home / base)), torch.device("cpu"), torch.float32)
        with policy.model.disable_adapter():
            torch.testing.assert_close(
                plain(policy.transformers_model, ids), plain(alone, ids), atol=1e-5, rtol=0
            )
        assert (expected - plain(alone, ids)).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "base", "template"),
    [
        ("expression", "base", None),
        ("whole modules", "tied", "title"),
        ("tied modules", "tied", None),
        ("tokens of both", "tied", None),
        ("new tokens", "base", "title"),
        ("new rows", "tied", None),
        ("new trained tokens", "tied", None),
    ],
)
def test_merged_model_has_the_numbers_that_peft_alone_gives(
    kind: str, base: str, template: str | None, home: Path, tmp_path: Path
) -> None:
    folder = foreign_adapter(home / base, tmp_path / "A", kind)
    model = by_peft(home / base, folder, kind)
    ids = sequences(model.get_base_model().config.vocab_size)
    settings = MergeSettings(adapter_dir=str(folder), output_dir=str(tmp_path / "M"), template=template)
    lines: list[str] = []
    assert merge(prepare_merge(settings), tmp_path / "M", lines.append).is_close
    assert lines[0].startswith(f"{folder} was made by another tool: base {home / base}")
    merged = load_base(find_base(str(tmp_path / "M")), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(plain(merged, ids), plain(model, ids), atol=2e-5, rtol=0)
    names = {path.name for path in (tmp_path / "M").iterdir()}
    assert {"template.txt", "yeonma.json"} & names == ({"template.txt", "yeonma.json"} if template else set())
    if template is not None:  # a merged model as any other
        builder = open_prompt_builder(tmp_path / "M")
        assert builder.adapter.template.name == "title"


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# The verbs


def test_generate_says_what_it_took_and_asks_for_the_template(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(foreign_adapter(home / "base", tmp_path / "A", tokenizer=False))
    row = ("--row", '{"document": "one"}', "--max_new_tokens", "3", "--device", "cpu")
    assert main(["generate", folder, *row]) == 2
    assert "another tool made this adapter, so it has no template; give --template" in capsys.readouterr().err
    assert main(["generate", folder, *row, "--template", "title"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        f"yeonma: {folder} was made by another tool: base {home / 'base'} (named in its adapter_config.json), "
        "template title, the base's tokenizer, default token rules (cutoff_len 2048)"
    )
    assert main(["generate", folder, "--prompt", "one", "--max_new_tokens", "3"]) == 0
    assert "no template, plain text only" in capsys.readouterr().err


def test_adapter_of_a_run_takes_no_other_template(home: Path, tmp_path: Path) -> None:
    run = adapter_on(home / "base", tmp_path / "OUT", "title")
    message = error_of(partial(open_prompt_builder, run, template="alpaca"))
    assert (
        message
        == f"--template: {run} has a template of its own; leave it out; it is for adapters of other tools"
    )


def test_same_prompt_and_answer_as_the_adapter_of_a_run(home: Path, tmp_path: Path) -> None:
    run = adapter_on(home / "base", tmp_path / "OUT", "title")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, copy)
    row = {"document": "하나 둘"}
    own, foreign = load(run, device="cpu"), load(copy, device="cpu", template="title")
    assert own.generate(row, max_new_tokens=8) == foreign.generate(row, max_new_tokens=8)


def test_compare_keeps_the_base_apart_from_an_adapter_with_tokens_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"document": "one two", "title": "x"}\n')
    folders = [foreign_adapter(home / "base", tmp_path / kind[-4:], kind) for kind in ("plain", "new tokens")]
    answers = []
    for number, models in enumerate(([home / "base"], [*reversed(folders), home / "base"])):
        words = ["--models", *map(str, models), "--data_path", str(rows), "--template", "title"]
        words += ["--max_new_tokens", "6", "--output_dir", str(tmp_path / f"report{number}")]
        assert main(["compare", *words]) == 0
        report = json.loads((tmp_path / f"report{number}" / "report.json").read_text())
        answers.append(report["rows"][0]["answers"][-1])
    assert answers[0] == answers[1]  # text and scores


def test_a_copy_of_the_head_in_another_shape_is_refused(home: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(home / "base", tmp_path / "adapter", "new tokens")
    name = "base_model.model.lm_head.original_module.weight"
    change_tensors(
        folder,
        lambda tensors: {**tensors, name: tensors["base_model.model.lm_head.weight"].flatten().clone()},
    )
    with pytest.raises(UserError, match="lm_head"):
        load(folder, device="cpu", template="title")


def test_serve_holds_adapters_of_several_kinds_on_one_base(home: Path, tmp_path: Path) -> None:
    kinds = ("plain", "whole modules", "tokens")
    folders = [foreign_adapter(home / "base", tmp_path / kind.split()[0], kind) for kind in kinds]
    settings = ServeSettings(adapter_dirs=[str(folder) for folder in folders], template="title", device="cpu")
    models = load_served_models(open_adapters(settings), settings, lambda _: None)
    ids = sequences(500)
    for kind, folder in zip(kinds, folders, strict=True):
        model, support = models[folder.name].model, models[folder.name].support
        model.set_attn_implementation(support.plain_attention)
        with models[folder.name].active():
            expected = plain(by_peft(home / "base", folder, kind), ids)
            torch.testing.assert_close(plain(model, ids), expected, atol=1e-5, rtol=0)
    larger = foreign_adapter(home / "base", tmp_path / "larger", "new tokens")
    both = ServeSettings(adapter_dirs=[str(folders[0]), str(larger)], template="title", device="cpu")
    message = error_of(lambda: load_served_models(open_adapters(both), both, lambda _: None))
    assert (
        f"larger: it has {NEW} tokens of its own, so its base has more rows than that of the others"
        in message
    )
    assert message.endswith("serve it with a command of its own on another --port")
    settings = ServeSettings(adapter_dirs=[str(larger)], template="title", device="cpu")
    assert list(load_served_models(open_adapters(settings), settings, lambda _: None)) == ["larger"]
    settings = ServeSettings(adapter_dirs=[str(folders[0])])
    assert "so it has no template" in error_of(lambda: open_adapters(settings))


VERBS: dict[str, tuple[str, ...]] = {
    "generate": ("generate", "A", "--prompt", "x"),
    "chat": ("chat", "A", "--template", "title"),
    "merge": ("merge", "A", "--output_dir", "M"),
    "export": ("export", "A", "--output_dir", "E"),
    "compare": ("compare", "--models", "A", "--data_path", "rows.jsonl", "--template", "title"),
    "serve": ("serve", "A", "--template", "title", "--port", "0"),
    "sft": (
        "sft",
        "--base_model",
        "base",
        "--adapter",
        "A",
        "--data_path",
        "rows.jsonl",
        "--output_dir",
        "O",
    ),
    "sft on it": ("sft", "--base_model", "A", "--data_path", "rows.jsonl", "--output_dir", "O"),
    "inspect": ("inspect", "--base_model", "base", "--adapter", "A", "--data_path", "rows.jsonl"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_adapter_that_lacks_a_tensor_and_leaves_nothing(
    verb: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "base", "base")
    Path("rows.jsonl").write_text('{"document": "one two", "title": "x"}\n' * 30)
    foreign_adapter(home / "base", Path("A"))
    change_tensors(Path("A"), lambda tensors: dict(list(tensors.items())[1:]))
    before = sorted(Path().rglob("*"))
    assert main([*VERBS[verb]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(
        "A/adapter_model.safetensors: 1 of 8 tensors is missing: base_model.model" in line for line in lines
    )
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_expression_that_does_not_end(
    verb: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("yeonma.model.name_patterns.BOUNDS", replace(EXPRESSION, seconds=0.5))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "base", "base")
    Path("rows.jsonl").write_text('{"document": "one two", "title": "x"}\n' * 30)
    foreign_adapter(home / "base", Path("A"))
    change_config(Path("A"), target_modules=r"((.*)*)*\.nothing!")
    assert main([*VERBS[verb]]) == 2
    assert "the expression" in (err := capsys.readouterr().err) and "name the layers instead" in err


def test_base_that_is_gone_or_unnamed_or_an_adapter_is_an_error(home: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(home / "base", tmp_path / "A")
    other = foreign_adapter(home / "base", tmp_path / "B")
    for name, message in (
        (
            "/nowhere/base",
            "its base model is no longer at /nowhere/base; give its new place with --base_model",
        ),
        (None, "it does not name its base model; give it with --base_model"),
        (str(other), "is an adapter too"),
    ):
        change_config(folder, base_model_name_or_path=name)
        assert message in error_of(partial(load_policy, folder))
        assert load_policy(folder, base_model=str(home / "base"), device="cpu").model is not None


def test_tokenizer_with_more_tokens_than_the_base_has_rows_is_an_error(home: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(home / "base", tmp_path / "A")
    larger = foreign_adapter(home / "base", tmp_path / "B", "new tokens")
    shutil.copy(larger / "tokenizer.json", folder)
    assert "the tokenizer has ids up to" in error_of(partial(load_policy, folder, device="cpu"))
    message = error_of(partial(load_policy, larger, adapter_weights=False, device="cpu"))
    assert f"it has {NEW} tokens of its own, which the base alone does not know" in message


def test_what_is_no_adapter_folder_is_named(home: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(home / "base", tmp_path / "A")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "this is a file, not a folder" in error_of(partial(load_policy, tmp_path / "a.gguf"))
    assert "this is a whole model, not an adapter" in error_of(partial(load_policy, home / "base"))
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json is missing" in error_of(partial(load_policy, folder))


def test_run_does_not_continue_an_adapter_with_tokens_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "base", "base")
    Path("rows.jsonl").write_text('{"document": "one two", "title": "x"}\n' * 30)
    foreign_adapter(Path("base"), Path("A"), "new tokens")
    assert main([*VERBS["sft"]]) == 2
    assert (
        f"A: it has {NEW} tokens of its own, which a run cannot continue; merge it" in capsys.readouterr().err
    )


def test_one_module_alone_gives_adapters_to_peft() -> None:
    loading = {
        "from_pretrained",
        "load_adapter",
        "add_adapter",
        "load_peft_weights",
        "set_peft_model_state_dict",
    }
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        from_peft = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft"
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                owner = node.func.value if isinstance(node.func, ast.Attribute) else None
                is_peft = name in from_peft or (isinstance(owner, ast.Name) and owner.id in from_peft)
                if name in loading and (is_peft or name == "add_adapter"):
                    found.add((path.name, name))
    assert found == {
        ("adapter_weights.py", "add_adapter"),
        ("adapter_weights.py", "set_peft_model_state_dict"),
    }

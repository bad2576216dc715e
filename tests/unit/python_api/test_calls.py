"""The verbs as functions: signatures of all settings, values instead of output, keywords in cures."""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import yeonma
from tests.runs import SETTINGS, articles, command, model_folder, write_jsonl
from yeonma.cli import VERBS
from yeonma.config.parse import settings_of
from yeonma.errors import Problem, UserError
from yeonma.python_api.calls import CALLS
from yeonma.python_api.keyword_form import keyword_form, with_keywords
from yeonma.python_api.results import (
    CompareResult,
    GenerateResult,
    InspectResult,
    MergeResult,
    RunResult,
    VerifyResult,
)

ROOT = Path(__file__).resolve().parents[3]
ROWS = articles(12)
TEMPLATE = SETTINGS["template"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    """A run of a few steps with validation rows."""
    output = tmp_path_factory.mktemp("run") / "out"
    settings = {**SETTINGS, "num_epochs": 2, "val_set_size": 3, "card_rows": 1}
    return yeonma.sft(base_model=base, data_path=ROWS, output_dir=output, **settings)  # type: ignore[arg-type]


# ------------------------------------------------------------------------- signatures


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_signature_has_all_settings_of_its_verb_with_their_defaults(name: str) -> None:
    form = CALLS[name].form
    verb = form.verb
    assert verb is VERBS[{"evaluate": "eval"}.get(name, name)]  # Python has an `eval` of its own
    call = getattr(yeonma, name)
    parameters = dict(inspect.signature(call).parameters)
    settings = settings_of(verb.groups, verb.not_required, verb.defaults)
    assert set(parameters) == (settings.keys() - set(form.omitted)) | {"config"}
    for setting in (settings[name] for name in parameters if name != "config"):
        parameter = parameters[setting.name]
        assert parameter.annotation == setting.hint
        assert parameter.default == (parameter.empty if setting.required else setting.default)
        assert f"\n    {setting.name}: " in call.__doc__
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [*form.positional]
    assert is_dataclass(inspect.signature(call).return_annotation)


def test_the_stub_for_editors_is_up_to_date() -> None:
    script = ROOT / "scripts" / "python_stub.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), "--check"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_stub_has_all_public_names_and_the_options_of_load() -> None:
    tree = ast.parse((ROOT / "yeonma" / "__init__.pyi").read_text("utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names |= {
        alias.asname or "" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(yeonma.__all__) - {"Loaded", "__version__"} <= names
    (load,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "load")
    from yeonma.policy import load_policy

    options = set(inspect.signature(load_policy).parameters) - {"adapter", "log"}
    assert {argument.arg for argument in load.args.kwonlyargs} == options


def test_editors_complete_calls_settings_and_results() -> None:
    """By jedi, which IPython and many editors ask, from the stub alone."""
    jedi = pytest.importorskip("jedi", reason="jedi is not installed: no editor's completion to try")

    def complete(code: str) -> list[str]:
        return [found.name for found in jedi.Script(f"import yeonma\n{code}", project=project).complete()]

    project = jedi.Project(ROOT)
    assert {"sft", "dpo", "inspect", "compare", "verify", "load"} <= set(complete("yeonma."))
    assert complete("yeonma.sft(learning_r") == ["learning_rate="]
    assert {"folder", "card", "steps", "metrics"} <= set(complete("run = yeonma.sft(base_model='x')\nrun."))
    (signature,) = jedi.Script("import yeonma\nyeonma.dpo(", project=project).get_signatures()
    assert [p.to_string() for p in signature.params if p.name == "learning_rate"] == [
        "learning_rate: float=1e-05"
    ]
    assert "Fine-tune a model on preference pairs" in signature.docstring()


def test_completion_lists_the_calls_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, inspect, yeonma\n"
        "assert {'sft', 'dpo', 'inspect', 'generate', 'compare', 'verify'} <= set(dir(yeonma))\n"
        "assert {'merge', 'export', 'push', 'load'} <= set(dir(yeonma))\n"
        "for name in dir(yeonma):\n"
        "    if name in yeonma._CALLS: inspect.signature(getattr(yeonma, name))\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'pandas', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_call_is_not_replaced_by_the_folder_of_its_name() -> None:
    import yeonma.inspect.audit
    import yeonma.verify.file_checks

    assert callable(yeonma.inspect) and callable(yeonma.verify)
    assert sys.modules["yeonma.inspect"] is not yeonma.inspect
    from yeonma.verify.file_checks import Finding

    assert Finding.__module__ == "yeonma.verify.file_checks"


# ------------------------------------------------------------------------- values


def test_a_run_is_its_folder_with_its_losses_and_card(run: RunResult, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert run.metrics() == lines
    assert os.fspath(run) == str(run.folder) and run.card.is_file()
    assert run.steps == 6 and len(run.training_losses) == 6
    evaluations = [(line["step"], line["loss"]) for line in lines if line.get("evaluation")]
    assert list(run.validation_losses) == evaluations
    assert repr(run).startswith(
        f"{run.folder}: finished after 6 steps\n  validation loss  {evaluations[0][1]:.4f}"
    )
    shown = run._repr_html_()
    assert shown.startswith("<pre") and "data:image/svg+xml;base64," in shown


def test_inspect_returns_rows_audit_and_what_the_command_prints(base: Path, tmp_path: Path) -> None:
    settings = {"base_model": base, "template": TEMPLATE, "rows": "1-2"}
    inspection = yeonma.inspect(data_path=pd.DataFrame(ROWS), **settings)  # type: ignore[arg-type]
    assert isinstance(inspection, InspectResult)
    assert [view.row for view in inspection.rows] == [1, 2]
    assert inspection.rows[0].answer == ROWS[0]["title"]
    assert (inspection.audit.train.rows, inspection.audit.steps) == (12, 3)
    assert inspection.forecast is not None
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    done = command(tmp_path, "inspect", "--base_model", str(base), "--data_path", str(data),
                   "--template", str(TEMPLATE), "--rows", "1-2")  # fmt: skip
    ours, theirs = (
        [
            line
            for line in text.splitlines()
            if line.startswith(("title: ", "per epoch: ", "trained: ", "  prompts: "))
        ]
        for text in (repr(inspection), done.out)
    )
    assert ours == theirs and len(ours) == 5
    assert "<script>" not in inspection._repr_html_().partition("srcdoc=")[2]  # escaped within the frame


def test_generate_returns_what_the_command_writes(run: RunResult, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    options = ("--max_new_tokens", "5", "--limit", "2")
    done = command(tmp_path, "generate", str(run.folder), "--data_path", str(data), *options)
    lines = [json.loads(line) for line in done.out.splitlines()]
    result = yeonma.generate(run, ROWS[:3], max_new_tokens=5, limit=2, output=tmp_path / "answers.jsonl")
    assert isinstance(result, GenerateResult)
    assert list(result.rows) == lines and len(result) == 2
    assert result.answers == [line["answer"] for line in lines]
    written = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in written] == lines
    assert list(pd.DataFrame(result.rows).columns) == ["row", "answer", "reference"]
    assert yeonma.load(run).generate(ROWS[:2], max_new_tokens=5) == result.answers
    frame = pd.DataFrame(ROWS[:2])
    assert yeonma.generate(adapter_dir=run, data_path=frame, max_new_tokens=5).rows == result.rows
    row = {"document": ROWS[1]["document"]}
    for one in (row, json.dumps(row)):
        assert yeonma.generate(run, row=one, max_new_tokens=5).answers == result.answers[1:]
    done = command(tmp_path, "generate", str(run.folder), "--prompt", "a storm", "--max_new_tokens", "5")
    assert yeonma.generate(run, prompt="a storm", max_new_tokens=5).rows == (
        {"row": 1, "answer": done.out.removesuffix("\n")},
    )


def test_answers_are_shown_as_a_table() -> None:
    rows = [{"row": number, "answer": f"<b>\x1b {number}", "reference": "x"} for number in range(1, 26)]
    result = GenerateResult(tuple(rows))
    lines = repr(result).splitlines()
    assert lines[0].split() == ["row", "answer", "reference"]
    assert lines[1].split() == ["1", "<b>\\x1b", "1", "x"] and len(lines) == 22
    assert lines[-1] == "5 more rows are in `rows`"
    assert "<b>" not in result._repr_html_() and "5 more rows are in" in result._repr_html_()
    assert repr(GenerateResult(())) == ""


def test_compare_returns_scores_and_rows(base: Path, run: RunResult, tmp_path: Path) -> None:
    result = yeonma.compare(
        models=[base, run], data_path=ROWS[:3], max_new_tokens=3, output_dir=tmp_path / "report"
    )
    assert isinstance(result, CompareResult) and result.web_page.is_file()
    assert json.loads((tmp_path / "report" / "report.json").read_text("utf-8")) == result.report
    assert list(result.scores["loss"]) == [base.name, run.folder.name]
    assert [row["wanted"] for row in result.rows] == [row["title"] for row in ROWS[:3]]
    assert "loss ↓" in repr(result) and str(result.web_page) in repr(result)
    assert result._repr_html_().startswith("<pre")


def test_verify_and_merge_return_what_they_found(run: RunResult, tmp_path: Path) -> None:
    found = yeonma.verify(run)
    assert isinstance(found, VerifyResult) and found.is_well
    done = command(tmp_path, "verify", str(run.folder))
    assert (done.status, done.out) == (0, f"{found!r}\n")
    assert yeonma.verify(run, data_path=ROWS).is_well
    others = yeonma.verify(run, data_path=pd.DataFrame(ROWS[1:]))
    assert [finding.check for finding in others.findings if finding.outcome == "differs"] == ["data"]
    merged = yeonma.merge(run, output_dir=tmp_path / "merged")
    assert isinstance(merged, MergeResult) and merged.agreement.is_close
    assert (merged.folder / "model.safetensors").is_file() and os.fspath(merged) == str(tmp_path / "merged")


def test_push_without_sending_returns_the_files(run: RunResult) -> None:
    with pytest.raises(UserError) as caught:  # the base is only here
        yeonma.push(run, repo="someone/titles", dry_run=True)
    assert "--" not in str(caught.value)


def test_html_is_escaped(tmp_path: Path) -> None:
    result = RunResult(tmp_path / "<script>x</script>", (), (), "")
    assert "<script>" not in result._repr_html_() and "&lt;script&gt;" in result._repr_html_()


def test_data_frames_are_rows_of_a_policy(run: RunResult) -> None:
    policy = yeonma.load(run)
    assert policy.generate(pd.DataFrame(ROWS[:2]), max_new_tokens=3) == policy.generate(
        ROWS[:2], max_new_tokens=3
    )


# ------------------------------------------------------------------------- mistakes


def test_mistakes_name_keywords(base: Path, run: RunResult, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lora_rr": 8}, 'lora_rr: unknown setting; did you mean "lora_r"?'),
        (
            {"template": "nosuch", "output_dir": tmp_path / "a"},
            "template: no built-in template and no file is named",
        ),
        ({"output_dir": run.folder, "template": TEMPLATE}, "another output_dir, or overwrite=True"),
    ]
    for settings, expected in cases:
        with pytest.raises(UserError) as caught:
            yeonma.sft(**{"base_model": base, "data_path": ROWS, "output_dir": tmp_path / "b", **settings})
        assert expected in str(caught.value)
        assert "--" not in str(caught.value)


def test_settings_that_only_print_are_refused_with_a_word(run: RunResult) -> None:
    with pytest.raises(UserError, match="json: a setting of the command line"):
        yeonma.verify(run, json=True)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="settings are given by name"):
        yeonma.verify(run, "x")
    with pytest.raises(UserError, match="adapter_dir: given twice"):
        yeonma.verify(run, adapter_dir=run)
    with pytest.raises(UserError, match="data_path: given twice"):
        yeonma.generate(run, ROWS, data_path=ROWS)
    with pytest.raises(UserError, match="settings are given by name"):
        yeonma.generate(run, ROWS, "x")
    with pytest.raises(UserError, match="give one of data_path, row and prompt"):
        yeonma.generate(run)
    with pytest.raises(UserError, match="which is no data"):
        yeonma.generate(run, row={"document": object()})


def test_a_notebook_shows_the_message_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UserError([Problem("is wrong", "seed", "mend it"), Problem("is missing", "a\x1b[2J")])
    assert error._render_traceback_() == ["yeonma: seed: is wrong; mend it", "yeonma: a\\x1b[2J: is missing"]
    monkeypatch.setenv("YEONMA_DEBUG", "1")
    (text,) = error._render_traceback_()
    assert text.rstrip().endswith("is missing")
    assert yeonma.Stopped("stopped", 130)._render_traceback_() == ["yeonma: stopped"]
    assert yeonma.Stopped("a\x1b", 130, printed=True)._render_traceback_() == ["yeonma: a\\x1b"]


SETTINGS_OF_SFT = settings_of(VERBS["dpo"].groups)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use --dtype bfloat16 or --device cpu", 'use dtype="bfloat16" or device="cpu"'),
        ("use --lora_dropout 0", "use lora_dropout=0"),
        ("give --overwrite true", "give overwrite=True"),
        ("lower --max_steps, or use --train lora", 'lower max_steps, or use train="lora"'),
        ("give --columns '{document: body}', or", "give columns={'document': 'body'}, or"),
        ("keep it out with --exclude_modules '[a.b]'", "keep it out with exclude_modules=['a.b']"),
        ("write --base_model ... --data_path ...", "write base_model=... data_path=..."),
        (
            "use --base_model owner/name --model_revision v1.0",
            'use base_model="owner/name" model_revision="v1.0"',
        ),
        (
            "with --base_model (and, to train, --adapter /a/b)",
            'with base_model (and, to train, adapter="/a/b")',
        ),
        ("another --cutoff_len: it is 3", "another cutoff_len: it is 3"),
        ("--bad_rows skip leaves them out", 'bad_rows="skip" leaves them out'),
        ("--train_on_inputs trains whole prompts", "train_on_inputs trains whole prompts"),
        ("try `yeonma compare --models` or --seed 3", "try `yeonma compare --models` or seed=3"),
        ("pip install --no-deps --target x", "pip install --no-deps --target x"),
        ("in a --config file", "in a config file"),
    ],
)
def test_options_become_keywords(text: str, expected: str) -> None:
    assert with_keywords(text, SETTINGS_OF_SFT) == expected


def test_places_become_keywords() -> None:
    problem = keyword_form(Problem("it is a file", "--output_dir my out", "name a folder"), SETTINGS_OF_SFT)
    assert str(problem) == 'output_dir="my out": it is a file; name a folder'
    assert keyword_form(Problem("x", "--template"), SETTINGS_OF_SFT).place == "template"
    assert keyword_form(Problem("x", "rows.jsonl:3"), SETTINGS_OF_SFT).place == "rows.jsonl:3"


# ------------------------------------------------------------------------- signals


def test_the_handlers_of_signals_are_put_back(base: Path, tmp_path: Path) -> None:
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    before = [signal.getsignal(getattr(signal, name)) for name in names]
    streams = sys.stdout, sys.stderr
    for template in (TEMPLATE, "nosuch"):
        settings = {"template": template, "max_steps": 1, "card_rows": 0, "output_dir": tmp_path / "out"}
        try:
            yeonma.sft(base_model=base, data_path=ROWS, **settings)
        except UserError:
            assert template == "nosuch"
    assert [signal.getsignal(getattr(signal, name)) for name in names] == before
    assert (sys.stdout, sys.stderr) == streams


# ------------------------------------------------------------------------- what is printed


def test_lines_of_progress_name_keywords(
    base: Path, run: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, "num_epochs": 2, "val_set_size": 3, "card_rows": 1}
    again = yeonma.sft(base_model=base, data_path=ROWS, output_dir=run, **settings)  # type: ignore[arg-type]
    assert again == run
    printed = capsys.readouterr().out
    assert f"{run.folder} holds this run, which is finished; use overwrite=True to run it again" in printed


def test_help_of_settings_is_korean_where_the_language_is() -> None:
    code = "import yeonma; print(yeonma.sft.__doc__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "YEONMA_LANG": "ko", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("    batch_size: "))
    assert any("가" <= char <= "힣" for char in line)


def test_an_interrupt_of_a_call_is_a_message(monkeypatch: pytest.MonkeyPatch, run: RunResult) -> None:
    from yeonma.commands import verify

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify", interrupted)
    streams = sys.stdout, sys.stderr
    with pytest.raises(yeonma.Stopped, match=r"^interrupted$"):
        yeonma.verify(run)
    assert (sys.stdout, sys.stderr) == streams

"""The command line: verbs, help, exit statuses and late imports."""

from __future__ import annotations

import inspect
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from rich.cells import cell_len

import yeonma
from yeonma.cli import VERBS, Verb, main
from yeonma.config.help import setting_texts
from yeonma.config.parse import read_config, settings_of
from yeonma.config.settings import StepSettings, TokenSettings
from yeonma.errors import Problem, UserError
from yeonma.language import VARIABLES, language
from yeonma.packages import MAIN

ROOT = Path(inspect.getfile(yeonma)).parents[1]


@dataclass(frozen=True)
class TryConfig:
    tokens: TokenSettings
    step: StepSettings


Run = Callable[[TryConfig], int | None]
HEAVY = ("torch", "transformers", "jsonargparse", "rich", "numpy")


def in_new_process(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "yeonma", *argv], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture
def try_verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Installs a function as the verb `try`."""

    def install(run: Run) -> None:
        module = ModuleType("verb_under_test")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "verb_under_test", module)
        verb = Verb("Try.", "verb_under_test:run", TryConfig)
        monkeypatch.setitem(VERBS, "try", verb)

    return install


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    page = " ".join(capsys.readouterr().out.split())
    for name, verb in VERBS.items():
        assert f" {name} {verb.about} " in page


def processor_seconds(*argv: str) -> float:
    """What a new Python process takes by itself: other programs, which may slow it, do not count."""
    taken = []
    for _ in range(4):
        before = os.times()
        subprocess.run([sys.executable, *argv], capture_output=True, cwd=ROOT, check=True)
        after = os.times()
        taken.append(sum(after[2:4]) - sum(before[2:4]))
    return min(taken)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_in_half_a_second(option: str) -> None:
    """Of the processor's time; on a slow machine in four times what its Python takes to import one large module."""
    limit = max(0.5, 4 * processor_seconds("-c", "import asyncio"))
    assert processor_seconds("-m", "yeonma", option) < limit


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["sft", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        f"import sys; from yeonma.cli import main; main({argv!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    first, python, *packages = capsys.readouterr().out.splitlines()
    assert first == f"yeonma {yeonma.__version__}"
    assert python.startswith(f"python {platform.python_version()} on ")
    assert packages == [f"{name} {version(name)}" for name in MAIN]
    assert MAIN[:3] == ("torch", "transformers", "peft")


def test_an_unknown_verb_gets_a_suggestion() -> None:
    done = in_new_process("genarate", "OUT")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == 'yeonma: genarate: unknown command; did you mean "generate"?\n'


def test_unknown_verb_without_a_similar_one_gets_the_list_of_verbs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["zzz"]) == 2
    assert f"the commands are {', '.join(VERBS)}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_all_help_of_a_verb_describes_every_setting(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help", "all"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for group in VERBS[verb].groups:
        assert (group.__doc__ or "").rstrip(".") in page
        texts = setting_texts(group)
        assert list(texts) == [field.name for field in fields(group)]
        for name, text in texts.items():
            assert f"--{name} " in page or name == VERBS[verb].positional
            assert text in page


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("language", ["en", "ko"])
def test_help_of_a_verb_is_one_screen(
    verb: str, language: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YEONMA_LANG", language)
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert all(sum(2 if "가" <= char <= "힣" else 1 for char in line) <= 80 for line in lines)
    for name, setting in settings_of(VERBS[verb].groups, VERBS[verb].not_required).items():
        if setting.required or name in VERBS[verb].important:
            assert any(name in line or name.upper() in line for line in lines)


@pytest.mark.parametrize("language", ["en", "ko"])
def test_overview_fits_into_80_columns(
    language: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YEONMA_LANG", language)
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    page = capsys.readouterr().out
    assert max(map(cell_len, page.splitlines())) <= 80
    assert all(f"\n  {name} " in page for name in VERBS)


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.important])
def test_examples_of_help_are_valid(verb: str) -> None:
    kind = VERBS[verb]
    _, given, *words = shlex.split(kind.example.replace("\\\n", " "))
    assert given == verb
    read_config(
        kind.config,
        words,
        verb=verb,
        groups=kind.groups,
        positional=kind.positional,
        not_required=kind.not_required,
    )


def test_help_shows_ranges_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sft", "--lora_r", "nonsense", "--help", "all"])
    page = " ".join(capsys.readouterr().out.split())
    assert "--lora_r N Rank of the adapter. (a whole number of at least 1; default 16)" in page
    assert "(one of end, start, middle; default end)" in page
    assert "--output_dir TEXT Folder for the adapter and the records of the run. (required)" in page
    assert page.startswith(
        "usage: yeonma sft [--config FILE] --data_path ... --base_model ... --output_dir ... "
    )
    main(["generate", "--help"])
    assert capsys.readouterr().out.startswith(
        "usage: yeonma generate ADAPTER_DIR [--config FILE] [--setting value"
    )


def test_help_of_one_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--help", "lora-r"], ["--help=lora_r"], ["--lora_r", "3", "-h", "lora_r"]):
        assert main(["sft", *words]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert text == "--lora_r N Rank of the adapter. (a whole number of at least 1; default 16)"
    monkeypatch.setenv("YEONMA_LANG", "ko_KR.UTF-8")
    assert main(["dpo", "--help", "learning_rate"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("--learning_rate X 워밍업이") and text.endswith("(0 초과의 수; 기본값 1e-05)")
    monkeypatch.setenv("YEONMA_LANG", "en")
    assert main(["sft", "--help", "lr"]) == 2
    assert capsys.readouterr().err == "yeonma: lr: no setting of this command; here it is --learning_rate\n"


def test_the_language_is_that_of_the_first_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert language() == "en"
    monkeypatch.setenv("LANG", "ko_KR.UTF-8")
    assert language() == "ko"
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert language() == "en"
    monkeypatch.setenv("YEONMA_LANG", "ko")
    assert language() == "ko"


def test_every_command_and_setting_has_a_korean_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YEONMA_LANG", "ko")
    for verb in VERBS:
        assert main([verb, "--help", "all"]) == 0
        page = capsys.readouterr().out
        assert all(
            f"--{name} " in page or name == VERBS[verb].positional for name in settings_of(VERBS[verb].groups)
        )
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert "명령의 설정" in page
    assert not any(verb.about in page for verb in VERBS.values())


def test_no_verb_has_two_settings_of_one_name() -> None:
    for name, verb in VERBS.items():
        names = [field.name for group in verb.groups for field in fields(group)]
        assert len(set(names)) == len(names), name
        assert verb.positional is None or verb.positional in names
        assert "config" not in names and "help" not in names


def test_verb_receives_its_settings_and_returns_the_exit_status(try_verb: Callable[[Run], None]) -> None:
    seen: list[TryConfig] = []

    def run(config: TryConfig) -> int | None:
        seen.append(config)
        return 5 if len(seen) == 1 else None

    try_verb(run)
    assert main(["try", "--cutoff-len", "7"]) == 5
    assert main(["try"]) == 0
    assert seen[0].tokens == TokenSettings(cutoff_len=7)
    assert seen[1] == TryConfig(TokenSettings(), StepSettings())


def test_warnings_go_to_stderr_once_for_all_processes(
    try_verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try_verb(lambda settings: None)
    argv = ["try", "--num_epochs", "1", "--max_steps", "2"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    warning = "yeonma: warning: num_epochs and max_steps are both given: max_steps (2) wins\n"
    assert (printed.out, printed.err) == ("", warning)
    monkeypatch.setenv("RANK", "1")
    assert main(argv) == 0
    assert capsys.readouterr().err == ""


def test_invalid_settings_end_with_status_2_and_no_traceback() -> None:
    done = in_new_process("sft", "--lora_r", "0", "--learning_rate", "-1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "yeonma: lora_r: 0 is out of range; give a whole number of at least 1",
        "yeonma: learning_rate: -1 is out of range; give a number above 0",
        "yeonma: data_path, base_model, output_dir: required, but not given; write --data_path ... "
        "--base_model ... --output_dir ..., or set them in a --config file",
    ]


def test_user_error_is_printed_and_debug_adds_the_traceback(
    try_verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: TryConfig) -> int | None:
        raise UserError([Problem("no title", "rows.jsonl:3", "add one"), Problem("empty", "rows.jsonl:5")])

    try_verb(run)
    monkeypatch.delenv("YEONMA_DEBUG", raising=False)
    assert main(["try"]) == 2
    lines = "yeonma: rows.jsonl:3: no title; add one\nyeonma: rows.jsonl:5: empty\n"
    assert capsys.readouterr().err == lines
    monkeypatch.setenv("YEONMA_DEBUG", "1")
    assert main(["try"]) == 2
    debug = capsys.readouterr().err
    assert debug.startswith("Traceback") and debug.endswith(lines)


def test_an_interrupt_ends_with_status_130(
    try_verb: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: TryConfig) -> int | None:
        raise KeyboardInterrupt

    try_verb(run)
    assert main(["try"]) == 130
    assert capsys.readouterr().err == "yeonma: interrupted\n"


def test_a_bug_keeps_its_traceback(try_verb: Callable[[Run], None]) -> None:
    def run(config: TryConfig) -> int | None:
        raise ZeroDivisionError("a bug")

    try_verb(run)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["try"])

"""Follows the chapters on reasoning, tools and several data sets as a reader does, in both languages: writes the files
that they show, runs their commands and programs in order, and finds what they say is printed.

A tiny model with the habits of the page's model is trained until it knows the rows, so that its answers are those of
the page. Only numbers of tokens depend on the tokenizer, and are not compared.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from tokenizers import AddedToken

from tests.adapters import tiny_base
from tests.chat_habits import HABITS
from tests.runs import command
from tests.servers import serving
from tests.tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]
HERE = "http://127.0.0.1:8000/v1"
KNOW_THE_ROWS = [
    *("--max_steps", "120", "--batch_size", "4", "--learning_rate", "1e-2", "--lr_scheduler", "constant"),
    *("--lora_r", "32", "--lora_alpha", "64", "--card_rows", "0"),
]
THINKING = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- if tools %}{{ '<|im_start|>system\nYour tools:\n' }}"
    "{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{%- endfor %}{{ 'That is all.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- set text = m.content or '' %}"
    "{%- if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + text + '\n</tool_response><|im_end|>\n' }}"
    "{%- elif m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}"
    "{%- else %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if not thought and '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}"
    "{%- endif %}{{ text }}"
    "{%- for call in m.tool_calls or [] %}{{ '\n' if text or not loop.first else '' }}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{{ '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Writes a block in the last turn, and with reasoning after the last question, as Qwen3's chat template does."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `file`: the name of the file that it shows."""

    text: str
    file: str | None

    @property
    def command(self) -> list[str] | None:
        return shlex.split(self.text) if self.text.startswith("yeonma ") else None


def blocks_of(page: str) -> Iterator[Block]:
    for found in re.finditer(r"^( *)```\w*\n(.*?)^\1```$", page, re.MULTILINE | re.DOTALL):
        before = page[: found.start()].rstrip().rsplit("\n", 1)[-1]
        named = re.search(r"`([\w.]+)`:$", before)
        yield Block(dedent(found[2]), named[1] if named else None)


def without_counts(text: str) -> str:
    text = re.sub(r"[\d,]+ tokens, [\d,]+ (of them )?trained.*", "N tokens, N trained", text)
    text = re.sub(r"토큰 [\d,]+개, (그중 )?학습하는 토큰 [\d,]+개.*", "N tokens, N trained", text)
    text = re.sub(
        r"^(step|스텝) .*  (validation loss|검증 손실) .*", "an evaluation", text, flags=re.MULTILINE
    )
    return re.sub(r"(validation loss|검증 손실) \d+\.\d+", r"\1 N", text)


def check_shown(shown: str, printed: str) -> None:
    """The lines of `shown` are printed in this order; those between two lines of `...` without others between."""
    rest = without_counts(printed)
    for part in re.split(r"^\.\.\.\n", without_counts(shown), flags=re.MULTILINE):
        before, found, rest = rest.partition(part.rstrip("\n"))
        assert found or not part, f"not printed:\n{part}\nbut:\n{before}"


def output(folder: Path, *words: str) -> str:
    done = command(folder, *words)
    return done.out + done.err


def korean_output(*words: str) -> str:
    """What a command prints in Korean: in a process of its own, because some texts are chosen at import."""
    environment = {**os.environ, "YEONMA_LANG": "ko", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    command_line = [sys.executable, "-m", "yeonma", *words]
    done = subprocess.run(command_line, env=environment, capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models in place of those that the pages name."""
    root = tmp_path_factory.mktemp("models")
    marks = [
        AddedToken(text, special=False) for text in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    ]

    def base(name: str, chat_template: str | None) -> str:
        tokenizer = byte_level(chat_template)
        tokenizer.add_tokens(marks)
        tokenizer.eos_token = "<|im_end|>"  # as in the pages' models
        return str(tiny_base(root / name, tokenizer))

    opening = "{{ '<|im_start|>assistant\n' }}{%- if enable"
    assert opening in THINKING
    return {
        "Qwen/Qwen3-0.6B": base("thinking", THINKING),
        "Qwen/Qwen3-4B-Thinking-2507": base(
            "opened", THINKING.replace(opening, opening.replace("assistant\n", "assistant\n<think>\n"))
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct": base("plain", HABITS[0].template),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["reasoning", "reasoning.ko", "tools", "tools.ko", "mixtures", "mixtures.ko"]
)
def test_a_chapter_prints_what_it_says(
    name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    printed: str | None = None
    url = ""
    checked = 0
    with ExitStack() as servers:
        for block in blocks_of(page):
            if block.file is not None and block.command is None and not Path(block.file).exists():
                Path(block.file).write_text(block.text, encoding="utf-8")
            elif (words := block.command) is not None:
                arguments = [models.get(word, word) for word in words[1:]]
                if arguments[0] == "serve":
                    server = servers.enter_context(
                        serving(tmp_path / "errors", tmp_path / arguments[1], *arguments[2:])
                    )
                    url, printed = server.url, ""
                    continue
                arguments += KNOW_THE_ROWS if arguments[0] == "sft" else []
                printed = korean_output(*arguments) if name.endswith(".ko") else output(tmp_path, *arguments)
                if "--output" in arguments:
                    printed += Path(arguments[arguments.index("--output") + 1]).read_text(encoding="utf-8")
            elif block.text.startswith(("from ", "import ")):
                text = block.text.replace(HERE, url)
                for model, folder in models.items():
                    text = text.replace(f'"{model}"', repr(folder))
                assert text != block.text
                code = [sys.executable, "-c", text]
                ran = subprocess.run(code, capture_output=True, text=True)
                assert ran.returncode == 0, ran.stderr
                printed = ran.stdout
            else:
                assert printed is not None
                check_shown(block.text, printed)
                checked += 1
    assert checked >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rewards", "rewards.ko"])
def test_the_chapter_on_rewards_runs(
    name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files and commands, and every key of metrics.jsonl that it names."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for block in blocks_of(page):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
            continue
        for line in block.text.splitlines():
            words = shlex.split(line)
            arguments = [models.get(word, word) for word in words[1:]]
            done = command(tmp_path, *arguments, *(KNOW_THE_ROWS if words[1] == "sft" else []))
            assert done.status == 0, done.err
    steps = [json.loads(line) for line in Path("shorter/metrics.jsonl").read_text().splitlines()]
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    known = {key for step in steps for key in step} | {"reward_NAME"}
    named = {key for cell in table for key in re.findall(r"`([a-z_A-Z]+)`", cell) if key in known}
    assert {
        "reward",
        "reward_best",
        "equal_groups",
        "unfinished",
        "answer_tokens",
        "ratio",
        "clipped",
    } <= named
    assert {"reward_right", "reward_short", "reward_regex", "drawing_seconds", "scoring_seconds"} <= known
    scored = [json.loads(line) for line in Path("solver/answers.jsonl").read_text().splitlines()]
    assert {"exact"} == {name for line in scored for name in line["scores"]}


def test_a_missing_line_is_found() -> None:
    printed = "one · 3 tokens, 2 trained ──\ntwo\nthree\nfour\n"
    check_shown("one · 9 tokens, 5 trained ──\ntwo\n...\nfour\n", printed)
    for wrong in ("one · 9 tokens, 5 trained ──\nthree\n", "four\n...\ntwo\n", "five\n"):
        with pytest.raises(AssertionError, match="not printed"):
            check_shown(wrong, printed)


def test_blocks_are_told_apart() -> None:
    page = "A file `a.jsonl`:\n\n```\n{}\n```\n\n- And:\n\n  ```\n  yeonma inspect 'b c'\n  ```\n\n  ```\n  d\n  ```\n"
    file, words, output = blocks_of(page)
    assert (file.file, file.text, words.command, output.text) == (
        "a.jsonl",
        "{}\n",
        ["yeonma", "inspect", "b c"],
        "d\n",
    )

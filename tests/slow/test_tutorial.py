"""Runs the commands of the docs pages, in order and as written, on a tiny model: from data to server."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import OpenAI

from tests.adapters import tiny_base
from tests.foreign import foreign_adapter
from tests.judge_server import RuledJudge, judging, longer
from tests.pairs import pairs
from tests.runs import articles, command, write_jsonl
from tests.tokenizers import byte_level

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PAGES = ("tutorial", "data", "preferences", "hardware", "evaluate", "serve-and-export")
"""In the order in which their commands run; later pages use what earlier ones leave behind."""
TEXT = {page: (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in PAGES}
SHORTER = {  # options that shorten the runs
    "sft": ["--max_steps", "2", "--save_steps", "1"],
    "dpo": ["--max_steps", "2"],
    "inspect": [],
    "generate": ["--max_new_tokens", "4"],
    "compare": [],
    "merge": [],
    "verify": [],
}
TESTED_ELSEWHERE = {
    "demo": "tests/slow/test_wheel.py and tests/slow/test_demo.py",
    "torchrun": "tests/slow/test_processes.py",
    "push": "tests/unit/export/test_hub_push.py",
    "eval": "tests/slow/test_eval.py",
    "export": "tests/slow/test_gguf.py",
    "serve": "below, and tests/unit/serve/test_serve.py",
}


def commands() -> list[list[str]]:
    """The commands of the pages as words, in order, without those that contain `...`."""
    result = []
    for text in TEXT.values():
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("yeonma ", "torchrun ", "python merge.py ")) and "..." not in line:
                    result.append(shlex.split(line, comments=True))
    return [words for words in result if words[1] != "--help"]


def block_after(page: str, text: str) -> str:
    """The first block of the page below a text in it."""
    return TEXT[page].split(text, 1)[1].split("```", 1)[1].partition("\n")[2].split("```", 1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages assume: a base model, a data set of the hub, and the reader's own files."""
    root = tmp_path_factory.mktemp("tutorial")
    base = tiny_base(root / "base", byte_level())
    foreign_adapter(base, root / "their-adapter")
    write_jsonl(root / "news.jsonl", articles(230))
    rows = [
        {"body": row["prompt"], "desk": "Town", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in pairs(12)
    ]
    write_jsonl(root / "pairs.jsonl", rows)
    (root / "Downloads").mkdir()
    saved = [
        {"document": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs(4)
    ]
    write_jsonl(root / "Downloads" / "pairs.jsonl", saved)  # as tests/unit/evaluate/test_votes.py saves them
    shown = json.loads(block_after("preferences", "`pairs.jsonl` has rows like this one:"))
    assert shown.keys() == rows[0].keys()
    labelled = json.loads(block_after("preferences", "`labelled.jsonl` has rows like this one:"))
    good = {**labelled, "headline": "Town hall clock runs again", "label": True}
    write_jsonl(root / "labelled.jsonl", [labelled, good] * 4)
    (root / "articles.csv").write_text(block_after("tutorial", "A CSV file, `articles.csv`:"))
    (root / "headline.txt").write_text(block_after("tutorial", "A template, `headline.txt`,"))
    (root / "scores.py").write_text(block_after("evaluate", "`scores.py`:"))
    (root / "ask.txt").write_text(block_after("evaluate", "A template with turns, `ask.txt`:"))
    write_jsonl(root / "prompts.jsonl", [{"prompt": row["document"]} for row in articles(3)])
    replayed = [{"prompt": row["document"], "completion": row["title"]} for row in articles(6)]
    write_jsonl(root / "replay.jsonl", replayed)  # as the page's program makes them of the base's answers
    done = command(
        root / "demo", "demo", "--model_dir", str(base), "--quick", "true", "--output_dir", str(root / "demo")
    )
    assert done.status == 0, done.err
    return root


def with_local_files(words: list[str], root: Path) -> list[str]:
    """A command with local files in place of what is on the hub."""
    names = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(root / "base"),
        "beomi/llama-2-ko-7b": str(root / "base"),
        "daekeun-ml/naver-news-summarization-ko": "news.jsonl",
        "./title-generator/checkpoint-2000": "./title-generator/checkpoint-2",
    }
    words = [names.get(word, word) for word in words]
    if "80" in words:  # one token per byte
        words[words.index("80")] = "800"
    return words


def test_documented_commands_succeed_and_write_their_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    verbs: list[str] = []
    for program, *words in commands():
        verb = "merge" if program == "python" else "torchrun" if program == "torchrun" else words[0]
        if verb in TESTED_ELSEWHERE:
            continue
        if "--served" in words:  # tests/unit/verify/test_served.py starts servers
            continue
        arguments = with_local_files(words[1:], folder)
        if program == "python":
            script = [sys.executable, str(ROOT / words[0]), *arguments]
            merged = subprocess.run(script, cwd=folder, capture_output=True, text=True)
            assert merged.returncode == 0, merged.stderr
            continue
        with ExitStack() as servers:
            if "--judge" in words:
                judge = servers.enter_context(judging(RuledJudge(longer)))
                places = {"http://127.0.0.1:8000": judge.url, "NAME": "judge"}
                arguments = [places.get(word, word) for word in arguments]
            run = command(folder, verb, *arguments, *SHORTER[verb])
        assert run.status == 0, f"{verb} {' '.join(arguments)}\n{run.err}"
        verbs.append(verb)
    assert verbs.count("sft") == 7
    assert verbs.count("dpo") == 3
    assert {"inspect", "generate", "compare", "dpo", "verify", "merge"} <= set(verbs)
    for file in (
        "demo/report/report.html",
        "demo/report/judge.jsonl",
        "answers.jsonl",
        "headlines.jsonl",
        "preferred/adapter_model.safetensors",
        "full/model.safetensors",
        "preferred-kto/adapter_model.safetensors",
        "headlines-merged/model.safetensors",
        "title-generator-merged/model.safetensors",
    ):
        assert (folder / file).is_file(), file


def test_documented_python_code_runs(folder: Path) -> None:
    """Training from Python, into a folder that the commands leave alone, and loading the adapter with PEFT."""
    train = block_after("tutorial", "## 8. In Python or a notebook")
    for local_name in with_local_files(["HuggingFaceTB/SmolLM2-135M-Instruct"], folder):
        train = train.replace("HuggingFaceTB/SmolLM2-135M-Instruct", local_name)
    train = train.replace('output_dir="headlines"', 'output_dir="in-python"')
    load = block_after("serve-and-export", "The output folder is an ordinary PEFT adapter:")
    for code in (train, f"{load}assert len(ids)"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "in-python" / "adapter_model.safetensors").is_file()


def test_documented_serve_command_and_client_code_run(folder: Path) -> None:
    """The serve command of the page, at a free port, and the page's client code."""
    (words,) = [words[1:] for words in commands() if words[:3] == ["yeonma", "serve", "demo"]]
    server = subprocess.Popen(
        [sys.executable, "-m", "yeonma", *words, "--port", "0"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        serving = (re.search(r"Serving .* at (http://\S+/v1)\.", line) for line in server.stdout)
        address = next(match[1] for match in serving if match)
        assert len(OpenAI(base_url=address, api_key="none").models.list().data) == 2
        code = block_after("serve-and-export", "The base model is in memory once.").replace(
            "http://127.0.0.1:8000/v1", address
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr
        server.send_signal(signal.SIGINT)
        server.communicate()
        assert server.returncode == 0
    finally:
        server.kill()

"""The README's tutorial, its commands one after the other as they stand there, on a tiny model: rows to server."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from tests.adapters import tiny_base
from tests.pairs import pairs
from tests.runs import articles, command, write_jsonl
from tests.tokenizers import byte_level

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEED = {  # what a tiny model need not do at length
    "sft": ["--max_steps", "2", "--save_steps", "1"],
    "dpo": ["--max_steps", "2"],
    "inspect": [],
    "generate": ["--max_new_tokens", "4"],
    "compare": [],
    "merge": [],
    "verify": [],
}
ELSEWHERE = {
    "torchrun": "tests/slow/test_processes.py",
    "push": "tests/unit/export/test_hub_push.py",
    "export": "tests/slow/test_gguf.py",
    "serve": "below, and tests/unit/serve/test_serve.py",
}


def commands() -> list[list[str]]:
    """The words of each command of the tutorial, in order."""
    text = README[README.index("## Tutorial") : README.index("## What it does not do yet")]
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("yeonma ", "torchrun ", "python merge.py ")) and "..." not in line:
                found.append(shlex.split(line, comments=True))
    return found


def block_after(text: str) -> str:
    return README.split(text, 1)[1].split("```", 1)[1].partition("\n")[2].split("```", 1)[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tutorial takes for granted: two bases, a data set of the hub, and the reader's own files."""
    root = tmp_path_factory.mktemp("tutorial")
    base = tiny_base(root / "base", byte_level())
    write_jsonl(root / "news.jsonl", articles(230))
    rows = [
        {"body": row["prompt"], "desk": "Town", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in pairs(12)
    ]
    write_jsonl(root / "pairs.jsonl", rows)
    (root / "articles.csv").write_text(block_after("A CSV file, `articles.csv`:"))
    (root / "headline.txt").write_text(block_after("a template, `headline.txt`, with its columns:"))
    made = command(
        root / "demo", "demo", "--model_dir", str(base), "--quick", "true", "--output_dir", str(root / "demo")
    )
    assert made.status == 0, made.err
    return root


def as_here(words: list[str], root: Path) -> list[str]:
    """A command with what lies elsewhere in the place of what the hub holds."""
    names = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(root / "base"),
        "beomi/llama-2-ko-7b": str(root / "base"),
        "daekeun-ml/naver-news-summarization-ko": "news.jsonl",
        "./title-generator/checkpoint-2000": "./title-generator/checkpoint-2",
    }
    found = [names.get(word, word) for word in words]
    if "80" in found:  # a token a byte
        found[found.index("80")] = "800"
    found = [str(ROOT / word) if word.startswith("yeonma/samples/") else word for word in found]
    return found


def test_each_command_does_what_it_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    done: list[str] = []
    for program, *words in commands():
        verb = "merge" if program == "python" else "torchrun" if program == "torchrun" else words[0]
        if verb in ELSEWHERE:
            continue
        rest = as_here(words[1:], place)
        if program == "python":
            script = [sys.executable, str(ROOT / words[0]), *rest]
            by_script = subprocess.run(script, cwd=place, capture_output=True, text=True)
            assert by_script.returncode == 0, by_script.stderr
            continue
        run = command(place, verb, *rest, *SPEED[verb])
        assert run.status == 0, f"{verb} {' '.join(rest)}\n{run.err}"
        done.append(verb)
    assert done.count("sft") == 3
    assert {"inspect", "generate", "compare", "dpo", "verify", "merge"} <= set(done)
    for file in (
        "demo/report/report.html",
        "answers.jsonl",
        "preferred/adapter_model.safetensors",
        "headlines-merged/model.safetensors",
        "title-generator-merged/model.safetensors",
    ):
        assert (place / file).is_file(), file


def test_the_demo_is_served(place: Path) -> None:
    """The README's command, at a port that is free, and its Python."""
    (words,) = [each[1:] for each in commands() if each[:3] == ["yeonma", "serve", "demo"]]
    server = subprocess.Popen(
        [sys.executable, "-m", "yeonma", *words, "--port", "0"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        serving = (re.search(r"Serving .* at (http://\S+/v1)\.", line) for line in server.stdout)
        address = next(found[1] for found in serving if found)
        assert len(OpenAI(base_url=address, api_key="none").models.list().data) == 2
        code = block_after("the base is in memory once.").replace("http://127.0.0.1:8000/v1", address)
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr
        server.send_signal(signal.SIGINT)
        server.communicate()
        assert server.returncode == 0
    finally:
        server.kill()

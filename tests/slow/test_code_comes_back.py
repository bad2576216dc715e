"""Code trains and comes back: a tiny model overfit on twenty Python functions gives each of them back byte for byte,
through `generate`, `chat`, `serve` with and without streams, `/v1/completions` one token at a time, and `compare`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import yeonma.train.model_card
from tests.adapters import tiny_base
from tests.runs import arguments, write_jsonl
from tests.servers import ROOT, serving
from tests.tokenizers import CHATML, byte_level
from yeonma import sft
from yeonma.cli import main
from yeonma.commands.compare import compare
from yeonma.config.settings import AnswerSettings, CompareConfig, CompareSettings, JudgeSettings

PLAIN = "{task}\n\n{code}\n"
TURNS = "[user]\n{task}\n[assistant]\n{code}\n"
MAX_TOKENS = 96
WORDS = (
    "amber basil cedar delta ember fjord grove haven ivory jolly "
    "knoll lilac maple noble ocean pearl quill river stone tulip"
)


def functions() -> list[dict[str, str]]:
    """Twenty functions, with all that could be lost at their edges and within them."""
    bodies = [
        "def f{n}(x):\n    if x:\n        return {n}\n    return x\n",
        "    def f{n}(self):\n        pass\n",
        "\n\ndef f{n}():\n\treturn '\t{n}'\n\n\n",
        "def f{n}(a,\n       b):  \n    return a  ",
        "def f{n}():\r\n    return {n}\r\n",
        "\tf{n} = lambda: {n}\t",
        "  # f{n}\n\n  x = '서울 🌳 \ufffd'\n  ",
        "f{n}()\n\n    \n",
        "\r\n  f{n}\n",
        "class F{n}:\n    x = {{\n        'a': [\n            {n},\n        ],\n    }}\n",
    ]
    return [
        {"task": task, "code": bodies[n % len(bodies)].format(n=n)} for n, task in enumerate(WORDS.split())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("template", [TURNS, PLAIN], ids=["turns", "plain"])
def test_code_comes_back_byte_for_byte(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yeonma.train.model_card, "MAX_NEW_TOKENS", 8)
    rows = functions()
    base = tiny_base(tmp_path / "base", byte_level(CHATML), width=64, spread=0.2)
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "OUT"
    (tmp_path / "t.txt").write_text(template)
    sft(
        base_model=str(base),
        data_path=str(data),
        output_dir=str(out),
        template=str(tmp_path / "t.txt"),
        max_steps=100,
        batch_size=20,
        learning_rate=1e-2,
        lora_r=32,
        lora_alpha=64,
        lr_scheduler="cosine",
    )
    trained = [row["code"] for row in rows]

    answers = tmp_path / "answers.jsonl"
    options = {"data_path": data, "output": answers, "max_new_tokens": MAX_TOKENS}
    assert main(["generate", str(out), *arguments(options)]) == 0
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == trained
    assert [line["reference"] for line in lines] == trained

    asked = "".join(f"{row['task']}\n" for row in rows)
    command = [sys.executable, "-m", "yeonma", "chat", str(out), "--max_new_tokens", str(MAX_TOKENS)]
    said = subprocess.run(command, cwd=ROOT, input=asked.encode(), capture_output=True, check=True).stdout
    assert said.decode() == "".join(f"{code}\n" for code in trained)

    settings = CompareSettings(models=[str(out)], data_path=str(data), output_dir=str(tmp_path / "compared"))
    answering = AnswerSettings(max_new_tokens=MAX_TOKENS)
    compare(CompareConfig(compare=settings, judging=JudgeSettings(), answer=answering), lambda _: None)
    report = json.loads((tmp_path / "compared" / "report.json").read_text())
    exact = next(metric for metric in report["metrics"] if metric["key"] == "exact")
    assert exact["values"] == [100.0]

    with serving(tmp_path / "err", out) as server:
        client = server.client()
        for row in rows:
            assert served(client, row["task"], stream=False) == row["code"]
            assert served(client, row["task"], stream=True) == row["code"]
        if template == PLAIN:
            for row in rows[:3]:
                assert chained(client, f"{row['task']}\n\n") == row["code"]


def served(client: OpenAI, task: str, *, stream: bool) -> str:
    request: dict[str, Any] = {"model": "OUT", "messages": [{"role": "user", "content": task}]}
    request |= {"max_tokens": MAX_TOKENS, "temperature": 0}
    if not stream:
        return str(client.chat.completions.create(**request).choices[0].message.content)
    chunks = client.chat.completions.create(**request, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def chained(client: OpenAI, prompt: str) -> str:
    """The answer, one token a request, each behind the prompt of the next. A character of several tokens needs more."""
    answer = ""
    for _ in range(4 * MAX_TOKENS):
        for tokens in range(1, 5):
            reply = client.completions.create(
                model="OUT", prompt=prompt + answer, max_tokens=tokens, temperature=0
            ).choices[0]
            if reply.text or reply.finish_reason == "stop":
                break
        answer += reply.text
        if reply.finish_reason == "stop":
            return answer
    return answer

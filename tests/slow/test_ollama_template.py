"""Go itself carries out the TEMPLATE of Modelfiles: the texts of transformers, and those of our own `execute`.

`make llama` installs Go, a wheel, in .venv-llama; or $YEONMA_GO names its program.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from tests.chat_habits import HABITS, rendered
from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma.data.template import Template, load_template
from yeonma.export.go_template import GoTemplateError, execute
from yeonma.export.ollama_modelfile import modelfile
from yeonma.export.role_frames import render_messages
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.text_encoder import TextEncoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RULES = TokenRules(512)
TEXTS = (
    "x",
    "두 줄\n\n그리고",
    '"{{ .Content }}" {x}',
    "a  b\tc",
    "\u3000wide\u3000",
    " edges \n",
    "`$before` \\n",
    "<|im_end|>",
    "😀",
)
FIELDS = {
    "title": load_template("title").text,
    "orca": load_template("orca").text,
    "odd": '\u3000a {{ b {{{{ "c" ""d\n\u200b{document} }}}}\xa0\n{title}\n',
    "quotes": '"""\n{document}"""\n{title}\n',
}


def go_program(folder: Path) -> Path:
    go = os.environ.get("YEONMA_GO") or which("go") or str(ROOT / ".venv-llama" / "bin" / "go")
    if not Path(go).is_file():
        pytest.skip("no Go: `make llama`")
    program = folder / "ollama_template"
    environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(folder / "cache"), "CGO_ENABLED": "0"}
    source = Path(__file__).with_name("ollama_template.go")
    subprocess.run([go, "build", "-o", str(program), str(source)], check=True, env=environment)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go_program(tmp_path_factory.mktemp("go"))


def by_go(program: Path, asked: list[dict[str, Any]]) -> list[list[dict[str, str]]]:
    done = subprocess.run([program], input=json.dumps(asked), capture_output=True, text=True, check=True)
    answers: list[list[dict[str, str]]] = json.loads(done.stdout)
    return answers


def template_in(text: str) -> str:
    return text.partition('TEMPLATE """')[2].partition('"""')[0]


def conversations(takes_system: bool) -> list[list[dict[str, str]]]:
    """Those of training, by a fixed draw, and those that must be refused or go on from an answer."""
    draw = random.Random(2)
    found = []
    for _ in range(30):
        roles = ("system",) * (takes_system and draw.random() < 0.5)
        roles += (("user", "assistant") * 3)[: draw.choice((1, 3, 5))]
        found.append([{"role": role, "content": draw.choice(TEXTS)} for role in roles])
    return found


ODD: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "begun"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "s"}],
    [{"role": "user", "content": "x"}, {"role": "tool", "content": "1"}],
    [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}],
]


def test_go_writes_what_transformers_writes(program: Path) -> None:
    asked, expected, own = [], [], []
    for habit in HABITS:
        encoder = TextEncoder.of(habit.tokenizer())
        text = modelfile(load_template("chat"), encoder, "m.gguf", (), RULES).text
        if 'TEMPLATE """' not in text:
            continue
        takes_system = "TEMPLATE refuses system messages" not in text
        found = conversations(takes_system)
        capital = [
            [{"Role": one["role"], "Content": one["content"]} for one in messages]
            for messages in (*found, *ODD)
        ]
        asked.append({"Modelfile": text, "Messages": capital})
        expected.append([rendered(habit, messages, add_generation_prompt=True) for messages in found])
        own.append([_own(template_in(text), messages) for messages in (*found, *ODD)])
    assert len(asked) >= 10
    for answers, texts, ours in zip(by_go(program, asked), expected, own, strict=True):
        assert [answer["Text"] for answer in answers[: len(texts)]] == texts
        assert [answer["Text"] for answer in answers] == [text for text, _ in ours]
        for answer, (_, error) in zip(answers, ours, strict=True):
            assert bool(answer["Error"]) == bool(error)
            assert error in answer["Error"]


def _own(go: str, messages: list[dict[str, str]]) -> tuple[str, str]:
    try:
        return render_messages(go, messages), ""
    except GoTemplateError as error:
        return "", str(error)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_go_writes_the_fields_of_other_templates(program: Path, name: str) -> None:
    asked, own = [], []
    for tokenizer in (byte_level(), sentencepiece_bpe()):
        text = modelfile(Template.parse(FIELDS[name]), TextEncoder.of(tokenizer), "m.gguf", (), RULES).text
        if 'TEMPLATE """' in text:
            fields = [{"Prompt": one, "System": other} for one in TEXTS for other in ("", "s {x}")]
            asked.append({"Modelfile": text, "Fields": fields})
            own.append([execute(template_in(text), values) for values in fields])
    assert asked
    assert [[answer["Text"] for answer in answers] for answers in by_go(program, asked)] == own

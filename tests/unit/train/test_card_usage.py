"""The card's code: the Python in it is run, and its commands say what `yeonma serve` and `yeonma export` would.

vLLM and Ollama themselves do not run here.
"""

from __future__ import annotations

import json
import re
import shlex
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml

from tests.adapters import tiny_base
from tests.runs import SAMPLE_TOKENS, Done, articles, model_folder, trained, write_jsonl
from tests.tokenizers import CHATML, byte_level
from yeonma.adapter.prompt_builder import open_prompt_builder
from yeonma.data.template import Template, load_template
from yeonma.model.load import load_tokenizer
from yeonma.model.source import find_base
from yeonma.serve.vllm import VllmPlan, rank_of, vllm_command, why_not
from yeonma.shown import many_lines
from yeonma.tokenization.example import DEFAULT_RULES
from yeonma.train.card_usage import NEW_TOKENS, ExamplePrompt, example_prompt
from yeonma.train.model_card import _hub_sets

TURNS = "[system]\nYou write titles.\n[user]\n{document}\n[assistant]\n{title}\n"
TWO_FIELDS = "{document}\n\nby {author}\n\ntitle: {title}"
SETTINGS = {"max_steps": 2, "card_rows": 2, "lora_r": 9}


def card(done: Done) -> str:
    return (done.folder / "README.md").read_text("utf-8")


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def printed(done: Done) -> str:
    """What the card's Python prints, run where the output folder lies, as the card says; with as many tokens as the
    samples of tests have."""
    (code,) = fenced(card(done), "python")
    assert f"max_new_tokens={NEW_TOKENS}," in code
    code = code.replace(f"max_new_tokens={NEW_TOKENS},", f"max_new_tokens={SAMPLE_TOKENS},")
    out = StringIO()
    with chdir(done.folder.parent), redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    return out.getvalue().removesuffix("\n")


def first_answer(done: Done) -> str:
    """The trained model's answer to the first row, as the card shows it."""
    trained_as = "fine-tuned" if "fine-tuned:\n" in card(done) else "with the adapter"
    return re.search(rf"^{trained_as}:\n\n```text\n(.*?)\n```$", card(done), re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("usage")
    rows = [{**row, "author": "Kim"} for row in articles(8)]
    write_jsonl(root / "rows.jsonl", rows)
    model_folder(root / "characters")
    tiny_base(root / "chatml", byte_level(CHATML))
    (root / "chatml" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, 2], "repetition_penalty": 1.7})
    )
    return root


RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("characters", {}),
    "two fields": ("characters", {"template": TWO_FIELDS}),
    "turns": ("chatml", {"template": TURNS}),
    "new tokens": ("chatml", {"template": TURNS, "new_tokens": "['<title>']"}),
    "full": ("chatml", {"template": TURNS, "train": "full", "lora_r": None}),
}


QUICK = ("plain", "turns", "two fields")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(RUNS)],
)
def done(place: Path, request: pytest.FixtureRequest) -> Done:
    base, settings = RUNS[request.param]
    if settings.get("train") == "full":
        settings = {**settings, "lora_alpha": None}
    name = f"my {request.param}"
    return trained(place / name, place / base, place / "rows.jsonl", **{**SETTINGS, **settings})


def test_python_on_the_card_prints_the_answer_on_the_card(done: Done) -> None:
    assert many_lines(printed(done)) == first_answer(done)


def test_vllm_command_is_that_of_serve(done: Done) -> None:
    builder = open_prompt_builder(done.folder)
    is_full = builder.adapter.is_full
    shell = [block for block in fenced(card(done), "sh") if "vllm serve" in block]
    if why_not([builder]):
        assert not shell
        assert "my new tokens" in str(done.folder)
        return
    command, _, request = shell[0].partition("\ncurl ")
    words = shlex.split(command)
    plan = VllmPlan(
        base=str(done.folder) if is_full else "path/to/" + Path(builder.adapter.base.name).name,
        base_name="base",
        revision=None,
        adapters={} if is_full else {done.folder.name: (done.folder, rank_of(builder))},
        host="127.0.0.1",
        port=8000,
        dtype="auto",
        trust_remote_code=False,
        temperature=0.0,
        max_new_tokens_limit=128,
    )
    served = vllm_command(plan)
    base = served[served.index("serve") + 1]
    assert words[:3] == ["vllm", "serve", Path(base).name if is_full else base]
    for option in ("--max-lora-rank", "--tokenizer", "--chat-template"):
        if option in words:
            value = served[served.index(option) + 1]
            expected = value.replace(str(done.folder), done.folder.name)
            assert words[words.index(option) + 1] == expected
    if not is_full:
        module = json.loads(served[served.index("--lora-modules") + 1])
        name, _, path = words[words.index("--lora-modules") + 1].partition("=")
        assert (name, path) == (module["name"], done.folder.name)
        assert "--enable-lora" in words
    body = json.loads(shlex.split("curl " + request)[-1])
    assert body["model"] == done.folder.name and body["temperature"] == 0
    assert body["max_tokens"] == NEW_TOKENS


def test_sglang_command_stands_where_vllm_has_one(done: Done) -> None:
    """By its documentation: `model` of a request is BASE:ADAPTER. SGLang needs a GPU and was not run."""
    shell = [block for block in fenced(card(done), "sh") if "sglang serve" in block]
    assert bool(shell) == ("vllm serve" in card(done))
    if not shell:
        return
    command, _, request = shell[0].partition("\ncurl ")
    words = shlex.split(command)
    name = done.folder.name
    assert words[words.index("--chat-template") + 1] == f"{name}/chat_template.jinja"
    model = json.loads(shlex.split(request)[-1])["model"]
    base = words[words.index("--model-path") + 1]
    if open_prompt_builder(done.folder).adapter.is_full:
        assert (base, model) == (name, name)
    else:
        assert words[words.index("--lora-paths") + 1] == f"{name}={name}"
        assert model == f"{base}:{name}"


def test_card_names_only_commands_that_the_template_allows(done: Done) -> None:
    text, name = card(done), done.folder.name
    exported = [block for block in fenced(text, "sh") if "ollama" in block]
    assert bool(exported) == ("two fields" not in name)
    if exported:
        first = shlex.split(exported[0].splitlines()[0])
        assert first == [*("yeonma", "export", name, "--output_dir", f"{name}-ollama", "--format", "ollama")]


def test_card_has_no_path_of_this_machine_and_only_changed_settings(done: Done, place: Path) -> None:
    text = card(done)
    assert str(place) not in text
    assert "base_model: /" not in text and text.startswith("---\nlibrary_name:")
    (settings,) = fenced(text, "yaml")
    assert "data_path: rows.jsonl" in settings and "max_steps: 2" in settings
    for default in ("weight_decay", "seed", "output_dir", "cache_dir", "num_epochs"):
        assert f"{default}:" not in settings
    assert text.index("<details>") < text.index("```yaml") < text.index("</details>")
    frame = "title: " if "two fields" in done.folder.name else "You write titles."
    if "plain" not in done.folder.name:
        assert text.count(frame) == 1  # in the template, not with every row


def test_code_is_left_out_where_it_would_ask_with_other_tokens(place: Path) -> None:
    template = "[user]\n{document}\n[assistant]\ntitle: {title}\n"
    done = trained(
        place / "around", place / "chatml", place / "rows.jsonl", **{**SETTINGS, "template": template}
    )
    assert "vllm serve" not in card(done)  # which would leave "title: " in its answers
    tokenizer = load_tokenizer(find_base(str(tiny_base(place / "no chat", byte_level(None)))))
    plain = example_prompt(load_template("title"), DEFAULT_RULES, tokenizer, None)
    assert not plain.messages and plain.text.endswith("\n\n### 제목:\n")
    other = example_prompt(load_template("title"), DEFAULT_RULES, tokenizer, "{{ messages[0]['content'] }}")
    assert other == plain
    turns, chatml = Template.parse(TURNS, "turns"), load_tokenizer(find_base(str(place / "chatml")))
    assert example_prompt(turns, DEFAULT_RULES, chatml, None) == ExamplePrompt()


def test_language_and_data_sets_are_named_where_they_are_sure(place: Path) -> None:
    def about(name: str, titles: list[str]) -> dict[str, object]:
        rows = [{"document": f"{number}.", "title": title} for number, title in enumerate(titles)]
        data = write_jsonl(place / f"{name}.jsonl", rows)
        text = card(
            trained(place / name, place / "chatml", data, **{**SETTINGS, "max_steps": 1, "card_rows": 0})
        )
        return dict(yaml.safe_load(text.split("---\n")[1]))

    korean = about("ko", ["서울의 아침", "부산행 KTX", "plain title"])
    assert korean["language"] == "ko" and "datasets" not in korean
    assert "language" not in about("en", ["a title", "서울의 아침", "eine Stadt"])
    names = ["owner/news:ko", str(place / "rows.jsonl"), "rows.jsonl", "owner/b", "data/train.jsonl.gz/x"]
    assert _hub_sets(names) == ["owner/news", "owner/b"]


def test_dora_and_high_ranks_have_no_vllm_command(place: Path) -> None:
    for name, settings in (("dora", {"use_dora": True}), ("high", {"lora_r": 600})):
        done = trained(place / name, place / "characters", place / "rows.jsonl", **{**SETTINGS, **settings})
        assert "vllm serve" not in card(done)
        assert printed(done) == first_answer(done)


def test_what_is_stored_is_english_and_the_card_is_in_the_language_of_help(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = articles(6)
    rows[2]["title"] = ""
    data = write_jsonl(place / "one-empty.jsonl", rows)
    settings = {**SETTINGS, "max_steps": 1, "card_rows": 0, "bad_rows": "skip"}
    english = trained(place / "english", place / "characters", data, **settings)
    monkeypatch.setenv("YEONMA_LANG", "ko")
    korean = trained(place / "korean", place / "characters", data, **settings)
    assert (korean.folder / "yeonma.json").read_bytes() == (english.folder / "yeonma.json").read_bytes()
    card = (korean.folder / "README.md").read_text("utf-8")
    assert "어텐션 2/2" in card and "attention 2/2" not in card
    assert '`"title" 필드 값이 비어 있습니다`: 1' in card

"""The docs match the program: links resolve, commands use existing settings, templates equal their files."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from yeonma.cli import VERBS, Verb
from yeonma.config.parse import read_config
from yeonma.data import template
from yeonma.data.bundled_samples import FOLDER as SAMPLES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
MAX_README_LINES = 150
# Pages that must have the same chapters in English (NAME.md) and Korean (NAME.ko.md), as paths without the ending.
# Add a page here together with its Korean translation.
TRANSLATED: tuple[str, ...] = (
    "README",
    "docs/benchmarks",
    "docs/choose",
    "docs/data",
    "docs/design",
    "docs/evaluate",
    "docs/extending",
    "docs/hardware",
    "docs/mixtures",
    "docs/models",
    "docs/preferences",
    "docs/rewards",
    "docs/python",
    "docs/reasoning",
    "docs/reliability",
    "docs/scale",
    "docs/serve-and-export",
    "docs/settings",
    "docs/studio",
    "docs/tools",
    "docs/tutorial",
)
OTHER_OPTIONS = {
    "model_path",  # SGLang
    "chat_template",
    "allowed_origins",  # of vLLM
    # of pip, wsl, Slurm, SkyPilot, torchrun, make's targets, and scripts in benchmarks/, tests/ and scripts/
    "trace",  # of scripts/choose.py
    *(
        "no_deps",
        "install",
        "index_url",
        "wheel_dir",
        "me",
        "name",
        "nnodes",
        "node_rank",
        "max_model_len",
        "signals_to_handle",
    ),
    *(
        "lr",
        "signal",
        "steps",
        "threads",
        "write_docs",
        "try",
        "data",
        "model",
        "output",
        "ours",
        "contenders",
        "rounds",
        "first_round",
        "workloads",
        "add",
        "tiny",
        "before",
        "rows",
        "pairs",
    ),
    *("minutes", "only", "list", "retry", "table_only", "python"),  # of benchmarks/lease.py and bundle.py
    *("kills", "cases", "targets"),
}
TUTORIAL_COMMAND = """\
torchrun --nproc_per_node=4 --master_port=1234 sft-trainer.py \\
    --base_model beomi/llama-2-ko-7b --data-path daekeun-ml/naver-news-summarization-ko \
--output_dir ./title-generator \\
    --batch_size 8 --micro_batch_size 1 --num_epochs 3 --learning_rate 1e-5 --cutoff_len 2048 --val_set_size 0 \\
    --lora_r 16 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules '[gate_proj, down_proj, up_proj]' \\
    --train_on_inputs False --add_eos_token True --group_by_length False --lr_scheduler 'linear' --warmup_steps 100
"""
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:cd|hf|make|nvidia-smi|python[\d.]*|rsync|ssh|tmux|torchrun|yeonma|\.[\w-]+/bin/\w+)(?: .*)?"
)
KOREAN_COMMANDS = {
    "yeonma inspect --base_model HuggingFaceTB/SmolLM2-135M-Instruct --data_path sample:news_en "
    "--template sample:title_en --cutoff_len 80 --rows 1,17": "yeonma inspect --base_model "
    "HuggingFaceTB/SmolLM2-135M-Instruct --data_path sample:news_ko --cutoff_len 256 --rows 1,17",
}
"""English commands whose Korean pages have another one: Korean rows suit the built-in template and have more tokens."""
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_korean(page: Path) -> bool:
    return page.stem.endswith(".ko")


def in_language_of(readme: Path) -> list[Path]:
    """The pages of a README's language, itself among them."""
    return [page for page in PAGES if is_korean(page) == is_korean(readme)]


def text_of(*pages: Path) -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def blocks(text: str) -> list[str]:
    """The contents of the fenced code blocks that are not indented."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text outside fences."""
    return FENCE.sub("", text)


def commands(text: str) -> list[list[str]]:
    """The words of every `yeonma` and `torchrun sft-trainer.py` command in the blocks, as `yeonma VERB ...`."""
    lines = (line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines())
    lines = (re.sub(r"^[A-Z_]+=\S+ ", "", line) for line in lines)
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(("yeonma ", "torchrun "))]
    return [
        ["yeonma", "sft", *command[command.index("sft-trainer.py") + 1 :]]
        if command[0] == "torchrun"
        else command
        for command in words
        if command[1] != "--help" and (command[0] == "yeonma" or "sft-trainer.py" in command)
    ]


def settings_named(verb: Verb) -> set[str]:
    return {field.name for group in verb.groups for field in fields(group)} | {"config", "help"}


def option_names(words: list[str]) -> list[str]:
    return [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    counts: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        anchors.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return anchors


def links(text: str) -> list[str]:
    """The targets of links and images outside fences and inline code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in links(text):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if not linked.exists() or (
            anchor and anchor not in slugs(text if linked == page else text_of(linked))
        ):
            broken.append(target)
    return broken


def chapters(text: str) -> list[tuple[str, str]]:
    """The level and number of each heading. Headings of templates in code blocks do not count."""
    return re.findall(r"^(#+) (\d*)", prose(text), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    assert broken_links(page, text_of(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_repository_files_named_in_the_docs_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w./-])((?:benchmarks|scripts|tests|yeonma)/[\w./-]+\.\w+)", text_of(page))
    assert [file for file in sorted(set(named)) if not (ROOT / file).exists()] == []


def test_a_broken_link_is_found() -> None:
    text = "# One `two`: three\n\n[a](#one-two-three) [b](#two) [c](docs/none.md) [d](LICENSE) [e](README.md#none)\n"
    assert broken_links(ROOT / "README.md", text) == ["#two", "docs/none.md", "README.md#none"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_docs_use_valid_settings(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)```", text_of(page), re.DOTALL):
        (tmp_path / name).write_text(content, encoding="utf-8")
    for _, verb, *words in commands(text_of(page)):
        known = VERBS[verb]
        assert set(option_names(words)) <= settings_named(known)
        # The reader completes these commands; tests/slow/test_extending.py runs them.
        if "..." in words or page.stem.removesuffix(".ko") == "extending":
            continue
        assert (
            read_config(
                known.config,
                words,
                verb=verb,
                groups=known.groups,
                positional=known.positional,
                not_required=known.not_required,
            ).warnings
            == ()
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_in_the_text_is_a_setting(page: Path) -> None:
    inline = " ".join(re.findall(r"`([^`\n]+)`", prose(text_of(page))))
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", inline)}
    assert (
        sorted(named - {name for verb in VERBS.values() for name in settings_named(verb)} - OTHER_OPTIONS)
        == []
    )


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_pages_of_each_language_show_the_main_commands(readme: Path) -> None:
    shown = {words[1] for words in commands(text_of(*in_language_of(readme)))}
    assert {
        "sft",
        "dpo",
        "grpo",
        "inspect",
        "generate",
        "compare",
        "verify",
        "merge",
        "export",
        "push",
        "serve",
    } <= shown


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_readme_contains_the_tutorial_command_verbatim(readme: Path) -> None:
    assert TUTORIAL_COMMAND in blocks(text_of(readme))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_templates_in_the_docs_equal_their_files(readme: Path) -> None:
    shown = blocks(text_of(*in_language_of(readme)))
    built_in = template._BUILT_IN_FOLDER
    assert (built_in / "alpaca.txt").read_text(encoding="utf-8") in shown
    own = SAMPLES / "title_en.txt" if readme.name == "README.md" else built_in / "title.txt"
    assert own.read_text(encoding="utf-8") in shown


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_readme_starts_with_make_demo_and_make_test(readme: Path) -> None:
    first_block = [line.split("#")[0].strip() for line in blocks(text_of(readme))[0].splitlines()]
    assert first_block == ["make demo", "make test"]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_a_readme_is_short(readme: Path) -> None:
    assert len(text_of(readme).splitlines()) <= MAX_README_LINES


def test_readme_links_every_page_and_pages_show_every_picture() -> None:
    readme, *_ = READMES
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(text_of(readme))}
    assert {page for page in in_language_of(readme) if page != readme} <= linked
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(text_of(page))}
    assert set((ROOT / "docs").glob("*.png")) <= shown


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_chapters_in_the_same_order(name: str) -> None:
    english, korean = (chapters(text_of(ROOT / f"{name}{ending}")) for ending in (".md", ".ko.md"))
    assert english == korean


def rows_of_numbers(text: str) -> list[list[list[str]]]:
    """For each row of the tables, the numbers of each cell; sorted, because languages order words differently."""
    rows = [line for line in prose(text).splitlines() if line.startswith("|")]
    return [[sorted(NUMBER.findall(cell)) for cell in row.split("|")] for row in rows]


@pytest.mark.parametrize("name", ["docs/benchmarks", "docs/scale"])
def test_both_languages_have_the_same_numbers_in_every_row_of_their_tables(name: str) -> None:
    english, korean = (rows_of_numbers(text_of(ROOT / f"{name}{ending}")) for ending in (".md", ".ko.md"))
    assert len(english) == len(korean) > 30
    assert [pair for pair in zip(english, korean, strict=True) if pair[0] != pair[1]] == []


def shown_commands(text: str) -> list[str]:
    """The commands in the blocks, without comments. Rows of data are reduced to their columns."""
    lines = (line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines())
    split = (shlex.split(line, comments=True) for line in lines if COMMAND.fullmatch(line))
    return [
        " ".join(columns_of(word) if word.startswith('{"') else word for word in words) for words in split
    ]


def columns_of(row: str) -> str:
    return f"{{{', '.join(json.loads(row))}}}"


def python_code(text: str) -> list[str]:
    """The Python blocks, without comments and the contents of strings."""
    trees = [
        ast.parse(block) for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return [ast.unparse(tree) for tree in trees]


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_show_the_same_commands(name: str) -> None:
    """The tests that run the English commands then prove the Korean ones."""
    english, korean = (text_of(ROOT / f"{name}{ending}") for ending in (".md", ".ko.md"))
    expected = [KOREAN_COMMANDS.get(command, command) for command in shown_commands(english)]
    assert shown_commands(korean) == expected
    assert python_code(korean) == python_code(english)


def test_both_languages_show_the_same_changes_and_code_for_extending() -> None:
    """The tests that apply the English ones then prove the Korean ones."""
    english, korean = (text_of(ROOT / "docs" / f"extending{ending}") for ending in (".md", ".ko.md"))
    assert blocks(english) == blocks(korean) != []


def test_differing_commands_are_detected() -> None:
    block = 'text\n\n```\nYEONMA_DEBUG=1 yeonma chat demo --row \'{{"body": "{}"}}\' --seed {}  # {}\nyeonma: {}\n```\n'
    expected = ["YEONMA_DEBUG=1 yeonma chat demo --row {body} --seed 1"]
    assert shown_commands(block.format("a", 1, "comment", "message")) == expected
    assert shown_commands(block.format("가", 1, "설명", "메시지")) == expected
    assert shown_commands(block.format("a", 2, "comment", "message")) != expected
    assert python_code('```python\nask("a", 1)  # b\n```\n') == python_code("```python\nask('가', 1)\n```\n")
    assert python_code("```python\nask(1)\n```\n") != python_code("```python\nask(2)\n```\n")


def test_every_korean_page_is_compared_with_its_english_one() -> None:
    korean = {name_of(page).removesuffix(".ko.md") for page in PAGES if is_korean(page)}
    assert korean == set(TRANSLATED)


@pytest.mark.parametrize("script", ["choose", "scale"])
def test_tables_of_a_page_equal_its_scripts_output(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""Targets that need no torch: data files, templates, settings, and one row on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.harness import Target
from tests.fuzz.mutate import (
    NUMBERS,
    TEXTS,
    Draw,
    damaged_bytes,
    damaged_text,
    damaged_value,
    edits,
    file_bytes,
)
from tests.fuzz.samples import (
    BUILT_IN_TEMPLATES,
    NAMES,
    SAMPLE_TEMPLATE,
    TABLES,
    data_files,
    rows_as_json,
)
from tests.fuzz.sandbox import Sandbox
from tests.tables import table_as
from yeonma.cli import VERBS
from yeonma.commands.first_checks import row_of
from yeonma.config.parse import config_from_keywords, read_config, settings_dict, to_yaml
from yeonma.config.settings import (
    TRAINING,
    RunConfig,
)
from yeonma.data.columns import recognise
from yeonma.data.rows import Row, glance, open_rows
from yeonma.data.strict_json import kind_of
from yeonma.data.template import Template, field_lengths, load_template, shorten
from yeonma.errors import UserError

# Data


@dataclass(frozen=True)
class DataCase:
    files: Mapping[str, bytes]
    data_path: str
    encoding: str = "utf-8"
    options: Mapping[str, Any] = dataclass_field(default_factory=dict)
    """Further options of `open_rows`."""


# fmt: off
CODECS = (
    "utf-8", "utf-8-sig", "cp949", "euc-kr", "utf-16", "utf-32", "utf-7", "latin-1", "ascii", "hz",
    "iso2022_kr", "utf-16-le", "gb18030", "idna", "punycode", "unicode_escape", "raw_unicode_escape",
    "undefined", "mbcs", "rot13", "base64", "palmos", "charmap", "", "utf-8\0", "ü", "a" * 500, "utf_8_sig",
)
# fmt: on


# fmt: off
OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "skip_bad": (True,),
    "delimiter": (";", "tab", "\\t", "|", "", "ab", '"', "\n", "\0", "한"),
    "max_rows": (1, 2, 1000),
    "split": ("test", "train[:1]", "train[1:]", "train[-1:]", "train[:50%]", "train+test", "dev[:", "", "train[1:1]"),
}
PARTS = ("data", "train", "Sheet1", "x", "")
CARDS = ("", "---\nconfigs:\n- config_name: a\n  data_files: '*'\n---\n", "---\nconfigs: [{}]\n---\n")
# fmt: on


@st.composite
def data_cases(draw: Draw) -> DataCase:
    name, content = draw(data_files())
    encoding = draw(st.sampled_from(CODECS)) if draw(st.integers(0, 4)) == 0 else "utf-8"
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=2))
    options = {option: draw(st.sampled_from(OPTIONS[option])) for option in chosen}
    if draw(st.integers(0, 9)) > 0:
        part = f":{draw(st.sampled_from(PARTS))}" if draw(st.integers(0, 9)) == 0 else ""
        return DataCase({name: content}, f"{name}{part}", encoding, options)
    other, more = draw(data_files())
    second = draw(
        st.sampled_from(("b.jsonl", "train.csv", "test.csv", ".hidden", "d.py", "dataset_info.json", other))
    )
    files = {f"d/{name}": content, f"d/{second}": more}
    if draw(st.booleans()):
        files["d/README.md"] = draw(st.sampled_from(CARDS)).encode()
    return DataCase(files, draw(st.sampled_from(("d", "d/", "./d", "d:a", *files))), encoding, options)


def read_data(case: DataCase, sandbox: Sandbox) -> None:
    """Reads the rows twice; then writes those of text files as JSON lines and reads these."""
    rows = open_rows(case.data_path, encoding=case.encoding, **case.options)
    rows_read = list(rows)
    assert [repr(row) for row in rows] == [repr(row) for row in rows_read], "read twice, the rows differ"
    assert rows_read, "no rows, and no error"
    assert [row.number for row in rows_read] == list(range(1, len(rows_read) + 1))
    again = open_rows(case.data_path, encoding=case.encoding, **case.options)
    assert (again.identity, again.columns, again.notes) == (rows.identity, rows.columns, rows.notes)
    if glanced := glance(case.data_path, encoding=case.encoding, **case.options):
        assert list(map(repr, glanced)) == list(map(repr, rows_read)), "a glance shows other rows"
    if any(row.fault is not None for row in rows_read):
        assert case.options["skip_bad"]
        with suppress(UserError):
            strict = {option: value for option, value in case.options.items() if option != "skip_bad"}
            list(open_rows(case.data_path, encoding=case.encoding, **strict))
            raise AssertionError("a faulty row, and no error")
        return
    if case.data_path.endswith((".jsonl", ".json", ".csv", ".tsv")):
        copy = sandbox.cache / "again.jsonl"
        copy.parent.mkdir(exist_ok=True)
        lines = [json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows_read]
        copy.write_text("".join(lines), encoding="utf-8", newline="\n")
        assert [row.values for row in open_rows(str(copy))] == [row.values for row in rows_read]


ROWS = Target(
    name="rows",
    cases=data_cases(),
    valid=DataCase({"rows.csv": table_as("csv", TABLES["news_ko"])}, "rows.csv"),
    files=lambda case: case.files,
    read=read_data,
)

# Templates


@dataclass(frozen=True)
class TemplateCase:
    content: bytes
    """The content of a file or, if `as_text`, the value of --template."""
    as_text: bool
    rows: tuple[Any, ...]
    columns: Mapping[str, str] | None


# fmt: off
TEMPLATE_TOKENS = (
    "{", "}", "{{", "}}", "{document}", "{title}", "{messages}", "{ document}", "{a.b}", "{0}", "{}",
    "{a[0]}", "\n---\n", "---", "--- ", "\n[system]\n", "\n[user]\n", "\n[assistant]\n", "[turns]\n",
    "[User]", "[tool]", "\r", "\n\n\n", "{input}", "{output}", "{{''.__class__}}", "{do\u200bc}",
)
# fmt: on
WITH_ROLES = "[system]\nBe brief.\n[user]\n{document}\n\n[assistant]\n{title}\n"
WITH_ROLES = f"{WITH_ROLES}---\n[user]\n{{text}}\n[assistant]\nIt is {{title}}.\n"
TEMPLATES = {**BUILT_IN_TEMPLATES, "sample": SAMPLE_TEMPLATE, "with roles": WITH_ROLES}
TABLE_OF_TEMPLATE = {"title": "news_ko", "sample": "news_en", "with roles": "news_ko", "chat": "messages"}
"""Template -> a table whose rows fill it, if their names differ."""


def rows_for(template: str) -> list[dict[str, Any]]:
    return TABLES[TABLE_OF_TEMPLATE.get(template, template)]


@st.composite
def column_choices(draw: Draw) -> dict[str, str] | None:
    if draw(st.integers(0, 4)) > 0:
        return None
    names = st.sampled_from((*NAMES[:4], "answer", "chosen", *TEXTS))
    columns: dict[str, str] = draw(st.dictionaries(names, names, max_size=3))
    return columns


@st.composite
def template_cases(draw: Draw) -> TemplateCase:
    name = draw(st.sampled_from(sorted(TEMPLATES)))
    content = file_bytes(draw(damaged_text(TEMPLATES[name], TEMPLATE_TOKENS)))
    if draw(st.integers(0, 3)) == 0:
        content = draw(damaged_bytes(content, [file_bytes(text) for text in TEMPLATES.values()]))
    values = []
    rows = [*rows_for(name) * 3, *(rows[0] for rows in TABLES.values())]
    for row in draw(st.lists(st.sampled_from(rows), min_size=1, max_size=3)):
        value = draw(damaged_value(row, NAMES))
        values.append(value if isinstance(value, dict) else row)
    return TemplateCase(content, draw(st.integers(0, 4)) == 0, tuple(values), draw(column_choices()))


def read_template(case: TemplateCase, sandbox: Sandbox) -> None:
    """Parses the template and fills it with the rows. A template that fits none of them counts as refused."""
    text = case.content.decode("utf-8", "surrogateescape")
    template = load_template(text if case.as_text else "template.txt")
    again = Template.parse(template.text, "again")
    assert again == template, "parsed from its own text, the template differs"
    assert (again.variants, again.fields) == (template.variants, template.fields)
    refusals: list[UserError] = []
    for number, values in enumerate(case.rows, 1):
        try:
            recognise(tuple(values), case.columns)
        except UserError as error:
            _check_message(error)
        try:
            _fill(template, Row(number, values, f"row {number}"), case.columns)
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(case.rows):
        raise UserError([problem for error in refusals for problem in error.problems])


def _check_message(error: UserError) -> None:
    assert str(error).strip()


def _fill(template: Template, row: Row, columns: Mapping[str, str] | None) -> None:
    trained = template.render(row, columns)
    prompt_only = template.render(row, columns, with_answer=False)
    assert prompt_only.variant == trained.variant
    assert prompt_only.turns == trained.turns[: len(prompt_only.turns)], (
        "the prompt for generation differs from the trained one"
    )
    if not template.is_chat:
        assert prompt_only.turns == trained.turns and not prompt_only.answer
        assert "".join(piece.text for piece in trained.answer).strip()
    for field, length in field_lengths(trained).items():
        for keep in (0, 1, length // 2, length):
            for side in ("end", "start", "middle"):
                short = shorten(trained, field, keep, side)
                assert field_lengths(short)[field] <= keep and short.answer == trained.answer


TEMPLATE = Target(
    name="template",
    cases=template_cases(),
    valid=TemplateCase(file_bytes(SAMPLE_TEMPLATE), False, tuple(TABLES["news_en"]), None),
    files=lambda case: {} if case.as_text else {"template.txt": case.content},
    read=read_template,
)

# Settings


@dataclass(frozen=True)
class SettingsCase:
    argv: tuple[str, ...]
    config: bytes
    generate: bool = False
    """For `yeonma generate`; otherwise for `yeonma sft`."""


_SETTINGS = {
    "base_model": "model",
    "data_path": "rows.jsonl",
    "output_dir": "out",
    "columns": {"document": "body", "title": "headline"},
    "template": WITH_ROLES,
    "val_set_size": 0.1,
    "cutoff_len": 512,
    "shrink": None,
    "shrink_side": "middle",
    "train_on_inputs": True,
    "lora_r": 8,
    "lora_alpha": 16.5,
    "lora_target_modules": ["gate_proj", "down_proj"],
    "micro_batch_tokens": None,
    "num_epochs": 1.5,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "report_to": ["tensorboard"],
    "seed": 7,
}
_GENERATE = {
    "adapter_dir": "out",
    "row": '{"document": "a"}',
    "columns": {"document": "b"},
    "temperature": 0.5,
    "top_k": 3,
}
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{former}'] * 9)}]\n"
    for former, name in zip("abcdefghi", "bcdefghij", strict=True)
)
_BOMB_OF_SETTINGS = (
    _BOMB + "lora_target_modules: *j\ncolumns: {a: *j}\nlr_scheduler_kwargs: *i\nbase_model: *h\n"
)
_CONFIG = config_from_keywords(RunConfig, _SETTINGS, groups=TRAINING).config
_WRITTEN = "".join(to_yaml(group) for group in (_CONFIG.tokens, _CONFIG.lora, _CONFIG.step))
_VALID_YAML = "".join(f"{name}: {json.dumps(value)}\n" for name, value in _SETTINGS.items())
YAML_TEXTS = (*[_VALID_YAML] * 4, *[_WRITTEN] * 3, _BOMB_OF_SETTINGS)
# fmt: off
YAML_TOKENS = (
    ":", ": ", "- ", "\n", "\n  ", "[", "]", "{", "}", "&a ", "*a", "<<: *a", "!!python/object:os.system ",
    "!!binary ", "!!set ", "!!timestamp ", "2024-01-01", "2024-99-99", "? ", "|", ">-", "%YAML 1.1\n",
    "---\n", "...\n", "#", "'", '"', "~", "null", "true", "yes", "off", "1e-4", "1_0", "0b1", "1:30",
    "0x" + "f" * 4000, "!!int ", "!!omap ", "!!pairs ", "=", "\t", "learning_rate", "lora_r", "columns",
    "!x ", "@", "`", ",", "\ufeff", "base_model",
)
ARGUMENTS = (
    "--", "-", "--config", "--lora_r", "--lora-r=", "--learning_rate", "--columns", "--lora_target_modules",
    "lora_r=8", "-lora_r", "[a, b]", "[a", "{a: b}", "{a: 1}", "[*a]", "&a [*a]",
    "'[gate_proj, down_proj]'", "None", "null", "true", "True", "1e-4", "all-linear", "linear", "--=",
    "--é", "--report_to", "[none]", "--num_epochs", "--max_steps", "--no-such", "[" * 3000, "- " * 500,
    "{a: " * 500, "!!python/name:os.system", "\udcff", "--seed=\0", "--template", "~x", "*a", "%",
)
# fmt: on


@st.composite
def yaml_files(draw: Draw, texts: tuple[str, ...] = YAML_TEXTS) -> bytes:
    content = file_bytes(draw(damaged_text(draw(st.sampled_from(texts)), YAML_TOKENS, max_edits=3)))
    if draw(st.integers(0, 4)) == 0:
        content = draw(damaged_bytes(content, [file_bytes(text) for text in texts]))
    return bytes(content)


@st.composite
def settings_cases(draw: Draw) -> SettingsCase:
    generate = draw(st.integers(0, 4)) == 0
    base = _GENERATE if generate else _SETTINGS
    chosen = draw(st.sets(st.sampled_from(sorted(base)), max_size=5))
    words = [word for name in sorted(chosen) for word in (f"--{name}", _as_word(base[name]))]
    for _ in range(draw(edits(4)) if draw(st.booleans()) else 0):
        at = draw(st.integers(0, len(words)))
        end = at + draw(st.integers(0, 1))
        words[at:end] = [draw(st.sampled_from((*ARGUMENTS, *NUMBERS, *TEXTS)))]
    texts = (json.dumps(_GENERATE),) if generate else YAML_TEXTS
    config = draw(yaml_files(texts))
    if draw(st.integers(0, 3)) > 0:
        odd = st.sampled_from(("no.yaml", ".", "a\0b", "~x/y", "a" * 5000))
        words += ["--config", draw(odd) if draw(st.integers(0, 9)) == 0 else "settings.yaml"]
    return SettingsCase(tuple(words), config, generate)


def _as_word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_all_settings(case: SettingsCase, sandbox: Sandbox) -> None:
    """Reads the settings. If they are accepted, writes them as YAML, and reads them back from it and from keywords."""
    verb = "generate" if case.generate else "sft"
    kind, groups, positional = VERBS[verb].config, VERBS[verb].groups, VERBS[verb].positional
    config = read_config(kind, case.argv, verb=verb, groups=groups, positional=positional).config
    again = sandbox.cache / "again.yaml"
    again.parent.mkdir(exist_ok=True)
    again.write_text(to_yaml(config), encoding="utf-8", newline="\n")
    written = read_config(kind, ["--config", str(again)], verb=verb, groups=groups, positional=positional)
    assert written.config == config, "written as YAML and read back, the settings differ"
    keywords = settings_dict(config)
    assert config_from_keywords(kind, keywords, groups=groups).config == config, (
        "from keywords the settings differ"
    )


SETTINGS = Target(
    name="settings",
    cases=settings_cases(),
    valid=SettingsCase(("--config", "settings.yaml"), file_bytes(YAML_TEXTS[0])),
    files=lambda case: {"settings.yaml": case.config},
    read=read_all_settings,
)

# One row


def read_row(case: str, sandbox: Sandbox) -> None:
    row = row_of(case)
    assert kind_of(row) == "an object"
    again = row_of(json.dumps(row))
    assert repr(again) == repr(row), "written and read again, the row differs"


ROW = Target(
    name="row",
    cases=rows_as_json(),
    valid=json.dumps(TABLES["news_ko"][0]),
    files=lambda case: {},
    read=read_row,
)

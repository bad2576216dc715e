"""Settings: one set of names, types and checks for the command line, YAML and Python."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from yeonma.config import settings as settings_module
from yeonma.config.parse import (
    NONE_WORDS,
    ParsedConfig,
    config_from_keywords,
    read_config,
    settings_dict,
    settings_of,
    to_yaml,
)
from yeonma.config.ranges import Range
from yeonma.config.settings import (
    TRAINING,
    AdapterSettings,
    DataSettings,
    DemoSettings,
    EvaluationSettings,
    GenerateConfig,
    GenerateSettings,
    LoraSettings,
    ModelSettings,
    RunConfig,
    RunSettings,
    StepSettings,
    TokenSettings,
)
from yeonma.errors import UserError

REQUIRED = {"data_path": "rows.jsonl", "base_model": "some/model", "output_dir": "out"}
SETTINGS_GROUPS = [
    group
    for name, group in vars(settings_module).items()
    if is_dataclass(group) and name.endswith("Settings")
]


def read(*argv: str) -> ParsedConfig[RunConfig]:
    required = [f"--{name}={value}" for name, value in REQUIRED.items()]
    return read_config(RunConfig, [*required, *argv], verb="sft", groups=TRAINING)


def value_of(parsed: ParsedConfig[RunConfig], name: str) -> object:
    return settings_dict(parsed.config)[name]


def from_yaml(tmp_path: Path, text: str) -> ParsedConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read("--config", str(path))


def problems(caught: pytest.ExceptionInfo[UserError]) -> list[str]:
    return str(caught.value).splitlines()


# ---------------------------------------------------------------- values


def test_tutorial_command_line_gives_the_expected_settings() -> None:
    argv = shlex.split("""
        --base_model beomi/llama-2-ko-7b --data-path daekeun-ml/naver-news-summarization-ko
        --output_dir ./title-generator --batch_size 8 --micro_batch_size 1 --num_epochs 3 --learning_rate 1e-5
        --cutoff_len 2048 --val_set_size 0 --lora_r 16 --lora_alpha 16 --lora_dropout 0.05
        --lora_target_modules '[gate_proj, down_proj, up_proj]' --train_on_inputs False --add_eos_token True
        --group_by_length False --lr_scheduler 'linear' --warmup_steps 100
    """)
    settings = read_config(RunConfig, argv, verb="sft", groups=TRAINING).config
    assert settings == RunConfig(
        data=DataSettings(data_path="daekeun-ml/naver-news-summarization-ko"),
        tokens=TokenSettings(),
        model=ModelSettings(base_model="beomi/llama-2-ko-7b"),
        lora=LoraSettings(lora_dropout=0.05, lora_target_modules=["gate_proj", "down_proj", "up_proj"]),
        step=StepSettings(batch_size=8, micro_batch_size=1, learning_rate=1e-5, warmup_steps=100),
        evaluation=EvaluationSettings(),
        run=RunSettings(output_dir="./title-generator"),
    )


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("num_epochs", ".5", 0.5),
        ("max_steps", "None", None),
        ("max_steps", "null", None),
        ("max_steps", "20", 20),
        ("template", "None", None),
        ("template", "---\n{document}: {title}", "---\n{document}: {title}"),
        ("template", "{document}\n### {title}", "{document}\n### {title}"),
        ("run_name", "0123", "0123"),
        ("run_name", "1e-4", "1e-4"),
        ("run_name", "true", "true"),
        ("train_on_inputs", "True", True),
        ("train_on_inputs", "false", False),
        ("columns", "{answer: title, document: 본문}", {"answer": "title", "document": "본문"}),
        ("columns", '{"answer": "title"}', {"answer": "title"}),
        ("lr_scheduler_kwargs", "{min_lr: 1e-6}", {"min_lr": 1e-6}),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("lora_target_modules", "[q_proj]", ["q_proj"]),
        ("lora_target_modules", r".*\.(q|k)_proj", r".*\.(q|k)_proj"),
        ("report_to", "wandb", "wandb"),
        ("report_to", "[wandb, mlflow]", ["wandb", "mlflow"]),
        ("lr_scheduler", "cosine", "cosine"),
    ],
)
def test_text_values_parse_the_same_from_cli_yaml_and_python(
    name: str, text: str, value: object, tmp_path: Path
) -> None:
    quoted = "'" + text.replace("'", "''").replace("\n", "\n\n  ") + "'"
    parsed_configs = [
        read(f"--{name}", text),
        read(f"--{name.replace('_', '-')}={text}"),
        from_yaml(tmp_path, f"{name.replace('_', '-')}: {quoted}\n"),
        config_from_keywords(RunConfig, {**REQUIRED, name: text}, groups=TRAINING),
    ]
    for parsed_config in parsed_configs:
        actual = value_of(parsed_config, name)
        assert actual == value and type(actual) is type(value)


def test_unquoted_yaml_values_equal_python_objects(tmp_path: Path) -> None:
    parsed = from_yaml(
        tmp_path, "learning_rate: 1e-4\nlora_target_modules: [a, b]\nmax_steps:\noverwrite: yes\n"
    )
    keywords = {
        "learning_rate": 1e-4,
        "lora_target_modules": ["a", "b"],
        "max_steps": None,
        "overwrite": True,
    }
    assert parsed == config_from_keywords(RunConfig, {**REQUIRED, **keywords}, groups=TRAINING)
    assert value_of(parsed, "learning_rate") == 1e-4


def test_path_object_is_converted_to_text() -> None:
    parsed = config_from_keywords(RunConfig, {**REQUIRED, "output_dir": Path("a") / "b"}, groups=TRAINING)
    assert value_of(parsed, "output_dir") == str(Path("a") / "b")


def test_a_bare_flag_is_true() -> None:
    assert value_of(read("--overwrite"), "overwrite") is True
    assert value_of(read("--overwrite", "--seed", "1"), "overwrite") is True
    assert value_of(read("--overwrite", "false"), "overwrite") is False


def test_last_option_wins_and_command_line_overrides_yaml(tmp_path: Path) -> None:
    assert value_of(read("--seed", "1", "--seed", "2"), "seed") == 2
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\nlora_r: 4\n")
    parsed = read("--seed", "5", "--config", str(path))
    assert (value_of(parsed, "seed"), value_of(parsed, "lora_r")) == (5, 4)
    from_python = config_from_keywords(RunConfig, {**REQUIRED, "seed": 5, "config": path}, groups=TRAINING)
    assert from_python == parsed


def test_first_positional_argument_fills_the_positional_setting() -> None:
    def parse(*argv: str) -> tuple[object, ...]:
        config = read_config(GenerateConfig, argv, verb="generate", positional="adapter_dir").config
        return config.adapter, config.generate

    expected = (AdapterSettings(adapter_dir="OUT"), GenerateSettings(row='{"document": "x"}'))
    assert parse("OUT", "--row", '{"document": "x"}') == expected
    assert parse("--row", '{"document": "x"}', "OUT") == expected
    assert parse("--adapter_dir", "OUT", "--row", '{"document": "x"}') == expected
    with pytest.raises(UserError, match='unexpected argument "OTHER"'):
        parse("OUT", "OTHER")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lora_r", "0", "lora_r: 0 is out of range; give a whole number of at least 1"),
        ("lora_r", "-2", "lora_r: -2 is out of range; give a whole number of at least 1"),
        ("lora_r", "1.5", "lora_r: 1.5 is not valid; give a whole number of at least 1"),
        ("lora_r", "True", "lora_r: True is not valid; give a whole number of at least 1"),
        ("lora_r", "None", "lora_r: None is not valid; give a whole number of at least 1"),
        ("lora_alpha", "0", "lora_alpha: 0 is out of range; give a number above 0"),
        ("learning_rate", "0", "learning_rate: 0 is out of range; give a number above 0"),
        ("learning_rate", "-1e-4", "learning_rate: -1e-4 is out of range; give a number above 0"),
        ("learning_rate", ".nan", "learning_rate: .nan is out of range; give a number above 0"),
        ("learning_rate", ".inf", "learning_rate: .inf is out of range; give a number above 0"),
        ("learning_rate", "fast", "learning_rate: fast is not valid; give a number above 0"),
        ("learning_rate", "9" * 400, f"learning_rate: {'9' * 57}... is not valid; give a number above 0"),
        ("lora_dropout", "1.5", "lora_dropout: 1.5 is out of range; give a number of at least 0 and below 1"),
        ("lora_dropout", "1", "lora_dropout: 1 is out of range; give a number of at least 0 and below 1"),
        ("cutoff_len", "0", "cutoff_len: 0 is out of range; give a whole number of at least 1"),
        (
            "warmup_ratio",
            "1.1",
            "warmup_ratio: 1.1 is out of range; give a number of at least 0 and at most 1",
        ),
        ("val_set_size", "-1", "val_set_size: -1 is out of range; give a number of at least 0"),
        (
            "val_set_size",
            "1.5",
            "val_set_size: 1.5 is not a number of rows; give a count, such as 100, or a fraction",
        ),
        ("train_on_inputs", "maybe", "train_on_inputs: maybe is not valid; give true or false"),
        (
            "shrink_side",
            "start ",
            'shrink_side: "start " is not valid; give one of end, start, middle; did you mean "s',
        ),
        (
            "lr_scheduler",
            "cosin",
            "lr_scheduler: cosin is not valid; give one of linear, cosine, cosine_with_restarts",
        ),
        ("lora_target_modules", "[a", 'lora_target_modules: "[a" is not valid (not YAML: '),
        (
            "lora_target_modules",
            "[1]",
            'lora_target_modules: "[1]" is not valid; give a list such as [a, b] or text',
        ),
        (
            "columns",
            "{a:b}",
            'columns: "{a:b}" is not valid; give a mapping such as {a: b}, with a space after each',
        ),
        ("columns", "{a: b, a: c}", 'columns: "{a: b, a: c}" is not valid ("a" is given twice'),
        ("columns", "{1: b}", 'columns: "{1: b}" is not valid; give a mapping'),
        (
            "lr_scheduler_kwargs",
            "{a: .nan}",
            'lr_scheduler_kwargs: "{a: .nan}" is out of range; give a mapping such as',
        ),
        (
            "report_to",
            "wandbb",
            "report_to: wandbb is not valid; give a list such as [tensorboard, wandb] or one of",
        ),
        ("data_path", "", 'data_path: "" is empty; give text'),
    ],
)
def test_invalid_value_error_names_the_setting_and_valid_values(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(f"--{name}", text)
    (line,) = problems(caught)
    assert line.startswith(message)
    with pytest.raises(UserError) as from_python:
        config_from_keywords(RunConfig, {**REQUIRED, name: text}, groups=TRAINING)
    assert problems(from_python) == [line]


@pytest.mark.parametrize("value", [True, 1.0, None, [1], {"a": 1}])
def test_python_objects_of_the_wrong_type_are_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"^lora_r: .* is not valid; give a whole number of at least 1$"):
        config_from_keywords(RunConfig, {**REQUIRED, "lora_r": value}, groups=TRAINING)


def test_all_problems_are_reported_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learnin_rate: 1\nlora_dropout: 2\nseed: 1\n")
    with pytest.raises(UserError) as caught:
        read_config(
            RunConfig,
            ["--lora_r", "0", "--lr=3", "stray", "-x", "--cutoff_len", "--config", str(path)],
            verb="sft",
            groups=TRAINING,
        )
    assert problems(caught) == [
        "--lr: unknown setting; here it is --learning_rate",
        "unexpected argument \"stray\"; write a list as '[a, b]', and put text with spaces in quotes",
        'unexpected argument "-x"; settings start with --',
        "--cutoff_len: needs a value",
        f'{path}:1: unknown setting learnin_rate; did you mean "learning_rate"?',
        f"{path}:2: lora_dropout: 2 is out of range; give a number of at least 0 and below 1",
        "lora_r: 0 is out of range; give a whole number of at least 1",
        "data_path, base_model, output_dir: required, but not given; write --data_path ... --base_model ... "
        "--output_dir ..., or set them in a --config file",
    ]


def test_unknown_setting_gets_a_suggestion_from_every_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'^--batchsize: unknown setting; did you mean "batch_size"\?$'):
        read("--batchsize", "4")
    with pytest.raises(UserError, match=r'^batchsize: unknown setting; did you mean "batch_size"\?$'):
        config_from_keywords(RunConfig, {**REQUIRED, "batchsize": 4}, groups=TRAINING)
    with pytest.raises(
        UserError, match=r'run.yaml:2: unknown setting batchsize; did you mean "batch_size"\?$'
    ):
        from_yaml(tmp_path, "seed: 1\nbatchsize: 4\n")


def test_missing_required_python_setting_is_named_in_python_syntax() -> None:
    with pytest.raises(
        UserError, match=r"^base_model: required, but not given; write base_model=\.\.\., or set it"
    ):
        config_from_keywords(RunConfig, {"data_path": "d", "output_dir": "o"}, groups=TRAINING)


def test_setting_without_double_dashes_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r'^unexpected argument "lora_r=8"; write --lora_r=8$'):
        read("lora_r=8")
    with pytest.raises(UserError, match=r'^unexpected argument "-lora_r"; write --lora_r$'):
        read("-lora_r")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", ':2: "seed" is given twice, first in line 1; remove one of them'),
        ("lora-r: 1\nlora_r: 2\n", ':2: "lora_r" is given twice; remove one of them'),
        ("columns: {a: b, a: c}\n", ':1: "a" is given twice, first in line 1; remove one of them'),
        (
            "seed: !!python/object:os.system {}\n",
            ":1:7: the tag !!python/object:os.system is refused; write a plain",
        ),
        (
            "seed: !!python/object/apply:os.system [ls]\n",
            ":1:7: the tag !!python/object/apply:os.system is refused",
        ),
        ("columns: {a: !mine b}\n", ":1:14: the tag !mine is refused"),
        ("- seed: 1\n", ": not a mapping; write one `setting: value` a line"),
        ("seed\n", ": not a mapping; write one `setting: value` a line"),
        ("seed: [1\n", ":2:1: not YAML: expected ',' or ']'"),
        ("seed: 1\n---\nseed: 2\n", ":2:1: not YAML: but found another document"),
        ("run_name: 12\n", ":1: run_name: 12 is not text; put it in quotes"),
        ("run_name: 2024-01-01\n", ":1: run_name: 2024-01-01 is not text; put it in quotes"),
        ("run_name: 2024-13-01\n", ": not YAML: month must be in 1..12"),
        ("lora_r: null\n", ":1: lora_r: None is not valid; give a whole number of at least 1"),
        ("lora_target_modules: &a [*a]\n", ":1:22: not YAML: found unconstructable recursive node"),
        ("[" * 5000, ": not YAML: maximum recursion depth exceeded"),
        ("1: 2\n", ":1: unknown setting 1"),
        ("run_name: !!timestamp x\n", ": not YAML: a value does not match its tag"),
        ('seed: !!int ""\n', ": not YAML: a value does not match its tag"),
        ("overwrite: !!bool x\n", ": not YAML: a value does not match its tag"),
    ],
)
def test_yaml_errors_give_their_location(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        from_yaml(tmp_path, text)
    (line,) = problems(caught)
    assert line.startswith(f"{tmp_path / 'run.yaml'}{message}")


def test_yaml_python_tags_run_no_code(tmp_path: Path) -> None:
    marker_folder = tmp_path / "trace"
    with pytest.raises(UserError, match="is refused"):
        from_yaml(tmp_path, f"seed: !!python/object/apply:os.mkdir [{marker_folder}]\n")
    assert not marker_folder.exists()


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    for words in (["--run_name", "\udcff"], ["--columns", '{title: "\\udcff"}'], ["--data_path", "\udcff"]):
        with pytest.raises(UserError, match="is not UTF-8 text"):
            read(*words)
    for line in ('run_name: "\\udcff"', 'lora_target_modules: ["\\udcff"]'):
        with pytest.raises(UserError, match=r"run\.yaml:1: .* is not UTF-8 text"):
            from_yaml(tmp_path, line)


def test_yaml_aliases_that_expand_to_billions_of_values_are_refused(tmp_path: Path) -> None:
    """Printing or checking such a value takes hours."""
    names = "abcdefghij"
    lines = [
        f"{name}: &{name} [{', '.join(f'*{former}' for _ in names)}]\n" for former, name in pairwise(names)
    ]
    text = "".join(["a: &a [x, x]\n", *lines, "lora_target_modules: *j\n"])
    with pytest.raises(UserError, match=r"run\.yaml:\d+:4: its aliases expand to more than 10,000 values"):
        from_yaml(tmp_path, text)


def test_yaml_aliases_and_long_lists_of_names_are_accepted(tmp_path: Path) -> None:
    names = [f"layer{number}" for number in range(20_000)]
    parsed = from_yaml(tmp_path, f"lora_target_modules: {json.dumps(names)}\n")
    assert value_of(parsed, "lora_target_modules") == names
    with pytest.raises(UserError, match=r"run\.yaml:1: lora_target_modules: .* has more than 1,000 items"):
        from_yaml(tmp_path, f"lora_target_modules: {list(range(20_000))}\n")
    parsed = from_yaml(tmp_path, "lora_r: &rank 8\nlora_alpha: *rank\n")
    assert value_of(parsed, "lora_alpha") == 8


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_yaml_file_sets_nothing(text: str, tmp_path: Path) -> None:
    assert from_yaml(tmp_path, text) == read()


def test_unreadable_config_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file or directory"):
        read("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read("--config", str(tmp_path))
    (tmp_path / "korean.yaml").write_bytes("run_name: 연마".encode("cp949"))
    with pytest.raises(UserError, match=r"korean\.yaml: not UTF-8; save it as UTF-8"):
        read("--config", str(tmp_path / "korean.yaml"))
    (tmp_path / "bom.yaml").write_text("seed: 7\n", encoding="utf-8-sig")
    assert value_of(read("--config", str(tmp_path / "bom.yaml")), "seed") == 7
    with pytest.raises(UserError) as caught:
        read("--config", "none.yaml", "--config", "b.yaml")
    assert problems(caught) == [
        "--config: given twice; put all settings into one file",
        "none.yaml: cannot be read: No such file or directory; --config takes a YAML file",
    ]


# ---------------------------------------------------------------- warnings


def test_max_steps_with_num_epochs_warns_that_max_steps_wins() -> None:
    warning = "num_epochs and max_steps are both given: max_steps (5) wins"
    assert read("--num_epochs", "3", "--max_steps", "5").warnings == (warning,)
    assert config_from_keywords(
        RunConfig, {**REQUIRED, "num_epochs": 3, "max_steps": 5}, groups=TRAINING
    ).warnings == (warning,)
    assert read("--max_steps", "5").warnings == ()
    assert read("--num_epochs", "2").warnings == ()
    assert read("--num_epochs", "2", "--max_steps", "None").warnings == ()


def test_warmup_steps_win_over_warmup_ratio_with_a_warning() -> None:
    warning = "warmup_steps and warmup_ratio are both given: warmup_steps (5) wins"
    assert read("--warmup_steps", "5", "--warmup_ratio", "0.1").warnings == (warning,)
    assert read("--warmup_steps", "0", "--warmup_ratio", "0.1").warnings == ()


# ---------------------------------------------------------------- ranges of settings


def test_every_numeric_setting_has_a_range_that_contains_its_default() -> None:
    for group in SETTINGS_GROUPS:
        for setting in settings_of([group]).values():
            if {int, float} & set(setting.members):
                assert isinstance(setting.range, Range), f"{group.__name__}.{setting.name}"
                assert setting.default in (None, "auto") or setting.default in setting.range, setting.name
            else:
                assert setting.range is None, f"{group.__name__}.{setting.name} is no number"


@pytest.mark.parametrize("limits", [{"at_least": 1}, {"above": 0}, {"at_most": 1}, {"below": 1}, {}])
def test_no_range_contains_infinity_or_nan(limits: dict[str, float]) -> None:
    for number in (float("inf"), float("-inf"), float("nan")):
        assert number not in Range(**limits)


def test_ranges_contain_inclusive_but_not_exclusive_bounds() -> None:
    assert 0 in Range(at_least=0, below=1) and 1 not in Range(at_least=0, below=1)
    assert 0 not in Range(above=0, at_most=1) and 1 in Range(above=0, at_most=1)


# ---------------------------------------------------------------- settings.yaml


def test_settings_round_trip_through_yaml(tmp_path: Path) -> None:
    parsed = config_from_keywords(
        RunConfig,
        {
            "data_path": "/data/기사 모음.csv",
            "base_model": "./models/7b",
            "output_dir": "~/out",
            "columns": {"answer": "제목: 한 줄"},
            "template": "[user]\n{document}  \n\n---\n# {title}\n",
            "lora_target_modules": ["gate_proj", "no", "1e-4"],
            "learning_rate": 1e-5,
            "lr_scheduler_kwargs": {"num_cycles": 0.5},
            "val_set_size": 0.05,
            "report_to": ["wandb"],
            "run_name": "yes",
            "max_steps": 20,
            "overwrite": True,
        },
        groups=TRAINING,
    )
    text = to_yaml(parsed.config)
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    reread = read_config(RunConfig, ["--config", str(path)], verb="sft", groups=TRAINING)
    assert reread == parsed
    assert reread.warnings == ()


def test_settings_yaml_has_every_setting_in_the_order_of_the_groups() -> None:
    parsed = read()
    names = [line.partition(":")[0] for line in to_yaml(parsed.config).splitlines()]
    assert names == [field.name for group in TRAINING for field in fields(group)]


def test_settings_yaml_writes_templates_as_block_text() -> None:
    text = to_yaml(DataSettings(data_path="d", template="본문:\n{document}\n\n제목: {title}"))
    assert "template: |-\n  본문:\n  {document}\n\n  제목: {title}\n" in text


SPECIAL_CHARACTERS = st.text(alphabet=" \n\r\t\x85\u2028\ufeff'\":#-|>&*!%@`{}[],?~\\a0가\x00😀", max_size=12)


@dataclass(frozen=True)
class DataAndDemo:
    data: DataSettings
    demo: DemoSettings


@hypothesis_settings(deadline=None)
@given(text=(st.text() | SPECIAL_CHARACTERS).filter(lambda text: text not in NONE_WORDS))
def test_any_text_round_trips_through_yaml(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    data = DataSettings(data_path="d", template=text, columns={text: text})
    config = DataAndDemo(data=data, demo=DemoSettings(model_dir=text))
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert read_config(DataAndDemo, ["--config", str(path)], verb="sft").config == config


# ---------------------------------------------------------------- imports


def test_importing_parse_loads_no_heavy_modules() -> None:
    heavy = ("torch", "transformers", "jsonargparse")
    code = f"import sys, yeonma.config.parse; print([name for name in {heavy} if name in sys.modules])"
    root = Path(inspect.getfile(settings_module)).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert process.stdout.strip() == "[]"


def test_parsing_settings_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom yeonma.config.parse import config_from_keywords as read\n"
        "from yeonma.config.settings import *\n"
        "read(DemoSettings, {'max_steps': 3}); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    root = Path(inspect.getfile(settings_module)).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert process.stdout.strip() == "[]"


def test_list_option_takes_all_words_that_follow_it() -> None:
    from yeonma.config.settings import CompareConfig

    def models(*words: str) -> list[str]:
        return read_config(CompareConfig, [*words, "--data_path", "x"], verb="compare").config.compare.models

    assert models("--models", "a", "b c", "d") == ["a", "b c", "d"]
    assert models("--models", "a") == ["a"]
    assert models("--models=a", "--rows", "3") == ["a"]
    assert models("--models", "[a, b]") == ["a", "b"]
    assert models("--rows", "3", "--models", "a", "b") == ["a", "b"]
    with pytest.raises(UserError, match='unexpected argument "c"'):
        models("--models", "[a, b]", "c")


def test_positional_list_takes_all_words_that_follow_it() -> None:
    from yeonma.config.settings import ServeSettings

    def folders(*words: str) -> list[str]:
        parsed = read_config(ServeSettings, words, verb="serve", positional="adapter_dirs")
        return parsed.config.adapter_dirs

    assert folders("a") == ["a"]
    assert folders("a", "b c", "--port", "1") == ["a", "b c"]
    assert folders("--port", "1", "a", "b") == ["a", "b"]
    assert folders("--adapter_dirs", "a", "b") == ["a", "b"]
    assert folders("[a, b]") == ["a", "b"]
    with pytest.raises(UserError, match='unexpected argument "b"'):
        folders("a", "--port", "1", "b")
    with pytest.raises(UserError, match="65536 is out of range"):
        folders("a", "--port", "65536")

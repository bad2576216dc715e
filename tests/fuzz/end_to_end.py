"""Targets up to tokens: data to examples, and command lines up to the point where weights would be loaded.

The base model's folder has a config, a tokenizer and a weights file with a valid header but no weights. A command
without faults therefore ends there, or at the output folder, which has a run with other settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import LlamaConfig

from tests.adapters import adapter_on, tiny_base
from tests.fuzz.harness import Target
from tests.fuzz.mutate import (
    SPECIAL,
    TEXTS,
    Draw,
    damaged_bytes,
    damaged_json,
    damaged_text,
    edits,
    file_bytes,
)
from tests.fuzz.samples import NAMES, TABLES, data_files, rows_as_json
from tests.fuzz.sandbox import Sandbox
from tests.fuzz.texts import (
    ARGUMENTS,
    NUMBERS,
    TEMPLATE_TOKENS,
    TEMPLATES,
    YAML_TOKENS,
    column_choices,
    rows_for,
)
from tests.hostile import check_messages, check_shown
from tests.runs import characters
from tests.tables import table_as
from tests.tokenizers import CHATML, LLAMA2_CHAT, PLAIN_CHAT, byte_level, sentencepiece_bpe, unigram
from yeonma.cli import main
from yeonma.config.parse import config_from_keywords
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.errors import Problem, UserError
from yeonma.tokenization.dataset import prepare_dataset
from yeonma.tokenization.example_encoder import encode_prompts

# Data to examples


@dataclass(frozen=True)
class TokensCase:
    name: str
    content: bytes
    template: str | None
    columns: Mapping[str, str] | None
    rules: Mapping[str, Any]
    tokenizer: str
    chat_template: str | None
    val_set_size: float = 0


TOKENIZERS = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece_bpe,
    "unigram": unigram,
    "characters": characters,
}
CHATS = (CHATML, LLAMA2_CHAT, PLAIN_CHAT)
# fmt: off
CHAT_TOKENS = (
    "{{", "}}", "{%", "%}", "{% endif %}", "{% endfor %}", "{% if true %}", "{{ messages }}", "{{ x.y.z }}",
    "{#", "-%}", "messages", "['content']", "| trim", "| tojson", "{{ bos_token }}",
    "{{ strftime_now('%Y') }}", "loop.index", "{{ raise_exception('no') }}", "{{ 1/0 }}",
    "{% generation %}", "{% include 'x' %}", "{{ ''.__class__ }}",
)
# fmt: on


@st.composite
def token_rules(draw: Draw) -> dict[str, Any]:
    rules = {
        "cutoff_len": st.sampled_from((1, 2, 8, 40, 64, 200, 2048)),
        "shrink": st.sampled_from((None, "document", "title", "x")),
        "shrink_side": st.sampled_from(("end", "start", "middle")),
        "over_limit": st.sampled_from(("drop", "error")),
        "train_on_inputs": st.booleans(),
        "add_eos_token": st.booleans(),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(rules)), max_size=2))
    return {name: draw(rules[name]) for name in sorted(chosen)}


@st.composite
def named_data(draw: Draw) -> tuple[str, bytes, str | None]:
    """A data file and a template text, which usually fit together, both slightly damaged."""
    if draw(st.integers(0, 4)) == 0:
        name, content = draw(data_files(1))
        return name, content, draw(st.sampled_from((None, "title", "chat", *TEMPLATES.values())))
    template = draw(st.sampled_from(sorted(TEMPLATES)))
    rows = draw(st.lists(st.sampled_from(rows_for(template)), min_size=1, max_size=4))
    rows = [{key: _spiced(draw, value) for key, value in row.items()} for row in rows]
    if draw(st.integers(0, 2)) == 0:
        content = b"".join(draw(damaged_json(row, NAMES)) + b"\n" for row in rows)
    else:
        content = table_as("jsonl", rows)
    text = TEMPLATES[template]
    if draw(st.integers(0, 3)) == 0:
        text = draw(damaged_text(text, TEMPLATE_TOKENS, max_edits=2))
    return "rows.jsonl", content, draw(st.sampled_from((None, text, text)))


def _spiced(draw: Draw, value: Any) -> Any:
    """Text with special-token text or odd characters in it."""
    if not isinstance(value, str) or draw(st.integers(0, 2)) > 0:
        return value
    at = draw(st.integers(0, len(value)))
    piece = draw(st.sampled_from((*SPECIAL, *TEXTS[:10], "\u200b", "\u1100\u1161", "\n\n", " ")))
    return f"{value[:at]}{piece}{value[at:]}"


@st.composite
def tokens_cases(draw: Draw) -> TokensCase:
    name, content, template = draw(named_data())
    chat = draw(st.sampled_from(CHATS))
    if draw(st.integers(0, 2)) == 0:
        chat = draw(damaged_text(chat, CHAT_TOKENS, max_edits=3)).replace(
            "\ud800", ""
        )  # load_tokenizer refuses it
    return TokensCase(
        name=name,
        content=content,
        template=template,
        columns=draw(column_choices()),
        rules=draw(token_rules()),
        tokenizer=draw(st.sampled_from(sorted(TOKENIZERS))),
        chat_template=draw(st.sampled_from((chat, chat, chat, None))),
        val_set_size=draw(st.sampled_from((0, 0, 0, 0.5, 1, 10))),
    )


def read_tokens(case: TokensCase, sandbox: Sandbox) -> None:
    """Tokenises the data, then loads it from the cache. Prompts must have the ids that generation uses."""
    tokenizer = TOKENIZERS[case.tokenizer]()
    tokenizer.chat_template = case.chat_template
    data_settings = {
        "data_path": case.name,
        "template": case.template,
        "columns": case.columns,
        "val_set_size": case.val_set_size,
    }
    written = {**data_settings, **case.rules}
    data, rules = (
        config_from_keywords(
            kind, {name: written[name] for name in written if name in kind.__annotations__}
        ).config
        for kind in (DataSettings, TokenSettings)
    )

    def prepared() -> Any:
        return prepare_dataset(data, rules, tokenizer, 0, lambda line: None, lambda count: None)

    dataset, again = prepared(), prepared()
    store = dataset.train.store
    assert again.train.store.key == store.key and again.train.store.counts == store.counts
    rows = {row.number: row for row in dataset.train.rows}
    for index in range(len(store)):
        example = store.example(index)
        assert len(example.token_ids) <= rules.cutoff_len
        if dataset.template.is_text:  # nothing is asked: all but the first token is trained
            assert example.trained[1:].all() and not example.trained[0]
            continue
        assert 0 < example.prompt_length < len(example.token_ids)
        assert example.trained[example.prompt_length :].all() and not example.trained[0]
        if example.cut_characters or dataset.template.is_chat:
            continue  # generation fits such prompts into another budget, or asks turn by turn
        text = dataset.template.render(rows[example.row], dataset.columns, with_answer=False)
        (ids,) = encode_prompts([text], [rows[example.row]], tokenizer, dataset.rules, 1)
        assert ids.tolist() == example.token_ids[: example.prompt_length].tolist(), (
            "the ids for generation differ from the trained ones"
        )


TOKENS = Target(
    name="tokens",
    cases=tokens_cases(),
    valid=TokensCase(
        "rows.jsonl", table_as("jsonl", TABLES["messages"]), None, None, {}, "byte level", CHATML
    ),
    files=lambda case: {case.name: case.content},
    read=read_tokens,
)

# Command lines


@dataclass(frozen=True)
class CommandLine:
    """A verb, its required arguments, and the problems with which it ends if there is nothing else to refuse.

    Without such problems, it ends with exit status 0.
    """

    verb: str
    words: tuple[str, ...]
    reached: tuple[str, ...] = ()
    finds: bool = False
    """Whether it ends with 1 where it finds differences, and prints them."""


TRAIN = CommandLine(
    "sft", ("--output_dir", "out", "--card_rows", "0"), ("the folder holds another run", "the weights lack")
)
"""The command of the targets `sft` and `model`."""
GENERATE = CommandLine("generate", (), ("the weights lack",))


def run(command: CommandLine, *words: str) -> None:
    """Raises UserError if the command refuses its input. Its output must be printable on a terminal."""
    out, err = _terminal("strict"), _terminal("backslashreplace")
    with redirect_stdout(out), redirect_stderr(err):
        status = main([command.verb, *words])
    out.flush()
    err.flush()
    stdout, stderr = (stream.buffer.getvalue().decode("utf-8") for stream in (out, err))  # type: ignore[attr-defined]
    check_shown(stdout, "standard output")
    check_shown(stderr, "standard error")
    if status == 1 and command.finds and stdout.count("DIFFERS"):
        raise UserError([Problem(line, "yeonma") for line in stdout.splitlines() if line.strip()])
    assert status in (0, 2), f"exit status {status}"
    if status == 0:
        assert not command.reached, "went on to the weights"
        return
    lines = [
        line for line in stderr.splitlines() if line.startswith("yeonma: ") and ": warning: " not in line
    ]
    assert lines, f"exit status 2 without a word: {stderr}"
    check_messages("\n".join(lines), "standard error")
    if not any(words in stderr for words in command.reached):
        raise UserError([Problem(line.removeprefix("yeonma: "), "yeonma") for line in lines])


def _terminal(errors: str) -> TextIOWrapper:
    return TextIOWrapper(BytesIO(), encoding="utf-8", errors=errors, write_through=True)


@lru_cache
def base_files() -> dict[str, bytes]:
    """The files of a model folder: valid, but without weights."""
    tokenizer = byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )
    return {
        "config.json": json.dumps(config.to_dict(), indent=2).encode(),
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "model_max_length": 4096,
                "chat_template": PLAIN_CHAT,  # where there is no chat_template.jinja
            }
        ).encode(),
        "chat_template.jinja": CHATML.encode(),
        "generation_config.json": b'{"eos_token_id": 0}',
        "special_tokens_map.json": b'{"eos_token": "<|endoftext|>"}',
        "model.safetensors": save({"nothing": torch.zeros(1)}, metadata={"format": "pt"}),
    }


def run_files(folder: Path) -> dict[str, bytes]:
    """A base, data, and the output folder of a run with other settings."""
    rows = table_as("jsonl", TABLES["news_ko"] * 2)
    run = {"identity": {"objective": "sft"}, "finished": False}
    return {
        **{f"base/{name}": content for name, content in base_files().items()},
        "rows.jsonl": rows,
        "other.csv": table_as("csv", TABLES["alpaca"]),
        "turns.jsonl": table_as("jsonl", TABLES["messages"]),
        "template.txt": file_bytes(TEMPLATES["title"]),
        "out/run.json": json.dumps(run).encode(),
        "out/settings.yaml": b"lora_r: 4\n",
    }


@dataclass(frozen=True)
class SftCase:
    words: tuple[str, ...]
    files: Mapping[str, bytes | None] = field(default_factory=dict)


OPTIONS: dict[str, tuple[str, ...]] = {
    "data_path": (
        "rows.jsonl",
        "turns.jsonl",
        "other.csv",
        ".",
        "out",
        "no.jsonl",
        "json",
        "~nobody/x.jsonl",
        "a" * 5000,
    ),
    "base_model": (
        "base",
        "./base",
        "a/b/c",
        "no",
        "~nobody/model",
        "rows.jsonl",
        "a" * 5000,
        "~",
        "base/config.json",
        " ",
    ),
    "template": (
        "template.txt",
        "title",
        "{document} {title}",
        "no.txt",
        "~nobody/t",
        "[user]\n{document}\n[assistant]\n{title}",
    ),
    "val_set_size": ("0.5", "1", "3", "1000", "1e300", "1.5"),
    "val_data_path": ("rows.jsonl", "turns.jsonl", "no.csv"),
    "columns": ("{document: title, title: document}", "{title: x}", "{answer: title}", "{}"),
    "cutoff_len": ("1", "10", "100", "100000", str(2**63), "9" * 400),
    "num_epochs": ("1", "0.001", "1e300", "1e18"),
    "max_steps": ("1", str(2**63), "9" * 400),
    "batch_size": ("1", str(2**63), "9" * 400),
    "micro_batch_size": ("1", str(2**64)),
    "learning_rate": ("1e-300", "1e300"),
    "lr_scheduler": (
        "cosine",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "greedy",
        "constant",
    ),
    "lr_scheduler_kwargs": (
        "{num_cycles: 2}",
        "{power: x}",
        "{lr_end: 1e300}",
        "{a: 1}",
        "{}",
        "{min_lr: -1}",
        "{timescale: 0}",
    ),
    "warmup_steps": ("1", str(2**63)),
    "warmup_ratio": ("1", "0.1"),
    "seed": ("0", "4294967295"),
    "weight_decay": ("0", "1e300"),
    "adam_epsilon": ("1e-300",),
    "lora_r": ("1", str(2**63)),
    "lora_target_modules": ("[q_proj]", "x"),
    "eval_steps": ("1",),
    "early_stopping_patience": ("1",),
    "save_steps": ("1",),
    "resume_from_checkpoint": (
        "none",
        "latest",
        "out/checkpoint-1",
        "~nobody/x",
        "rows.jsonl",
        "a" * 5000,
        "\0",
    ),
    "overwrite": ("true", "false"),
    "output_dir": (
        "out",
        "new/deep/out",
        "base",
        "rows.jsonl",
        "rows.jsonl/x",
        "a" * 5000,
        "~nobody/x",
        "~/x",
        ".",
        "/",
        "",
    ),
    "adapter": ("base", "no", "~nobody/x", "a" * 5000),
    "dtype": ("bfloat16", "float16"),
    "device": ("cuda", "cpu"),
    "trust_remote_code": ("true",),
    "report_to": ("none", "tensorboard", "[tensorboard, wandb]", "[]"),
    "run_name": ("x", "\udcff"),
    "encoding": ("cp949", "utf-16", "x"),
    "data_split": ("test",),
    "data_revision": ("x",),
    "cache_dir": ("../cache/other", "rows.jsonl", "rows.jsonl/x", "a" * 5000),
    "shrink": ("document", "title"),
    "model_revision": ("x",),
    "group_by_length": ("true",),
}
# fmt: off
SCHEDULE_ARGUMENTS = (
    "{num_cycles: x}", "{num_cycles: 0}", "{timescale: 0}", "{lr_end: x}", "{lr_end: 1e300}", "{power: -1}",
    "{power: x}", "{min_lr: x}", "{min_lr_rate: 1}", "{num_decay_steps: 0}", "{num_decay_steps: -5}",
    "{num_decay_steps: 2, min_lr_ratio: x}", "{factor: 2}", "{patience: x}", "{last_epoch: 5}", "{mode: x}",
)
# fmt: on
VALID_WORDS = ("--base_model", "base", "--data_path", "rows.jsonl")


@st.composite
def sft_cases(draw: Draw) -> SftCase:
    words = [*TRAIN.words, *VALID_WORDS]
    for name in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True)):
        value = draw(st.sampled_from(OPTIONS[name]))
        words += [f"--{name}={value}"] if draw(st.booleans()) else [f"--{name}", value]
    if draw(st.integers(0, 7)) == 0:
        words += ["--lr_scheduler", draw(st.sampled_from(OPTIONS["lr_scheduler"])), "--val_set_size", "1"]
        words += ["--lr_scheduler_kwargs", draw(st.sampled_from(SCHEDULE_ARGUMENTS)), "--warmup_steps", "1"]
    if draw(st.integers(0, 4)) == 0:
        for _ in range(draw(edits(3))):
            at = draw(st.integers(0, len(words)))
            words[at : at + draw(st.integers(0, 1))] = [draw(st.sampled_from((*ARGUMENTS, *NUMBERS, *TEXTS)))]
    files: dict[str, bytes | None] = {}
    if draw(st.integers(0, 2)) == 0:
        name, content, template = draw(named_data())
        files[name] = content
        words += ["--data_path", name, *(("--template", template) if template else ())]
    if draw(st.integers(0, 2)) == 0:
        chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
        text = "".join(f"{name}: {json.dumps(draw(st.sampled_from(OPTIONS[name])))}\n" for name in chosen)
        files["run.yaml"] = file_bytes(draw(damaged_text(text, YAML_TOKENS, max_edits=2)))
        words += ["--config", "run.yaml"]
    if draw(st.integers(0, 9)) == 0:
        files["out/run.json"] = draw(
            damaged_json({"identity": {"objective": "sft"}, "finished": False}, NAMES)
        )
    return SftCase(tuple(words), files)


SFT = Target(
    name="sft",
    cases=sft_cases(),
    valid=SftCase((*TRAIN.words, *VALID_WORDS)),
    files=lambda case: case.files,
    read=lambda case, sandbox: run(TRAIN, *case.words),
    pristine=run_files,
)

INSPECT_ALL = CommandLine("inspect", ("--rows", "all"))
INSPECT = Target(
    name="inspect",
    cases=sft_cases(),
    valid=SftCase((*TRAIN.words, *VALID_WORDS)),
    files=lambda case: case.files,
    read=lambda case, sandbox: run(INSPECT_ALL, *case.words, *INSPECT_ALL.words),
    pristine=run_files,
)

# Model folders


@dataclass(frozen=True)
class FilesCase:
    files: Mapping[str, bytes | None]
    words: tuple[str, ...] = ()


# fmt: off
MODEL_NAMES = (
    "model_type", "vocab_size", "auto_map", "architectures", "tokenizer_class", "eos_token", "content",
    "model", "added_tokens", "vocab", "merges", "type", "normalizer", "pre_tokenizer", "chat_template",
    "weight_map", "quantization_config", "max_position_embeddings", "dtype", "torch_dtype",
    "rope_parameters", "special",
)
# fmt: on


@st.composite
def damaged_folder(draw: Draw, folder: str, files: Mapping[str, bytes]) -> dict[str, bytes | None]:
    """Up to three files of a folder, damaged or deleted."""
    damaged: dict[str, bytes | None] = {}
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=3, unique=True)):
        damaged[f"{folder}/{name}"] = draw(_damaged_file(name, files[name]))
    return damaged


@st.composite
def _damaged_file(draw: Draw, name: str, content: bytes) -> bytes | None:
    if draw(st.integers(0, 14)) == 0:
        return None
    if name.endswith(".json") and draw(st.integers(0, 3)) > 0:
        return bytes(draw(damaged_json(json.loads(content), MODEL_NAMES)))
    if name.endswith((".jinja", ".txt")):
        tokens = CHAT_TOKENS if name.endswith(".jinja") else TEMPLATE_TOKENS
        return file_bytes(draw(damaged_text(content.decode(), tokens, max_edits=3)))
    return bytes(draw(damaged_bytes(content, [content])))


_INDEX = b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'
_UNDER = b'{"base_model_name_or_path": "base", "revision": null, "peft_type": "LORA"}'


IMPOSSIBLE: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        7,
        1.5,
        10**5,
        10**9,
        10**12,
        10**40,
        float("nan"),
        float("inf"),
        -float("inf"),
        True,
        None,
    ),
    *(
        "",
        "x",
        "64",
        "no",
        "flash_attention_2",
        "float8_e4m3fn",
        [],
        [0],
        ["x"],
        [1] * 20_000,
        {},
        {"a": {"b": 0}},
    ),
    *({"rope_type": "zzz"}, {"rope_type": "yarn", "factor": "x"}, {"hidden_size": 0}, {"quant_method": 5}),
)
RUN_KEYS = (
    *("_attn_implementation", "_experts_implementation", "return_dict", "output_attentions", "use_cache"),
    *(
        "head_dim",
        "rope_scaling",
        "quantization_config",
        "text_config",
        "num_labels",
        "pruned_heads",
        "layer_types",
    ),
)


@st.composite
def model_cases(draw: Draw) -> FilesCase:
    files = {**base_files()}
    if draw(st.integers(0, 5)) == 0:  # in shards
        files["model-00001-of-00001.safetensors"] = files["model.safetensors"]
        files["model.safetensors.index.json"] = _INDEX
        damaged = {"base/model.safetensors": None}
        damaged |= {f"base/{name}": files[name] for name in files if name not in base_files()}
        return FilesCase({**damaged, **draw(damaged_folder("base", files))})
    if draw(st.integers(0, 4)) == 0:  # numbers that no model can have
        config = json.loads(files["config.json"])
        keys = st.sampled_from((*sorted(config), *RUN_KEYS))
        config |= draw(st.dictionaries(keys, st.sampled_from(IMPOSSIBLE), min_size=1, max_size=3))
        return FilesCase({"base/config.json": json.dumps(config).encode()})
    if draw(st.integers(0, 5)) == 0:  # under an adapter
        config = draw(damaged_json(json.loads(_UNDER), ("base_model_name_or_path", "revision", "peft_type")))
        return FilesCase({"over/adapter_config.json": config}, ("--base_model", "over"))
    words = ("--data_path", "turns.jsonl") if draw(st.integers(0, 3)) == 0 else ()
    return FilesCase(draw(damaged_folder("base", files)), words)


MODEL = Target(
    name="model",
    cases=model_cases(),
    valid=FilesCase({}),
    files=lambda case: case.files,
    read=lambda case, sandbox: run(TRAIN, *TRAIN.words, *VALID_WORDS, *case.words),
    pristine=run_files,
)

# Adapter folders


def adapter_files(folder: Path) -> dict[str, bytes]:
    """The run's files, and the folder of an adapter on the base, made from one with weights."""
    base = tiny_base(folder / "base", byte_level(), layers=1)  # of the size that base_files says
    adapter = adapter_on(base, folder / "OUT", "title", columns={"title": "title"})
    files = {path.name: path.read_bytes() for path in sorted(adapter.iterdir())}
    for name in ("yeonma.json", "adapter_config.json"):
        files[name] = files[name].replace(str(base).encode(), b"base")
    details = json.loads(files["yeonma.json"])
    del details["base_content"]  # the sandbox's base has no weights: the adapter is of an earlier version
    files["yeonma.json"] = json.dumps(details).encode()
    return {**run_files(folder), **{f"adapter/{name}": content for name, content in files.items()}}


@lru_cache
def _adapter_folder() -> dict[str, bytes]:
    """An adapter folder to be damaged. It is valid, but has other bytes than the one in the sandbox."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = adapter_files(Path(folder))
    return {name.removeprefix("adapter/"): files[name] for name in files if name.startswith("adapter/")}


@st.composite
def adapter_cases(draw: Draw) -> FilesCase:
    files = draw(damaged_folder("adapter", _adapter_folder())) if draw(st.integers(0, 4)) > 0 else {}
    if draw(st.integers(0, 2)) == 0:
        files["rows.jsonl"] = b"".join(
            draw(damaged_json(row, NAMES)) + b"\n" for row in TABLES["news_ko"][:2]
        )
    words = st.sampled_from(
        (
            ("--data_path", "rows.jsonl"),
            ("--row", draw(rows_as_json())),
            ("--row", json.dumps(TABLES["news_ko"][0])),
            ("--prompt", draw(st.sampled_from(("a", *TEXTS)))),
            ("--data_path", "rows.jsonl", "--columns", "{title: x}"),
            (
                "--row",
                '{"document": "a"}',
                "--max_new_tokens",
                draw(st.sampled_from(("1", "2047", "2048", str(2**63)))),
            ),
            (
                "--data_path",
                "rows.jsonl",
                "--limit",
                "1",
                "--output",
                draw(st.sampled_from(("x", "a/b", "rows.jsonl", "\0"))),
            ),
        )
    )
    return FilesCase(files, draw(words))


ADAPTER = Target(
    name="adapter",
    cases=adapter_cases(),
    valid=FilesCase({}, ("--data_path", "rows.jsonl")),
    files=lambda case: case.files,
    read=lambda case, sandbox: run(GENERATE, "adapter", *case.words),
    pristine=adapter_files,
)

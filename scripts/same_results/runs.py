"""The runs: what a user does with Yeonma, in miniature, by the command line alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from .material import KOREAN, write_rows
from .recording import COMMAND_SECONDS, Console, Run

CPU = "--dtype float32 --device cpu"
LLAMA, QWEN = "--base_model models/llama", "--base_model models/qwen"
TRAIN = f"{CPU} --cutoff_len 160 --lora_r 8 --lora_alpha 16 --seed 7 --card_rows 2"
STEPS = f"{TRAIN} --batch_size 4 --micro_batch_size 2 --val_set_size 4"
TITLES = f"{LLAMA} --data_path data/titles.jsonl {STEPS} --learning_rate 1e-2"
DROPOUT = (
    f"{TITLES} --lora_dropout 0.1 --use_rslora true --lr_scheduler cosine --warmup_steps 2 --save_steps 4"
)
PREFERENCES = f"{STEPS} --learning_rate 2e-3 --num_epochs 2 --beta 0.3 --save_steps 3"
PAIRS = f"{LLAMA} --data_path data/pairs.jsonl {PREFERENCES}"


def inspect(console: Console) -> None:
    """What the rows of every kind of data become: token ids, trained masks, texts, the audit and the forecast."""
    for data, settings in (
        ("titles", f"{LLAMA} --val_set_size 4"),
        ("titles", f"{QWEN} --shrink_side middle --train_on_inputs true"),
        ("instructions", QWEN),
        ("chats", LLAMA),
        ("pairs", f"{QWEN} --objective dpo"),
        ("dialogues", f"{QWEN} --objective dpo"),
        ("labels", f"{QWEN} --objective dpo --loss kto"),
    ):
        rows = f"--data_path data/{data}.jsonl {settings} {TRAIN} --output_dir nowhere"
        console.yeonma(f"inspect {rows} --rows all --json true", stdout="jsonl")


def sft(console: Console) -> None:
    """The built-in template of titles, with validation, checkpoints and a model card."""
    console.yeonma(f"sft {TITLES} --save_steps 6 --eval_steps 3 --output_dir sft")


def sft_turns(console: Console) -> None:
    """Lists of turns, on a model with grouped heads; and a template with turns, without a validation set."""
    console.yeonma(
        f"sft {QWEN} --data_path data/chats.jsonl {STEPS} --learning_rate 1e-2 --output_dir sft-turns/chats"
    )
    headlines = f"{QWEN} --data_path data/headlines.jsonl --template data/headline.txt"
    batches = "--batch_size 3 --micro_batch_tokens 300 --num_epochs 1 --train_on_inputs true"
    console.yeonma(f"sft {headlines} {TRAIN} {batches} --output_dir sft-turns/headlines")


def sft_dropout(console: Console) -> None:
    """Dropout, rsLoRA, another schedule with warm-up, and a checkpoint every other step."""
    console.yeonma(f"sft {DROPOUT} --output_dir sft-dropout")


def sft_processes(console: Console) -> None:
    """Two processes, with dropout and the gradients of steps that do not divide by two."""
    console.yeonma(f"sft {DROPOUT} --batch_size 5 --nproc 2 --output_dir sft-processes")


def sft_resumed(console: Console) -> None:
    """`sft-dropout` again from its first checkpoint, in a copy of its folder."""
    folder = console.copy("sft-dropout", "sft-resumed").name
    console.yeonma(f"sft {DROPOUT} --output_dir {folder} --resume_from_checkpoint {folder}/checkpoint-4")


def sft_killed(console: Console) -> None:
    """`sft-dropout`, killed when it has left its first checkpoint; then the same command again."""
    command = f"sft {DROPOUT} --output_dir sft-killed"
    console.yeonma_killed(command, once=Path("sft-killed/checkpoint-4"))
    console.yeonma(command)


def dpo(console: Console) -> None:
    """DPO as usual."""
    console.yeonma(f"dpo {PAIRS} --output_dir dpo")


def dpo_dora(console: Console) -> None:
    """DoRA, for which the reference has always been computed in a pass of its own."""
    console.yeonma(f"dpo {PAIRS} --use_dora true --label_smoothing 0.1 --output_dir dpo-dora")


def dpo_continued(console: Console) -> None:
    """DPO from a supervised adapter with dropout: that adapter is the reference, in a pass of its own as well."""
    console.yeonma(f"dpo {PAIRS} --adapter sft-dropout --sft_weight 0.2 --output_dir dpo-continued")


def dpo_others(console: Console) -> None:
    """Two losses without a reference, and KTO on labelled answers."""
    console.yeonma(f"dpo {PAIRS} --loss simpo --simpo_gamma 0.7 --output_dir dpo-others/simpo")
    console.yeonma(f"dpo {PAIRS} --loss orpo --lora_dropout 0.1 --output_dir dpo-others/orpo")
    labels = f"{QWEN} --data_path data/labels.jsonl {PREFERENCES} --loss kto --kto_undesirable_weight 0.8"
    console.yeonma(f"dpo {labels} --output_dir dpo-others/kto")


def generate(console: Console) -> None:
    """Answers to rows and to one row, greedy and sampled, with and without the adapter; a text continued."""
    (console.work / "generate").mkdir()
    answer = f"generate sft {CPU} --max_new_tokens 24"
    rows, row = "--data_path data/unseen.jsonl", json.dumps({"document": KOREAN[5]}, ensure_ascii=False)
    sampled = "--temperature 0.8 --top_p 0.9 --top_k 40 --seed 3"
    console.yeonma(f"{answer} {rows} --output generate/greedy.jsonl")
    console.yeonma(f"{answer} {rows} {sampled} --batch_size 3 --output generate/sampled.jsonl")
    console.yeonma(f"{answer} {rows} --limit 3 --adapter_weights false", stdout="jsonl")
    console.yeonma(f"{answer} {sampled} --repetition_penalty 1.3", "--row", row, stdout="txt")
    console.yeonma(answer, "--prompt", "The night train", stdout="txt")


def chat(console: Console) -> None:
    """Questions through a pipe: the field of a template, and conversations. Earlier versions read a field up to an
    empty line, and had another command that starts anew."""
    settings = f"{CPU} --max_new_tokens 16"
    articles = "A storm. It closed the harbour.\n\n기차가 달린다.\n\n"
    console.yeonma(f"chat sft {settings}", stdout="txt", stdin=articles)
    for turns in ("Which train runs?\nAnd when?\n/quit\n", "몇 시에?\n/quit\n"):
        console.yeonma(f"chat sft-turns/chats {settings} --temperature 0.7", stdout="txt", stdin=turns)


def compare(console: Console) -> None:
    """A base and two adapters on rows that none was trained on: answers, losses, numbers, the page."""
    rows = f"--data_path data/unseen.jsonl {CPU} --max_new_tokens 24"
    console.yeonma(f"compare --models models/llama sft sft-dropout {rows} --output_dir compare")


def merge(console: Console) -> None:
    """A whole model, which then answers as an adapter's folder does."""
    console.yeonma(f"merge sft-dropout {CPU} --output_dir merge")
    console.yeonma(f"generate merge --data_path data/unseen.jsonl {CPU} --max_new_tokens 24", stdout="jsonl")


def serve(console: Console) -> None:
    """Two adapters and their base over HTTP: whole and streamed, greedy and sampled, and requests that are refused."""
    with console.server(f"serve sft sft-dropout {CPU} --port 0 --max_new_tokens 16") as url:
        answers = [{"request": request.name, **_ask(url, request)} for request in REQUESTS]
    folder = console.work / "serve"
    folder.mkdir()
    write_rows(folder / "answers.jsonl", answers)


@dataclass(frozen=True)
class HttpRequest:
    """A request: POST of `body`, or GET where there is none."""

    name: str
    path: str
    body: Mapping[str, Any] | None = None


def _chat(name: str, text: str, model: str = "sft", **more: Any) -> HttpRequest:
    messages = [{"role": "user", "content": text}]
    return HttpRequest(name, "/v1/chat/completions", {"model": model, "messages": messages, **more})


REQUESTS = (
    HttpRequest("models", "/v1/models"),
    _chat("greedy", KOREAN[0]),
    _chat("the second adapter", KOREAN[0], "sft-dropout"),
    _chat("the base", KOREAN[0], "llama", max_tokens=8),
    _chat("sampled", KOREAN[1], temperature=0.9, top_p=0.9, seed=5),
    _chat("shortened", " ".join(KOREAN * 2)),
    _chat(
        "streamed", KOREAN[2], stream=True, stream_options={"include_usage": True}, temperature=0.5, seed=1
    ),
    _chat("with stop texts", KOREAN[3], temperature=0.9, seed=2, stop=["e", "o", "제"], max_tokens=32),
    HttpRequest(
        "texts", "/v1/completions", {"model": "sft", "prompt": ["A storm", "밤 기차"], "max_tokens": 12}
    ),
    HttpRequest(
        "a text, streamed", "/v1/completions", {"model": "sft", "prompt": "The town", "stream": True}
    ),
    _chat("two answers at once", KOREAN[4], n=2),
    _chat("an unknown model", KOREAN[4], "nobody"),
    HttpRequest("no text", "/v1/completions", {"model": "sft"}),
)


def _ask(url: str, request: HttpRequest) -> dict[str, Any]:
    """Status, whether the text was shortened, and the answer; the parts of a streamed one are put together."""
    body = None if request.body is None else json.dumps(request.body).encode()
    http = Request(url + request.path, body, {"Content-Type": "application/json"})
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(http, timeout=COMMAND_SECONDS) as response:
            status, headers, text = response.status, response.headers, response.read().decode()
    except HTTPError as error:
        status, headers, text = error.code, error.headers, error.read().decode()
    answer = _joined(text) if text.startswith("data: ") else json.loads(text)
    return {"status": status, "shortened": "Yeonma-Shortened" in headers, "answer": answer}


def _joined(stream: str) -> dict[str, Any]:
    """What server-sent events say together. How the text was parted is a matter of time."""
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    parts = [json.loads(event) for event in events if event != "[DONE]"]
    choices = [choice for part in parts for choice in part["choices"]]
    return {
        "text": "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
        ),
        "role": [role for choice in choices if (role := choice.get("delta", {}).get("role"))],
        "finish_reason": [reason for choice in choices if (reason := choice["finish_reason"])],
        "usage": [part["usage"] for part in parts if part.get("usage")],
        "model": sorted({part["model"] for part in parts}),
        "object": sorted({part["object"] for part in parts}),
        "ended": events[-1] == "[DONE]",
    }


def verify(console: Console) -> None:
    """Runs, a checkpoint and a merged model that are whole, data that was not trained on, and a damaged adapter."""
    for folder in ("sft", "sft-dropout/checkpoint-4"):
        console.yeonma(f"verify {folder} --json true", stdout="jsonl")
    console.yeonma("verify sft --data_path data/unseen.jsonl --json true", stdout="jsonl", status=1)
    damaged = console.copy("sft", "verify") / "adapter_model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    console.yeonma("verify verify --json true", stdout="jsonl", status=1)


def mistakes(console: Console) -> None:
    """Commands that are refused with exit status 2, and change nothing."""
    folder = console.copy("sft", "mistakes").name
    train = f"sft {TITLES} --output_dir {folder}/new"
    for line, *more in (
        (f"{train} --lora_rr 8",),
        (f"{train} --lora_r many --lora_dropout 1.5",),
        (train, "--template", "{boddy}\n\n{title}"),
        (train, "--template", "{document\n\n{title}"),
        (f"sft {STEPS} --base_model models/none --data_path data/titles.jsonl --output_dir {folder}/new",),
        (f"sft {LLAMA} --data_path data/none.jsonl {STEPS} --output_dir {folder}/new",),
        (f"sft {LLAMA} --data_path data/damaged.jsonl {STEPS} --output_dir {folder}/new",),
        (f"sft {TITLES} --save_steps 6 --eval_steps 3 --learning_rate 1e-4 --output_dir {folder}",),
        (f"dpo {PAIRS} --simpo_gamma 1 --output_dir {folder}/new",),
        (f"dpo {TITLES} --output_dir {folder}/new",),
        ("generate sft",),
        ("generate sft", "--row", '{"text": "of another column"}'),
        ("verify nowhere",),
    ):
        console.yeonma(line, *more, status=2)


SFT, TURNS, DROPPED = Run(sft), Run(sft_turns), Run(sft_dropout)
RUNS = (
    SFT,
    DROPPED,
    TURNS,
    Run(inspect),
    Run(sft_killed),
    Run(sft_processes),
    Run(sft_resumed, (DROPPED,)),
    Run(dpo),
    Run(dpo_dora),
    Run(dpo_continued, (DROPPED,)),
    Run(dpo_others),
    Run(generate, (SFT,)),
    Run(chat, (SFT, TURNS)),
    Run(compare, (SFT, DROPPED)),
    Run(merge, (DROPPED,)),
    Run(serve, (SFT, DROPPED)),
    Run(verify, (SFT, DROPPED)),
    Run(mistakes, (SFT,)),
)
"""In the order in which they begin: those that others need come first."""

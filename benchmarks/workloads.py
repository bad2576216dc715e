"""The benchmark's rows and templates, tokenised once by Yeonma's own rules: every contender trains on these ids.

Run as a script with a job file, this makes a folder that all contenders start from: `NAME.jsonl` and `NAME.txt` (rows
and template), `NAME.json` (token ids and labels in the order of training), `start/` (one LoRA start), `prepared.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness import HERE, answer_job

SAMPLE = HERE.parent / "yeonma" / "samples" / "news_en.jsonl"
SHORT_CHARACTERS = 300
BATCH_SIZE = 8
SEED = 42
LEARNING_RATE = 2e-4
CUTOFF_LEN = 2048
LORA_R = 16
TARGETS = ("gate_proj", "up_proj", "down_proj")
IGNORED = -100  # transformers' label of a token that is not trained

Fields = dict[str, str]


@dataclass(frozen=True)
class Workload:
    about: str
    template: str
    rows: list[Fields]


def read_data(path: Path | None) -> list[Fields]:
    """Rows with instruction, input and output; without a file, the bundled English sample in that form."""
    if path is not None:
        rows = json.loads(path.read_text("utf-8"))
        return [{name: row.get(name) or "" for name in ("instruction", "input", "output")} for row in rows]
    sample = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    ask = "Write a title for this article."
    return [{"instruction": ask, "input": row["document"], "output": row["title"]} for row in sample]


def workload(name: str, data: list[Fields], count: int) -> Workload:
    """The first `count` rows of `data` that suit it. Raises ValueError for too few, or an unknown name."""
    alpaca = (HERE.parent / "yeonma" / "data" / "templates" / "alpaca.txt").read_text("utf-8")
    whole = [{"instruction": question(row), "output": row["output"]} for row in data]
    if name == "alpaca":
        work = Workload("alpaca template: short prompt, long answer", alpaca, data[:count])
    elif name == "reversed":
        swapped = [{"instruction": row["output"], "output": row["instruction"]} for row in whole[:count]]
        work = Workload("the same with prompt and answer swapped: long prompt, short answer", alpaca, swapped)
    elif name == "system":
        frame = (HERE / "system_prompt.txt").read_text("utf-8")
        template = f"{frame}\n### Instruction:\n{{instruction}}\n\n### Response:\n{{output}}"
        short = [row for row in whole if sum(map(len, row.values())) <= SHORT_CHARACTERS]
        about = f"a long system prompt before short rows (at most {SHORT_CHARACTERS} characters)"
        work = Workload(about, template, short[:count])
    else:
        raise ValueError(f"unknown workload {name}")
    if len(work.rows) < count:
        raise ValueError(f"{name} needs {count} rows; the data has {len(work.rows)} that suit it")
    return work


def question(row: Fields) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"]) if part)


def loaded(folder: str) -> tuple[Any, Any, dict[str, Any]]:
    """A base model in float32 on the CPU, its tokenizer, and what the results say of it."""
    from yeonma.model.load import load_base, load_tokenizer, pick_device, pick_dtype
    from yeonma.model.source import find_base

    source, device = find_base(folder), pick_device("cpu")
    model = load_base(source, device, pick_dtype("float32", device))
    tied = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    sizes = {id(weight): weight.numel() for weight in model.parameters()}
    about = {
        "name": Path(folder).name,
        "type": model.config.model_type,
        "parameters": sum(sizes.values()),
        "non_embedding_parameters": sum(size for weight, size in sizes.items() if weight not in tied),
        "weights_sha256": weights_sum(model),
    }
    return model, load_tokenizer(source), about


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Make the folder of the module's docstring; returns what prepared.json holds."""
    from yeonma.model.load import LoraShape, add_lora

    folder = Path(job["folder"])
    model, tokenizer, about_model = loaded(job["model"])
    data = read_data(Path(job["data"]) if job["data"] else None)
    workloads = {}
    for name in job["workloads"]:
        workloads[name] = tokenise(name, workload(name, data, job["rows"]), tokenizer, folder)
    # `yeonma sft` draws the same numbers from the same seed.
    add_lora(model, LoraShape(LORA_R, LORA_R, 0.0, list(TARGETS)), SEED).save_pretrained(folder / "start")
    return {"model": about_model, "workloads": workloads}


def weights_sum(model: Any) -> str:
    """SHA-256 of the weights in the order of their names."""
    total = sha256()
    for name, weights in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(weights.contiguous().numpy().data)
    return total.hexdigest()


def tokenised(
    path: Path,
    folder: Path,
    tokenizer: Any,
    cutoff_len: int,
    *,
    template: str | None = None,
    pairs: bool = False,
) -> Any:
    """The training part of a data set, tokenised by Yeonma's own rules with the cache in `folder`."""
    from yeonma.config.settings import DataSettings, TokenSettings
    from yeonma.data.task import ANSWERS, PAIRS
    from yeonma.tokenization.dataset import prepare_dataset

    data = DataSettings(data_path=str(path), template=template)
    tokens = TokenSettings(cutoff_len=cutoff_len, cache_dir=str(folder / "cache"))
    task = PAIRS if pairs else ANSWERS
    return prepare_dataset(data, tokens, tokenizer, SEED, lambda _: None, lambda _: None, task).train


def tokenise(name: str, work: Workload, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write a workload's rows, template and examples; returns what describes them."""
    from yeonma.batch.forest import lay_out
    from yeonma.batch.plan import make_plan

    rows_file, template_file = folder / f"{name}.jsonl", folder / f"{name}.txt"
    rows_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in work.rows), "utf-8")
    template_file.write_text(work.template, "utf-8")
    part = tokenised(rows_file, folder, tokenizer, CUTOFF_LEN, template=str(template_file))
    lengths = part.store.lengths[part.positions]
    plan = make_plan(part.positions, lengths, batch_size=BATCH_SIZE, seed=SEED, num_epochs=1, max_steps=None)
    examples, steps, computed = [], [], 0
    for positions in plan.steps():
        step = [part.store.example(int(position)) for position in positions]
        forest = lay_out([example.token_ids for example in step], [example.trained for example in step])
        computed += len(forest.token_ids_T)
        tokens = sum(len(example.token_ids) for example in step)
        steps.append({"tokens": tokens, "trained_tokens": forest.trained_tokens})
        examples += [labelled(example) for example in step]
    (folder / f"{name}.json").write_text(json.dumps(examples), "utf-8")
    return {
        "about": work.about,
        "examples": len(examples),
        "longest": max(map(int, lengths)),
        "frame_tokens": common_beginning([example["input_ids"] for example in examples]),
        "distinct_tokens": computed,
        "steps": steps,
    }


def labelled(example: Any) -> dict[str, list[int]]:
    """An example as transformers' collators take it."""
    ids = example.token_ids.tolist()
    pairs = zip(ids, example.trained.tolist(), strict=True)
    return {"input_ids": ids, "labels": [token if trained else IGNORED for token, trained in pairs]}


def common_beginning(sequences: list[list[int]]) -> int:
    """How many tokens all sequences begin with in common."""
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


if __name__ == "__main__":
    answer_job(prepare, output="prepared.json")

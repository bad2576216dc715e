"""How fast `yeonma eval` answers requests of lm-evaluation-harness, beside the harness's own class with transformers.

Both ask SmolLM2 with a LoRA adapter the same few-shot questions, in float32, and take turns in one process; their
answers are compared in every round. The harness's class runs with each batch size in the first round and then with its
fastest. Loading is not counted, keeping the answers on disk is. Writes results/eval.json. Needs lm_eval.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from harness import HERE, benchmark_parser, model_to_use, new_result, save
from workloads import SAMPLE

PACKAGES = ("yeonma", "lm_eval", "torch", "transformers", "peft", "tokenizers", "numpy")
RESULT = HERE / "results" / "eval.json"
BATCH_SIZES = (1, 8, 32)
SHOTS = 4
WORKLOADS = {
    "titles": "options of several tokens: a title in full",
    "letters": "options of one token: the letter of a title",
    "answers": "generated answers of up to 24 tokens",
}
LETTERS = "ABCD"
LARGEST_DIFFERENCE = 1e-3
"""Of two log-likelihoods of a request, which are sums over its tokens."""

Work = Callable[[list[Any]], list[Any]]


def main(given: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, RESULT, compares=False)
    parser.add_argument("--rows", type=int, default=6, help="questions of each workload")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    options = parser.parse_args(given)
    result = new_result("eval.py", given, PACKAGES)
    model = model_to_use(options.model)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
        adapter = random_adapter(model, Path(folder) / "adapter")
        requests = {name: requests_of(name, Path(folder), options.rows) for name in options.workloads}
        ours, theirs = our_model(adapter, model, Path(folder)), their_model(adapter, model)
        result |= {"model": Path(model).name, "rows": options.rows, "shots": SHOTS, "runs": []}
        measure(result, options, requests, ours, theirs)
    print_table(result)
    return 0


def measure(
    result: dict[str, Any],
    options: argparse.Namespace,
    requests: Mapping[str, list[Any]],
    ours: Work,
    theirs: Callable[[int], Work],
) -> None:
    """Adds a run for each round, workload and contender, and saves the result after each workload. Raises
    AssertionError where the answers differ."""
    runs: list[dict[str, Any]] = result["runs"]
    for number in range(1, options.rounds + 1):
        for workload, asked in requests.items():
            first = [run for run in runs if run["workload"] == workload and run["batch"]]
            best = min(first, key=lambda run: run["cpu_seconds"])["batch"] if first else 0
            contenders = [("yeonma", 0, ours)]
            contenders += [
                (f"lm_eval-{batch}", batch, theirs(batch)) for batch in ([best] if best else BATCH_SIZES)
            ]
            if number % 2 == 0:
                contenders.reverse()
            answers = {}
            for name, batch, work in contenders:
                started, worked = time.perf_counter(), time.process_time()
                answers[name] = work(asked)
                run = {"round": number, "workload": workload, "contender": name, "batch": batch}
                run |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
                runs.append(run)
                print(f"round {number} {workload:8} {name:10} {run['cpu_seconds']:.2f} s CPU", flush=True)
            for run in runs[-len(contenders) :]:
                run["differs_by"] = difference(answers["yeonma"], answers[run["contender"]])
                assert run["differs_by"] < LARGEST_DIFFERENCE, run
            save(options.output, result)


def difference(a: Sequence[Any], b: Sequence[Any]) -> float:
    """The largest difference of two log-likelihoods; infinite where greedy decoding or a text differs."""
    if isinstance(a[0], str):
        return 0.0 if list(a) == list(b) else float("inf")
    same = all(one[1] == other[1] for one, other in zip(a, b, strict=True))
    return max(abs(one[0] - other[0]) for one, other in zip(a, b, strict=True)) if same else float("inf")


def print_table(result: Mapping[str, Any]) -> None:
    """Medians of CPU time, and of the ratios of each round."""
    for workload in dict.fromkeys(run["workload"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["workload"] == workload]
        own = {run["round"]: run for run in runs if run["contender"] == "yeonma"}
        counts = Counter(run["contender"] for run in runs)
        print(f"\n{workload}: {WORKLOADS[workload]}")
        print(f"  yeonma: {median(run['cpu_seconds'] for run in own.values()):.2f} s CPU, {len(own)} rounds")
        for name, count in counts.items():
            if name == "yeonma":
                continue
            those = [run for run in runs if run["contender"] == name]
            ratios = [run["cpu_seconds"] / own[run["round"]]["cpu_seconds"] for run in those]
            seconds = median(run["cpu_seconds"] for run in those)
            spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
            print(
                f"  {name}: {seconds:.2f} s CPU, {count} rounds; Yeonma is {median(ratios):.2f}x as fast ({spread})"
            )


def random_adapter(model: str, folder: Path) -> Path:
    """An adapter on all linear layers, with random weights that matter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(str(folder))
    return folder


def requests_of(workload: str, folder: Path, count: int) -> list[Any]:
    """The harness's requests for questions on bundled articles, after the same examples."""
    from lm_eval.tasks import TaskManager

    articles = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    rows = []
    for number, article in enumerate(articles[: SHOTS + count]):
        titles = [articles[(number + step) % 100]["title"] for step in range(4)]
        gold = number % 4
        titles = titles[-gold:] + titles[:-gold] if gold else titles
        listed = "\n".join(f"{letter}. {title}" for letter, title in zip(LETTERS, titles, strict=True))
        rows.append({**article, "titles": titles, "gold": gold, "listed": listed})
    place = folder / workload
    place.mkdir()
    for name, part in (("train", rows[:SHOTS]), ("test", rows[SHOTS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (place / f"{name}.jsonl").write_text(text, "utf-8")
    choices = {"titles": "doc_to_choice: titles\n", "letters": "doc_to_choice: ['A', 'B', 'C', 'D']\n"}
    question = "{{document}}\\n{{listed}}\\nAnswer:" if workload == "letters" else "{{document}}\\nTitle:"
    body = (
        f"task: {workload}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {place}/test.jsonl\n    train: {place}/train.jsonl\n"
        "test_split: test\nfewshot_split: train\nfewshot_config: {sampler: first_n}\n"
        f'num_fewshot: {SHOTS}\ndoc_to_text: "{question}"\n'
    )
    if workload == "answers":
        body += (
            "output_type: generate_until\ndoc_to_target: title\n"
            'generation_kwargs: {until: ["\\n\\n"], do_sample: false, max_gen_toks: 24}\n'
        )
    else:
        body += f"output_type: multiple_choice\ndoc_to_target: gold\n{choices[workload]}"
    (place / f"{workload}.yaml").write_text(body, "utf-8")
    task = TaskManager(include_path=str(place), include_defaults=False).load([workload])["tasks"][workload]
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    return list(task.instances)


def our_model(adapter: Path, model: str, folder: Path) -> Work:
    from yeonma.evaluate.answer_cache import open_answer_cache
    from yeonma.evaluate.harness_model import harness_model
    from yeonma.evaluate.harness_requests import RequestRunner
    from yeonma.policy import load_policy

    policy = load_policy(str(adapter), base_model=model, device="cpu", dtype="float32")
    assert policy.support.forest and policy.prompt_builder is not None
    tokenizer = policy.prompt_builder.tokenizer

    def work(requests: list[Any]) -> list[Any]:
        answers = folder / "answers.jsonl"
        answers.unlink(missing_ok=True)
        with open_answer_cache(answers) as cache:
            runner = RequestRunner(policy, tokenizer, "tuned", "", cache, lambda _: None, 32)
            asked = harness_model(runner, Counter())
            return list(getattr(asked, requests[0].request_type)(requests))

    return work


def their_model(adapter: Path, model: str) -> Callable[[int], Work]:
    from lm_eval.models.huggingface import HFLM

    harness_class = HFLM(model, peft=str(adapter), dtype="float32", device="cpu", batch_size=1)

    def with_batch(batch: int) -> Work:
        def work(requests: list[Any]) -> list[Any]:
            harness_class.batch_size_per_gpu = batch
            return list(getattr(harness_class, requests[0].request_type)(requests, disable_tqdm=True))

        return work

    return with_batch


if __name__ == "__main__":
    sys.exit(main())

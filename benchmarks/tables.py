"""Results -> the tables of docs/benchmarks.md. Pure functions of what lies in results/*.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is: taken within each round, then over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, both: Sequence[tuple[Run, Run]], speed: Callable[[Run], float]) -> Ratio:
        """`both`: runs of theirs and ours, round by round."""
        ratios = [speed(ours) / speed(theirs) for theirs, ours in both]
        return cls(median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        least, middle, most = (f"{ratio:.2f}" for ratio in (self.least, self.median, self.most))
        return f"{middle}x as fast" + (f" ({least}-{most})" if least != most else "")


def beside_ours(result: Mapping[str, Any], contender: str, **where: str) -> list[tuple[Run, Run]]:
    """A contender's run and ours, for every round that has both. `where`: the workload, and other keys of a run."""

    def rounds(name: str) -> dict[int, Run]:
        where_and_who = {**where, "contender": name}
        return {
            run["round"]: run
            for run in result["runs"]
            if all(run[key] == value for key, value in where_and_who.items())
        }

    theirs, ours = rounds(contender), rounds(result["ours"])
    return [(theirs[number], ours[number]) for number in sorted(theirs) if number in ours]


def table(columns: Mapping[str, str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. `columns`: the heads with their alignment, `---` or `---:`."""
    lines = [columns, columns.values(), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class Line:
    """One contender at one workload, over all rounds."""

    workload: str
    contender: str
    rounds: int
    tokens_per_second: float
    ratio: Ratio
    share: float  # of the machine's matrix rate
    peak_memory_bytes: int
    loss: float
    loss_gap: float | None  # to ours, the largest of any step; None where the steps have other rows


def tokens_per_second(run: Run) -> float:
    """Without the first step, which is warm-up."""
    return sum(run["tokens"][1:]) / sum(run["seconds"][1:])


def epoch_loss(run: Run) -> float:
    """The mean over all trained tokens."""
    total = sum(loss * count for loss, count in zip(run["losses"], run["trained_tokens"], strict=True))
    return total / sum(run["trained_tokens"])


def loss_gap(run: Run, ours: Run) -> float | None:
    """The largest difference of any step; None where the steps have other rows."""
    if run["tokens"] != ours["tokens"] or len(run["losses"]) != len(ours["losses"]):
        return None
    return max(abs(a - b) for a, b in zip(run["losses"], ours["losses"], strict=True))


def largest_gap(both: Sequence[tuple[Run, Run]]) -> float | None:
    """Of any step of any round; None where a round's steps have other rows."""
    gaps = [loss_gap(theirs, ours) for theirs, ours in both]
    known = [gap for gap in gaps if gap is not None]
    return max(known) if len(known) == len(gaps) else None


def matrix_rate(result: Mapping[str, Any]) -> float:
    return median(rate for run in result["runs"] for rate in run["matrix_rates"])


def frozen_rate(result: Mapping[str, Any]) -> float:
    return median(run["frozen_rate"] for run in result["runs"])


def lines(result: Mapping[str, Any]) -> list[Line]:
    """In the order of the workloads and contenders; those that were never measured together with ours are left out."""
    rate = matrix_rate(result)
    operations = (
        4 * result["model"]["non_embedding_parameters"]
    )  # a token: forward, and backward to the inputs
    result_lines = []
    for workload in result["workloads"]:
        for contender in result["contenders"]:
            both = beside_ours(result, contender, workload=workload)
            if not both:
                continue
            speed = median(tokens_per_second(theirs) for theirs, _ in both)
            result_lines.append(
                Line(
                    workload=workload,
                    contender=contender,
                    rounds=len(both),
                    tokens_per_second=speed,
                    ratio=Ratio.of(both, tokens_per_second),
                    share=speed * operations / rate,
                    peak_memory_bytes=int(median(theirs["peak_memory_bytes"] for theirs, _ in both)),
                    loss=median(epoch_loss(theirs) for theirs, _ in both),
                    loss_gap=largest_gap(both),
                )
            )
    return result_lines


def label_of(contender: str, rounds: int, of_rounds: int, result: Mapping[str, Any]) -> str:
    """A contender's cell: ours in bold, and how many rounds it has where others have more."""
    label = result["contenders"][contender]["label"]
    label += f" (rounds: {rounds})" if rounds < of_rounds else ""
    return f"**{label}**" if contender == result["ours"] else label


def failures_of(result: Mapping[str, Any]) -> list[str]:
    labels = {name: about["label"] for name, about in result["contenders"].items()}
    return [
        f"{labels[failure['contender']]} failed at {failure['workload']}: `{failure['error']}`"
        for failure in result["failures"]
    ]


def sft_section(result: Mapping[str, Any]) -> str:
    """The words and tables about training speed."""
    result_lines, ours = lines(result), result["ours"]
    rounds = max((line.rounds for line in result_lines), default=0)
    columns = dict.fromkeys(["workload", "contender"], "---")
    columns |= dict.fromkeys(["tokens/s", "Yeonma is", "of matrix rate", "peak memory", "loss"], "---:")
    rows = [
        (
            line.workload,
            label_of(line.contender, line.rounds, rounds, result),
            f"{line.tokens_per_second:.0f}",
            "" if line.contender == ours else str(line.ratio),
            f"{line.share:.0%}",
            gigabytes(line.peak_memory_bytes),
            f"{line.loss:.4f}" + ("" if line.loss_gap is not None else " *"),
        )
        for line in result_lines
    ]
    gaps = [line.loss_gap for line in result_lines if line.loss_gap is not None and line.contender != ours]
    after = []
    if gaps:
        after.append(f"The loss of every step is the same for all contenders to {max(gaps):.0e}.")
    if any(line.loss_gap is None for line in result_lines):
        after.append("\\* packing puts other rows into a step, so this loss is of other updates.")
    after += failures_of(result)
    blocks = [
        about_run(result),
        about_workloads(result),
        table(columns, rows),
        " ".join(after),
        "\n".join(best(result)),
    ]
    return "\n\n".join(block for block in blocks if block)


def best(result: Mapping[str, Any]) -> list[str]:
    """A line a workload: ours against the fastest setting of every other library."""
    result_lines, contenders = lines(result), result["contenders"]
    library = {name: about["library"] for name, about in contenders.items()}
    written = []
    for workload in result["workloads"]:
        here = [line for line in result_lines if line.workload == workload]
        parts = []
        for other in dict.fromkeys(library.values()):
            if other == library[result["ours"]]:
                continue
            theirs = [line for line in here if library[line.contender] == other]
            if theirs:
                line = max(theirs, key=lambda line: line.tokens_per_second)
                parts.append(
                    f"{line.ratio.median:.2f} times {contenders[line.contender]['label']}, its fastest here"
                )
        if parts:
            written.append(f"- {workload}: {'; '.join(parts)}")
    return written


def about_run(result: Mapping[str, Any]) -> str:
    model, settings = result["model"], result["settings"]
    rounds = len({run["round"] for run in result["runs"]})
    steps = len(next(iter(result["workloads"].values()))["steps"])
    sizes = (
        f"{model['parameters'] / 1e6:.1f}M parameters, {model['non_embedding_parameters'] / 1e6:.1f}M of them"
    )
    return (
        f"{about_machine(result)}\n\n"
        f"Model: {model['name']} ({model['type']}, {sizes} not embeddings), LoRA r={settings['lora_r']} on "
        f"{', '.join(settings['targets'])}, float32, batch {settings['batch_size']}. Data: {result['data']['name']}, "
        f"{settings['rows']} rows a workload, {steps} steps, the first not timed. Rounds: {rounds}. "
        f"Matrix rate: {matrix_rate(result) / 1e9:.1f} GFLOP/s "
        f"(float32 `torch.mm` of 2048x2048, the median of all measurements between the runs); "
        f"{frozen_rate(result) / 1e9:.1f} by the routine that Yeonma multiplies frozen weights by."
    )


def about_machine(result: Mapping[str, Any], language: str = "en") -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    cores = "cores" if language == "en" else "코어 수"
    where = f"{machine['cpu']}, {cores}: {machine['cores']}, {memory}"
    return f"{result['date']}, {where}; {packages}.\n`{result['command']}`"


def about_workloads(result: Mapping[str, Any]) -> str:
    written = []
    for name, work in result["workloads"].items():
        tokens, trained = (sum(step[key] for step in work["steps"]) for key in ("tokens", "trained_tokens"))
        frame = f", {work['frame_tokens']} at the beginning of every row" if work["frame_tokens"] > 15 else ""
        written.append(f"- `{name}`: {work['about']}; {tokens:,} tokens, {trained:,} of them trained{frame}")
    return "\n".join(written)


def tokenize_section(result: Mapping[str, Any]) -> str:
    """The words and table about tokenising many rows."""
    first, second = result["first"], result["second"]
    columns = dict.fromkeys(["rows read", "resident, own", "resident, all"], "---:")
    rows = []
    for sample in first["samples"]:
        own, whole = (megabytes(sample[name]) for name in ("anonymous_bytes", "resident_bytes"))
        rows.append((f"{sample['rows']:,}", own, whole))
    counts = first["counts"]
    return "\n\n".join(
        [
            about_machine(result),
            f"{counts['rows']:,} generated rows ({result['data_bytes'] / 1e6:.0f} MB of jsonl), "
            f"{counts['tokens']:,} tokens, tokenizer of {result['model']}: {first['seconds']:.1f} s, "
            f"{counts['rows'] / first['seconds']:,.0f} rows/s, {counts['tokens'] / first['seconds']:,.0f} tokens/s. "
            f"Memory in the middle of it:",
            table(columns, rows),
            f"The same again in a new process: {second['seconds']:.2f} s, {second['rows_tokenised']} rows tokenised.",
            "`yeonma inspect`, the whole process from its start to its end, with nothing tokenised before and again:",
            inspection_table(result["inspections"]),
        ]
    )


def tokenize_rate_section(result: Mapping[str, Any]) -> str:
    """The words and table about the rate of tokenising before and now."""
    columns = {
        "form": "---",
        "rows/s before": "---:",
        "rows/s now": "---:",
        "of the rate before": "---:",
        "lowest and highest": "---:",
    }
    rows = []
    for form in result["tokens"]:
        seconds = {
            name: [measured[name][form]["cpu_seconds"] for measured in result["rounds"]]
            for name in ("before", "now")
        }
        ratios = [before / now for before, now in zip(seconds["before"], seconds["now"], strict=True)]
        before, now = (f"{result['rows'] / median(seconds[name]):,.0f}" for name in ("before", "now"))
        rows.append((form, before, now, f"{median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"))
    commits = result["commits"]
    return "\n\n".join(
        [
            about_machine(result),
            f"{result['rows']:,} rows of each form, tokenizer of {result['model']}, {len(result['rounds'])} rounds; "
            f"before: {commits['before']}, now: {commits['now']}. The rates are of CPU seconds of all threads.",
            table(columns, rows),
        ]
    )


def tokenize_forms_section(result: Mapping[str, Any]) -> str:
    """The words and table about the memory that rows of each form take."""
    by_form: dict[str, list[Run]] = {}
    for run in result["runs"]:
        by_form.setdefault(run["form"], []).append(run)
    first, *_ = by_form.values()
    counts = [run["rows"] for run in first]
    columns = {"form": "---", **dict.fromkeys([f"{count:,} rows" for count in counts], "---:")}
    rows = []
    for form, runs in by_form.items():
        grown = [megabytes(run["peak_bytes"] - run["start_bytes"]) for run in runs]
        rows.append((form, *grown))
    return "\n\n".join([about_machine(result), f"Tokenizer of {result['model']}.", table(columns, rows)])


def inspection_table(inspections: Sequence[Mapping[str, Any]]) -> str:
    columns = {"rows": "---:", "cache": "---", "seconds": "---:", "own memory at most": "---:"}
    rows = [
        (
            f"{run['rows']:,}",
            "cold" if run["cold"] else "warm",
            f"{run['seconds']:.1f}",
            megabytes(run["own_bytes"]),
        )
        for run in inspections
    ]
    return table(columns, rows)


@dataclass(frozen=True)
class PairLine:
    """One contender at one preference workload, over all rounds."""

    workload: str
    contender: str
    rounds: int
    pairs_per_second: float
    ratio: Ratio
    reference_seconds: float
    first_step_share: float
    """Of the time of all steps."""
    peak_memory_bytes: int
    loss: float  # the mean over the steps
    loss_gap: float  # to ours, the largest of any step


LEAST_STEPS = 12
"""Fewer steps make no published table: the first one, slower than the rest, would weigh too much."""


def too_few_steps(result: Mapping[str, Any]) -> list[str]:
    """The workloads that were measured over fewer than LEAST_STEPS steps, the first included."""
    return sorted({run["workload"] for run in result["runs"] if len(run["seconds"]) < LEAST_STEPS})


def pairs_per_second(run: Run, work: Mapping[str, Any]) -> float:
    """Over all steps and the pass over the reference."""
    return work["pairs"] * work["epochs"] / (run["reference_seconds"] + sum(run["seconds"]))


def pair_lines(result: Mapping[str, Any]) -> list[PairLine]:
    """In the order of the workloads and contenders; those never measured in a round that has ours are left out."""
    result_lines = []
    for workload, work in result["workloads"].items():
        speed = partial(pairs_per_second, work=work)
        for contender in result["contenders"]:
            both = beside_ours(result, contender, workload=workload)
            if not both:
                continue
            theirs = [run for run, _ in both]
            result_lines.append(
                PairLine(
                    workload=workload,
                    contender=contender,
                    rounds=len(both),
                    pairs_per_second=median(map(speed, theirs)),
                    ratio=Ratio.of(both, speed),
                    reference_seconds=median(run["reference_seconds"] for run in theirs),
                    first_step_share=median(run["seconds"][0] / sum(run["seconds"]) for run in theirs),
                    peak_memory_bytes=int(median(run["peak_memory_bytes"] for run in theirs)),
                    loss=median(sum(run["losses"]) / len(run["losses"]) for run in theirs),
                    loss_gap=max(
                        abs(a - b)
                        for run, ours in both
                        for a, b in zip(run["losses"], ours["losses"], strict=True)
                    ),
                )
            )
    return result_lines


def dpo_section(result: Mapping[str, Any]) -> str:
    """The words and tables about preference tuning."""
    result_lines, ours = pair_lines(result), result["ours"]
    model, settings = result["model"], result["settings"]
    rounds = max((line.rounds for line in result_lines), default=0)
    about = (
        f"Model: {model['name']} ({model['type']}, {model['parameters'] / 1e6:.1f}M parameters), LoRA "
        f"r={settings['lora_r']} on {', '.join(settings['targets'])}, float32, DPO with beta {settings['beta']}, batch "
        f"{settings['batch_size']}. Data: {result['data']['name']}. Rounds: {rounds}. "
        f"Matrix rate: {matrix_rate(result) / 1e9:.1f} GFLOP/s; {frozen_rate(result) / 1e9:.1f} by the routine that "
        f"Yeonma multiplies frozen weights by."
    )
    works = [
        f"- `{name}`: {work['about']}; {work['pairs']} pairs, {work['prompt_tokens']:.0f} tokens a prompt and "
        f"{work['answer_tokens']:.0f} an answer"
        for name, work in result["workloads"].items()
    ]
    columns = dict.fromkeys(["workload", "contender"], "---")
    numbers = ["pairs/s", "Yeonma is", "reference", "first step", "peak memory", "loss"]
    columns |= dict.fromkeys(numbers, "---:")
    rows = [
        (
            line.workload,
            label_of(line.contender, line.rounds, rounds, result),
            f"{line.pairs_per_second:.3f}",
            "" if line.contender == ours else str(line.ratio),
            f"{line.reference_seconds:.0f} s" if line.reference_seconds else "in the steps",
            f"{line.first_step_share:.0%}",
            gigabytes(line.peak_memory_bytes),
            f"{line.loss:.4f}",
        )
        for line in result_lines
    ]
    after = [
        f"The loss of every step is the same for all contenders to {max(line.loss_gap for line in result_lines):.0e}."
    ]
    after += failures_of(result)
    best_lines = [*pairs_best(result), *memory_shares(result)]
    blocks = [about_machine(result), about, "\n".join(works), table(columns, rows), " ".join(after)]
    return "\n\n".join([*blocks, "\n".join(best_lines)])


def pairs_best(result: Mapping[str, Any]) -> list[str]:
    """A line a workload: ours against the fastest setting of the other library."""
    contenders, written = result["contenders"], []
    for workload in result["workloads"]:
        theirs = [
            line for line in pair_lines(result) if line.workload == workload and not _is_ours(result, line)
        ]
        if theirs:
            line = max(theirs, key=lambda line: line.pairs_per_second)
            label = contenders[line.contender]["label"]
            written.append(f"- {workload}: {line.ratio.median:.2f} times {label}, its fastest here")
    return written


def memory_shares(result: Mapping[str, Any]) -> list[str]:
    """A line a workload: our peak memory as a share of the other library's lowest at the same micro-batch."""
    written = []
    for workload in result["workloads"]:
        here = [line for line in pair_lines(result) if line.workload == workload]
        shares = []
        for size in sorted({contender["micro_batch"] for contender in result["contenders"].values()}):
            same = [line for line in here if result["contenders"][line.contender]["micro_batch"] == size]
            mine = [line.peak_memory_bytes for line in same if _is_ours(result, line)]
            theirs = [line.peak_memory_bytes for line in same if not _is_ours(result, line)]
            if mine and theirs:
                shares.append(f"{mine[0] / min(theirs):.0%} at micro-batch {size}")
        if shares:
            written.append(f"- {workload}, peak memory beside TRL's lowest: {', '.join(shares)}")
    return written


def _is_ours(result: Mapping[str, Any], line: PairLine) -> bool:
    contenders = result["contenders"]
    return bool(contenders[line.contender]["library"] == contenders[result["ours"]]["library"])


def new_tokens_per_second(run: Run) -> float:
    return float(run["new_tokens"] / run["seconds"])


def generate_section(result: Mapping[str, Any]) -> str:
    """The words and table about answering many rows."""
    numbers = ["seconds", "new tokens/s", "Yeonma is", "peak memory", "answers equal to one by one"]
    columns = {"contender": "---", **dict.fromkeys(numbers, "---:")}
    rows = []
    for name in result["contenders"]:
        both = beside_ours(result, name)
        own = [run for run, _ in both]
        rows.append(
            (
                label_of(name, len(both), len(both), result),
                f"{median(run['seconds'] for run in own):.1f}",
                f"{median(map(new_tokens_per_second, own)):.0f}",
                "" if name == result["ours"] else str(Ratio.of(both, lambda run: 1 / run["seconds"])),
                gigabytes(median(run["peak_memory_bytes"] for run in own)),
                f"{result['equal'][name]} of {result['rows']}",
            )
        )
    rounds, any_run = len({run["round"] for run in result["runs"]}), result["runs"][0]
    about = (
        f"Model: {result['model']}, float32, greedy. {result['rows']} prompts of the demo, "
        f"{any_run['prompt_tokens']:,} tokens, "
        f"{result['new_tokens']} new tokens at most. Rounds: {rounds}. Matrix rate: "
        f"{matrix_rate(result) / 1e9:.1f} GFLOP/s."
    )
    return "\n\n".join([about_machine(result), about, table(columns, rows)])


def saving_section(result: Mapping[str, Any]) -> str:
    """The words about what saving costs."""
    settings, saves, steps = result["settings"], result["save_seconds"], result["step_seconds"]
    share = sum(saves) / (sum(saves) + sum(steps))
    durations = ", ".join(f"{seconds:.2f}" for seconds in saves)
    return "\n\n".join(
        [
            about_machine(result),
            f"{result['model']}, LoRA r={settings['lora_r']} on all linear layers, batch {settings['batch_size']}, "
            f"{settings['max_steps']} steps, save_steps {settings['save_steps']}. Data: {result['data']['name']}. "
            f"A checkpoint has {megabytes(result['checkpoint_bytes'])}.",
            f"Saves: {durations} s. Steps: {sum(steps):.0f} s, {median(steps):.2f} each in the middle. "
            f"**Saving took {share:.2%} of the run.**",
        ]
    )


def eval_section(result: Mapping[str, Any]) -> str:
    """CPU time of `yeonma eval` and of the harness's own class, in medians, and the ratios within rounds."""
    rows = [
        "| questions | Yeonma, CPU s | lm_eval, CPU s | rounds | Yeonma is |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for workload in dict.fromkeys(run["workload"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["workload"] == workload]
        own = {run["round"]: run["cpu_seconds"] for run in runs if run["contender"] == "yeonma"}
        theirs = [run for run in runs if run["contender"] != "yeonma"]
        best = max(theirs, key=lambda run: run["round"])["contender"]
        pairs = [(run["cpu_seconds"], own[run["round"]]) for run in theirs if run["contender"] == best]
        ratios = [seconds / ours for seconds, ours in pairs]
        rows.append(
            f"| {workload} ({best}) | {median(own.values()):.1f} | {median(seconds for seconds, _ in pairs):.1f} | "
            f"{len(pairs)} | {median(ratios):.2f}x as fast ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    worst = max(run["differs_by"] for run in result["runs"])
    return "\n\n".join(
        [
            about_machine(result),
            f"{result['model']} with a LoRA adapter, {result['rows']} questions after {result['shots']} examples.",
            "\n".join(rows),
            f"Log-likelihoods differed by {worst:.1e} at most.",
        ]
    )


def gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


def put(page: str, name: str, section: str) -> str:
    """The page with the section between its two comments. Raises ValueError where they are missing."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"the comments {begin} and {end} are missing")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def lease_section(result: Mapping[str, Any] | None, language: str = "en") -> str:
    """What was proved and measured on a GPU; without a result, that nothing was."""
    from lease_tables import lease_section as section  # which imports this module

    return section(result, language)


def cpu_profile_section(result: Mapping[str, Any], language: str = "en") -> str:
    """What a step on the CPU spends its time on."""
    from profile_kinds import cpu_profile_section as section  # which imports this module

    return section(result, language)


SECTIONS = {
    "lease": lease_section,
    "cpu_profile": cpu_profile_section,
    "sft": sft_section,
    "tokenize_rows": tokenize_section,
    "tokenize_forms": tokenize_forms_section,
    "tokenize_rate": tokenize_rate_section,
    "dpo": dpo_section,
    "generate": generate_section,
    "saving": saving_section,
    "eval": eval_section,
}


def page_of(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with a section for each result, by its name in SECTIONS."""
    for name, result in results.items():
        page = put(page, name, SECTIONS[name](result))
    return page


def shown_command(script: str, given: Sequence[str]) -> str:
    """A command line without the folders of the machine that it ran on."""
    return " ".join(
        ["python", f"benchmarks/{script}", *(part.rstrip("/").rpartition("/")[2] for part in given)]
    )

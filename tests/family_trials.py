"""What works with a model type: short real runs on its tiny config, and what they say of it.

`scripts/model_table.py` writes the results of all families into docs/models.md, tests/slow/test_families.py tries them
again. A result is a word, so that it can be compared: `yes`, `no`, or `none` (there is nothing of the kind).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.families import tiny_config, tiny_family
from tests.runs import Done, arguments, articles, command, write_jsonl
from tests.tokenizers import byte_level
from yeonma.batch.batch import Batch
from yeonma.batch.forest import lay_out
from yeonma.config.settings import Quantization
from yeonma.errors import UserError
from yeonma.model.load import LoraShape, find_base
from yeonma.model.memory_trace import trace
from yeonma.model.quantized import check_layers, packed_layers
from yeonma.model.targets import ROUTED, target_layers
from yeonma.policy import blueprint, build_policy
from yeonma.tokenization.example import Example

YES, NO, NONE = "yes", "no", "none"
FOREST, ONE_BY_ONE, REFUSED = "forest", "one by one", "refused"
TOLERANCE = 1e-4
"""Of losses, and of mean log-probabilities."""
ROWS = 4
TEMPLATE = "below is an article.\n\n{document}\n\ntitle:\n{title}"
SETTINGS: dict[str, Any] = {
    "template": TEMPLATE,
    "batch_size": ROWS,
    "micro_batch_size": ROWS,
    "max_steps": 2,
    "learning_rate": 0.1,  # so that two steps show in the answers
    "lora_r": 4,
    "lora_alpha": 8,
    "card_rows": 0,
}
_WHY_NOT = re.compile(r"one sequence at a time, because (.*)")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
"""The names under which vLLM finds an adapter's tensors: the path of a layer between these parts."""


@dataclass(frozen=True)
class FamilyResult:
    """What works with a model type. Fields but the first three are words, see above."""

    model_type: str
    computed: str
    """FOREST, ONE_BY_ONE or REFUSED."""
    why_not: str
    """Why there is no forest, or why a run is refused; empty if there is a forest."""
    lora: str
    """Two steps of `sft` and of `dpo` on all-linear, whose first losses are those of a plain forward pass."""
    experts: str
    """Routed experts have adapters in that run."""
    dora: str
    """DoRA on all layers but routed experts."""
    int8: str
    nf4: str
    fp8: str
    merge: str
    """`yeonma merge` gives a model with the same answers."""
    vllm_keys: str
    """The adapter's tensors are named by layers of the model: all, or all but routed experts'."""
    forecast: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class FamilyTrial:
    """A tiny model of a family on disk, and runs on it. Delete its folder when done."""

    def __init__(self, model_type: str, place: Path) -> None:
        self.model_type, self.place = model_type, place
        self.base = place / "base"
        self.tokenizer = byte_level(None)
        tiny_family(model_type).save_pretrained(self.base)
        self.tokenizer.save_pretrained(self.base)
        self.rows = articles(ROWS)
        pairs = [
            {"document": row["document"], "chosen": row["title"], "rejected": row["title"][::-1] + "."}
            for row in self.rows
        ]
        self.data = write_jsonl(place / "rows.jsonl", self.rows)
        self.pairs = write_jsonl(place / "pairs.jsonl", pairs)

    def sft(self, **settings: object) -> Done:
        return self._command("sft", self.data, settings)

    def dpo(self, **settings: object) -> Done:
        return self._command("dpo", self.pairs, settings)

    def merge(self) -> Done:
        return command(
            self.place, "merge", str(self.place / "sft"), "--output_dir", str(self.place / "merged")
        )

    def _command(self, verb: str, data: Path, settings: dict[str, object]) -> Done:
        output = self.place / verb
        places = {"base_model": self.base, "data_path": data, "output_dir": output}
        return command(output, verb, *arguments({**places, **SETTINGS, **settings}))

    def examples(self) -> list[Example]:
        """The rows as tokens, made by transformers alone: the filled template and the end token."""
        examples = []
        for row in self.rows:
            prompt = TEMPLATE.replace("{title}", "").replace("{document}", row["document"])
            start = len(self.tokenizer(prompt)["input_ids"])
            ids = self.tokenizer(prompt + row["title"])["input_ids"] + [self.tokenizer.eos_token_id]
            trained = np.arange(len(ids)) >= start
            examples.append(Example(np.array(ids, dtype=np.int32), trained, start, 0, 0, 0, False, 0))
        return examples

    def plain_logprobs(self, model: Any = None) -> list[torch.Tensor]:
        """The log-probabilities of each row's trained tokens, by transformers' own forward pass of one row."""
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        results = []
        for example in self.examples():
            row = torch.from_numpy(example.token_ids).long()
            with torch.no_grad():
                logprobs = model(row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            results.append(logprobs.gather(1, row[1:, None])[torch.from_numpy(example.trained[1:]), 0])
        return results

    def policy(self, quantization: Quantization = "none", **shape: Any) -> Any:
        """A model ready to train, as a run builds it."""
        lora = LoraShape(**{"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", **shape})
        return build_policy(
            find_base(str(self.base)),
            lora,
            device=torch.device("cpu"),
            dtype=torch.float32,
            quantization=quantization,
            trainable=True,
        )

    def gradients_of(self, policy: Any) -> torch.Tensor:
        """The log-probabilities of the trained tokens, after a check that all adapter tensors have finite gradients."""
        logprobs: torch.Tensor = policy.logprobs(Batch.of(self.examples()))
        logprobs.mean().backward()
        gradients = [
            weight.grad
            for name, weight in policy.model.named_parameters()
            if weight.requires_grad and "lora_B" in name
        ]
        assert gradients
        assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)
        return logprobs.detach()


def try_family(model_type: str, place: Path, *, everything: bool = True) -> FamilyResult:
    """Tries a family in the folder `place`, which is emptied. Without `everything` only the two runs and the forecast
    are tried, and the other fields are empty.

    Raises AssertionError if a number is not that of a plain forward pass, and whatever a run raises that is no
    UserError.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    trial = FamilyTrial(model_type, place)
    sft = trial.sft()
    if sft.status == 2:
        why_not = sft.err.strip().splitlines()[-1].replace(str(place), "").removeprefix("yeonma: ")
        assert trial.dpo().status == 2
        rest = dict.fromkeys(("lora", "experts", "dora", "int8", "nf4", "fp8", "merge", "vllm_keys"), NO)
        return FamilyResult(model_type, REFUSED, why_not, forecast=_forecast(model_type), **rest)
    assert sft.status == 0, sft.err
    plain = trial.plain_logprobs()
    loss = -float(torch.cat(plain).mean())
    assert abs(sft.losses[0] - loss) < TOLERANCE, (
        f"sft begins at {sft.losses[0]}, a plain forward gives {loss}"
    )
    dpo = trial.dpo()
    assert dpo.status == 0, dpo.err
    step = dpo.steps[0]
    assert abs(step["loss"] - float(np.log(2))) < TOLERANCE
    chosen = float(torch.stack([logprobs.sum() for logprobs in plain]).mean())
    assert abs(step["logprob_chosen"] - chosen) < TOLERANCE * max(map(len, plain))
    why_not = _WHY_NOT.search(sft.out)
    words: dict[str, str] = dict.fromkeys(("dora", "int8", "nf4", "fp8", "merge"), "")
    routed, vllm_keys = _routed_experts(trial, sft)
    if everything:
        words = {
            "dora": _outcome(lambda: _check_dora(trial, plain)),
            **{kind: _outcome(lambda kind=kind: _check_quantised(trial, kind)) for kind in KINDS},  # type: ignore[misc]
            "merge": YES if trial.merge().status == 0 else NO,
        }
    return FamilyResult(
        model_type=model_type,
        computed=ONE_BY_ONE if why_not else FOREST,
        why_not=_wording(why_not[1]) if why_not else "",
        lora=YES,
        experts=routed,
        vllm_keys=vllm_keys,
        forecast=_forecast(model_type),
        **words,
    )


KINDS: tuple[Quantization, ...] = ("int8", "nf4", "fp8")


def _wording(why_not: str) -> str:
    """Without numbers, which depend on the machine."""
    return re.sub(r" by \d[\d.e+-]* in log-probability", "", why_not)


def _outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except UserError:
        return NO
    return YES


def _check_dora(trial: FamilyTrial, plain: list[torch.Tensor]) -> None:
    """A new DoRA adapter changes nothing yet, and has gradients."""
    logprobs = trial.gradients_of(trial.policy(use_dora=True, experts=False))
    assert float((logprobs - torch.cat(plain)).abs().mean()) < TOLERANCE


def _check_quantised(trial: FamilyTrial, kind: Quantization) -> None:
    """The quantised model's log-probabilities, over a forest or not, are those of its plain forward pass."""
    check_layers(tiny_family(trial.model_type), kind, trial.model_type)
    policy = trial.policy(kind)
    model = policy.transformers_model
    assert any(True for _ in packed_layers(model))
    logprobs = trial.gradients_of(policy)
    model.set_attn_implementation(policy.support.plain_attention)
    model.eval()
    difference = float((logprobs - torch.cat(trial.plain_logprobs(model))).abs().mean())
    assert difference < (0.05 if kind == "fp8" else TOLERANCE), f"{kind}: {difference}"


def _routed_experts(trial: FamilyTrial, run: Done) -> tuple[str, str]:
    """Whether the run's adapter reaches all routed experts, and whether vLLM finds its tensors by their names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(trial.model_type))
    layers = target_layers(model)
    experts = [layer.path for layer in layers if layer.part == ROUTED]
    linear = {layer.path for layer in layers if layer.kind == "linear"}
    has = {_layer_of(key) for key in run.weights}
    containers = {layer.path.rpartition(".")[0] for layer in layers if layer.kind == "experts"}
    routed = {
        path
        for path in has
        if any(f"{path}.".startswith(f"{container}.") or path in experts for container in containers)
    }
    rest_is_linear = has - routed <= linear
    keys = NO if not rest_is_linear else "all but experts" if routed else YES
    if not experts:
        return NONE, keys
    adapter_on = re.search(rf"adapter on .*{ROUTED} (\d+)/(\d+)", run.out)
    assert adapter_on is not None, run.out
    return YES if adapter_on[1] == adapter_on[2] else NO, keys


def _layer_of(key: str) -> str:
    match = _KEY.fullmatch(key)
    return match[1] if match else key


def _forecast(model_type: str) -> str:
    """Whether the memory of a micro-batch can be traced without weights."""
    sequences = [np.arange(3, 50, dtype=np.int32), np.arange(3, 40, dtype=np.int32)]
    forest = lay_out(sequences, [np.ones(len(sequence), dtype=bool) for sequence in sequences])
    try:
        model = blueprint(tiny_config(model_type), torch.float32, LoraShape(4, 8, 0.0, "all-linear"))
        traced = trace(model, forest, has_gradients=True)
    except UserError:
        return NO
    assert traced.peak > 0
    return YES

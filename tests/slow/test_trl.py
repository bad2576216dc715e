"""Compares `yeonma dpo` with TRL's trainers: same pairs, token ids, LoRA start and AdamW, no dropout."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from tests.runs import WORDS, Done, arguments, articles, command, model_folder, trained, write_jsonl
from yeonma.batch.plan import epoch_order

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # silences its warning about the next imports
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

pytestmark = pytest.mark.slow

SEED = 42
STEPS = 10
BATCH_SIZE = 4
BETA = 0.3
LEARNING_RATE = 3e-3


def pairs(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)

    def words(minimum: int, maximum: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(minimum, maximum)))

    return [
        {"prompt": f"{number}. {words(3, 10)}. title: ", "chosen": words(1, 5), "rejected": words(2, 6)}
        for number in range(count)
    ]


PAIRS = pairs(STEPS * BATCH_SIZE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter after supervised training, so that none of its matrices is zero."""
    folder = tmp_path_factory.mktemp("sft")
    rows = write_jsonl(folder / "rows.jsonl", articles(20))
    return trained(folder / "out", base, rows, learning_rate=3e-2).folder


# Yeonma


def run_yeonma(output: Path, base: Path, data: Path, **settings: object) -> Done:
    settings = {
        "base_model": base,
        "data_path": data,
        "output_dir": output,
        "batch_size": BATCH_SIZE,
        "micro_batch_size": 2,
        "num_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lora_r": 4,
        "lora_alpha": 8,
        "beta": BETA,
        "seed": SEED,
        "card_rows": 0,
        **settings,
    }
    done = command(output, "dpo", *arguments(settings))
    assert done.status == 0, done.err
    return done


def first_gradients(base: Path, data: Path, output: Path, **settings: object) -> dict[str, torch.Tensor]:
    """Returns the gradients of the first step: with beta1 = 0, AdamW's mean is the gradient."""
    run_yeonma(output, base, data, adam_beta1=0.0, max_grad_norm=0.0, save_steps=1, **settings)
    state = load_file(output / "checkpoint-1" / "optimizer.safetensors")
    return {name.removesuffix("/exp_avg"): mean for name, mean in state.items() if name.endswith("/exp_avg")}


# TRL


class FirstGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        if not self.gradients:
            named = model.named_parameters()
            self.gradients = {
                name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None
            }


def lora_start(base: Path, adapter: Path | None = None) -> Any:
    """The start of `yeonma dpo`: the same seed gives the same random numbers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    torch.manual_seed(SEED)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def in_training_order(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([rows[i] for i in epoch_order(len(rows), SEED, 0, BATCH_SIZE)])


def trl_settings(output: Path, micro_batch: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": BATCH_SIZE // micro_batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "beta": BETA,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }


def dpo_trainer(output: Path, base: Path, adapter: Path | None = None, **options: Any) -> DPOTrainer:
    return DPOTrainer(
        model=lora_start(base, adapter),
        args=DPOConfig(**trl_settings(output, **options)),
        train_dataset=in_training_order(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def logged_steps(trainer: Any) -> list[dict[str, float]]:
    """Returns the metrics of every step."""
    return [record for record in trainer.state.log_history if "loss" in record]


# Comparison


TRL_NAMES = {
    "loss": "loss",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins",
    "logprob_chosen": "logps/chosen",
    "logprob_rejected": "logps/rejected",
}


def check_steps(done: Done, trl_steps: list[dict[str, float]], *, skip: Collection[str] = ()) -> None:
    """Compares all metrics of all steps except those in `skip`. Log-probabilities, about 100, have a relative tolerance
    of 1e-5."""
    assert len(done.steps) == len(trl_steps) == STEPS
    for name, trl_name in TRL_NAMES.items():
        if name not in skip:
            values, trl_values = (
                [step[name] for step in done.steps],
                [step[trl_name] for step in trl_steps],
            )
            # losses are 0.005 (WPO) to 7 (SPPO)
            tolerance = {"rel": 2e-4, "abs": 0.0} if name == "loss" else {"abs": 1e-4}
            tolerance = {"abs": 1e-4, "rel": 1e-5} if "logprob" in name else tolerance
            assert values == pytest.approx(trl_values, **tolerance), name
    for step, trl_step in zip(done.steps, trl_steps, strict=True):
        if step["reward_margin"] != 0:  # at zero the policy is its reference: ties, where TRL has rounding
            assert step["reward_accuracy"] == pytest.approx(trl_step["rewards/accuracies"])


@dataclass(frozen=True)
class SameLoss:
    """The settings of one loss here and in TRL."""

    ours: Mapping[str, Any]
    theirs: Mapping[str, Any]


def same(loss: str, **options: Any) -> SameLoss:
    """A loss with the same name and the same options in both."""
    return SameLoss({"loss": loss, **options}, {"loss_type": [loss], **options})


def divergence(ours: str, theirs: str) -> SameLoss:
    return SameLoss({"f_divergence": ours}, {"loss_type": ["sigmoid"], "f_divergence_type": theirs})


SAME_NAMES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "apo_zero", "apo_down", "nca_pair", "bco_pair"),
    *("sppo_hard", "discopop", "aot", "aot_unpaired"),
)
DPO_LOSSES: Mapping[str, SameLoss] = {
    **{loss: same(loss) for loss in SAME_NAMES},
    "robust": same("robust", label_smoothing=0.1),
    "exo_pair": same("exo_pair", label_smoothing=0.01),
    "aot_smoothed": same("aot", label_smoothing=0.1),
    "sum": SameLoss(
        {"loss": "sigmoid:1,bco_pair:0.5"}, {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.5]}
    ),
    "wpo": SameLoss({"wpo_weights": True}, {"loss_type": ["sigmoid"], "use_weighting": True}),
    "js": divergence("js", "js_divergence"),
    "forward_kl": divergence("forward_kl", "forward_kl"),
    "alpha": SameLoss(
        {"f_divergence": "alpha", "f_alpha": 0.3},
        {
            "loss_type": ["sigmoid"],
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3,
        },
    ),
}


def micro_batch(loss: str) -> int:
    """TRL sorts the pairs of a micro-batch, so that there a micro-batch must be the step."""
    return BATCH_SIZE if loss.startswith("aot") else 2


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_10_dpo_steps_match_trl(tmp_path: Path, base: Path, data: Path, loss: str) -> None:
    done = run_yeonma(tmp_path / "ours", base, data, **DPO_LOSSES[loss].ours)
    trainer = dpo_trainer(tmp_path / "theirs", base, micro_batch=micro_batch(loss), **DPO_LOSSES[loss].theirs)
    trainer.train()
    check_steps(done, logged_steps(trainer))
    assert done.losses[0] != pytest.approx(done.losses[-1], rel=1e-2)  # the loss changed


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_first_dpo_gradient_matches_trl(
    tmp_path: Path, base: Path, data: Path, adapter: Path, loss: str
) -> None:
    """The run continues an adapter, so both of its matrices have gradients; the adapter is also the reference."""
    gradients = first_gradients(base, data, tmp_path / "ours", adapter=adapter, **DPO_LOSSES[loss].ours)
    trainer = dpo_trainer(
        tmp_path / "theirs",
        base,
        adapter,
        micro_batch=micro_batch(loss),
        max_grad_norm=0.0,
        max_steps=1,
        **DPO_LOSSES[loss].theirs,
    )
    callback = FirstGradients()
    trainer.add_callback(callback)
    trainer.train()
    assert gradients.keys() == callback.gradients.keys()
    for name, gradient in gradients.items():
        largest = float(gradient.abs().max())
        assert float((gradient - callback.gradients[name]).abs().max()) < 1e-5 * max(1.0, largest), name
        assert largest > 1e-3, name


# Without a reference


def experimental_trainer(trainer: Any, settings: Any, base: Path) -> Any:
    """One of TRL's experimental trainers, without BOS: they always add the tokenizer's BOS, whatever its own rules."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.bos_token = None
    return trainer(
        model=lora_start(base),
        args=settings,
        train_dataset=in_training_order(PAIRS),
        processing_class=tokenizer,
    )


def test_10_simpo_steps_match_trl(tmp_path: Path, base: Path, data: Path) -> None:
    done = run_yeonma(tmp_path / "ours", base, data, loss="simpo", simpo_gamma=0.7, label_smoothing=0.1)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7, "label_smoothing": 0.1}
    trainer = experimental_trainer(
        CPOTrainer, CPOConfig(**trl_settings(tmp_path / "theirs", **options)), base
    )
    trainer.train()
    check_steps(
        done, logged_steps(trainer), skip=("logprob_chosen", "logprob_rejected")
    )  # TRL's are per token


def test_10_cpo_steps_match_trl(tmp_path: Path, base: Path, data: Path) -> None:
    """TRL averages the supervised term over the tokens of a micro-batch, Yeonma over those of each answer. Both are
    equal if a micro-batch is one pair."""
    done = run_yeonma(tmp_path / "ours", base, data, loss="cpo")
    settings = CPOConfig(**trl_settings(tmp_path / "theirs", micro_batch=1))
    trainer = experimental_trainer(CPOTrainer, settings, base)
    trainer.train()
    check_steps(done, logged_steps(trainer))


def torch_losses(
    base: Path, rows: list[dict[str, Any]], loss: Callable[[Callable[..., Any], list[dict[str, Any]]], Any]
) -> list[float]:
    """Trains with torch and PEFT alone and returns the loss of each step, `loss(answer_logprobs, rows)`.
    `answer_logprobs(prompt, answer)` are the log-probabilities of the answer's tokens and the end token."""
    model, tokenizer = lora_start(base), AutoTokenizer.from_pretrained(base)

    def answer_logprobs(prompt: str, answer: str, *, reference: bool = False) -> torch.Tensor:
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([*prompt_ids, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
        with model.disable_adapter() if reference else nullcontext():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        return logprobs[torch.arange(len(prompt_ids) - 1, len(ids) - 1), ids[len(prompt_ids) :]]

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    order, losses = epoch_order(len(rows), SEED, 0, BATCH_SIZE), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (STEPS - step) / STEPS
        step_loss = loss(
            answer_logprobs, [rows[i] for i in order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
        )
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss.item())
    return losses


def orpo_loss(answer_logprobs: Callable[..., torch.Tensor], rows: list[dict[str, str]]) -> torch.Tensor:
    """Hong et al. 2024, equations 3 to 7, with lambda = BETA."""
    losses = []
    for row in rows:
        chosen, rejected = (
            answer_logprobs(row["prompt"], row[side]).mean() for side in ("chosen", "rejected")
        )
        odds_chosen, odds_rejected = (p.exp() / (1 - p.exp()) for p in (chosen, rejected))
        odds_ratio = -torch.log(torch.sigmoid(torch.log(odds_chosen / odds_rejected)))
        losses.append(-chosen + BETA * odds_ratio)
    return torch.stack(losses).mean()


def test_10_orpo_steps_match_the_paper_formula(tmp_path: Path, base: Path, data: Path) -> None:
    """TRL is no reference here: its supervised term includes the prompt, Yeonma's only the answer."""
    done = run_yeonma(tmp_path / "ours", base, data, loss="orpo")
    assert done.losses == pytest.approx(torch_losses(base, PAIRS, orpo_loss), abs=1e-4)


def test_first_orpo_odds_ratio_and_rewards_match_trl(tmp_path: Path, base: Path, data: Path) -> None:
    """Compares the first step only: after it, different supervised terms give different weights."""
    done = run_yeonma(tmp_path / "ours", base, data, loss="orpo", sft_weight=0.0)
    settings = ORPOConfig(**trl_settings(tmp_path / "theirs", max_steps=1))
    trainer = experimental_trainer(ORPOTrainer, settings, base)
    trainer.train()
    (first,), step = logged_steps(trainer), done.steps[0]
    assert step["loss"] == pytest.approx(-BETA * first["log_odds_ratio"], abs=1e-5)
    for name in ("reward_chosen", "reward_rejected", "reward_margin"):
        assert step[name] == pytest.approx(first[TRL_NAMES[name]], abs=1e-5), name
    assert step["reward_accuracy"] == first["rewards/accuracies"]


# One answer a row, with a label


LABELLED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for number, row in enumerate(PAIRS)
    for side in [("rejected", "chosen", "chosen")[number % 3]]
]
KTO_WEIGHTS = {"desirable": 0.75, "undesirable": 1.5}


def kto_loss(
    answer_logprobs: Callable[..., torch.Tensor],
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
) -> torch.Tensor:
    """Ethayarajh et al. 2024, equations 7 and 8, for a step's rows; the reference point is estimated from their prompts
    with the answers of `others`."""

    def log_ratio(row: dict[str, Any], answer_row: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            reference = answer_logprobs(row["prompt"], answer_row["completion"], reference=True).sum()
        return answer_logprobs(row["prompt"], answer_row["completion"]).sum() - reference

    with torch.no_grad():
        mismatched = torch.stack([log_ratio(row, other) for row, other in zip(rows, others, strict=True)])
    reference_point = mismatched.mean().clamp(min=0)
    losses = []
    for row in rows:
        gain = log_ratio(row, row) - reference_point
        if row["label"]:
            losses.append(KTO_WEIGHTS["desirable"] * (1 - torch.sigmoid(BETA * gain)))
        else:
            losses.append(KTO_WEIGHTS["undesirable"] * (1 - torch.sigmoid(-BETA * gain)))
    return torch.stack(losses).mean()


def test_kto_paper_formula_matches_10_trl_steps(tmp_path: Path, base: Path) -> None:
    """TRL takes the mismatched answer from the previous row of the batch."""
    weights = {f"{name}_weight": weight for name, weight in KTO_WEIGHTS.items()}
    trainer = KTOTrainer(
        model=lora_start(base),
        args=KTOConfig(**trl_settings(tmp_path / "theirs", micro_batch=BATCH_SIZE, **weights)),
        train_dataset=in_training_order(LABELLED),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    trl_steps = logged_steps(trainer)
    assert sum(step["kl"] > 0 for step in trl_steps) > 2
    losses = torch_losses(
        base, LABELLED, lambda logprobs, rows: kto_loss(logprobs, rows, [rows[-1], *rows[:-1]])
    )
    assert losses == pytest.approx([step["loss"] for step in trl_steps], abs=1e-4)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_10_labelled_steps_match_trl(tmp_path: Path, base: Path, loss: str) -> None:
    """Both take KTO's mismatched answer from the row before in the step. In TRL a micro-batch must be the step."""
    data = write_jsonl(tmp_path / "rows.jsonl", LABELLED)
    ours = {f"kto_{name}_weight": weight for name, weight in KTO_WEIGHTS.items()}
    theirs = {f"{name}_weight": weight for name, weight in KTO_WEIGHTS.items()}
    done = run_yeonma(tmp_path / "ours", base, data, loss=loss, **ours)
    trainer = KTOTrainer(
        model=lora_start(base),
        args=KTOConfig(**trl_settings(tmp_path / "theirs", micro_batch=BATCH_SIZE, loss_type=loss, **theirs)),
        train_dataset=in_training_order(LABELLED),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    steps = logged_steps(trainer)
    assert done.losses == pytest.approx([step["loss"] for step in steps], abs=1e-4)
    points = [step["reference_point"] for step in done.steps]
    assert points == pytest.approx([step["kl"] for step in steps], abs=1e-4)
    assert (max(points) > 0.01) == (loss == "kto")


def test_10_bco_steps_match_the_paper_formula(tmp_path: Path, base: Path) -> None:
    """TRL 1.16 has no trainer for it. The shift is the mean of all rewards of the steps before."""
    rewards: list[float] = []

    def bco_loss(answer_logprobs: Callable[..., torch.Tensor], rows: list[dict[str, Any]]) -> torch.Tensor:
        shift, losses = sum(rewards) / max(1, len(rewards)), []
        for row in rows:
            with torch.no_grad():
                reference = answer_logprobs(row["prompt"], row["completion"], reference=True).sum()
            reward = BETA * (answer_logprobs(row["prompt"], row["completion"]).sum() - reference)
            rewards.append(reward.item())
            logit = reward - shift if row["label"] else shift - reward
            losses.append(-torch.nn.functional.logsigmoid(logit))
        return torch.stack(losses).mean()

    data = write_jsonl(tmp_path / "rows.jsonl", LABELLED)
    done = run_yeonma(tmp_path / "ours", base, data, loss="bco")
    losses = torch_losses(base, LABELLED, bco_loss)
    assert done.losses == pytest.approx(losses, abs=1e-4)
    points = [BETA * step["reference_point"] for step in done.steps]
    assert points[0] == 0
    assert points[-1] != 0
    assert points[-1] == pytest.approx(sum(rewards[:-BATCH_SIZE]) / (len(rewards) - BATCH_SIZE), abs=1e-4)


# Supervised


@pytest.mark.parametrize("token_loss", ["nll", "dft"])
def test_10_supervised_steps_match_trl(tmp_path: Path, base: Path, token_loss: str) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {
        **{"base_model": base, "data_path": data, "output_dir": tmp_path / "ours", "seed": SEED},
        **{"batch_size": BATCH_SIZE, "micro_batch_size": 2, "num_epochs": 1, "card_rows": 0},
        **{"learning_rate": LEARNING_RATE, "lora_r": 4, "lora_alpha": 8, "token_loss": token_loss},
    }
    done = command(tmp_path / "ours", "sft", *arguments(settings))
    assert done.status == 0, done.err
    options = trl_settings(tmp_path / "theirs", loss_type=token_loss)
    del options["beta"]
    trainer = SFTTrainer(
        model=lora_start(base),
        args=SFTConfig(**options),
        train_dataset=in_training_order(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    # DFT's losses are about 0.04
    assert done.losses == pytest.approx([step["loss"] for step in logged_steps(trainer)], rel=1e-4)
    gradients = [step["grad_norm"] for step in done.steps]
    assert gradients == pytest.approx([step["grad_norm"] for step in logged_steps(trainer)], rel=1e-3)

"""Pairs in a forest: one prompt for two answers, and the log-probabilities and gradients of separate sequences."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models import FOREST_FAMILIES, OTHER_FAMILIES, VOCABULARY, tiny_model
from yeonma.batch.forest import lay_out
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.logprobs import ForestSupport, example_logprobs
from yeonma.train.losses import answer_logprobs
from yeonma.train.pair_losses import PairLogprobs, PreferenceOptions, ReferenceLogprobs
from yeonma.train.preference_losses import LOSSES, pair_losses

EXACT = {"rtol": 2e-5, "atol": 1e-5}  # an answer's log-probability is a sum, far below -1
OPTIONS = PreferenceOptions(beta=0.5)
UNITS = [0, 0, 1, 1, 2, 2, 3, 3]


def pairs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The sequences of four pairs, chosen and rejected in turn, and their trained masks.

    The prompts are a long one, a short one, the long one again, and its first nine tokens. The answers of a pair begin
    with the same two tokens.
    """
    rng = np.random.default_rng(7)
    long, short = rng.integers(3, VOCABULARY, 20), rng.integers(3, VOCABULARY, 5)
    prompts = [long, short, long, long[:9]]
    sequences, trained = [], []
    for prompt in prompts:
        shared_start = rng.integers(3, VOCABULARY, 2)
        for length in rng.integers(1, 9, 2):
            answer = np.concatenate([shared_start, rng.integers(3, VOCABULARY, length)])
            sequences.append(np.concatenate([prompt, answer]).astype(np.int32))
            trained.append(np.arange(len(sequences[-1])) >= len(prompt))
    return sequences, trained


def loss_of(logprob_N: torch.Tensor) -> torch.Tensor:
    counts = [int(mask.sum()) for mask in pairs()[1]]
    logprob_E = answer_logprobs(logprob_N, counts)
    policy = PairLogprobs(
        logprob_E[0::2], logprob_E[1::2], *(torch.tensor(counts[i::2], dtype=torch.float32) for i in (0, 1))
    )
    reference = ReferenceLogprobs(policy.chosen_P.detach() + 1.0, policy.rejected_P.detach() - 0.5)
    return pair_losses(LOSSES["sigmoid"], policy, reference, OPTIONS).sum()


def model_with_adapter(family: str) -> Any:
    """A PeftModel with a nonzero adapter."""
    model = tiny_model(family)
    torch.manual_seed(1)
    targets = ["q_proj", "o_proj"] if family == "phimoe" else "all-linear"  # PEFT cannot adapt its router
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_alpha=4)
    return get_peft_model(model, config)


def gradients_of(model: Any, logprob_N: torch.Tensor) -> list[torch.Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss_of(logprob_N), trained, allow_unused=True, materialize_grads=True))


@lru_cache
def expected(family: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs every answer with its own copy of the prompt, one by one, through the unpatched model."""
    model = model_with_adapter(family)
    logprobs_by_sequence = []
    for ids, mask in zip(*pairs(), strict=True):
        tokens = torch.from_numpy(ids).long()
        batch = {"input_ids": tokens.unsqueeze(0), "attention_mask": torch.ones_like(tokens).unsqueeze(0)}
        logprobs = torch.log_softmax(model(**batch, use_cache=False).logits[0, :-1].float(), -1)
        logprobs_by_sequence.append(logprobs.gather(1, tokens[1:, None])[mask[1:], 0])
    logprob_N = torch.cat(logprobs_by_sequence)
    gradients = gradients_of(model, logprob_N)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0.1
    return logprob_N.detach(), gradients


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", [*FOREST_FAMILIES, *OTHER_FAMILIES])
def test_pairs_have_the_logprobs_and_gradients_of_separate_sequences(family: str, share_prefix: bool) -> None:
    model = model_with_adapter(family)
    support: ForestSupport = check_forest_support(model.get_base_model())
    assert support.forest == (family in FOREST_FAMILIES)
    if family != "qwen3_next":  # its recurrence amplifies the kernels' rounding; the tests of LoRA cover it
        patch_kernels(model)
    sequences, trained = pairs()
    logprob_N = example_logprobs(
        model.get_base_model(), support, sequences, trained, share_prefix=share_prefix, units=UNITS
    )
    values, gradients = expected(family)
    torch.testing.assert_close(logprob_N.detach(), values, **EXACT)
    for ours, theirs in zip(gradients_of(model, logprob_N), gradients, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        atol = 1e-5 if support.forest else 2e-5  # the recurrent ones round more
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-5, atol=atol)


def test_a_pair_is_three_segments_however_short_its_prompt() -> None:
    prompt, chosen, rejected = np.array([5, 6, 7]), np.array([8, 9]), np.array([10])
    sequences = [np.concatenate([prompt, answer]).astype(np.int32) for answer in (chosen, rejected)]
    trained = [np.arange(len(sequence)) >= 3 for sequence in sequences]
    forest = lay_out(sequences, trained, units=[4, 4])
    assert [(segment.length, segment.parent) for segment in forest.segments] == [(3, None), (2, 0), (1, 0)]
    assert forest.source_U[forest.pair_N[[0, 2]]].tolist() == [2, 2]  # the prompt's last token predicts both
    assert len(lay_out(sequences, trained, units=[4, 5]).segments) == 2
    assert len(lay_out(sequences, trained, units=[4, 4], share_prefix=False).segments) == 2


def test_forest_of_pairs_stores_shared_prompts_and_answer_starts_once() -> None:
    sequences, trained = pairs()
    forest = lay_out(sequences, trained, units=UNITS)
    # Two pairs share the long prompt. The last pair's prompt, its first nine tokens, is too short to be shared.
    # The two tokens that both answers of a pair begin with are stored once.
    answers = sum(
        len(sequence) - int((~mask).sum()) for sequence, mask in zip(sequences, trained, strict=True)
    )
    assert len(forest.token_ids_T) == 20 + 5 + 9 + answers - 4 * 2
    assert forest.trained_tokens == answers

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from tests.models import FOREST_FAMILIES, tiny_model
from tests.quantised import INT8, KINDS, loaded
from tests.runs import SETTINGS, articles, model_folder, write_jsonl
from yeonma.batch import micro_batches as batches_module
from yeonma.batch.batch import Batch
from yeonma.batch.forest import Forest, lay_out
from yeonma.batch.micro_batches import survey_micro_batches
from yeonma.batch.plan import MicroBatchBounds
from yeonma.config.parse import config_from_keywords
from yeonma.config.settings import TRAINING, Quantization, RunConfig
from yeonma.errors import UserError
from yeonma.inspect import probe as probing
from yeonma.inspect.estimate import estimate
from yeonma.inspect.forecast import (
    Forecast,
    forecast_dict,
    forecast_lines,
    forecast_of,
    timed_by_probe,
    timed_by_rate,
)
from yeonma.inspect.probe import Rate, device_rate, known_rate, measure_rate, probe_run
from yeonma.model import load
from yeonma.model.attention.dispatch import FOREST
from yeonma.model.kernels.last_layer import trim_last_layer
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.logprobs import HEAD_CHUNK_BYTES, ForestSupport, plain_head
from yeonma.model.memory_trace import Blueprint, trace
from yeonma.model.quantized import packed_layers
from yeonma.policy import blueprint
from yeonma.train.distributed import Processes
from yeonma.train.losses import SFT
from yeonma.train.oom_retry import MicroBatchLimit
from yeonma.train.prepare import Prepared, prepare
from yeonma.train.step import TrainState, _passes

SHAPE = load.LoraShape(4, 8, 0.0, "all-linear")


def meta_blueprint(family: str = "llama", shape: load.LoraShape = SHAPE, **changed: Any) -> Blueprint:
    return blueprint(tiny_model(family).config, changed.pop("dtype", torch.float32), shape, **changed)


def real_blueprint(family: str, shape: load.LoraShape = SHAPE, **changed: Any) -> Blueprint:
    """The same blueprint with real weights, so that real operations are traced."""
    on_meta, base = meta_blueprint(family, shape), tiny_model(family)
    load.add_lora(base, shape, seed=0)
    base.set_attn_implementation(FOREST)
    if changed.get("gradient_checkpointing"):
        load.checkpoint_activations(base)
    patch_kernels(base)
    trim_last_layer(base)
    return replace(on_meta, model=base.train(), head=plain_head(base))


def make_forest(*lengths: int, shared: int = 20) -> Forest:
    random = np.random.default_rng(0)
    ids = [random.integers(3, 97, length).astype(np.int32) for length in lengths]
    for sequence in ids[1:]:
        sequence[:shared] = ids[0][:shared]
    return lay_out(ids, [np.arange(len(sequence)) >= len(sequence) // 2 for sequence in ids])


@pytest.mark.parametrize("family", FOREST_FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "one layer"])
def test_blueprint_counts_and_weight_bytes_equal_the_real_model(family: str, targets: str) -> None:
    names = {"gpt2": "c_attn", "phi3": "qkv_proj"}
    shape = SHAPE if targets == "all-linear" else replace(SHAPE, target_modules=[names.get(family, "q_proj")])
    base = tiny_model(family)
    weights = {*base.parameters(), *base.buffers()}
    frozen = sum(parameter.numel() for parameter in base.parameters())
    weight_bytes = sum(weight.nbytes for weight in weights)
    peft_model = load.add_lora(base, shape, seed=0)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    model = meta_blueprint(family, shape)
    assert (model.trained, model.frozen) == (sum(parameter.numel() for parameter in trained), frozen)
    assert (model.trained_bytes, model.weight_bytes) == (
        sum(parameter.nbytes for parameter in trained),
        weight_bytes,
    )
    assert 0 < model.dense < frozen


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "exaone4", "mistral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_meta_trace_matches_the_memory_of_real_tensors(family: str, has_gradients: bool) -> None:
    forest = make_forest(60, 50, 44)
    expected = trace(real_blueprint(family), forest, has_gradients=has_gradients)
    on_meta = trace(meta_blueprint(family), forest, has_gradients=has_gradients)
    assert on_meta.activations > 20_000
    assert on_meta.peak == pytest.approx(expected.peak, rel=0.01)
    for part in ("activations", "logits", "gradients"):
        assert getattr(on_meta, part) == pytest.approx(getattr(expected, part), rel=0.01), part


def test_meta_trace_with_checkpointing_matches_the_real_one() -> None:
    forest = make_forest(90, 80)
    on_meta = trace(meta_blueprint(gradient_checkpointing=True), forest, has_gradients=True)
    expected = trace(real_blueprint("llama", gradient_checkpointing=True), forest, has_gradients=True)
    assert on_meta.peak == pytest.approx(expected.peak, rel=0.02)
    without_checkpointing = trace(meta_blueprint(), forest, has_gradients=True)
    assert on_meta.activations < 0.5 * without_checkpointing.activations
    assert without_checkpointing.flops < on_meta.flops < 1.5 * without_checkpointing.flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trace_of_single_call_attention_is_close_to_segment_by_segment(checkpointing: bool) -> None:
    forest = make_forest(90, 80, 70, shared=40)
    by_segment = meta_blueprint(dtype=torch.bfloat16, gradient_checkpointing=checkpointing)
    single_call = replace(by_segment, capability=(9, 0))
    expected, in_single_call = (
        trace(model, forest, has_gradients=True) for model in (by_segment, single_call)
    )
    assert in_single_call.flops == pytest.approx(expected.flops, rel=0.01)
    assert in_single_call.peak == pytest.approx(expected.peak, rel=0.25)
    assert in_single_call.peak != expected.peak  # it makes no masks, but gathers keys
    softcapped = meta_blueprint("gemma2", dtype=torch.bfloat16)
    plain = [
        trace(replace(softcapped, capability=capability), forest, has_gradients=False)
        for capability in (None, (9, 0))
    ]
    assert plain[0].flops == plain[1].flops
    assert plain[0].peak == pytest.approx(plain[1].peak, rel=0.02)  # only the indices of the layout differ


def test_traced_memory_grows_with_tokens_and_gradients() -> None:
    model = meta_blueprint()
    small, large = (trace(model, make_forest(length, length), has_gradients=False) for length in (40, 80))
    assert 1.5 * small.activations < large.activations < 2.6 * small.activations
    with_gradients = trace(model, make_forest(80, 80), has_gradients=True)
    assert with_gradients.gradients == model.trained_bytes
    assert large.peak < with_gradients.peak <= large.peak + model.trained_bytes
    assert trace(model, make_forest(80, 80), has_gradients=True) == with_gradients  # a trace leaves no state
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_shared_prefix_reduces_traced_memory() -> None:
    model = meta_blueprint()
    shared, separate = (
        trace(model, make_forest(80, 80, shared=length), has_gradients=False) for length in (60, 0)
    )
    assert (shared.tokens, separate.tokens) == (100, 160)
    assert shared.activations < 0.8 * separate.activations


def test_logits_are_chunked_unless_lora_is_on_the_head() -> None:
    config = tiny_model("llama").config
    config.vocab_size = 200_000  # a chunk of 41 rows
    forest = make_forest(150)
    plain = trace(blueprint(config, torch.float32, SHAPE), forest, has_gradients=False)
    assert plain.logits == HEAD_CHUNK_BYTES // (4 * 200_000) * 4 * 200_000
    on_head = replace(SHAPE, target_modules=["q_proj", "lm_head"])
    model = blueprint(config, torch.float32, on_head)
    assert model.head is None
    traced = trace(model, forest, has_gradients=False)
    assert traced.logits + traced.activations > 2 * len(forest.source_U) * 4 * 200_000


def test_traced_flops_match_the_count_of_matrix_products() -> None:
    shape = replace(SHAPE, r=1, target_modules=["q_proj"])
    model, forest = meta_blueprint("llama", shape), make_forest(100)
    traced = trace(model, forest, has_gradients=False)
    products = 4 * model.dense * 100 + 4 * 97 * 32 * len(forest.source_U)
    attention = 2 * 7 * 4 * 8 * 100 * 50 * 2  # products, heads, head size, pairs, layers
    # not exact: the first layer's keys and values pass no gradient down, and the adapter adds a little
    assert 0.85 * (products + attention) < traced.flops < 1.15 * (products + attention)


def test_bfloat16_shrinks_weights_and_activations_but_not_lora() -> None:
    full, half = meta_blueprint(), meta_blueprint(dtype=torch.bfloat16)
    assert half.weight_bytes < 0.6 * full.weight_bytes
    assert half.trained_bytes == full.trained_bytes  # LoRA stays in float32
    forest = make_forest(90, 80)
    ratio = (
        trace(half, forest, has_gradients=False).activations
        / trace(full, forest, has_gradients=False).activations
    )
    assert 0.45 < ratio < 0.8


def test_blueprint_leaves_the_rng_unchanged_and_reports_unknown_targets() -> None:
    before = torch.get_rng_state()
    meta_blueprint()
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="no layer of the model is called"):
        meta_blueprint(shape=replace(SHAPE, target_modules=["queries"]))


# Complete forecasts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(21))


def prepared_run(base: Path, data: Path, **changed: object) -> tuple[Any, load.BaseSource, Prepared]:
    keywords = {"base_model": base, "data_path": data, "output_dir": "nowhere", **SETTINGS, **changed}
    config = config_from_keywords(RunConfig, keywords, groups=TRAINING).config
    source = load.find_base(config.model.base_model)
    return config, source, prepare(config, source, None, lambda _: None)


def forecast(base: Path, data: Path, changed: dict[str, object], **options: Any) -> Forecast:
    options = {"with_alternatives": False, **options}
    return estimate(*prepared_run(base, data, **changed), **options)


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("most_tokens", [None, 90])
def test_surveyed_micro_batches_equal_those_of_training_steps(
    base: Path, data: Path, processes: int, most_tokens: int | None
) -> None:
    _, _, prepared = prepared_run(base, data)
    store, micro = prepared.dataset.train.store, MicroBatchBounds(2, most_tokens, True)
    expected = []
    for step, positions in enumerate(prepared.plan.steps()):
        for rank in range(processes):
            group = Processes(rank, processes)
            unused: Any = None
            support, limit = (
                ForestSupport(True, None, "sdpa", ""),
                MicroBatchLimit(micro, torch.device("cpu")),
            )
            state = TrainState(unused, support, {}, unused, unused, False, 1.0, limit, SFT, group)
            step_batch = Batch.from_store(store, positions)
            batches = [micro_pass.batch.index_E for micro_pass in _passes(state, step_batch)]
            expected += [(step, units.tolist(), len(batches) > 1) for units in batches]
    surveyed = list(batches_module._micro_batches_of(prepared.plan, store, micro, processes))
    assert [(step, members.tolist(), several) for step, members, several in surveyed] == expected
    heaviest = survey_micro_batches(prepared.plan, store, micro, processes)
    forests = [batches_module.forest_of(store, np.array(members), True) for _, members, _ in expected]
    assert len(heaviest.heaviest.token_ids_T) == max(len(forest.token_ids_T) for forest in forests)
    assert heaviest.several == any(several for *_, several in expected)
    assert heaviest.forest_tokens <= 1
    if processes == 1 and most_tokens is None:
        assert heaviest.forest_tokens < 0.95  # the template's first text is shared


def test_memory_parts_sum_to_the_total_and_survive_json(base: Path, data: Path) -> None:
    untimed = forecast(base, data, {}, with_alternatives=True)
    timed = timed_by_rate(untimed, 1e11, price=2.0)
    as_dict = json.loads(json.dumps(forecast_dict(timed)))
    memory = as_dict["memory"]
    parts = [value for name, value in memory.items() if name not in ("loading", "training", "peak")]
    assert sum(parts) == memory["training"]
    assert memory["peak"] == max(memory["training"], memory["loading"])
    assert memory["process"] > 100e6
    assert memory["optimizer"] == 2 * memory["lora"] == 2 * 4 * timed.parameters_trained
    assert (
        memory["weights"] == 4 * timed.parameters_frozen + 32
    )  # 32: the rotary frequencies, twice 4 numbers
    lines = dict(forecast_lines(timed))
    assert lines["parameters"] == f"{timed.parameters_trained:,} trained, {timed.parameters_frozen:,} frozen"
    assert "peak memory" in lines and "price" in lines and "roughly" in lines["time"]
    assert forecast_of(as_dict) == untimed


def test_forecast_tokens_equal_those_of_the_planned_steps(base: Path, data: Path) -> None:
    for changed in ({"num_epochs": 2}, {"num_epochs": 1.5}, {"max_steps": 2, "num_epochs": None}):
        _, _, prepared = prepared_run(base, data, **{k: v for k, v in changed.items() if v is not None})
        lengths = prepared.dataset.train.store.lengths
        expected = sum(int(lengths[positions].sum()) for positions in prepared.plan.steps())
        result = forecast(base, data, {k: v for k, v in changed.items() if v is not None})
        assert (result.tokens, result.time, result.price) == (expected, None, None)


def test_smaller_micro_batch_and_checkpointing_reduce_forecast_memory(base: Path, data: Path) -> None:
    large, small = (forecast(base, data, {"micro_batch_size": size}) for size in (4, 1))
    assert small.memory.activations < large.memory.activations
    assert (small.heaviest_units, large.heaviest_units) == (1, 4)
    result = forecast(base, data, {"micro_batch_size": 4}, with_alternatives=True)
    names = [other.name for other in result.alternatives]
    assert names == [
        "gradient_checkpointing true", "micro_batch_size 2", "micro_batch_size 1", "dtype bfloat16",
        "quantization int8", "quantization nf4",
    ]  # fmt: skip
    peaks = {other.name: other.peak_bytes for other in result.alternatives}
    assert peaks["gradient_checkpointing true"] < result.memory.peak
    same = {other.name for other in result.alternatives if other.same_result}
    assert same == {"gradient_checkpointing true", "micro_batch_size 2", "micro_batch_size 1"}


def test_loading_into_another_dtype_counts_both_copies(base: Path, data: Path) -> None:
    same, other = forecast(base, data, {}), forecast(base, data, {"dtype": "bfloat16"})
    assert same.memory.loading == same.memory.process + same.memory.weights
    extra = other.memory.loading - other.memory.process - other.memory.weights
    assert extra == 4 * other.parameters_frozen


def test_time_and_price_follow_from_the_rate(base: Path, data: Path) -> None:
    slow, fast = (timed_by_rate(forecast(base, data, {}), rate, price=3.0) for rate in (1e10, 2e10))
    assert slow.time is not None and fast.time is not None and slow.price is not None
    assert slow.time.seconds == pytest.approx(2 * fast.time.seconds)
    assert slow.time.seconds_low < slow.time.seconds < slow.time.seconds_high
    assert slow.price.of_the_run == pytest.approx(3.0 * slow.time.seconds / 3600)
    epochs_bought = slow.price.epochs_per_hour * slow.time.seconds / 3600
    assert epochs_bought == pytest.approx(slow.epochs)


def test_measured_flop_rate_is_plausible() -> None:
    assert measure_rate(torch.device("cpu"), torch.float32, seconds=0.1).flops_per_second > 1e8


def test_a_probe_takes_real_steps_and_writes_nothing(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings, source, prepared = prepared_run(base, data)
    probe = probe_run(settings, source, prepared, lambda _: None)
    assert probe.steps == 3 and probe.tokens_per_second > 0 and probe.peak_memory_bytes > 100e6
    assert list(tmp_path.iterdir()) == []
    untimed = estimate(settings, source, prepared, with_alternatives=False)
    timed = timed_by_probe(untimed, probe.tokens_per_second)
    assert timed.time is not None and timed.time.measured_by == "probe"
    assert timed.time.seconds == pytest.approx(timed.tokens / probe.tokens_per_second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_quantised_blueprint_weight_bytes_equal_the_real_model(
    tmp_path: Path, family: str, kind: Quantization
) -> None:
    if kind == "fp8" and family == "gpt2":
        pytest.skip("its layers are no nn.Linear")
    model = loaded(model_folder(tmp_path / family, family), kind)
    tensors = {*model.parameters(), *model.buffers()}
    for name, weight in packed_layers(model):
        packed_weight = model.get_submodule(name).weight
        if kind == "int8":
            tensors.add(packed_weight.SCB)
        elif kind == "nf4":
            state = packed_weight.quant_state
            tensors |= {state.absmax, state.state2.absmax, state.state2.code, state.code, state.offset}
        else:
            tensors.add(weight.scale)
    meta = meta_blueprint(family, quantization=kind)
    assert meta.weight_bytes == sum(tensor.nbytes for tensor in tensors)
    assert meta.frozen == meta_blueprint(family).frozen and meta.trained == meta_blueprint(family).trained
    assert meta.dense == meta_blueprint(family).dense


@pytest.mark.parametrize("kind", [INT8, "fp8"])
def test_meta_trace_of_a_quantised_model_matches_the_real_one(tmp_path: Path, kind: Quantization) -> None:
    folder, forest = model_folder(tmp_path / "llama"), make_forest(60, 50)
    base = loaded(folder, kind)
    load.add_lora(base, SHAPE, seed=0)
    base.set_attn_implementation(FOREST)
    patch_kernels(base)
    trim_last_layer(base)
    on_meta = meta_blueprint(quantization=kind)
    with_real_weights = replace(on_meta, model=base.train(), head=plain_head(base))
    meta_trace, real_trace = (
        trace(model, forest, has_gradients=True) for model in (on_meta, with_real_weights)
    )
    for part in ("activations", "logits", "gradients", "workspace"):
        assert getattr(meta_trace, part) == pytest.approx(getattr(real_trace, part), rel=0.03), part


def test_quantised_weights_are_smaller_and_offered_as_an_alternative(base: Path, data: Path) -> None:
    plain, int8, nf4 = (
        forecast(base, data, {"quantization": kind}, with_alternatives=True)
        for kind in ("none", "int8", "nf4")
    )
    assert max(nf4.memory.weights, int8.memory.weights) < 0.6 * plain.memory.weights
    assert plain.parameters_frozen == int8.parameters_frozen == nf4.parameters_frozen
    names = [other.name for other in nf4.alternatives]
    assert not any(name.startswith("quantization") for name in names)
    alternative = next(other for other in plain.alternatives if other.name == "quantization int8")
    assert alternative.peak_bytes == pytest.approx(
        int8.memory.peak, rel=0.05
    )  # the process has grown in between


def test_7b_model_in_nf4_is_forecast_under_9_gb_without_its_weights() -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    shape = replace(SHAPE, r=16)
    model = blueprint(config, torch.bfloat16, shape, quantization="nf4", gradient_checkpointing=True)
    assert 3.5e9 < model.weight_bytes < 4.0e9
    traced = trace(model, make_forest(2048), has_gradients=True)
    assert model.weight_bytes + 4 * model.trained_bytes + traced.peak < 9e9


def test_a_rate_is_kept_for_a_day_and_measured_anew_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def measure(*_: object) -> Rate:
        measured.append(len(measured) + 1.0)
        return Rate(measured[-1])

    monkeypatch.setattr(probing, "measure_rate", measure)
    cpu, later = torch.device("cpu"), probing.time.time() + 90_000
    assert known_rate(tmp_path, cpu, torch.float32) is None
    assert [device_rate(tmp_path, cpu, torch.float32).flops_per_second for _ in range(2)] == [1.0, 1.0]
    assert known_rate(tmp_path, cpu, torch.bfloat16) is None
    assert device_rate(tmp_path, cpu, torch.bfloat16).flops_per_second == 2.0
    monkeypatch.setattr(probing.time, "time", lambda: later)
    assert known_rate(tmp_path, cpu, torch.float32) == Rate(1.0)
    assert device_rate(tmp_path, cpu, torch.float32) == Rate(3.0) == known_rate(tmp_path, cpu, torch.float32)
    for path in tmp_path.glob("*.rate"):
        path.write_text("{}")
    assert known_rate(tmp_path, cpu, torch.float32) is None
    assert device_rate(tmp_path / "nowhere", cpu, torch.float32) == Rate(4.0)

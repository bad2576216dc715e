"""Whether a run fits: the verdict agrees with the numbers, and the settings that it names make the run fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.models import VOCABULARY
from tests.runs import SETTINGS, Done, arguments, articles, command, model_folder, write_jsonl
from yeonma.config.gpus import GPUS, UnknownGpu, gpu_named
from yeonma.config.parse import config_from_keywords
from yeonma.config.settings import TRAINING, RunConfig
from yeonma.inspect import fit_verdict
from yeonma.inspect.estimate import combinations, estimate
from yeonma.inspect.fit_verdict import (
    SAVED,
    USABLE,
    memory_for_run,
    outcome_of,
    savings,
    verdict_lines,
    verdict_of,
)
from yeonma.inspect.forecast import DATA_SHEET_PARTS, Alternative, Forecast, timed_by_data_sheet
from yeonma.model import load
from yeonma.train.memory_parts import Memory
from yeonma.train.prepare import Prepared, prepare
from yeonma.train.target_device import TargetDevice, target_device

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}
"""Large enough that weights and activations count beside the rest."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of larger layers, whose weights are a hole in a file: a forecast does not read them."""
    folder = model_folder(tmp_path_factory.mktemp("models") / "llama")
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaConfig(**SHAPE, **ids, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    size = 4 * 60_000_000
    header = json.dumps({"weights": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{**row, "document": row["document"] * 8} for row in articles(24)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def run_of(base: Path, data: Path, **settings: object) -> tuple[RunConfig, load.BaseSource]:
    lora = ("lora_r", "lora_alpha") if settings.get("train") in ("full", "lora") else ()
    usual = {name: value for name, value in SETTINGS.items() if name not in lora}
    keywords = {"base_model": base, "data_path": data, "output_dir": "nowhere", **usual, **settings}
    config = config_from_keywords(RunConfig, keywords, groups=TRAINING).config
    return config, load.find_base(config.model.base_model)


def prepared_run(config: RunConfig, source: load.BaseSource, target: TargetDevice) -> Prepared:
    return prepare(config, source, None, lambda _: None, target=target, try_adapter=False)


def forecast_of_run(base: Path, data: Path, target: TargetDevice, **settings: object) -> Forecast:
    config, source = run_of(base, data, **settings)
    prepared, processes = prepared_run(config, source, target), config.run.nproc
    forecast = estimate(config, source, prepared, target=target, processes=processes)
    together = combinations(config, source, prepared, target, processes, forecast.memory.process)
    return replace(forecast, combinations=together)


def applied(base: Path, data: Path, target: TargetDevice, cure: Alternative, **settings: object) -> int:
    """The peak memory of the run to which the settings of a cure are given."""
    changed = dict(setting.split(" ") for setting in cure.name.split(", "))
    config, source = run_of(base, data, **{**settings, **changed})
    prepared = prepared_run(config, source, target)
    done = estimate(
        config, source, prepared, target=target, processes=config.run.nproc, with_alternatives=False
    )
    return done.memory.peak


def test_gpus_are_found_by_name_and_by_size() -> None:
    assert gpu_named("NVIDIA GeForce RTX 4090") is gpu_named("rtx4090") is gpu_named("RTX-4090")
    assert gpu_named("A100 80GB").name == "a100-80" and gpu_named("a100-40").memory_bytes < 44e9
    assert gpu_named("24GB").memory_bytes == 24e9 and gpu_named("24 GiB").memory_bytes == 24 * 2**30
    assert gpu_named("24g").flops_per_second is None
    for text in ("a100", "4090", "", "0GB", "rtx", "24", "24 TB", "-1GB"):
        with pytest.raises(UnknownGpu):
            gpu_named(text)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    assert all(gpu.source and gpu.flops_per_second and gpu.bytes_per_second for gpu in GPUS)
    assert [gpu for gpu in GPUS if not 14e9 < gpu.memory_bytes < 152e9] == []


def test_the_outcome_follows_from_peak_and_memory() -> None:
    for kind, share in USABLE.items():
        assert outcome_of(int(share * 1000), 1000, kind) == "fits"
        assert outcome_of(int(share * 1000) + 1, 1000, kind) == "may not fit"
        assert outcome_of(1001, 1000, kind) == "does not fit"
        assert outcome_of(1, None, kind) == "unknown"


SHARES = (0.97, 0.8, 0.6, 0.45, 0.3)
"""The memory of a GPU, as parts of what the run needs there."""


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 4},
        {"micro_batch_size": 1, "gradient_checkpointing": True},
        pytest.param({"micro_batch_size": 2, "nproc": 2}, marks=pytest.mark.slow),
        pytest.param({"train": "full", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_the_verdict_names_makes_the_run_fit(base: Path, data: Path, settings: dict[str, Any]) -> None:
    settings = {**settings, "cutoff_len": 2048}
    target = target_device("auto", "24GB")
    forecast = forecast_of_run(base, data, target, **settings)
    peaks: dict[str, int] = {}
    for share in SHARES:
        memory = int(forecast.memory.peak * share)
        small = TargetDevice(target.device, replace(gpu_named("24GB"), memory_bytes=memory))
        verdict = verdict_of(forecast, small, memory)
        assert verdict.outcome == "does not fit" and "does not fit" in verdict.sentence
        for cure in verdict.cures:
            assert outcome_of(cure.peak_bytes, memory, "cuda") == "fits"
            if cure.name not in peaks:
                peaks[cure.name] = applied(base, data, target, cure, **settings)
            assert peaks[cure.name] == pytest.approx(cure.peak_bytes, rel=0.02), cure.name
            assert cure.peak_bytes < (1 - SAVED) * forecast.memory.peak
        names = [cure.changed for cure in verdict.cures]
        assert not any(one <= other for one in names for other in names if one is not other)
        same = [cure.same_result for cure in verdict.cures]
        assert same == sorted(same, reverse=True), "settings that change no result come first"
        lines = verdict_lines(verdict, forecast)
        assert lines[0] == ("verdict", verdict.sentence)
        assert len(lines) > 1
    assert len(peaks) >= 2
    plenty = verdict_of(forecast, target, 10**12)
    assert (plenty.outcome, plenty.cures) == ("fits", ())


@pytest.mark.parametrize("settings", [{"micro_batch_size": 2}, {"micro_batch_size": 1}])
def test_the_forecast_of_a_shorter_cutoff_is_that_of_the_run_with_it(
    base: Path, data: Path, settings: dict[str, Any]
) -> None:
    """The cures with `cutoff_len` are forecast from the longest row's last tokens; the run shortens the rows."""
    settings = {**settings, "cutoff_len": 2048}
    target = target_device("auto", "24GB")
    forecast = forecast_of_run(base, data, target, **settings)
    shorter = [one for one in forecast.combinations if "cutoff_len" in one.changed]
    lengths = {setting for one in shorter for setting in one.name.split(", ") if "cutoff_len" in setting}
    assert len(shorter) >= 1 and lengths
    for cure in shorter:
        assert applied(base, data, target, cure, **settings) == pytest.approx(cure.peak_bytes, rel=0.02), (
            cure.name
        )
        assert cure.peak_bytes < forecast.memory.peak and not cure.same_result
        assert re.search(r"shortens \d+ of 24 rows", cure.note)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_offered_cures_only_save_and_fit(seed: int) -> None:
    draw, target = Random(seed), target_device("auto", "24GB")
    forecast = replace(untraced(), memory=replace(untraced().memory, weights=draw.randint(10**8, 10**11)))
    peak = forecast.memory.peak
    names = [f"setting{number} {draw.randint(1, 9)}" for number in range(5)]

    def alternative(count: int) -> Alternative:
        name = ", ".join(draw.sample(names, count))
        return Alternative(name, int(peak * draw.uniform(0.1, 1.2)), "", draw.random() < 0.5)

    forecast = replace(
        forecast,
        alternatives=tuple(alternative(1) for _ in range(draw.randint(0, 6))),
        combinations=tuple(alternative(draw.randint(2, 4)) for _ in range(draw.randint(0, 6))),
    )
    memory = int(peak * draw.uniform(0.2, 1.3))
    verdict = verdict_of(forecast, target, memory)
    fitting = [
        one
        for one in (*forecast.alternatives, *forecast.combinations)
        if one.peak_bytes <= min((1 - SAVED) * peak, USABLE["cuda"] * memory)
    ]
    assert all(cure in fitting for cure in verdict.cures)
    assert bool(verdict.cures) == (bool(fitting) and verdict.outcome != "fits")
    assert all(one.peak_bytes <= (1 - SAVED) * peak for one in savings(forecast))


def untraced() -> Forecast:
    """A forecast whose numbers mean nothing."""
    memory = Memory(0, 10**9, 0, 0, 0, 0, 0, 0, 0, 0)
    numbers = (1, 1, 1, 1.0, 1, 1, 1, 1.0, 1.0, 1.0, 1, 1)
    return Forecast("cuda", "bfloat16", *numbers, memory, (), (), None, None, None)


def test_settings_that_save_nothing_are_not_named(base: Path, data: Path) -> None:
    target = target_device("auto", "24GB")
    forecast = forecast_of_run(base, data, target, micro_batch_size=2)
    useless = Alternative("lora_r 1", int(0.99 * forecast.memory.peak), "")
    forecast = replace(forecast, alternatives=(*forecast.alternatives, useless))
    assert useless not in savings(forecast) and len(savings(forecast)) > 1
    memory = int(0.995 * forecast.memory.peak / USABLE["cuda"])
    verdict = verdict_of(forecast, target, memory)
    assert outcome_of(useless.peak_bytes, memory, "cuda") == "fits"
    assert verdict.cures and useless not in verdict.cures


def test_a_run_that_nothing_makes_fit_is_told_what_it_needs_least(base: Path, data: Path) -> None:
    target = target_device("auto", "24GB")
    forecast = forecast_of_run(base, data, target)
    verdict = verdict_of(forecast, target, 10_000_000)
    assert (verdict.outcome, verdict.cures) == ("does not fit", ())
    names = [name.strip() for name, _ in verdict_lines(verdict, forecast)]
    assert names == ["verdict", "needs least with", "fits on"]


def test_a_forecast_for_a_gpu_uses_its_number_format_and_its_data_sheet(base: Path, data: Path) -> None:
    forecasts = {}
    for name in ("t4", "rtx3090", "h100"):
        target, (config, source) = target_device("auto", name), run_of(base, data)
        forecasts[name] = estimate(config, source, prepared_run(config, source, target), target=target)
    assert {name: forecast.dtype for name, forecast in forecasts.items()} == {
        "t4": "float16",
        "rtx3090": "bfloat16",
        "h100": "bfloat16",
    }
    kinds = {one.name for one in forecasts["h100"].alternatives}
    assert "quantization fp8" in kinds
    assert "quantization fp8" not in {one.name for one in forecasts["rtx3090"].alternatives}
    h100 = gpu_named("h100")
    assert h100.flops_per_second is not None
    slow = replace(h100, flops_per_second=h100.flops_per_second / 1e4)
    timed = timed_by_data_sheet(forecasts["h100"], slow, price=2.0)
    assert timed.time is not None and timed.price is not None
    assert slow.flops_per_second is not None
    expected = timed.operations / (DATA_SHEET_PARTS[1] * slow.flops_per_second)
    assert timed.time.seconds == pytest.approx(expected)
    assert timed.time.seconds_low < timed.time.seconds < timed.time.seconds_high
    fast = timed_by_data_sheet(forecasts["h100"], h100)
    assert fast.time is not None
    calls = forecasts["h100"].operator_calls
    assert fast.time.seconds >= 8e-6 * calls > 0  # small models are as fast as Python calls operators
    assert timed_by_data_sheet(forecasts["h100"], gpu_named("24GB")).time is None
    whole = replace(forecasts["h100"], dtype="float32")
    assert timed_by_data_sheet(whole, h100).time is None


# Commands


def inspect(base: Path, data: Path, **settings: object) -> Done:
    return command(
        data.parent, "inspect", *arguments({"base_model": base, "data_path": data, **SETTINGS, **settings})
    )


def test_the_forecast_begins_with_the_verdict(base: Path, data: Path) -> None:
    done = inspect(base, data, rows="none", gpu="rtx 4090", price=0.5)
    assert done.status == 0, done.err
    verdict = re.search(r"── forecast ──\nverdict: (.*)\n", done.out)
    assert verdict is not None
    pattern = r"needs [\d.]+ [MG]B of 25\.76 GB on rtx4090: fits; .+; [\d.]+ at 0\.5 an hour"
    assert re.fullmatch(pattern, verdict[1])
    assert "from the data sheet, at an assumed 35% of its rate" in done.out
    small = inspect(base, data, rows="none", gpu="0.1GB", json=True)
    last = json.loads(small.out.splitlines()[-1])
    assert last["verdict"]["outcome"] == "does not fit" and last["verdict"]["memory_bytes"] == 100_000_000
    assert last["verdict"]["sentence"].endswith(" of 100 MB: does not fit")
    again = json.loads(inspect(base, data, rows="none", gpu="0.1GB", json=True).out.splitlines()[-1])
    assert again["verdict"] == last["verdict"]


def test_a_gpu_that_is_not_here_can_have_settings_that_need_one(base: Path, data: Path) -> None:
    full = {"train": "full", "optimizer": "adamw_8bit", "lora_r": None, "lora_alpha": None}
    settings = {key: value for key, value in {**SETTINGS, **full}.items() if value is not None}
    words = arguments({"base_model": base, "data_path": data, "rows": "none", "gpu": "h100", **settings})
    pytest.importorskip("bitsandbytes")
    assert command(data.parent, "inspect", *words).status == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpu": "h1000"}, 'names no GPU: "h1000" is not in the table; give one of h200, h100, '),
        ({"gpu": "a100"}, 'names no GPU: "a100" may be a100-80 or a100-40; give one of '),
        ({"gpu": "h100", "probe": True}, "real steps run on this machine; leave out --gpu or --probe"),
        ({"gpu": "h100", "device": "cpu"}, "it has no meaning for another machine's GPU"),
        ({"gpu": "t4", "dtype": "bfloat16"}, "the device has no bfloat16; use --dtype float32 or float16"),
    ],
)
def test_gpus_that_cannot_be_are_refused(
    base: Path, data: Path, settings: dict[str, object], message: str
) -> None:
    done = inspect(base, data, **settings)
    assert done.status == 2 and message in done.err, done.err


def test_auto_is_resolved_for_the_memory_of_the_gpu(base: Path, data: Path) -> None:
    auto = {
        "micro_batch_tokens": "auto",
        "gradient_checkpointing": "auto",
        "cutoff_len": 2048,
        "rows": "none",
    }
    settings = {name: value for name, value in SETTINGS.items() if name != "micro_batch_size"}
    words = {"base_model": base, "data_path": data, **settings, **auto, "batch_size": 8}
    told = []
    for gpu in ("h100", "0.6GB"):
        done = command(data.parent, "inspect", *arguments({**words, "gpu": gpu}))
        assert done.status == 0, done.err
        told.append(re.search(r"at most ([\d,]+) tokens at once; activations are (\w+)", done.err))
    assert told[0] is not None and told[1] is not None
    assert int(told[0][1].replace(",", "")) > int(told[1][1].replace(",", ""))


def test_cpu_devices_know_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_device("cpu")
    assert (target.device, target.gpu, target.planned) == (torch.device("cpu"), None, None)
    alone = memory_for_run(target)
    assert alone is not None and alone > 1e8
    monkeypatch.setattr(fit_verdict, "free_memory", lambda _: 4 * 10**9)  # other programs use it, too
    monkeypatch.setattr(fit_verdict, "status_bytes", lambda _: 10**9)  # of this process
    assert (memory_for_run(target), memory_for_run(target, 4)) == (5 * 10**9, 5 * 10**9 // 4)
    assert memory_for_run(target_device("auto", "24GB"), 4) == 24e9  # each has a GPU of its own

"""`yeonma merge`: the merged model equals PEFT's merge and gives the adapter's answers, or nothing is written."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters import tiny_adapter, tiny_base
from tests.runs import articles, command, model_folder, trained, write_jsonl
from tests.tokenizers import sentencepiece_bpe
from yeonma import load
from yeonma.export import merge_weights, merged_model
from yeonma.export.merged_model import GreedyAnswers, measure_agreement
from yeonma.model.load import LoraShape, add_lora, load_base, load_tokenizer
from yeonma.model.source import find_base
from yeonma.model.weight_files import weight_files
from yeonma.tokenization.chat_template_export import chat_ids
from yeonma.tokenization.conversation import Conversation

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with sample rows, beside its base."""
    folder = tmp_path_factory.mktemp("run")
    base = model_folder(folder / "base")
    data = write_jsonl(folder / "rows.jsonl", articles(10))
    return trained(
        folder / "OUT", base, data, max_steps=2, save_steps=1, card_rows=3, learning_rate=0.05
    ).folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """PEFT's own merge."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


def greedy_answer(model: Any, ids: list[int]) -> list[int]:
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    return [int(number) for number in out[0, len(ids) :]]


def test_merged_model_gives_the_adapters_answers_in_transformers(run: Path, tmp_path: Path) -> None:
    done = command(run, "merge", str(run), "--output_dir", str(tmp_path / "M"))
    assert done.status == 0, done.out + done.err
    assert "on 3 sample rows, in float32" in done.out
    assert "3 of 3 greedy answers are the same" in done.out
    folder, base = tmp_path / "M", run.parent / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run))
    samples = json.loads((run / "samples.json").read_text())["samples"]
    for sample in samples:
        ids = chat_ids(tokenizer, Conversation([{"role": "user", "content": sample["row"]["document"]}]))
        assert ids == sample["prompt_ids"]
        merged_logits, peft_logits = model(torch.tensor([ids])).logits, peft_model(torch.tensor([ids])).logits
        torch.testing.assert_close(merged_logits, peft_logits, atol=1e-4, rtol=1e-4)
        assert greedy_answer(model, ids) == greedy_answer(peft_model, ids)
    row = {"document": samples[0]["row"]["document"]}
    assert load(folder).generate(row) == load(run).generate(row)


def test_merged_folder_has_exactly_the_expected_files(run: Path, tmp_path: Path) -> None:
    assert command(run, "merge", str(run), "--output_dir", str(tmp_path / "M")).status == 0
    assert {path.name for path in (tmp_path / "M").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "base_chat_template.jinja"),
        *("template.txt", "yeonma.json", "samples.json"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["M"]
    for name in ("template.txt", "samples.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "M" / name).read_bytes() == (run / name).read_bytes()
    assert json.loads((tmp_path / "M" / "yeonma.json").read_text())["merged"] is True


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", LoraShape(4, 8, 0.0, "all-linear")),
        ("llama", LoraShape(4, 8, 0.0, "all-linear", use_dora=True)),
        ("qwen2", LoraShape(3, 8, 0.0, ["q_proj", "down_proj"], use_rslora=True)),
        ("gpt2", LoraShape(4, 8, 0.0, "all-linear")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_by_shard_is_bit_identical_to_pefts_merge(
    family: str, shape: LoraShape, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = model_folder(tmp_path / "base", family)
    model: Any = AutoModelForCausalLM.from_pretrained(base).to(dtype)
    model.save_pretrained(base, max_shard_size=20_000)
    (base / "model.safetensors").unlink()
    source = find_base(str(base))
    peft_model = add_lora(load_base(source, torch.device("cpu"), dtype), shape, seed=0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    peft_model.save_pretrained(str(tmp_path / "A"))
    files = weight_files(source)
    assert len(files) >= 3
    (tmp_path / "M").mkdir()
    merge_weights.merge_by_shard(source, files, str(tmp_path / "A"), tmp_path / "M", 30_000)
    merged, expected = tensors_of(tmp_path / "M"), merged_by_peft(base, tmp_path / "A", dtype)
    assert merged.keys() == tensors_of(base).keys()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    for path in (tmp_path / "M").glob("*.safetensors"):
        assert path.stat().st_size < 40_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "M")  # index and config are complete
    assert loaded.dtype == dtype
    (tmp_path / "W").mkdir()
    unmerged = PeftModel.from_pretrained(load_base(source, torch.device("cpu"), dtype), str(tmp_path / "A"))
    merge_weights.merge_in_memory(unmerged, tmp_path / "W", 10**9)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in tensors_of(tmp_path / "W").items())


def test_experts_with_different_names_in_the_files_are_merged_in_memory(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "qwen3_moe")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(8))
    out = trained(tmp_path / "OUT", base, data, max_steps=1, card_rows=2, learning_rate=0.05).folder
    done = command(out, "merge", str(out), "--output_dir", str(tmp_path / "M"))
    assert done.status == 0, done.out + done.err
    assert "loading the whole base into memory" in done.out


def test_merge_unties_a_tied_head_that_has_its_own_adapter(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    data = write_jsonl(tmp_path / "rows.jsonl", articles(8))
    settings: dict[str, Any] = {"max_steps": 2, "card_rows": 2, "learning_rate": 0.05}
    out = trained(tmp_path / "OUT", base, data, lora_target_modules=["lm_head"], **settings).folder
    done = command(out, "merge", str(out), "--output_dir", str(tmp_path / "M"))
    assert done.status == 0, done.out + done.err
    assert not torch.equal(
        *(tensors_of(tmp_path / "M")[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    )


def test_merged_generation_config_also_has_the_training_eos(tmp_path: Path) -> None:
    generation: dict[str, object] = {"eos_token_id": 7, "do_sample": False, "temperature": 0.5}
    folders = tiny_adapter(tmp_path, sentencepiece_bpe(), generation=generation)
    assert command(tmp_path, "merge", str(folders.adapter), "--output_dir", str(tmp_path / "M")).status == 0
    eos_id = load_tokenizer(find_base(str(folders.base))).eos_token_id
    config = json.loads((tmp_path / "M" / "generation_config.json").read_text())
    assert config == {"eos_token_id": [7, eos_id], "do_sample": False, "temperature": 0.5}


@pytest.mark.slow
def test_merge_script_accepts_a_checkpoint(run: Path, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        str(ROOT / "merge.py"),
        "--base_model_name_or_path",
        str(run.parent / "base"),
    ]
    arguments += [f"--peft_model_path={run / 'checkpoint-1'}", "--output-dir", str(tmp_path / "M")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    merged, expected = (
        tensors_of(tmp_path / "M"),
        merged_by_peft(run.parent / "base", run / "checkpoint-1", torch.float32),
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


# Refusals


def error_of_refused_merge(run: Path, output: Path, *words: str) -> str:
    """The error message of a merge that must fail and leave no files behind."""
    before = {path.name for path in output.parent.iterdir()}
    done = command(run, "merge", str(run), "--output_dir", str(output), *words)
    assert done.status == 2
    assert {path.name for path in output.parent.iterdir()} == before
    return done.err


def test_an_adapter_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other", sentencepiece_bpe(), layers=3)
    error_text = error_of_refused_merge(run, tmp_path / "M", "--base_model", str(other))
    assert f"was trained on {run.parent / 'base'}, which is not {other}" in error_text


def test_a_missing_shard_is_reported(run: Path, tmp_path: Path) -> None:
    base = shutil.copytree(run.parent / "base", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size=20_000)
    (base / "model.safetensors").unlink()
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"missing shards: {shard.name}" in error_of_refused_merge(
        run, tmp_path / "M", "--base_model", str(base)
    )


def test_folder_without_an_adapter_or_already_merged_is_refused(run: Path, tmp_path: Path) -> None:
    message = error_of_refused_merge(run.parent / "base", tmp_path / "M")
    assert "this is a whole model, not an adapter" in message
    assert command(run, "merge", str(run), "--output_dir", str(tmp_path / "M")).status == 0
    assert "merged already" in error_of_refused_merge(tmp_path / "M", tmp_path / "N")
    assert (
        "the adapter is merged into this model"
        in command(
            run, "generate", str(tmp_path / "M"), "--row", '{"document": "x"}', "--adapter_weights", "false"
        ).err
    )
    for verb in ("verify", "serve"):
        assert "this is a merged model" in command(run, verb, str(tmp_path / "M")).err


def test_an_output_folder_that_is_not_empty_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "M").mkdir()
    (tmp_path / "M" / "mine.txt").write_text("x")
    assert "it exists already" in error_of_refused_merge(run, tmp_path / "M")
    assert "it exists already" in error_of_refused_merge(run, run)
    assert (tmp_path / "M" / "mine.txt").read_text() == "x"


def test_an_adapter_of_a_quantised_base_merges_into_the_unquantised_one(tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, sentencepiece_bpe())
    plain = shutil.copytree(folders.base, tmp_path / "plain")
    from yeonma.adapter.adapter_folder import config_hash
    from yeonma.model.load import load_config

    path = folders.base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    details = json.loads((folders.adapter / "yeonma.json").read_text())
    # as in an adapter trained on the quantised base: packed weights count as fewer parameters
    details["base"]["config_sha256"] = config_hash(load_config(find_base(str(folders.base))))
    details["base"]["parameters"] //= 2
    (folders.adapter / "yeonma.json").write_text(json.dumps(details))
    done = command(
        tmp_path,
        "merge",
        str(folders.adapter),
        "--base_model",
        str(plain),
        "--output_dir",
        str(tmp_path / "M"),
    )
    assert done.status == 0, done.out + done.err
    expected = merged_by_peft(plain, folders.adapter, torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(tmp_path / "M").items())


def test_adapter_trained_with_quantization_merges_into_full_precision_weights(
    tmp_path: Path,
) -> None:
    base = model_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(10))
    settings: dict[str, object] = {
        "max_steps": 2,
        "card_rows": 3,
        "learning_rate": 0.05,
        "quantization": "fp8",
    }
    run = trained(tmp_path / "OUT", base, data, **settings).folder
    done = command(run, "merge", str(run), "--output_dir", str(tmp_path / "M"))
    assert done.status == 0, done.out + done.err
    assert "3 of 3 greedy answers are the same" in done.out
    expected = merged_by_peft(base, run, torch.float32)
    for name, weight in tensors_of(tmp_path / "M").items():
        assert torch.equal(weight, expected[name]), name


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limits files to `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("size", [1_000, 30_000])
def test_full_disk_while_merging_leaves_no_files(run: Path, tmp_path: Path, size: int) -> None:
    with file_size_limit(size):
        error_text = error_of_refused_merge(run, tmp_path / "M")
    assert "the merged model cannot be written" in error_text


def test_too_little_disk_space_for_merging_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yeonma.files.free_bytes", lambda _: 1_000)
    error_text = error_of_refused_merge(run, tmp_path / "M")
    assert "the merged model needs" in error_text
    assert "1,000 are free" in error_text


def test_merged_model_with_different_answers_is_deleted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_adapter(source: Any, files: list[Path], adapter: str, folder: Path, *_: object) -> None:
        AutoModelForCausalLM.from_pretrained(source.name).save_pretrained(folder)

    monkeypatch.setattr(merged_model, "merge_by_shard", without_adapter)
    done = command(run, "merge", str(run), "--output_dir", str(tmp_path / "M"))
    assert done.status == 1
    assert "nothing was written" in done.out
    assert list(tmp_path.iterdir()) == []


def test_adapter_with_nan_weights_is_refused(tmp_path: Path) -> None:
    folders = tiny_adapter(tmp_path, sentencepiece_bpe())
    path = folders.adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_B" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    error_text = error_of_refused_merge(folders.adapter, tmp_path / "M")
    assert "NaN" in error_text or "not finite" in error_text


def test_answers_may_differ_only_between_almost_equally_likely_tokens() -> None:
    logits = torch.tensor([[5.0, 4.99999, 0.0], [0.0, 0.0, 9.0]])
    first = GreedyAnswers(((0, 2),), (logits,))
    float32 = torch.float32
    near = measure_agreement(
        first, GreedyAnswers(((1, 2),), (logits + 1e-5,)), [logits - 1], float32, float32
    )
    assert near.is_close
    assert (near.same_answers, near.rows) == (0, 1)
    assert near.adapter_effect == 1.0
    far = measure_agreement(first, GreedyAnswers(((2, 2),), (logits,)), [logits], float32, float32)
    assert not far.is_close
    assert far.max_gap == 5.0
    nan = measure_agreement(
        first, GreedyAnswers(((0, 2),), (logits * float("nan"),)), [logits], float32, float32
    )
    assert not nan.is_close

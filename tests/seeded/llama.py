"""Faults of llama.cpp's own server: what files and options make it commit."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runs import command, trained, write_jsonl
from tests.seeded.entry import Seeded, Target
from tests.seeded.own import only, times
from tests.served_runs import with_weights
from yeonma.adapter.sample_answers import read_sample_answers
from yeonma.export.gguf_converter import CONVERTER, convert
from yeonma.export.tool_folder import install_tool, run_in
from yeonma.model.load import load_tokenizer
from yeonma.model.smollm2 import fetch
from yeonma.model.source import find_base

ROOT = Path(__file__).resolve().parents[2]
TITLES = {
    "A storm closed the harbour on Monday.": "Storm closes harbour",
    "The council opened a new library this year.": "New library opens",
    "Boats waited for the wind in the afternoon. " * 40: "Boats wait for wind",
    "A model of the old bridge was found.": "Old bridge model found",
    "월요일에 폭풍이 항구를 닫았다.": "폭풍에 멈춘 항구",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class EngineRuns:
    """Runs on a small llama with SmolLM2's tokenizer, of a shape that k-quants and vLLM take."""

    root: Path

    @cached_property
    def base(self) -> Path:
        tokenizer = load_tokenizer(find_base(fetch(print)))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            initializer_range=0.08,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(self.root / "base")
        tokenizer.save_pretrained(self.root / "base")
        return self.root / "base"

    @cached_property
    def other_base(self) -> Path:
        """Another revision of the base."""
        folder = self.root / "other-base"
        shutil.copytree(self.base, folder)
        draw = torch.Generator().manual_seed(1)
        path = folder / "model.safetensors"
        weights = {
            name: tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=draw)
            if tensor.dim() > 1
            else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
        return folder

    @cached_property
    def run(self) -> Path:
        return run_on(self.base, self.root / "run", TITLES)

    @cached_property
    def other(self) -> Path:
        titles = {text: title[::-1].upper() for text, title in TITLES.items()}
        return run_on(self.base, self.root / "other", titles)

    def copy(self, name: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
        folder = self.root / name
        return folder if folder.exists() else with_weights(self.run, folder, change)

    def on_other_base(self) -> Path:
        """The adapter with its folder's word that it belongs to the other base."""
        folder = self.root / "on-other-base"
        if not folder.exists():
            shutil.copytree(self.run, folder)
            for name in ("yeonma.json", "adapter_config.json"):
                path = folder / name
                details = json.loads(path.read_text().replace(str(self.base), str(self.other_base)))
                details.pop("base_content", None)
                path.write_text(json.dumps(details))
        return folder


def run_on(base: Path, output: Path, titles: Mapping[str, str]) -> Path:
    """The folder of a run that has learned these titles by heart."""
    rows = [{"document": text, "title": title} for text, title in titles.items()]
    data = write_jsonl(output.with_suffix(".jsonl"), rows * 8)
    held_out = write_jsonl(output.with_suffix(".held-out.jsonl"), rows)
    settings = {"template": "### Text:\n{document}\n\n### Title:\n{title}\n", "val_data_path": held_out}
    settings |= {"num_epochs": 10, "learning_rate": 1e-2, "batch_size": 8, "card_rows": 5, "lora_r": 16}
    return trained(output, base, data, eval_steps=1000, save_steps=1000, **settings).folder


@dataclass
class LlamaLab:
    runs: EngineRuns
    python: str
    """One that has xllamacpp."""

    @property
    def root(self) -> Path:
        return self.runs.root

    def gguf(self, outtype: str = "f16", folder: Path | None = None) -> Path:
        """A run's merged model as a file; `self.runs.run` by default."""
        run = folder or self.runs.run
        made = self.root / f"{run.name}-{outtype}"
        return next(made.glob("*.gguf")) if made.exists() else exported(run, made, outtype)

    @cached_property
    def base_file(self) -> Path:
        """The base, asked with the template of the run."""
        folder = self.root / "asked-base"
        shutil.copytree(self.runs.base, folder)
        shutil.copy(self.runs.run / "chat_template.jinja", folder)
        install_tool(CONVERTER)
        convert(folder, self.root / "base.gguf", "f16", "base")
        return self.root / "base.gguf"

    def adapter(self, folder: Path) -> Path:
        made = self.root / f"{folder.name}-lora"
        return next(made.glob("*.gguf")) if made.exists() else adapter_file(folder, made)

    def changed_file(self, name: str, change: Callable[[gguf.GGUFReader], None]) -> Path:
        """A copy of the right file with other metadata."""
        path = self.root / f"{name}.gguf"
        shutil.copy(self.gguf(), path)
        change(gguf.GGUFReader(path, "r+"))
        return path

    def log(self) -> Path:
        return self.root / "llama.log"


def exported(run: Path, folder: Path, outtype: str) -> Path:
    words = ["export", str(run), "--output_dir", str(folder), "--outtype", outtype]
    done = command(folder, *words)
    assert done.status == 0, done.err
    (file,) = folder.glob("*.gguf")
    return file


def adapter_file(run: Path, folder: Path) -> Path:
    done = command(folder, "export", str(run), "--output_dir", str(folder), "--format", "lora")
    assert done.status == 0, done.err
    (file,) = folder.glob("*.gguf")
    return file


@contextmanager
def llama_server(python: str, file: Path, log: Path, **options: Any) -> Iterator[str]:
    """The address of llama.cpp's server with a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, str(ROOT / "tests" / "slow" / "llama_open.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"gguf": str(file), "port": port, **options}) + "\n")
        process.stdin.flush()
        started = process.stdout.readline()
        assert started, log.read_text()
        yield json.loads(started)["address"]
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


Options = Mapping[str, Any]


def served(
    name: str,
    cause: str | None,
    file: Callable[[LlamaLab], Path] = lambda lab: lab.gguf(),
    options: Callable[[LlamaLab], Options] = lambda lab: {},
    before: Callable[[LlamaLab, str], None] = lambda lab, url: None,
) -> Seeded[LlamaLab]:
    """`before`: what others ask the server first, at its address."""

    @contextmanager
    def at(lab: LlamaLab) -> Iterator[Target]:
        run = lab.runs.run
        with llama_server(lab.python, file(lab), lab.log(), **options(lab)) as url:
            before(lab, url)
            yield Target(run, url)

    return Seeded(name, "llama.cpp", cause, at)


def with_adapter(
    name: str, cause: str | None, adapter: Callable[[LlamaLab], Path], scale: float = 1.0
) -> Seeded[LlamaLab]:
    def options(lab: LlamaLab) -> Options:
        return {"lora": str(lab.adapter(adapter(lab))), "scale": scale}

    return served(name, cause, lambda lab: lab.base_file, options)


def _add_bos(reader: gguf.GGUFReader) -> None:
    field = reader.fields["tokenizer.ggml.add_bos_token"]
    field.parts[field.data[0]][0] = True


def _other_end(reader: gguf.GGUFReader) -> None:
    field = reader.fields["tokenizer.ggml.eos_token_id"]
    field.parts[field.data[0]][0] = 5


def _other_splitting(lab: LlamaLab) -> Path:
    """The same vocabulary, read by another way of splitting text: an older converter's."""
    path = lab.root / "splitting.gguf"
    command_line = ["-c", _RENAMED, str(lab.gguf()), str(path)]
    done = run_in(install_tool(CONVERTER), command_line)
    assert done.returncode == 0, done.stderr
    return path


_RENAMED = """
import subprocess, sys
from gguf.scripts import gguf_new_metadata
sys.argv = ["x", "--pre-tokenizer", "gpt-2", "--force", *sys.argv[1:]]
gguf_new_metadata.main()
"""


def _quantised(lab: LlamaLab, number: int) -> Path:
    """By llama.cpp's number of a file type that `export` does not offer."""
    from yeonma.export.gguf_quantiser import _QUANTISE, QUANTISER

    path = lab.root / f"type-{number}.gguf"
    words = [str(lab.gguf("f32")), str(path), str(number)]
    done = run_in(install_tool(QUANTISER), ["-c", _QUANTISE, *words])
    assert done.returncode == 0, done.stderr
    return path


def _asked_as_base(lab: LlamaLab, url: str) -> None:
    """The sample rows' prompts with the adapter turned off: the server keeps what it computed of them."""
    for answer in read_sample_answers(lab.runs.run) or []:
        body = {"prompt": answer.prompt_ids, "n_predict": 1, "lora": [{"id": 0, "scale": 0.0}]}
        request = Request(
            f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request) as response:
            response.read()


def _template(lab: LlamaLab) -> str:
    return (lab.runs.run / "chat_template.jinja").read_text()


def _base_template(lab: LlamaLab) -> str:
    return (lab.runs.run / "base_chat_template.jinja").read_text()


LLAMA_FAULTS = (
    served("the base alone", "adapter_not_applied", lambda lab: lab.base_file),
    with_adapter("half of the adapter's scale", "adapter_in_part", lambda lab: lab.runs.run, 0.5),
    with_adapter("three quarters of its scale", "adapter_in_part", lambda lab: lab.runs.run, 0.75),
    with_adapter("twice its scale", "adapter_in_part", lambda lab: lab.runs.run, 2.0),
    with_adapter(
        "half of the layers dropped",
        "adapter_in_part",
        lambda lab: lab.runs.copy(
            "half-layers", only(lambda key: ".layers.0." in key or ".layers.1." in key)
        ),
    ),
    served(
        "merged twice",
        "adapter_in_part",
        lambda lab: lab.gguf(folder=lab.runs.copy("double", times(2.0))),
    ),
    served("weights in Q4_K_M", "fewer_bits", lambda lab: lab.gguf("q4_k_m")),
    served("weights in Q4_0", "fewer_bits", lambda lab: _quantised(lab, 2)),
    served("BOS before the prompt", "added_bos", lambda lab: lab.changed_file("bos", _add_bos)),
    served("ChatML", "another_template", options=lambda lab: {"chat_template": CHATML}),
    served(
        "the base's chat template",
        "base_template",
        options=lambda lab: {"chat_template": _base_template(lab)},
    ),
    served(
        "a word of the template changed",
        "another_template",
        options=lambda lab: {"chat_template": _template(lab).replace("### Text", "### Article")},
    ),
    served("a short context", "context_cut", options=lambda lab: {"context": 256}),
    served("ends at a stop text", "early_end", options=lambda lab: {"antiprompt": ["r", "e", "o"]}),
    served("a penalty on repetition", "penalty", options=lambda lab: {"sampling": {"penalty_repeat": 2.5}}),
)
LLAMA_RIGHT = (
    *(
        served(f"merged, in {outtype}", None, lambda lab, outtype=outtype: lab.gguf(outtype))
        for outtype in ("f16", "q8_0")
    ),
    with_adapter("the adapter beside the base", None, lambda lab: lab.runs.run),
)

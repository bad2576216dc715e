"""The options of the verbs that come after training, as settings.py has the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yeonma.choices import AskedQuantization
from yeonma.ranges import COUNT, NOT_NEGATIVE, PORT


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """What is sent to the hub, and who may see it there."""

    folder: str
    """The adapter folder that a run left behind, a checkpoint in it, or a merged model."""
    repo: str
    """The repository on the hub: `owner/name`, or a name in your own account. It is made where there is none."""
    public: bool = False
    """Let everybody see it. Off, it is private, and a repository that is public already is refused."""
    base_model: str | None = None
    """The base model's name on the hub, where training took it from a local folder. It is written in what is sent."""
    hide_paths: bool = False
    """Of each absolute path in the files, send the last part alone. Off, such files are refused."""
    message: str = "Upload with Yeonma"
    """What the commit says."""
    dry_run: bool = False
    """Show what would be sent, and send nothing."""
    yes: bool = False
    """Send without asking. Needed where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Which adapters answer, where, and within which bounds."""

    adapter_dirs: list[str]
    """The adapter folders, all of one base: `yeonma serve OUT OUT2`. A request's `model` is a folder's name, or the base model's."""
    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own, such as 0.0.0.0, needs an `api_key`."""
    port: int = field(default=8000, metadata=PORT)
    """Port to listen at; 0 takes a free one and says which."""
    api_key: str | None = None
    """The key that requests must bring. Better given as $YEONMA_API_KEY: others on the machine can read a command line."""
    engine: Literal["auto", "yeonma", "vllm"] = "auto"
    """What computes the answers. auto: vLLM where it is installed, a GPU is there and it asks with the trained tokens; else Yeonma itself."""
    max_new_tokens: int = field(default=128, metadata=COUNT)
    """The most tokens of an answer where the request does not say."""
    max_new_tokens_limit: int = field(default=1024, metadata=COUNT)
    """The most tokens that a request may ask for."""
    temperature: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """0 takes the likeliest token each time, above 0 draws, where the request does not say."""
    batch_size: int = field(default=16, metadata=COUNT)
    """Answers computed at once: memory and speed, not the answers."""
    base_model: str | None = None
    """The base model's name or folder, where it is no longer where the adapter folders say."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights and the computation. auto: bfloat16 on a GPU that has it, float32 on the CPU."""
    quantization: AskedQuantization = "auto"
    """How the frozen weights are held, as in training. auto: as the adapters were trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What becomes one model, where, and how it is asked whether it still says the same."""

    adapter_dir: str
    """The adapter folder that a run left behind, or a checkpoint in it."""
    output_dir: str
    """The folder to make for the merged model."""
    base_model: str | None = None
    """The base model's name or folder, where it is no longer where the adapter folder says, or is quantised there."""
    max_shard_bytes: int = field(default=5_000_000_000, metadata=COUNT)
    """The most bytes of one file of weights, and about the most memory that merging takes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format in which both models are asked. auto: float32 where memory holds it, else the base's own. The weights keep their own in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where both models are asked. auto: the GPU if there is one. The merging itself is on the CPU."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is written for other programs, and where."""

    model_dir: str
    """The adapter folder that a run left behind, a checkpoint in it, or a merged model. An adapter is merged first."""
    output_dir: str
    """The folder to make for the files."""
    format: Literal["gguf", "ollama"] = "gguf"
    """gguf: one file for llama.cpp and its like. ollama: a Modelfile beside it, with template, stop texts and parameters."""
    outtype: Literal["f16", "bf16", "q8_0"] = "f16"
    """Number format of the weights in the file; q8_0 takes about half of the others."""
    base_model: str | None = None
    """The base model's name or folder, where it is no longer where the adapter folder says, or is quantised there."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format in which merged and unmerged are asked, as for `yeonma merge`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where they are asked. auto: the GPU if there is one."""

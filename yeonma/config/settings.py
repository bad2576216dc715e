"""The words that settings take, where they are many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LrScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
PairLossName = Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "simpo", "cpo", "orpo"]
LabelLossName = Literal["kto"]  # it learns from labelled answers instead of pairs
LossName = Literal[PairLossName, LabelLossName]
Checkpointing = bool | Literal["selective"]
AskedCheckpointing = bool | Literal["selective", "auto"]
Compiling = bool | Literal["auto"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Quantization = Literal["none", "int8", "nf4", "fp8"]
AskedQuantization = Literal["auto", "none", "int8", "nf4", "fp8"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting takes. Infinity and NaN are never among them."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            float("-inf") < number < float("inf")
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        ends = (
            ("of at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{words} {number}" for words, number in ends if number is not None)


COUNT = {"range": Range(at_least=1)}
NOT_NEGATIVE = {"range": Range(at_least=0)}
POSITIVE = {"range": Range(above=0)}
SHARE = {"range": Range(at_least=0, at_most=1)}
DECAY = {"range": Range(at_least=0, below=1)}
SEED = {"range": Range(at_least=0, at_most=2**32 - 1)}
PORT = {"range": Range(at_least=0, at_most=65535)}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the rows come from and how they become text."""

    data_path: str
    """Training rows: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, a `save_to_disk` folder, or a data set on the hub (`name` or `name:config`)."""
    data_split: str = "train"
    """Split of a hub data set or of a `save_to_disk` folder that holds several."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files; never guessed."""
    columns: dict[str, str] | None = None
    """Template field -> column, where their names differ: `{document: body, answer: headline}`; `answer` is the template's last field; `chosen`, `rejected` and `label` are those of preference data."""
    template: str | None = None
    """A built-in template's name, a file, or the template text itself. Without it, the built-in whose fields the columns satisfy."""
    val_set_size: float = field(default=0, metadata=NOT_NEGATIVE)
    """Rows held out for validation, drawn by `seed`: a count (1 or more) or a fraction (below 1)."""
    val_data_path: str | None = None
    """Validation rows of their own, in any form that `data_path` takes."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """How text becomes tokens."""

    cutoff_len: int = field(default=2048, metadata=COUNT)
    """The most tokens of prompt and answer together. A longer row loses text from one prompt field, never from the answer."""
    shrink: str | None = None
    """The prompt field that may be shortened. Without it, the longest prompt field of the row."""
    shrink_side: Literal["end", "start", "middle"] = "end"
    """The side that a shortened field loses text from."""
    over_limit: Literal["drop", "error"] = "drop"
    """What happens to a row whose frame and answer alone are over `cutoff_len`: left out and counted, or the run stops."""
    train_on_inputs: bool = False
    """Train the prompt too, not only the answer."""
    add_eos_token: bool = True
    """End every answer with the tokenizer's end-of-sequence token, trained."""
    cache_dir: str | None = None
    """Where tokenised data is kept. Without it, $YEONMA_CACHE or ~/.cache/yeonma."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model and how it is held."""

    base_model: str
    """The model to tune: a name on the hub or a local folder. A folder that is itself an adapter stands for its base with that adapter."""
    model_revision: str | None = None
    """Branch, tag or commit of the base model on the hub."""
    adapter: str | None = None
    """An adapter folder to continue training from. Its own rank, alpha and target modules hold."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights and the computation. auto: bfloat16 on a GPU that has it, float32 on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPU if there is one."""
    quantization: Quantization = "none"
    """Hold the frozen weights of dense layers in fewer bits: int8, nf4 (4 bits, double quantisation) or fp8. Less memory, another result. int8 and nf4 need bitsandbytes; fp8 is fast on GPUs from compute capability 8.9 on."""
    shard: bool = False
    """With several processes: share the frozen weights out over them (FSDP2), so that a model fits that is too large for one GPU. Slower where it would fit; the result is the same."""
    gradient_checkpointing: AskedCheckpointing = False
    """Recompute activations in the backward pass: less memory, about a third more time. selective: in every other layer. auto: what the forecast has room for."""
    torch_compile: Compiling = "auto"
    """Norms, SwiGLU and rotary positions by kernels that PyTorch's compiler makes, which takes some seconds at the start. auto: on a GPU. The result is the same to rounding."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapter's shape (Hu et al. 2021, arXiv:2106.09685), through PEFT."""

    lora_r: int = field(default=16, metadata=COUNT)
    """Rank of the adapter."""
    lora_alpha: float = field(default=16, metadata=POSITIVE)
    """Scale of the adapter: its output is multiplied by `lora_alpha / lora_r`."""
    lora_dropout: float = field(default=0.0, metadata=DECAY)
    """Dropout before the adapter. Tokens that examples share draw one mask together (see `share_prefix`)."""
    lora_target_modules: list[str] | str = "all-linear"
    """Names of the layers that get an adapter, such as `[gate_proj, down_proj, up_proj]`, or `all-linear`."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(lora_r)` instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, Liu et al. 2024, arXiv:2402.09353)."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The mathematics of the steps, and what is only their speed."""

    batch_size: int = field(default=16, metadata=COUNT)
    """Examples a step, or pairs, over all processes. Need not divide by anything."""
    micro_batch_size: int = field(default=4, metadata=COUNT)
    """The most examples, or pairs, that go through the model at once: memory and speed, never the result."""
    micro_batch_tokens: int | Literal["auto"] | None = field(default=None, metadata=COUNT)
    """The most tokens that go through the model at once; one longer example still goes alone. auto: what free memory holds by the forecast, tried before the first step; `micro_batch_size` plays no part then."""
    share_prefix: bool = True
    """Compute once what the examples of a micro-batch begin with in common, from 16 tokens; the prompt of a pair always."""
    num_epochs: float = field(default=3, metadata=POSITIVE)
    """Passes over the training rows; a fraction is allowed."""
    max_steps: int | None = field(default=None, metadata=COUNT)
    """Stop after this many steps; wins over `num_epochs`."""
    learning_rate: float = field(default=2e-4, metadata=POSITIVE)
    """Highest learning rate, reached after the warm-up. `yeonma dpo` begins lower: 1e-5."""
    lr_scheduler: LrScheduler = "linear"
    """Schedule of the learning rate, by transformers' names."""
    lr_scheduler_kwargs: dict[str, int | float | str] | None = None
    """More arguments of the schedule, such as `{num_cycles: 2}`."""
    warmup_steps: int = field(default=0, metadata=NOT_NEGATIVE)
    """Steps until the learning rate is at its highest; wins over `warmup_ratio`."""
    warmup_ratio: float = field(default=0.0, metadata=SHARE)
    """The same as a share of all steps."""
    optimizer: Optimizer = "adamw"
    """AdamW, its two averages in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), and those where the GPU may page them out: the latter two by bitsandbytes, on a GPU."""
    weight_decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """AdamW's weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101)."""
    adam_beta1: float = field(default=0.9, metadata=DECAY)
    """AdamW's decay of the gradient's mean."""
    adam_beta2: float = field(default=0.999, metadata=DECAY)
    """AdamW's decay of the gradient's square."""
    adam_epsilon: float = field(default=1e-8, metadata=POSITIVE)
    """AdamW's term against division by zero."""
    max_grad_norm: float = field(default=1.0, metadata=NOT_NEGATIVE)
    """Gradients with a larger norm are scaled down to it; 0 turns clipping off."""
    group_by_length: bool = False
    """Put rows of similar length into one step. There is no padding to save; it only evens out the time of steps."""
    seed: int = field(default=42, metadata=SEED)
    """Seed of the adapter's start, the order of rows, the validation draw and dropout."""


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """What is learnt from preferences. Setting what the chosen `loss` does not read is an error."""

    loss: LossName = "sigmoid"
    """What a pair costs. sigmoid is DPO (Rafailov et al. 2023, arXiv:2305.18290); simpo, cpo and orpo need no reference. kto takes single answers with a `label` of true or false instead of pairs."""
    beta: float = field(default=0.1, metadata=POSITIVE)
    """Scale of an answer's reward: the higher it is, the closer the model stays to the reference."""
    label_smoothing: float = field(default=0.0, metadata={"range": Range(at_least=0, below=0.5)})
    """Share of the pairs that are taken to stand the wrong way round: sigmoid (conservative DPO), robust, cpo, simpo."""
    sft_weight: float | None = field(default=None, metadata=NOT_NEGATIVE)
    """Weight of the chosen answer's negative log-likelihood a token, added to the loss. Without it, 1 for cpo and orpo, else 0."""
    simpo_gamma: float = field(default=0.5, metadata=NOT_NEGATIVE)
    """The margin between rewards that simpo wants (Meng et al. 2024, arXiv:2405.14734)."""
    kto_desirable_weight: float = field(default=1.0, metadata=POSITIVE)
    """Weight of the answers labelled true in kto (Ethayarajh et al. 2024, arXiv:2402.01306)."""
    kto_undesirable_weight: float = field(default=1.0, metadata=POSITIVE)
    """Weight of those labelled false. The more of them there are, the lower it should be."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When the validation rows are looked at, and what follows."""

    eval_steps: int | None = field(default=None, metadata=COUNT)
    """Evaluate every so many steps. Without it, at the end of every epoch. Always before the first and after the last step."""
    keep_best: bool = True
    """Leave the adapter with the lowest validation loss in the output folder, not the last one."""
    early_stopping_patience: int | None = field(default=None, metadata=COUNT)
    """Stop when so many evaluations in a row bring no lower loss."""
    early_stopping_threshold: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """How much lower the loss must be to count as lower."""
    card_rows: int = field(default=5, metadata=NOT_NEGATIVE)
    """Validation rows answered before and after training for the model card; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the run leaves behind and how it is watched."""

    output_dir: str
    """The adapter folder."""
    overwrite: bool = False
    """Replace what another run left in `output_dir`."""
    save_steps: int | None = field(default=None, metadata=COUNT)
    """Write a checkpoint every so many steps. Without it, at the end of every epoch."""
    save_total_limit: int | None = field(default=None, metadata=COUNT)
    """Keep only so many of the newest checkpoints, and the best one."""
    resume_from_checkpoint: str = "latest"
    """Continue from `latest` in `output_dir`, from a checkpoint folder, or from `none`."""
    time_limit: str | None = None
    """Stop with a checkpoint and exit status 75 before the command has run for so long: `11h30m`, `90m`, `45s` or `1:30:00`. The same command goes on."""
    logging_steps: int = field(default=1, metadata=COUNT)
    """Print and report every so many steps; metrics.jsonl has every step."""
    report_to: list[Tracker] | Tracker | Literal["none"] = "none"
    """Trackers that get the metrics too: tensorboard, wandb, trackio, mlflow, those that are installed."""
    run_name: str | None = None
    """The run's name for trackers. Without it, the name of `output_dir`."""
    nproc: int = field(default=1, metadata=COUNT)
    """Processes to start on this machine. Under torchrun, torchrun's own count holds."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a training run, by group. Made once, then passed down."""

    data: DataSettings
    tokens: TokenSettings
    model: ModelSettings
    lora: LoraSettings
    step: StepSettings
    preference: PreferenceSettings | None = None
    """None for supervised fine-tuning."""
    evaluation: EvaluationSettings
    run: RunSettings


TRAINING = (
    DataSettings,
    TokenSettings,
    ModelSettings,
    LoraSettings,
    StepSettings,
    EvaluationSettings,
    RunSettings,
)
"""The groups that `yeonma sft` reads; `yeonma dpo` reads all groups of RunConfig."""
PREFERENCE_DEFAULTS = {"learning_rate": 1e-5}
"""Defaults of `yeonma dpo` that differ from those of `yeonma sft`."""


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What is shown. All settings of training are taken as well, so that a command only changes its verb."""

    objective: Literal["sft", "dpo"] = "sft"
    """The verb that would train: what the rows hold, and which settings count."""
    rows: str | None = None
    """Rows to show: numbers such as `17,40` or `5-8`, or `all`. Without it, the first three; `none` for the audit alone."""
    tokens: bool = False
    """Show the rows token by token, with ids."""
    json: bool = False
    """Print JSON: an object a line for each example, then one with the key `audit`."""
    html: str | None = None
    """File for the same as one page that opens without a network."""
    probe: bool = False
    """Load the model and measure time and memory by a few real steps, instead of estimating them."""
    price: float | None = field(default=None, metadata=POSITIVE)
    """What an hour of one GPU costs, in any currency: the forecast says what the run costs, and what an hour buys."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The adapter folder that is asked."""

    adapter_dir: str
    """The adapter folder that a run left behind, or a checkpoint in it. Base model, template and tokenizer are found from it."""
    base_model: str | None = None
    """The base model's name or folder, where it is no longer where the adapter folder says."""
    adapter_weights: bool = True
    """Off, the base model answers alone, with the same prompts."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights and the computation. auto: bfloat16 on a GPU that has it, float32 on the CPU."""
    quantization: AskedQuantization = "auto"
    """How the frozen weights are held, as in training. auto: as the adapter was trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """The folder that is looked at. Nothing in it changes, and no weights of the base model are read."""

    adapter_dir: str
    """A run's output folder, a checkpoint in it, or an adapter folder copied from there."""
    base_model: str | None = None
    """The base model's name or folder, where it is no longer where the adapter folder says."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, such a base model is not looked at."""
    data_path: str | None = None
    """Data of which to say whether the adapter was trained on it."""
    data_split: str = "train"
    """Split of a hub data set or of a `save_to_disk` folder that holds several."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files, as in training."""
    json: bool = False
    """Print what was found as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What is asked, and where the answers go. One of `data_path`, `row` and `prompt`."""

    data_path: str | None = None
    """Rows to answer, in any form that training takes."""
    data_split: str = "train"
    """Split of a hub data set or of a `save_to_disk` folder that holds several."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files; never guessed."""
    columns: dict[str, str] | None = None
    """Template field -> column, where their names differ: `{document: body}`. Without it, as in training."""
    limit: int | None = field(default=None, metadata=COUNT)
    """Answer only so many of the first rows."""
    row: str | None = None
    """One row to answer, as JSON: `{"document": "..."}`."""
    prompt: str | None = None
    """Text to continue as it stands, without the template."""
    output: str | None = None
    """File for the answers, one JSON object a line. Without it, standard output."""
    batch_size: int = field(default=8, metadata=COUNT)
    """Prompts answered at once: memory and speed, not the answers."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Which models are compared on which rows, and where the report goes."""

    models: list[str]
    """The models, the first of them the one to compare with: `--models BASE OUT OUT2`. Each is a model (a name on the hub or a folder) or an adapter folder; one alone is measured by itself."""
    data_path: str
    """Rows that no model was trained on, in any form that training takes. Rows without a wanted answer are answered, too."""
    data_split: str = "train"
    """Split of a hub data set or of a `save_to_disk` folder that holds several."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files; never guessed."""
    columns: dict[str, str] | None = None
    """Template field -> column, where their names differ: `{document: body, answer: headline}`. Without it, as in training."""
    template: str | None = None
    """How models without a template of their own are asked: a built-in template's name, a file, or the text itself. Without it, as the first adapter is, or by the columns."""
    rows: int | None = field(default=None, metadata=COUNT)
    """Compare on only so many of the first rows."""
    output_dir: str = "report"
    """Folder for report.html, report.json and the answers, answers.jsonl, which the same command goes on from."""
    base_model: str | None = None
    """The adapters' base model, where it is no longer where their folders say."""
    batch_size: int = field(default=32, metadata=COUNT)
    """Prompts answered at once: memory and speed, not the answers."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights and the computation. auto: bfloat16 on a GPU that has it, float32 on the CPU."""
    quantization: AskedQuantization = "auto"
    """How the frozen weights are held, as in training. auto: as the adapter was trained; a base alone as the first adapter on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: the GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How the model answers."""

    max_new_tokens: int = field(default=128, metadata=COUNT)
    """The most tokens of one answer. Prompts are fitted so that they leave this much room."""
    temperature: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """0 takes the likeliest token each time (greedy); above 0 draws, more freely the higher it is."""
    top_p: float = field(default=1.0, metadata={"range": Range(above=0, at_most=1)})
    """Draw only from the likeliest tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751)."""
    top_k: int = field(default=0, metadata=NOT_NEGATIVE)
    """Draw only from so many of the likeliest tokens; 0 for all."""
    repetition_penalty: float = field(default=1.0, metadata=POSITIVE)
    """Above 1 makes what came before less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    seed: int = field(default=42, metadata=SEED)
    """Seed of the draws. The same prompt and seed get the same answer."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`yeonma inspect`: the settings of a training run, and what of it is shown."""

    inspect: InspectSettings
    training: RunConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """`yeonma generate`."""

    adapter: AdapterSettings
    generate: GenerateSettings
    answer: AnswerSettings


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """`yeonma chat`."""

    adapter: AdapterSettings
    answer: AnswerSettings


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`yeonma compare`."""

    compare: CompareSettings
    answer: AnswerSettings


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The bundled sample, end to end."""

    output_dir: str = "demo"
    """The folder for the adapter and everything else that the demo makes."""
    max_steps: int | None = field(default=None, metadata=COUNT)
    """Stop after this many steps. Without it, as many as the sample needs."""
    model_dir: str | None = None
    """A local model folder to tune instead of fetching SmolLM2-135M-Instruct."""
    quick: bool = False
    """A short form that shows that everything runs, with too few steps to learn much."""
    overwrite: bool = False
    """Replace what another run left in `output_dir`."""


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

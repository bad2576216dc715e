"""All settings, as typed fields of frozen dataclasses. The docstring below a field is its help text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from yeonma.config.gpus import GPU_EXAMPLE, gpu_named
from yeonma.config.layer_ranges import RANGES_EXAMPLE, layer_ranges
from yeonma.config.loss_sum import SUM_EXAMPLE, LossName, weighted_losses
from yeonma.config.metric_names import BEST_EXAMPLE
from yeonma.config.ranges import (
    BATCH,
    BYTES,
    COUNT,
    DECAY,
    EPOCHS,
    FRACTION,
    NOT_NEGATIVE,
    PORT,
    POSITIVE,
    PROCESSES,
    RANK,
    RATIO,
    REQUESTS,
    ROWS,
    SEED,
    TOKENS,
    Range,
)
from yeonma.config.reward_settings import RewardSettings

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
Checkpointing = bool | Literal["selective"]
CheckpointingOrAuto = bool | Literal["selective", "auto"]
TorchCompile = bool | Literal["auto"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
Quantization = Literal["none", "int8", "nf4", "fp8"]
QuantizationOrAuto = Literal["auto", "none", "int8", "nf4", "fp8"]
SampleLanguage = Literal["en", "ko"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
TokenLoss = Literal["nll", "dft"]
Trained = Literal["lora", "full"]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where the rows come from and how they become text."""

    data_path: str | list[Any]
    """Training rows: a .jsonl, .ndjson, .json, .csv, .tsv, .xlsx, .parquet or .arrow file (text files also as .gz or .zst), a folder of them, a `save_to_disk` folder, a bundled sample (`sample:news_en`, `sample:news_ko`), or a data set on the hub (`name` or `name:config`). A list of them is a mixture; an entry `{path: chats.jsonl, weight: 2}` has settings of its own."""
    data_split: str = "train"
    """Split to read from a hub data set or from a folder with several splits. A slice such as `train[:1000]` or `train[10%:20%]` works for every kind of data."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files. It is never guessed."""
    delimiter: str | None = None
    """The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header."""
    columns: dict[str, str] | None = None
    """Maps template fields to columns with other names: `{document: body, answer: headline}`. `answer` is the template's last field; preference data also has `chosen`, `rejected` and `label`. `answers.text` is a value within a column, `json(output)` a value written as JSON."""
    template: str | None = None
    """Name of a built-in template, a template file, a bundled sample (`sample:title_en`), or the template text itself. By default, the built-in template whose fields match the columns."""
    val_set_size: float = field(default=0, metadata=NOT_NEGATIVE)
    """Rows to hold out of each data set for validation, as a count (1 or more) or a fraction (below 1). `seed` decides which."""
    val_data_path: str | list[Any] | None = None
    """Separate validation rows, in any format that `data_path` accepts; a list for a list. Slices in `data_split` do not apply to them."""
    val_split: str | None = None
    """Validation rows from another split of the same data, such as `validation`, or from a slice such as `train[90%:]`."""
    max_rows: int | None = field(default=None, metadata=ROWS)
    """Read only this many training rows of each data set, from the first on. Rows for `val_set_size` are drawn among them."""
    replay: str | dict[str, Any] | None = None
    """General rows to train on beside the others, so that the model keeps what it knew: a path in any format of `data_path`, or an entry `{path: chats.jsonl, template: chat}`. They follow none of the settings above."""
    replay_share: float = field(default=0.1, metadata={"range": Range(above=0, below=1)})
    """The share of each step's examples that are rows of `replay`. An epoch still has every other row once."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read, does not fit the template or is refused by the model's chat template. error: stop the run. skip: leave it out and count it; the other rows keep their numbers."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """How text becomes tokens."""

    cutoff_len: int = field(default=2048, metadata=TOKENS)
    """Maximum number of tokens in prompt and answer together. Longer rows are shortened in one prompt field, never in the answer."""
    shrink: str | None = None
    """The prompt field to shorten. By default, the longest one in the row."""
    shrink_side: Literal["end", "start", "middle"] = "end"
    """Which part of the field to remove: the end, the start or the middle."""
    over_limit: Literal["drop", "error"] = "drop"
    """What to do with a row whose frame and answer alone exceed `cutoff_len`. drop: leave it out and count it. error: stop the run."""
    train_on_inputs: bool = False
    """Train on the prompt as well as the answer."""
    add_eos_token: bool = True
    """End every answer with the tokenizer's end-of-sequence token and train on it."""
    train_on: Literal["all", "last", "marked"] = "all"
    """Which assistant turns of a conversation are trained. all: every turn that is not marked with weight 0 (`weight`, `loss` or `train`). last: only the last one. marked: only turns marked with a weight above 0."""
    thinking: Literal["auto", "keep", "drop", "empty"] = "auto"
    """Reasoning in assistant turns (`reasoning_content`, `thinking`, or a <think> block). auto: trained where a row has it; elsewhere what the model's chat template writes. keep: as auto, but rows without reasoning get no empty think block. drop: never trained. empty: rows without reasoning get an empty think block."""
    row_weights: str | None = None
    """The column with each row's weight in the loss: a number from 0 up, which multiplies the weights of its turns. Rows with weight 0 are left out. By default, all rows weigh 1."""
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None
    """Arguments of the model's chat template, such as `{enable_thinking: false}`. A column of this name overrides them row by row."""
    parse_special_tokens: bool = False
    """Turn special-token text in the data, such as <|im_end|>, into these tokens: for text that was formatted with them. By default it is encoded as ordinary text, and counted."""
    cache_dir: str | None = None
    """Folder for cached tokenised data and the SHA-256 of base models. By default, $YEONMA_CACHE or ~/.cache/yeonma."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model and how it is loaded."""

    base_model: str
    """The model to fine-tune: a name on the hub or a local folder. An adapter folder stands for its base model with that adapter applied."""
    model_revision: str | None = None
    """Branch, tag or commit of the base model on the hub."""
    adapter: str | None = None
    """Adapter folder to continue training from. Its rank, alpha, dropout, target modules, new tokens and whole modules are used; of these only `lora_dropout` may be changed."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with the model. When off, such a model is refused."""
    train: Trained = "lora"
    """What is trained. lora: an adapter on the frozen base. full: all weights of the base (full fine-tuning), so that the output folder is a model of its own. A full run needs 16 bytes of memory per parameter beside activations, 18 with bfloat16."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the frozen weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU. With `train` full and bfloat16, the optimizer updates float32 copies of the weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: the GPU if there is one."""
    quantization: Quantization = "none"
    """Quantise the frozen weights of linear layers: int8, nf4 (4-bit with double quantisation) or fp8. Uses less memory and changes the result. int8 and nf4 need bitsandbytes; fp8 is fast on GPUs of compute capability 8.9 or higher."""
    shard: bool = False
    """Shard the base's weights over several processes (FSDP2), to train a model too large for one GPU; with `train` full, gradients and averages as well. Slower for a model that fits on one; the result is the same."""
    gradient_checkpointing: CheckpointingOrAuto = False
    """Recompute activations in the backward pass: less memory, about a third more time. selective: only in every other layer. auto: chosen from the memory forecast."""
    torch_compile: TorchCompile = "auto"
    """Compile norms, SwiGLU and rotary embeddings with torch.compile. Takes a few seconds at the start; results agree to rounding. auto: on a GPU only."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The LoRA adapter (Hu et al. 2021, arXiv:2106.09685), built with PEFT."""

    lora_r: int = field(default=16, metadata=RANK)
    """Rank of the adapter."""
    lora_alpha: float = field(default=16, metadata=POSITIVE)
    """Scale of the adapter: its output is multiplied by `lora_alpha / lora_r`."""
    lora_dropout: float = field(default=0.0, metadata=DECAY)
    """Dropout on the adapter's input. Tokens shared by several examples share one mask (see `share_prefix`)."""
    lora_target_modules: list[str] | str = "all-linear"
    """Layers to adapt: `all-linear`, or names such as `[gate_proj, down_proj, up_proj]`. A name is the end of a layer's path, a module (`shared_experts`) or a pattern with `*`. all-linear is every linear layer of the language model but routers and the head. Routers, the head, and vision and audio towers need their own name: `gate`, `lm_head`, `vision_tower.*`."""
    lora_experts: bool = True
    """Whether `all-linear`, and names that routed experts share with other layers, also adapt the routed experts of a mixture of experts. A name of their own, such as `experts`, reaches them anyway."""
    lora_layers: list[int] | int | str | None = field(
        default=None, metadata={**NOT_NEGATIVE, "check": layer_ranges, "also": RANGES_EXAMPLE}
    )
    """Adapt only these layers of the language model, counted from 0: `0-11`, or `0-3,8,10-`. The head and towers, which their own names reach, are not among them. By default, all layers."""
    exclude_modules: list[str] | str | None = None
    """Layers to leave without an adapter, although `lora_target_modules` reaches them: names in the same forms."""
    new_tokens: list[str] | str | None = None
    """Tokens to add to the tokenizer, as a list such as `[<a>, <b>]` or a file with one a line. Only their rows of the embedding and the head are trained, beside the adapter; they begin as the mean of all rows."""
    modules_to_save: list[str] | str | None = None
    """Modules to train whole beside the adapter, as PEFT's setting of this name: `[lm_head]`, `[embed_tokens]`, `[norm]`. An embedding and a head that share their weight are trained together."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(lora_r)` instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction separately (DoRA, Liu et al. 2024, arXiv:2402.09353)."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What one training step computes, and how fast."""

    batch_size: int = field(default=16, metadata=BATCH)
    """Examples, or pairs, in one step over all processes. Any number works."""
    micro_batch_size: int = field(default=4, metadata=BATCH)
    """Maximum number of examples, or pairs, in one forward pass. Affects memory and speed, never the result."""
    micro_batch_tokens: int | Literal["auto"] | None = field(default=None, metadata=COUNT)
    """Maximum number of tokens in one forward pass; a longer example is processed alone. auto: as many as the memory forecast allows, tried out before the first step; `micro_batch_size` is then ignored."""
    share_prefix: bool = True
    """Compute a prefix shared by examples of a micro-batch only once, from 16 tokens on. The prompt of a pair is always shared."""
    num_epochs: float = field(default=3, metadata=EPOCHS)
    """Passes over the training rows. Fractions are allowed."""
    max_steps: int | None = field(default=None, metadata=COUNT)
    """Stop after this many steps. Overrides `num_epochs`."""
    learning_rate: float = field(default=2e-4, metadata=POSITIVE)
    """Peak learning rate, reached after the warm-up. Other defaults: 1e-5 for `yeonma dpo`, and with `train` full 2e-5 and, for dpo, 1e-6."""
    lr_scheduler: LrScheduler = "linear"
    """Learning rate schedule, by its name in transformers."""
    lr_scheduler_kwargs: dict[str, int | float | str] | None = None
    """Extra arguments of the schedule, such as `{num_cycles: 2}`."""
    warmup_steps: int = field(default=0, metadata=NOT_NEGATIVE)
    """Steps until the learning rate reaches its peak. Overrides `warmup_ratio`."""
    warmup_ratio: float = field(default=0.0, metadata=FRACTION)
    """Warm-up as a fraction of all steps."""
    token_loss: TokenLoss = "nll"
    """Loss of a token in supervised fine-tuning. nll: its negative log-likelihood. dft: that times the token's own probability, without gradient (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629). Evaluations always use nll."""
    optimizer: Optimizer = "adamw"
    """adamw, adamw_8bit (both moments in 8 bits; Dettmers et al. 2021, arXiv:2110.02861), or paged_adamw_8bit, whose state the GPU can page out. The 8-bit optimizers need bitsandbytes and a GPU."""
    loraplus_ratio: float | None = field(default=None, metadata=RATIO)
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): matrix B of the adapter learns at this many times the learning rate of A, which is `learning_rate`. The paper uses 16. By default, both learn alike."""
    weight_decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight decay of AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101). With `train` full, only matrices have it, not biases and norms."""
    adam_beta1: float = field(default=0.9, metadata=DECAY)
    """AdamW's decay rate for the mean of the gradient."""
    adam_beta2: float = field(default=0.999, metadata=DECAY)
    """AdamW's decay rate for the mean of the squared gradient."""
    adam_epsilon: float = field(default=1e-8, metadata=POSITIVE)
    """Term added to AdamW's denominator for numerical stability."""
    max_grad_norm: float = field(default=1.0, metadata=NOT_NEGATIVE)
    """Clip gradients to this norm. 0 turns clipping off."""
    group_by_length: bool = False
    """Put rows of similar length into the same step. This only evens out step times: there is no padding to save."""
    seed: int = field(default=42, metadata=SEED)
    """Random seed for adapter initialisation, row order, the validation split and dropout."""


ADAPTER_SETTINGS = frozenset(setting.name for setting in fields(LoraSettings)) | {"loraplus_ratio"}
"""Settings that full fine-tuning does not have."""


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """Training on preferences. Options that the chosen `loss` does not use are refused."""

    loss: LossName | str = field(default="sigmoid", metadata={"check": weighted_losses, "also": SUM_EXAMPLE})
    """Loss function, or a weighted sum such as `sigmoid:1,sft:0.5`. sigmoid is DPO (Rafailov et al. 2023, arXiv:2305.18290). simpo, cpo, orpo and sft need no reference model. kto, apo_zero_unpaired and bco take single answers with a `label` of true or false instead of pairs."""
    beta: float = field(default=0.1, metadata=POSITIVE)
    """Scale of the rewards. Higher values keep the model closer to the reference."""
    label_smoothing: float = field(default=0.0, metadata={"range": Range(at_least=0, below=0.5)})
    """Assumed fraction of pairs whose labels are flipped, for sigmoid (conservative DPO), sigmoid_norm, robust, aot, aot_unpaired, cpo and simpo. exo_pair needs a value above 0; its paper uses 0.001."""
    sft_weight: float | None = field(default=None, metadata=NOT_NEGATIVE)
    """Weight of the chosen answer's negative log-likelihood per token, added to the loss. By default, 1 for cpo and orpo, otherwise 0."""
    simpo_gamma: float = field(default=0.5, metadata=NOT_NEGATIVE)
    """Target reward margin of simpo (Meng et al. 2024, arXiv:2405.14734)."""
    discopop_tau: float = field(default=0.05, metadata=POSITIVE)
    """Temperature of discopop: over what range of margins it changes from the exponential to the logistic loss (Lu et al. 2024, arXiv:2406.08414)."""
    f_divergence: Divergence = "reverse_kl"
    """Divergence from the reference that the rewards stand for (f-DPO, Wang et al. 2023, arXiv:2309.16240), for sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair and discopop. reverse_kl is DPO's own."""
    f_alpha: float = field(default=0.5, metadata=POSITIVE)
    """The alpha of `f_divergence` alpha: near 0 like forward_kl, 1 is reverse_kl."""
    wpo_weights: bool = False
    """Weight each pair by how likely the model itself would write its answers (WPO, Zhou et al. 2024, arXiv:2406.11827). Not for aot and aot_unpaired."""
    kto_desirable_weight: float = field(default=1.0, metadata=POSITIVE)
    """Weight of answers labelled true in kto, apo_zero_unpaired and bco (Ethayarajh et al. 2024, arXiv:2402.01306)."""
    kto_undesirable_weight: float = field(default=1.0, metadata=POSITIVE)
    """Weight of answers labelled false. Lower it when there are many of them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Evaluation on the validation rows."""

    eval_steps: int | None = field(default=None, metadata=COUNT)
    """Steps between evaluations. By default, evaluate after every epoch. The model is always evaluated before the first step and after the last."""
    keep_best: bool | str = field(default=True, metadata={"also": BEST_EXAMPLE})
    """Save the adapter with the lowest validation loss instead of the last one, or the one that is best by a metric of `answer_metrics`: `exact`, or what your function gives."""
    early_stopping_patience: int | None = field(default=None, metadata=COUNT)
    """Stop after this many evaluations in a row without a lower validation loss."""
    early_stopping_threshold: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Minimum decrease of the loss that counts as lower."""
    answer_metrics: list[str] | str | None = None
    """Generate answers to validation rows at every evaluation, and measure them: exact, chrf, rougeL, json, or `FILE.py:function` for a function of your own, `(row, answer) -> number or dict of numbers`. accuracy and f1 are those of labels. Several with commas between them."""
    answer_rows: int = field(default=32, metadata=COUNT)
    """Validation rows to answer at every evaluation for `answer_metrics`."""
    card_rows: int = field(default=5, metadata=NOT_NEGATIVE)
    """Validation rows to answer before and after training, for the model card. 0 turns this off."""
    general_questions: int | None = field(default=None, metadata=NOT_NEGATIVE)
    """General questions, English and Korean, that base and trained model are asked for the model card, which then says what was kept (`yeonma compare` asks all 64). By default 24, or none with `card_rows` 0."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Output, checkpoints and logging."""

    output_dir: str
    """Folder for the adapter and the records of the run."""
    overwrite: bool = False
    """Replace what an earlier run left in `output_dir`."""
    save_steps: int | None = field(default=None, metadata=COUNT)
    """Steps between checkpoints. By default, write one after every epoch."""
    save_total_limit: int | None = field(default=None, metadata=COUNT)
    """Keep only this many of the newest checkpoints, plus the best one."""
    resume_from_checkpoint: str = "latest"
    """Continue from `latest` in `output_dir`, from a given checkpoint folder, or from `none`."""
    time_limit: str | None = None
    """Stop before this much time has passed, with a checkpoint and exit status 75: `11h30m`, `90m`, `45s` or `1:30:00`. Run the same command again to continue."""
    logging_steps: int | Literal["auto"] = field(default="auto", metadata=COUNT)
    """Steps between printed and reported metrics. auto: a live line on a terminal, about a hundred lines elsewhere; trackers get every step. metrics.jsonl records every step anyway."""
    report_to: list[Tracker] | Tracker | Literal["none"] = "none"
    """Trackers that also receive the metrics: tensorboard, wandb, trackio, mlflow. Each must be installed."""
    run_name: str | None = None
    """Name of the run in the trackers. By default, the name of `output_dir`."""
    nproc: int = field(default=1, metadata=PROCESSES)
    """Number of processes to start on this machine. Under torchrun, torchrun decides."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a training run, by group. Built once, then passed down."""

    data: DataSettings
    tokens: TokenSettings
    model: ModelSettings
    lora: LoraSettings
    step: StepSettings
    preference: PreferenceSettings | None = None
    """None for supervised fine-tuning."""
    reward: RewardSettings | None = None
    """None unless the run learns from rewards."""
    evaluation: EvaluationSettings
    run: RunSettings
    given: frozenset[str] = field(default=frozenset(), compare=False)
    """Names of the settings that the user gave; all others have their defaults."""

    @property
    def objective(self) -> Literal["sft", "dpo", "grpo"]:
        """The verb whose settings these are."""
        if self.reward is not None:
            return "grpo"
        return "sft" if self.preference is None else "dpo"


TRAINING = (
    DataSettings,
    TokenSettings,
    ModelSettings,
    LoraSettings,
    StepSettings,
    EvaluationSettings,
    RunSettings,
)
"""The groups that every verb that trains reads."""
GROUPS: Mapping[str, tuple[type, ...]] = {
    "sft": TRAINING,
    "dpo": (*TRAINING, PreferenceSettings),
    "grpo": (*TRAINING, RewardSettings),
}
"""The groups that a verb that trains reads."""
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "sft": {},
    "dpo": {"learning_rate": 1e-5},
    "grpo": {"learning_rate": 1e-5, "train_on": "last", "num_epochs": 1, "keep_best": False},
}
"""Its defaults that differ from those of `yeonma sft`."""
FULL_LEARNING_RATES: Mapping[object, float] = {2e-4: 2e-5, 1e-5: 1e-6}
"""Default learning rate of a verb -> that of full fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """What to show. All training settings are accepted too: only the name of the command changes."""

    objective: Literal["sft", "dpo"] = "sft"
    """The training command to inspect for. It decides how rows are read and which settings apply."""
    rows: str | None = None
    """Rows to show: numbers such as `17,40` or `5-8`, `all`, or `none` for the audit alone. By default, the first three."""
    tokens: bool = False
    """Show rows token by token, with token ids."""
    json: bool = False
    """Print JSON lines: one object per example, then one with the key `audit`."""
    html: str | None = None
    """Also write everything to this file, as one web page that needs no network."""
    probe: bool = False
    """Load the model and measure time and memory on a few real steps instead of estimating them."""
    gpu: str | None = field(default=None, metadata={"check": gpu_named, "also": GPU_EXAMPLE})
    """Forecast the run for this GPU instead of the device of this machine: h200, h100, a100-80, a100-40, l40s, l4, t4, rtx5090, rtx4090, rtx3090, or the size of its memory, such as `24GB`."""
    price: float | None = field(default=None, metadata=POSITIVE)
    """Price of one GPU hour, in any currency. The forecast then shows what the run costs and what an hour buys."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The adapter to use."""

    adapter_dir: str
    """Output folder of a run, or one of its checkpoints. It records the base model, template and tokenizer."""
    base_model: str | None = None
    """Name or folder of the base model, if it has moved since training."""
    template: str | None = None
    """Template for an adapter that another tool made: a built-in template's name, a file, or the text itself. `chat` is the model's own chat template."""
    data_set: str | None = None
    """Ask with the template of this data set, if the adapter was trained on several. By default, the first one's."""
    adapter_weights: bool = True
    """Apply the adapter. When off, the base model answers the same prompts without it."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with the model. When off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU."""
    quantization: QuantizationOrAuto = "auto"
    """Quantisation of the frozen weights, as for training. auto: as in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: the GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """The folder to check, or the server to ask. Nothing in the folder changes."""

    adapter_dir: str
    """Output folder of a run, one of its checkpoints, or an adapter folder copied from there."""
    base_model: str | None = None
    """Name or folder of the base model, if it has moved since training."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with the model. When off, such a base model is not checked."""
    data_path: str | None = None
    """Data to check against what the adapter was trained on."""
    data_split: str = "train"
    """Split to read from a hub data set, or from a `save_to_disk` folder with several splits."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files, as in training."""
    served: str | None = None
    """Address of a server with OpenAI's API, such as `http://127.0.0.1:8000`: ask it the run's sample rows and say what differs from training, in place of the checks of the folder. $OPENAI_API_KEY is its key."""
    model: str | None = None
    """The model's name on that server. By default, the name of the folder, or the only model there."""
    json: bool = False
    """Print the findings as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What to answer, and where the answers go. Give one of `data_path`, `row` and `prompt`."""

    data_path: str | None = None
    """Rows to answer, in any format that training accepts."""
    data_split: str = "train"
    """Split to read from a hub data set, or from a `save_to_disk` folder with several splits."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files. It is never guessed."""
    delimiter: str | None = None
    """The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header."""
    columns: dict[str, str] | None = None
    """Maps template fields to columns with other names: `{document: body}`. By default, as in training."""
    limit: int | None = field(default=None, metadata=ROWS)
    """Answer at most this many rows, from the first on."""
    row: str | None = None
    """One row to answer, as JSON: `{"document": "..."}`."""
    prompt: str | None = None
    """Text to continue as it is, without the template."""
    output: str | None = None
    """File for the answers, as JSON lines. By default, standard output."""
    batch_size: int = field(default=32, metadata=BATCH)
    """Prompts to answer at once. Affects memory and speed, not the answers."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Which models to compare on which rows, and where the report goes."""

    models: list[str]
    """Models to compare, the baseline first: `--models BASE OUT OUT2`. Each is an adapter folder or a model (a name on the hub or a folder). A single model is measured on its own."""
    data_path: str
    """Rows that none of the models was trained on, in any format that training accepts. Rows without a reference answer are answered too."""
    data_split: str = "train"
    """Split to read from a hub data set, or from a `save_to_disk` folder with several splits."""
    data_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    encoding: str = "utf-8"
    """Character encoding of text files. It is never guessed."""
    delimiter: str | None = None
    """The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header."""
    columns: dict[str, str] | None = None
    """Maps template fields to columns with other names: `{document: body, answer: headline}`. By default, as in training."""
    template: str | None = None
    """Template for models that have none of their own: a built-in template's name, a file, or the text itself. By default, that of the first adapter or fully fine-tuned model, or the one that matches the columns."""
    rows: int | None = field(default=None, metadata=ROWS)
    """Compare on at most this many rows, from the first on."""
    general_questions: int = field(default=64, metadata=NOT_NEGATIVE)
    """General questions, English and Korean, that every model is asked, to see what it kept of the first one. 0 turns this off."""
    output_dir: str = "report"
    """Folder for report.html, report.json, answers.jsonl and judge.jsonl. The same command continues from the answers and verdicts already there."""
    base_model: str | None = None
    """Name or folder of the adapters' base model, if it has moved since training."""
    data_set: str | None = None
    """Ask the adapters with the template of this data set, if they were trained on several. By default, the first one's."""
    batch_size: int = field(default=32, metadata=BATCH)
    """Prompts to answer at once. Affects memory and speed, not the answers."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with a model. When off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU."""
    quantization: QuantizationOrAuto = "auto"
    """Quantisation of the frozen weights, as for training. auto: as in each adapter's training; a base model alone follows the first adapter trained on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: the GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Which benchmarks to run, and how; the names are those of lm-evaluation-harness."""

    adapter_dir: str
    """Output folder of a run, or one of its checkpoints."""
    tasks: list[str]
    """Tasks and groups of lm-evaluation-harness: `kmmlu,gsm8k` or `kmmlu gsm8k`, patterns such as `kmmlu_*`, or task files (.yaml). Their data come from the hub."""
    include_path: str | None = None
    """Folder with task files (.yaml) of your own."""
    num_fewshot: int | None = field(default=None, metadata=NOT_NEGATIVE)
    """Number of examples before each question. By default, each task's own."""
    limit: float | None = field(default=None, metadata=POSITIVE)
    """Ask only the first questions of each task: a count (1 or more) or a fraction (below 1)."""
    apply_chat_template: bool = False
    """Ask through the chat template of the base model."""
    fewshot_as_multiturn: bool = True
    """With `apply_chat_template`, give the examples as turns of a conversation instead of in one user turn."""
    system_instruction: str | None = None
    """System message, or text before each question."""
    gen_kwargs: dict[str, bool | int | float | str] | None = None
    """Settings of generated answers, in place of the tasks' own: `{max_gen_toks: 512}`."""
    base: bool = True
    """Ask the base model the same questions, and show the difference. When off, only the fine-tuned model is asked."""
    output: str | None = None
    """File for the results, as JSON. By default, eval.json in the run's folder; that of a checkpoint is eval-checkpoint-10.json beside it."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute the code which the model writes. When off, they are refused."""
    batch_size: int = field(default=32, metadata=BATCH)
    """Generated answers at once. Affects memory and speed, not the answers."""
    base_model: str | None = None
    """Name or folder of the base model, if it has moved since training."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with a model. When off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU."""
    quantization: QuantizationOrAuto = "auto"
    """Quantisation of the frozen weights, as for training. auto: as in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: the GPU if there is one."""
    json: bool = False
    """Print the scores as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Which model judges the answers of a comparison, and how it is asked."""

    judge: str | None = None
    """Address of a server with OpenAI's API whose model judges the answers in pairs, each pair in both orders: `http://127.0.0.1:8000` or `https://api.openai.com/v1`. The rows' prompts and answers are sent there."""
    judge_model: str | None = None
    """The judge's name on its server."""
    rubric: str | None = None
    """Text file that tells the judge how to judge, with the places `{question}`, `{first}`, `{second}` and, if wanted, `{reference}`. By default, a built-in one: in Korean if more than a fifth of the letters of the data are Hangul, else in English."""
    judge_reference: bool = True
    """Show the judge the row's reference answer."""
    judge_tokens: int = field(default=512, metadata=COUNT)
    """Maximum number of tokens of a verdict. A judge that reasons first needs more."""
    judge_requests: int = field(default=4, metadata=REQUESTS)
    """Requests to the judge at once. Affects only speed."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How answers are generated."""

    max_new_tokens: int = field(default=128, metadata=COUNT)
    """Maximum number of tokens to generate. Prompts are shortened to leave room for them."""
    temperature: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """0 always takes the most likely token (greedy decoding). Higher values sample more freely."""
    top_p: float = field(default=1.0, metadata={"range": Range(above=0, at_most=1)})
    """Sample only from the most likely tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751)."""
    top_k: int = field(default=0, metadata=NOT_NEGATIVE)
    """Sample only from the k most likely tokens. 0 turns this off."""
    repetition_penalty: float = field(default=1.0, metadata=POSITIVE)
    """Values above 1 make tokens that already occurred less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    seed: int = field(default=42, metadata=SEED)
    """Random seed for sampling. The same prompt and seed give the same answer."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`yeonma inspect`: what to show, and the settings of the training run."""

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
    judging: JudgeSettings
    answer: AnswerSettings


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The demo: fine-tune a small model on the bundled sample."""

    output_dir: str = "demo"
    """Folder for the adapter and everything else the demo writes."""
    sample: SampleLanguage = "en"
    """Language of the articles and titles: en, on SmolLM2-135M-Instruct, or ko, on Qwen3-0.6B, which knows Korean and comes from the hub alone. The sample of preference pairs is English."""
    max_steps: int | None = field(default=None, metadata=COUNT)
    """Stop after this many steps. By default, as many as the sample needs."""
    model_dir: str | None = None
    """Local model folder to fine-tune instead of downloading a model."""
    quick: bool = False
    """Run only a few steps: enough to see that everything works, too few to learn much."""
    overwrite: bool = False
    """Replace what an earlier run left in `output_dir`."""


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Which file of another tool to convert."""

    file: str
    """YAML file of LLaMA-Factory or Axolotl."""
    output: str | None = None
    """File for the settings. By default, they are printed."""
    dataset_dir: str | None = None
    """Folder of LLaMA-Factory's dataset_info.json, where its data sets are described. By default, the file's own `dataset_dir`, or `data`."""
    nproc: int = field(default=1, metadata=PROCESSES)
    """Number of processes, or GPUs, that the file was used with: their examples together make a step."""


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What to look at."""

    hub: bool = True
    """Ask the hub whether it answers: at most 5 seconds."""
    cache_dir: str | None = None
    """Folder of the cache. By default, $YEONMA_CACHE or ~/.cache/yeonma."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What to show or delete of the cache."""

    action: Literal["list", "clean"] = "list"
    """`list` shows what the cache holds. `clean` shows what it would delete, and deletes it with `--yes true`."""
    kind: Literal[
        "all",
        "tokens",
        "references",
        "general",
        "forecasts",
        "weight_sums",
        "tokenizers",
        "converter",
        "models",
        "unfinished",
    ] = "all"
    """Only entries of this kind. all: every kind, but `clean` leaves the models, which adapters that were trained from them need."""
    older_than: str | None = None
    """Only entries that were last used this long ago: `12h`, `30d` or `8w`. By default, all."""
    yes: bool = False
    """Delete. When off, nothing is deleted. What a running command uses is never deleted."""
    cache_dir: str | None = None
    """Folder of the cache. By default, $YEONMA_CACHE or ~/.cache/yeonma."""


@dataclass(frozen=True, kw_only=True)
class CompletionSettings:
    """For which shell."""

    shell: Literal["bash", "zsh"]
    """Shell to write the script for: put `eval "$(yeonma completion bash)"` into ~/.bashrc, or the same with zsh into ~/.zshrc."""


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """What to upload to the hub, and who can see it there."""

    folder: str
    """Output folder of a run, one of its checkpoints, or a merged model."""
    repo: str
    """Repository on the hub: `owner/name`, or a name in your own account. It is created if it does not exist."""
    public: bool = False
    """Make the repository public. When off, it is private, and an existing public repository is refused."""
    base_model: str | None = None
    """Name of the base model on the hub, if training used a local folder. The uploaded files name it."""
    hide_paths: bool = False
    """Shorten each absolute path in the files to its last part, and hide home directories and the names of this machine's user and host. When off, files with these are refused."""
    message: str = "Upload with Yeonma"
    """Commit message."""
    dry_run: bool = False
    """Show what would be uploaded without uploading it."""
    yes: bool = False
    """Upload without asking. Required when there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Serve adapters over an OpenAI-compatible API."""

    adapter_dirs: list[str]
    """Adapter folders, all of one base model: `yeonma serve OUT OUT2`; or one fully fine-tuned model. A request's `model` is the name of a folder or of the base model."""
    host: str = "127.0.0.1"
    """Address to listen on. An address that other machines can reach, such as 0.0.0.0, requires an `api_key`."""
    port: int = field(default=8000, metadata=PORT)
    """Port to listen on. 0 picks a free port and prints it."""
    api_key: str | None = None
    """Key that requests must send. Prefer $YEONMA_API_KEY: other users of the machine can read command lines."""
    engine: Literal["auto", "yeonma", "vllm"] = "auto"
    """Inference engine. auto: vLLM if it is installed, there is a GPU, and it would send the trained prompt tokens; otherwise Yeonma itself."""
    max_new_tokens: int = field(default=128, metadata=COUNT)
    """Maximum number of tokens to generate, unless the request sets it."""
    max_new_tokens_limit: int = field(default=1024, metadata=COUNT)
    """Highest number of tokens that a request may ask for."""
    temperature: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Sampling temperature, unless the request sets it. 0 always takes the most likely token (greedy decoding)."""
    batch_size: int = field(default=16, metadata=BATCH)
    """Answers to generate at once. Affects memory and speed, not the answers."""
    base_model: str | None = None
    """Name or folder of the base model, if it has moved since training."""
    template: str | None = None
    """Template for adapters that another tool made: a built-in template's name, a file, or the text itself. `chat` is the model's own chat template."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with the model. When off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU."""
    quantization: QuantizationOrAuto = "auto"
    """Quantisation of the frozen weights, as for training. auto: as in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on. auto: the GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class StudioSettings:
    """Look at runs and at rows in the browser."""

    root: list[str] | None = None
    """Folders that the studio may look into: `--root runs data`. By default, the working directory."""
    host: str = "127.0.0.1"
    """Address to listen on. An address that other machines can reach, such as 0.0.0.0, requires $YEONMA_API_KEY."""
    port: int = field(default=8765, metadata=PORT)
    """Port to listen on. 0 picks a free port and prints it."""
    lang: Literal["auto", "en", "ko"] = "auto"
    """Language of the pages. auto: that of the terminal, as for help."""
    allow_code: bool = False
    """Allow resuming runs whose settings let them execute code: `trust_remote_code`, and `answer_metrics` and `reward` with functions in Python files."""


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What to merge, where to write it, and how to check it."""

    adapter_dir: str
    """Output folder of a run, or one of its checkpoints."""
    output_dir: str
    """Folder to create for the merged model."""
    base_model: str | None = None
    """Name or folder of the base model, if it has moved since training or is quantised there."""
    template: str | None = None
    """Template for an adapter that another tool made: a built-in template's name, a file, or the text itself. `chat` is the model's own chat template. Without one, the merged model has none either."""
    max_shard_bytes: int = field(default=5_000_000_000, metadata=BYTES)
    """Maximum size of one weight file in bytes. Merging needs about this much memory."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with the model. When off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type for comparing the two models. auto: float32 if it fits into memory, otherwise the base model's own. The merged weights always keep theirs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for comparing the two models. auto: the GPU if there is one. Merging itself runs on the CPU."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to write for other programs, and where."""

    model_dir: str
    """Output folder of a run, one of its checkpoints, or a merged model. An adapter is merged first."""
    output_dir: str
    """Folder to create for the files."""
    format: Literal["gguf", "ollama", "lora"] = "gguf"
    """gguf: one file for llama.cpp and compatible programs. ollama: a Modelfile as well, with template, stop texts and parameters. lora: the adapter alone, for a llama.cpp server that has its base."""
    outtype: Literal["f16", "bf16", "f32", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = "f16"
    """Data type of the weights in the file. q8_0 takes about half the space of f16, q4_k_m less than a third; q4_k_m, q5_k_m and q6_k are made by llama.cpp's own quantiser."""
    base_model: str | None = None
    """Name or folder of the base model, if it has moved since training or is quantised there."""
    template: str | None = None
    """Template for an adapter that another tool made, as for `yeonma merge`. `--format ollama` needs one."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with the model. When off, such a model is refused."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type for comparing the merged model with the original, as for `yeonma merge`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device for comparing them. auto: the GPU if there is one."""

"""Written by scripts/python_stub.py from the settings (`make docs`)."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypeAlias

from yeonma.data.template import Template as Template
from yeonma.errors import UserError as UserError
from yeonma.policy import Policy as Policy
from yeonma.python_api.results import (CompareResult, ExportResult, GenerateResult, InspectResult, MergeResult, PushResult, RunResult, VerifyResult)
from yeonma.train.interrupt import Stopped as Stopped

StrPath: TypeAlias = str | PathLike[str]
Data: TypeAlias = StrPath | Sequence[Any] | Any
"""A path, a list of dicts, a pandas or polars DataFrame, a `datasets.Dataset`, or a list of these."""

__version__: str
Loaded = Policy

def load(
    adapter_dir: StrPath,
    *,
    base_model: StrPath | None = None,
    template: StrPath | None = None,
    data_set: str | None = None,
    adapter_weights: bool = True,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: Literal["auto", "none", "int8", "nf4", "fp8"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Policy:
    """Load an adapter folder and its base model for generation."""

def compare(
    *,
    models: Sequence[StrPath],
    data_path: Data,
    data_split: str = "train",
    data_revision: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    columns: dict[str, str] | None = None,
    template: StrPath | None = None,
    rows: int | None = None,
    output_dir: StrPath = "report",
    base_model: StrPath | None = None,
    data_set: str | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: Literal["auto", "none", "int8", "nf4", "fp8"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    judge: str | None = None,
    judge_model: str | None = None,
    rubric: str | None = None,
    judge_reference: bool = True,
    judge_tokens: int = 512,
    judge_requests: int = 4,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    config: StrPath | None = None,
) -> CompareResult:
    """Compare models on the same rows and write a report. Takes data as `sft`.

    Returns the report: scores, answers, and the page to open. Raises UserError, where possible before weights are
    loaded. After an interrupt the same call goes on from the answers so far.

    Settings:
        models: Models to compare, the baseline first: `--models BASE OUT OUT2`. Each is an adapter folder or a model (a name on the hub or a folder). A single model is measured on its own. (a list such as [a, b]; required)
        data_path: Rows that none of the models was trained on, in any format that training accepts. Rows without a reference answer are answered too. (required)
        data_split: Split to read from a hub data set, or from a `save_to_disk` folder with several splits. (default train)
        data_revision: Branch, tag or commit of a hub data set.
        encoding: Character encoding of text files. It is never guessed. (default utf-8)
        delimiter: The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header.
        columns: Maps template fields to columns with other names: `{document: body, answer: headline}`. By default, as in training. (a mapping such as {a: b}, with a space after each colon)
        template: Template for models that have none of their own: a built-in template's name, a file, or the text itself. By default, that of the first adapter or fully fine-tuned model, or the one that matches the columns.
        rows: Compare on at most this many rows, from the first on. (a whole number of at least 1)
        output_dir: Folder for report.html, report.json, answers.jsonl and judge.jsonl. The same command continues from the answers and verdicts already there. (default report)
        base_model: Name or folder of the adapters' base model, if it has moved since training.
        data_set: Ask the adapters with the template of this data set, if they were trained on several. By default, the first one's.
        batch_size: Prompts to answer at once. Affects memory and speed, not the answers. (a whole number of at least 1; default 32)
        trust_remote_code: Allow running Python code that comes with a model. When off, such a model is refused. (true or false; default False)
        dtype: Data type of the weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU. (one of auto, float32, bfloat16, float16; default auto)
        quantization: Quantisation of the frozen weights, as for training. auto: as in each adapter's training; a base model alone follows the first adapter trained on it. (one of auto, none, int8, nf4, fp8; default auto)
        device: Device to run on. auto: the GPU if there is one. (one of auto, cpu, cuda; default auto)
        judge: Address of a server with OpenAI's API whose model judges the answers in pairs, each pair in both orders: `http://127.0.0.1:8000` or `https://api.openai.com/v1`. The rows' prompts and answers are sent there.
        judge_model: The judge's name on its server.
        rubric: Text file that tells the judge how to judge, with the places `{question}`, `{first}`, `{second}` and, if wanted, `{reference}`. By default, a built-in one: in Korean if more than a fifth of the letters of the data are Hangul, else in English.
        judge_reference: Show the judge the row's reference answer. (true or false; default True)
        judge_tokens: Maximum number of tokens of a verdict. A judge that reasons first needs more. (a whole number of at least 1; default 512)
        judge_requests: Requests to the judge at once. Affects only speed. (a whole number of at least 1 and at most 256; default 4)
        max_new_tokens: Maximum number of tokens to generate. Prompts are shortened to leave room for them. (a whole number of at least 1; default 128)
        temperature: 0 always takes the most likely token (greedy decoding). Higher values sample more freely. (a number of at least 0; default 0.0)
        top_p: Sample only from the most likely tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751). (a number above 0 and at most 1; default 1.0)
        top_k: Sample only from the k most likely tokens. 0 turns this off. (a whole number of at least 0; default 0)
        repetition_penalty: Values above 1 make tokens that already occurred less likely (Keskar et al. 2019, arXiv:1909.05858). (a number above 0; default 1.0)
        seed: Random seed for sampling. The same prompt and seed give the same answer. (a whole number of at least 0 and at most 4294967295; default 42)
        config: YAML file of settings. Keywords win over it.
    """

def dpo(
    *,
    data_path: Data,
    data_split: str = "train",
    data_revision: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    columns: dict[str, str] | None = None,
    template: StrPath | None = None,
    val_set_size: float = 0,
    val_data_path: Data | None = None,
    val_split: str | None = None,
    max_rows: int | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    cutoff_len: int = 2048,
    shrink: str | None = None,
    shrink_side: Literal["end", "start", "middle"] = "end",
    over_limit: Literal["drop", "error"] = "drop",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    train_on: Literal["all", "last", "marked"] = "all",
    thinking: Literal["auto", "keep", "drop", "empty"] = "auto",
    row_weights: str | None = None,
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None,
    parse_special_tokens: bool = False,
    cache_dir: StrPath | None = None,
    base_model: StrPath,
    model_revision: str | None = None,
    adapter: StrPath | None = None,
    trust_remote_code: bool = False,
    train: Literal["lora", "full"] = "lora",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none",
    shard: bool = False,
    gradient_checkpointing: bool | Literal["selective", "auto"] = False,
    torch_compile: bool | Literal["auto"] = "auto",
    lora_r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target_modules: list[str] | str = "all-linear",
    lora_experts: bool = True,
    lora_layers: list[int] | int | str | None = None,
    exclude_modules: list[str] | str | None = None,
    new_tokens: list[str] | str | None = None,
    modules_to_save: list[str] | str | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    batch_size: int = 16,
    micro_batch_size: int = 4,
    micro_batch_tokens: int | Literal["auto"] | None = None,
    share_prefix: bool = True,
    num_epochs: float = 3,
    max_steps: int | None = None,
    learning_rate: float = 1e-05,
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"] = "linear",
    lr_scheduler_kwargs: dict[str, int | float | str] | None = None,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    token_loss: Literal["nll", "dft"] = "nll",
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw",
    loraplus_ratio: float | None = None,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-08,
    max_grad_norm: float = 1.0,
    group_by_length: bool = False,
    seed: int = 42,
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "sft", "kto", "apo_zero_unpaired", "bco"] | str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float | None = None,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    f_alpha: float = 0.5,
    wpo_weights: bool = False,
    kto_desirable_weight: float = 1.0,
    kto_undesirable_weight: float = 1.0,
    eval_steps: int | None = None,
    keep_best: bool = True,
    early_stopping_patience: int | None = None,
    early_stopping_threshold: float = 0.0,
    card_rows: int = 5,
    output_dir: StrPath,
    overwrite: bool = False,
    save_steps: int | None = None,
    save_total_limit: int | None = None,
    resume_from_checkpoint: str = "latest",
    time_limit: str | None = None,
    logging_steps: int | Literal["auto"] = "auto",
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] | Literal["tensorboard", "wandb", "trackio", "mlflow"] | Literal["none"] = "none",
    run_name: str | None = None,
    nproc: int = 1,
    config: StrPath | None = None,
) -> RunResult:
    """Fine-tune a model on preference pairs or labelled answers. Takes data, returns and raises as `sft`.

    Settings:
        data_path: Training rows: a .jsonl, .ndjson, .json, .csv, .tsv, .xlsx, .parquet or .arrow file (text files also as .gz or .zst), a folder of them, a `save_to_disk` folder, a bundled sample (`sample:news_en`, `sample:news_ko`), or a data set on the hub (`name` or `name:config`). A list of them is a mixture; an entry `{path: chats.jsonl, weight: 2}` has settings of its own. (text or a list such as [a, b]; required)
        data_split: Split to read from a hub data set or from a folder with several splits. A slice such as `train[:1000]` or `train[10%:20%]` works for every kind of data. (default train)
        data_revision: Branch, tag or commit of a hub data set.
        encoding: Character encoding of text files. It is never guessed. (default utf-8)
        delimiter: The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header.
        columns: Maps template fields to columns with other names: `{document: body, answer: headline}`. `answer` is the template's last field; preference data also has `chosen`, `rejected` and `label`. `answers.text` is a value within a column, `json(output)` a value written as JSON. (a mapping such as {a: b}, with a space after each colon)
        template: Name of a built-in template, a template file, a bundled sample (`sample:title_en`), or the template text itself. By default, the built-in template whose fields match the columns.
        val_set_size: Rows to hold out of each data set for validation, as a count (1 or more) or a fraction (below 1). `seed` decides which. (a number of at least 0; default 0)
        val_data_path: Separate validation rows, in any format that `data_path` accepts; a list for a list. Slices in `data_split` do not apply to them. (text or a list such as [a, b])
        val_split: Validation rows from another split of the same data, such as `validation`, or from a slice such as `train[90%:]`.
        max_rows: Read only this many training rows of each data set, from the first on. Rows for `val_set_size` are drawn among them. (a whole number of at least 1)
        bad_rows: What to do with a row that cannot be read, does not fit the template or is refused by the model's chat template. error: stop the run. skip: leave it out and count it; the other rows keep their numbers. (one of error, skip; default error)
        cutoff_len: Maximum number of tokens in prompt and answer together. Longer rows are shortened in one prompt field, never in the answer. (a whole number of at least 1; default 2048)
        shrink: The prompt field to shorten. By default, the longest one in the row.
        shrink_side: Which part of the field to remove: the end, the start or the middle. (one of end, start, middle; default end)
        over_limit: What to do with a row whose frame and answer alone exceed `cutoff_len`. drop: leave it out and count it. error: stop the run. (one of drop, error; default drop)
        train_on_inputs: Train on the prompt as well as the answer. (true or false; default False)
        add_eos_token: End every answer with the tokenizer's end-of-sequence token and train on it. (true or false; default True)
        train_on: Which assistant turns of a conversation are trained. all: every turn that is not marked with weight 0 (`weight`, `loss` or `train`). last: only the last one. marked: only turns marked with a weight above 0. (one of all, last, marked; default all)
        thinking: Reasoning in assistant turns (`reasoning_content`, `thinking`, or a <think> block). auto: trained where a row has it; elsewhere what the model's chat template writes. keep: as auto, but rows without reasoning get no empty think block. drop: never trained. empty: rows without reasoning get an empty think block. (one of auto, keep, drop, empty; default auto)
        row_weights: The column with each row's weight in the loss: a number from 0 up, which multiplies the weights of its turns. Rows with weight 0 are left out. By default, all rows weigh 1.
        chat_template_kwargs: Arguments of the model's chat template, such as `{enable_thinking: false}`. A column of this name overrides them row by row. (a mapping such as {a: 1}, with a space after each colon)
        parse_special_tokens: Turn special-token text in the data, such as <|im_end|>, into these tokens: for text that was formatted with them. By default it is encoded as ordinary text, and counted. (true or false; default False)
        cache_dir: Folder for cached tokenised data and the SHA-256 of base models. By default, $YEONMA_CACHE or ~/.cache/yeonma.
        base_model: The model to fine-tune: a name on the hub or a local folder. An adapter folder stands for its base model with that adapter applied. (required)
        model_revision: Branch, tag or commit of the base model on the hub.
        adapter: Adapter folder to continue training from. Its rank, alpha, dropout, target modules, new tokens and whole modules are used; of these only `lora_dropout` may be changed.
        trust_remote_code: Allow running Python code that comes with the model. When off, such a model is refused. (true or false; default False)
        train: What is trained. lora: an adapter on the frozen base. full: all weights of the base (full fine-tuning), so that the output folder is a model of its own. A full run needs 16 bytes of memory per parameter beside activations, 18 with bfloat16. (one of lora, full; default lora)
        dtype: Data type of the frozen weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU. With `train` full and bfloat16, the optimizer updates float32 copies of the weights. (one of auto, float32, bfloat16, float16; default auto)
        device: Device to train on. auto: the GPU if there is one. (one of auto, cpu, cuda; default auto)
        quantization: Quantise the frozen weights of linear layers: int8, nf4 (4-bit with double quantisation) or fp8. Uses less memory and changes the result. int8 and nf4 need bitsandbytes; fp8 is fast on GPUs of compute capability 8.9 or higher. (one of none, int8, nf4, fp8; default none)
        shard: Shard the base's weights over several processes (FSDP2), to train a model too large for one GPU; with `train` full, gradients and averages as well. Slower for a model that fits on one; the result is the same. (true or false; default False)
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. selective: only in every other layer. auto: chosen from the memory forecast. (true or false or one of selective, auto; default False)
        torch_compile: Compile norms, SwiGLU and rotary embeddings with torch.compile. Takes a few seconds at the start; results agree to rounding. auto: on a GPU only. (true or false or one of auto; default auto)
        lora_r: Rank of the adapter. (a whole number of at least 1; default 16)
        lora_alpha: Scale of the adapter: its output is multiplied by `lora_alpha / lora_r`. (a number above 0; default 16)
        lora_dropout: Dropout on the adapter's input. Tokens shared by several examples share one mask (see `share_prefix`). (a number of at least 0 and below 1; default 0.0)
        lora_target_modules: Layers to adapt: `all-linear`, or names such as `[gate_proj, down_proj, up_proj]`. A name is the end of a layer's path, a module (`shared_experts`) or a pattern with `*`. all-linear is every linear layer of the language model but routers and the head. Routers, the head, and vision and audio towers need their own name: `gate`, `lm_head`, `vision_tower.*`. (a list such as [a, b] or text; default all-linear)
        lora_experts: Whether `all-linear`, and names that routed experts share with other layers, also adapt the routed experts of a mixture of experts. A name of their own, such as `experts`, reaches them anyway. (true or false; default True)
        lora_layers: Adapt only these layers of the language model, counted from 0: `0-11`, or `0-3,8,10-`. The head and towers, which their own names reach, are not among them. By default, all layers. (a list such as [a, b] or a whole number of at least 0 or numbers and ranges such as 0-3,8,10-)
        exclude_modules: Layers to leave without an adapter, although `lora_target_modules` reaches them: names in the same forms. (a list such as [a, b] or text)
        new_tokens: Tokens to add to the tokenizer, as a list such as `[<a>, <b>]` or a file with one a line. Only their rows of the embedding and the head are trained, beside the adapter; they begin as the mean of all rows. (a list such as [a, b] or text)
        modules_to_save: Modules to train whole beside the adapter, as PEFT's setting of this name: `[lm_head]`, `[embed_tokens]`, `[norm]`. An embedding and a head that share their weight are trained together. (a list such as [a, b] or text)
        use_rslora: Scale by `lora_alpha / sqrt(lora_r)` instead (Kalajdzievski 2023, arXiv:2312.03732). (true or false; default False)
        use_dora: Train magnitude and direction separately (DoRA, Liu et al. 2024, arXiv:2402.09353). (true or false; default False)
        batch_size: Examples, or pairs, in one step over all processes. Any number works. (a whole number of at least 1; default 16)
        micro_batch_size: Maximum number of examples, or pairs, in one forward pass. Affects memory and speed, never the result. (a whole number of at least 1; default 4)
        micro_batch_tokens: Maximum number of tokens in one forward pass; a longer example is processed alone. auto: as many as the memory forecast allows, tried out before the first step; `micro_batch_size` is then ignored. (a whole number of at least 1 or one of auto)
        share_prefix: Compute a prefix shared by examples of a micro-batch only once, from 16 tokens on. The prompt of a pair is always shared. (true or false; default True)
        num_epochs: Passes over the training rows. Fractions are allowed. (a number above 0; default 3)
        max_steps: Stop after this many steps. Overrides `num_epochs`. (a whole number of at least 1)
        learning_rate: Peak learning rate, reached after the warm-up. Other defaults: 1e-5 for `yeonma dpo`, and with `train` full 2e-5 and, for dpo, 1e-6. (a number above 0; default 1e-05)
        lr_scheduler: Learning rate schedule, by its name in transformers. (one of linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, greedy; default linear)
        lr_scheduler_kwargs: Extra arguments of the schedule, such as `{num_cycles: 2}`. (a mapping such as {a: 1}, with a space after each colon)
        warmup_steps: Steps until the learning rate reaches its peak. Overrides `warmup_ratio`. (a whole number of at least 0; default 0)
        warmup_ratio: Warm-up as a fraction of all steps. (a number of at least 0 and at most 1; default 0.0)
        token_loss: Loss of a token in supervised fine-tuning. nll: its negative log-likelihood. dft: that times the token's own probability, without gradient (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629). Evaluations always use nll. (one of nll, dft; default nll)
        optimizer: adamw, adamw_8bit (both moments in 8 bits; Dettmers et al. 2021, arXiv:2110.02861), or paged_adamw_8bit, whose state the GPU can page out. The 8-bit optimizers need bitsandbytes and a GPU. (one of adamw, adamw_8bit, paged_adamw_8bit; default adamw)
        loraplus_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): matrix B of the adapter learns at this many times the learning rate of A, which is `learning_rate`. The paper uses 16. By default, both learn alike. (a number of at least 1)
        weight_decay: Weight decay of AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101). With `train` full, only matrices have it, not biases and norms. (a number of at least 0; default 0.0)
        adam_beta1: AdamW's decay rate for the mean of the gradient. (a number of at least 0 and below 1; default 0.9)
        adam_beta2: AdamW's decay rate for the mean of the squared gradient. (a number of at least 0 and below 1; default 0.999)
        adam_epsilon: Term added to AdamW's denominator for numerical stability. (a number above 0; default 1e-08)
        max_grad_norm: Clip gradients to this norm. 0 turns clipping off. (a number of at least 0; default 1.0)
        group_by_length: Put rows of similar length into the same step. This only evens out step times: there is no padding to save. (true or false; default False)
        seed: Random seed for adapter initialisation, row order, the validation split and dropout. (a whole number of at least 0 and at most 4294967295; default 42)
        loss: Loss function, or a weighted sum such as `sigmoid:1,sft:0.5`. sigmoid is DPO (Rafailov et al. 2023, arXiv:2305.18290). simpo, cpo, orpo and sft need no reference model. kto, apo_zero_unpaired and bco take single answers with a `label` of true or false instead of pairs. (one of sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, discopop, apo_zero, apo_down, simpo, cpo, orpo, sft, kto, apo_zero_unpaired, bco or a weighted sum such as sigmoid:1,sft:0.5; default sigmoid)
        beta: Scale of the rewards. Higher values keep the model closer to the reference. (a number above 0; default 0.1)
        label_smoothing: Assumed fraction of pairs whose labels are flipped, for sigmoid (conservative DPO), sigmoid_norm, robust, aot, aot_unpaired, cpo and simpo. exo_pair needs a value above 0; its paper uses 0.001. (a number of at least 0 and below 0.5; default 0.0)
        sft_weight: Weight of the chosen answer's negative log-likelihood per token, added to the loss. By default, 1 for cpo and orpo, otherwise 0. (a number of at least 0)
        simpo_gamma: Target reward margin of simpo (Meng et al. 2024, arXiv:2405.14734). (a number of at least 0; default 0.5)
        discopop_tau: Temperature of discopop: over what range of margins it changes from the exponential to the logistic loss (Lu et al. 2024, arXiv:2406.08414). (a number above 0; default 0.05)
        f_divergence: Divergence from the reference that the rewards stand for (f-DPO, Wang et al. 2023, arXiv:2309.16240), for sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair and discopop. reverse_kl is DPO's own. (one of reverse_kl, forward_kl, js, alpha; default reverse_kl)
        f_alpha: The alpha of `f_divergence` alpha: near 0 like forward_kl, 1 is reverse_kl. (a number above 0; default 0.5)
        wpo_weights: Weight each pair by how likely the model itself would write its answers (WPO, Zhou et al. 2024, arXiv:2406.11827). Not for aot and aot_unpaired. (true or false; default False)
        kto_desirable_weight: Weight of answers labelled true in kto, apo_zero_unpaired and bco (Ethayarajh et al. 2024, arXiv:2402.01306). (a number above 0; default 1.0)
        kto_undesirable_weight: Weight of answers labelled false. Lower it when there are many of them. (a number above 0; default 1.0)
        eval_steps: Steps between evaluations. By default, evaluate after every epoch. The model is always evaluated before the first step and after the last. (a whole number of at least 1)
        keep_best: Save the adapter with the lowest validation loss instead of the last one. (true or false; default True)
        early_stopping_patience: Stop after this many evaluations in a row without a lower validation loss. (a whole number of at least 1)
        early_stopping_threshold: Minimum decrease of the loss that counts as lower. (a number of at least 0; default 0.0)
        card_rows: Validation rows to answer before and after training, for the model card. 0 turns this off. (a whole number of at least 0; default 5)
        output_dir: Folder for the adapter and the records of the run. (required)
        overwrite: Replace what an earlier run left in `output_dir`. (true or false; default False)
        save_steps: Steps between checkpoints. By default, write one after every epoch. (a whole number of at least 1)
        save_total_limit: Keep only this many of the newest checkpoints, plus the best one. (a whole number of at least 1)
        resume_from_checkpoint: Continue from `latest` in `output_dir`, from a given checkpoint folder, or from `none`. (default latest)
        time_limit: Stop before this much time has passed, with a checkpoint and exit status 75: `11h30m`, `90m`, `45s` or `1:30:00`. Run the same command again to continue.
        logging_steps: Steps between printed and reported metrics. auto: a live line on a terminal, about a hundred lines elsewhere; trackers get every step. metrics.jsonl records every step anyway. (a whole number of at least 1 or one of auto; default auto)
        report_to: Trackers that also receive the metrics: tensorboard, wandb, trackio, mlflow. Each must be installed. (a list such as [tensorboard, wandb] or one of tensorboard, wandb, trackio, mlflow, none; default none)
        run_name: Name of the run in the trackers. By default, the name of `output_dir`.
        nproc: Number of processes to start on this machine. Under torchrun, torchrun decides. (a whole number of at least 1; default 1)
        config: YAML file of settings. Keywords win over it.
    """

def export(
    model_dir: StrPath,
    *,
    output_dir: StrPath,
    format: Literal["gguf", "ollama", "lora"] = "gguf",
    outtype: Literal["f16", "bf16", "f32", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = "f16",
    base_model: StrPath | None = None,
    template: StrPath | None = None,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    config: StrPath | None = None,
) -> ExportResult:
    """Export a fine-tuned model to llama.cpp or Ollama.

    Returns the files. Raises UserError as `merge`, and if the converter cannot be installed or does not support the
    model.

    Settings:
        model_dir: Output folder of a run, one of its checkpoints, or a merged model. An adapter is merged first. (required)
        output_dir: Folder to create for the files. (required)
        format: gguf: one file for llama.cpp and compatible programs. ollama: a Modelfile as well, with template, stop texts and parameters. lora: the adapter alone, for a llama.cpp server that has its base. (one of gguf, ollama, lora; default gguf)
        outtype: Data type of the weights in the file. q8_0 takes about half the space of f16, q4_k_m less than a third; q4_k_m, q5_k_m and q6_k are made by llama.cpp's own quantiser. (one of f16, bf16, f32, q8_0, q6_k, q5_k_m, q4_k_m; default f16)
        base_model: Name or folder of the base model, if it has moved since training or is quantised there.
        template: Template for an adapter that another tool made, as for `yeonma merge`. `--format ollama` needs one.
        trust_remote_code: Allow running Python code that comes with the model. When off, such a model is refused. (true or false; default False)
        dtype: Data type for comparing the merged model with the original, as for `yeonma merge`. (one of auto, float32, bfloat16, float16; default auto)
        device: Device for comparing them. auto: the GPU if there is one. (one of auto, cpu, cuda; default auto)
        config: YAML file of settings. Keywords win over it.
    """

def generate(
    adapter_dir: StrPath,
    data_path: Data | None = None,
    *,
    base_model: StrPath | None = None,
    template: StrPath | None = None,
    data_set: str | None = None,
    adapter_weights: bool = True,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    quantization: Literal["auto", "none", "int8", "nf4", "fp8"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    data_split: str = "train",
    data_revision: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    row: Mapping[str, Any] | str | None = None,
    prompt: str | None = None,
    output: StrPath | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    config: StrPath | None = None,
) -> GenerateResult:
    """Generate answers to rows, one row, or a prompt. Takes rows as `sft`: `yeonma.generate(run, rows)`.

    `row` may also be a dict. Returns the answers; with `output` they are written to a file, too, as they come. Each
    call loads the model; to ask it several times, see `yeonma.load`. Raises UserError before the model is loaded.

    Settings:
        adapter_dir: Output folder of a run, or one of its checkpoints. It records the base model, template and tokenizer. (required)
        data_path: Rows to answer, in any format that training accepts.
        base_model: Name or folder of the base model, if it has moved since training.
        template: Template for an adapter that another tool made: a built-in template's name, a file, or the text itself. `chat` is the model's own chat template.
        data_set: Ask with the template of this data set, if the adapter was trained on several. By default, the first one's.
        adapter_weights: Apply the adapter. When off, the base model answers the same prompts without it. (true or false; default True)
        trust_remote_code: Allow running Python code that comes with the model. When off, such a model is refused. (true or false; default False)
        dtype: Data type of the weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU. (one of auto, float32, bfloat16, float16; default auto)
        quantization: Quantisation of the frozen weights, as for training. auto: as in training. (one of auto, none, int8, nf4, fp8; default auto)
        device: Device to run on. auto: the GPU if there is one. (one of auto, cpu, cuda; default auto)
        data_split: Split to read from a hub data set, or from a `save_to_disk` folder with several splits. (default train)
        data_revision: Branch, tag or commit of a hub data set.
        encoding: Character encoding of text files. It is never guessed. (default utf-8)
        delimiter: The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header.
        columns: Maps template fields to columns with other names: `{document: body}`. By default, as in training. (a mapping such as {a: b}, with a space after each colon)
        limit: Answer at most this many rows, from the first on. (a whole number of at least 1)
        row: One row to answer, as JSON: `{"document": "..."}`.
        prompt: Text to continue as it is, without the template.
        output: File for the answers, as JSON lines. By default, standard output.
        batch_size: Prompts to answer at once. Affects memory and speed, not the answers. (a whole number of at least 1; default 32)
        max_new_tokens: Maximum number of tokens to generate. Prompts are shortened to leave room for them. (a whole number of at least 1; default 128)
        temperature: 0 always takes the most likely token (greedy decoding). Higher values sample more freely. (a number of at least 0; default 0.0)
        top_p: Sample only from the most likely tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751). (a number above 0 and at most 1; default 1.0)
        top_k: Sample only from the k most likely tokens. 0 turns this off. (a whole number of at least 0; default 0)
        repetition_penalty: Values above 1 make tokens that already occurred less likely (Keskar et al. 2019, arXiv:1909.05858). (a number above 0; default 1.0)
        seed: Random seed for sampling. The same prompt and seed give the same answer. (a whole number of at least 0 and at most 4294967295; default 42)
        config: YAML file of settings. Keywords win over it.
    """

def inspect(
    *,
    objective: Literal["sft", "dpo"] = "sft",
    rows: str | None = None,
    tokens: bool = False,
    html: StrPath | None = None,
    probe: bool = False,
    gpu: str | None = None,
    price: float | None = None,
    data_path: Data,
    data_split: str = "train",
    data_revision: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    columns: dict[str, str] | None = None,
    template: StrPath | None = None,
    val_set_size: float = 0,
    val_data_path: Data | None = None,
    val_split: str | None = None,
    max_rows: int | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    cutoff_len: int = 2048,
    shrink: str | None = None,
    shrink_side: Literal["end", "start", "middle"] = "end",
    over_limit: Literal["drop", "error"] = "drop",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    train_on: Literal["all", "last", "marked"] = "all",
    thinking: Literal["auto", "keep", "drop", "empty"] = "auto",
    row_weights: str | None = None,
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None,
    parse_special_tokens: bool = False,
    cache_dir: StrPath | None = None,
    base_model: StrPath,
    model_revision: str | None = None,
    adapter: StrPath | None = None,
    trust_remote_code: bool = False,
    train: Literal["lora", "full"] = "lora",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none",
    shard: bool = False,
    gradient_checkpointing: bool | Literal["selective", "auto"] = False,
    torch_compile: bool | Literal["auto"] = "auto",
    lora_r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target_modules: list[str] | str = "all-linear",
    lora_experts: bool = True,
    lora_layers: list[int] | int | str | None = None,
    exclude_modules: list[str] | str | None = None,
    new_tokens: list[str] | str | None = None,
    modules_to_save: list[str] | str | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    batch_size: int = 16,
    micro_batch_size: int = 4,
    micro_batch_tokens: int | Literal["auto"] | None = None,
    share_prefix: bool = True,
    num_epochs: float = 3,
    max_steps: int | None = None,
    learning_rate: float = 0.0002,
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"] = "linear",
    lr_scheduler_kwargs: dict[str, int | float | str] | None = None,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    token_loss: Literal["nll", "dft"] = "nll",
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw",
    loraplus_ratio: float | None = None,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-08,
    max_grad_norm: float = 1.0,
    group_by_length: bool = False,
    seed: int = 42,
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop", "apo_zero", "apo_down", "simpo", "cpo", "orpo", "sft", "kto", "apo_zero_unpaired", "bco"] | str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float | None = None,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    f_alpha: float = 0.5,
    wpo_weights: bool = False,
    kto_desirable_weight: float = 1.0,
    kto_undesirable_weight: float = 1.0,
    eval_steps: int | None = None,
    keep_best: bool = True,
    early_stopping_patience: int | None = None,
    early_stopping_threshold: float = 0.0,
    card_rows: int = 5,
    output_dir: StrPath = "",
    overwrite: bool = False,
    save_steps: int | None = None,
    save_total_limit: int | None = None,
    resume_from_checkpoint: str = "latest",
    time_limit: str | None = None,
    logging_steps: int | Literal["auto"] = "auto",
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] | Literal["tensorboard", "wandb", "trackio", "mlflow"] | Literal["none"] = "none",
    run_name: str | None = None,
    nproc: int = 1,
    config: StrPath | None = None,
) -> InspectResult:
    """Show what a run would train on, audit it, and forecast memory and time. Takes data as `sft`.

    Returns the rows, the audit and the forecast. Raises UserError for all that `sft` refuses before it loads weights.

    Settings:
        objective: The training command to inspect for. It decides how rows are read and which settings apply. (one of sft, dpo; default sft)
        rows: Rows to show: numbers such as `17,40` or `5-8`, `all`, or `none` for the audit alone. By default, the first three.
        tokens: Show rows token by token, with token ids. (true or false; default False)
        html: Also write everything to this file, as one web page that needs no network.
        probe: Load the model and measure time and memory on a few real steps instead of estimating them. (true or false; default False)
        gpu: Forecast the run for this GPU instead of the device of this machine: h200, h100, a100-80, a100-40, l40s, l4, t4, rtx5090, rtx4090, rtx3090, or the size of its memory, such as `24GB`.
        price: Price of one GPU hour, in any currency. The forecast then shows what the run costs and what an hour buys. (a number above 0)
        data_path: Training rows: a .jsonl, .ndjson, .json, .csv, .tsv, .xlsx, .parquet or .arrow file (text files also as .gz or .zst), a folder of them, a `save_to_disk` folder, a bundled sample (`sample:news_en`, `sample:news_ko`), or a data set on the hub (`name` or `name:config`). A list of them is a mixture; an entry `{path: chats.jsonl, weight: 2}` has settings of its own. (text or a list such as [a, b]; required)
        data_split: Split to read from a hub data set or from a folder with several splits. A slice such as `train[:1000]` or `train[10%:20%]` works for every kind of data. (default train)
        data_revision: Branch, tag or commit of a hub data set.
        encoding: Character encoding of text files. It is never guessed. (default utf-8)
        delimiter: The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header.
        columns: Maps template fields to columns with other names: `{document: body, answer: headline}`. `answer` is the template's last field; preference data also has `chosen`, `rejected` and `label`. `answers.text` is a value within a column, `json(output)` a value written as JSON. (a mapping such as {a: b}, with a space after each colon)
        template: Name of a built-in template, a template file, a bundled sample (`sample:title_en`), or the template text itself. By default, the built-in template whose fields match the columns.
        val_set_size: Rows to hold out of each data set for validation, as a count (1 or more) or a fraction (below 1). `seed` decides which. (a number of at least 0; default 0)
        val_data_path: Separate validation rows, in any format that `data_path` accepts; a list for a list. Slices in `data_split` do not apply to them. (text or a list such as [a, b])
        val_split: Validation rows from another split of the same data, such as `validation`, or from a slice such as `train[90%:]`.
        max_rows: Read only this many training rows of each data set, from the first on. Rows for `val_set_size` are drawn among them. (a whole number of at least 1)
        bad_rows: What to do with a row that cannot be read, does not fit the template or is refused by the model's chat template. error: stop the run. skip: leave it out and count it; the other rows keep their numbers. (one of error, skip; default error)
        cutoff_len: Maximum number of tokens in prompt and answer together. Longer rows are shortened in one prompt field, never in the answer. (a whole number of at least 1; default 2048)
        shrink: The prompt field to shorten. By default, the longest one in the row.
        shrink_side: Which part of the field to remove: the end, the start or the middle. (one of end, start, middle; default end)
        over_limit: What to do with a row whose frame and answer alone exceed `cutoff_len`. drop: leave it out and count it. error: stop the run. (one of drop, error; default drop)
        train_on_inputs: Train on the prompt as well as the answer. (true or false; default False)
        add_eos_token: End every answer with the tokenizer's end-of-sequence token and train on it. (true or false; default True)
        train_on: Which assistant turns of a conversation are trained. all: every turn that is not marked with weight 0 (`weight`, `loss` or `train`). last: only the last one. marked: only turns marked with a weight above 0. (one of all, last, marked; default all)
        thinking: Reasoning in assistant turns (`reasoning_content`, `thinking`, or a <think> block). auto: trained where a row has it; elsewhere what the model's chat template writes. keep: as auto, but rows without reasoning get no empty think block. drop: never trained. empty: rows without reasoning get an empty think block. (one of auto, keep, drop, empty; default auto)
        row_weights: The column with each row's weight in the loss: a number from 0 up, which multiplies the weights of its turns. Rows with weight 0 are left out. By default, all rows weigh 1.
        chat_template_kwargs: Arguments of the model's chat template, such as `{enable_thinking: false}`. A column of this name overrides them row by row. (a mapping such as {a: 1}, with a space after each colon)
        parse_special_tokens: Turn special-token text in the data, such as <|im_end|>, into these tokens: for text that was formatted with them. By default it is encoded as ordinary text, and counted. (true or false; default False)
        cache_dir: Folder for cached tokenised data and the SHA-256 of base models. By default, $YEONMA_CACHE or ~/.cache/yeonma.
        base_model: The model to fine-tune: a name on the hub or a local folder. An adapter folder stands for its base model with that adapter applied. (required)
        model_revision: Branch, tag or commit of the base model on the hub.
        adapter: Adapter folder to continue training from. Its rank, alpha, dropout, target modules, new tokens and whole modules are used; of these only `lora_dropout` may be changed.
        trust_remote_code: Allow running Python code that comes with the model. When off, such a model is refused. (true or false; default False)
        train: What is trained. lora: an adapter on the frozen base. full: all weights of the base (full fine-tuning), so that the output folder is a model of its own. A full run needs 16 bytes of memory per parameter beside activations, 18 with bfloat16. (one of lora, full; default lora)
        dtype: Data type of the frozen weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU. With `train` full and bfloat16, the optimizer updates float32 copies of the weights. (one of auto, float32, bfloat16, float16; default auto)
        device: Device to train on. auto: the GPU if there is one. (one of auto, cpu, cuda; default auto)
        quantization: Quantise the frozen weights of linear layers: int8, nf4 (4-bit with double quantisation) or fp8. Uses less memory and changes the result. int8 and nf4 need bitsandbytes; fp8 is fast on GPUs of compute capability 8.9 or higher. (one of none, int8, nf4, fp8; default none)
        shard: Shard the base's weights over several processes (FSDP2), to train a model too large for one GPU; with `train` full, gradients and averages as well. Slower for a model that fits on one; the result is the same. (true or false; default False)
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. selective: only in every other layer. auto: chosen from the memory forecast. (true or false or one of selective, auto; default False)
        torch_compile: Compile norms, SwiGLU and rotary embeddings with torch.compile. Takes a few seconds at the start; results agree to rounding. auto: on a GPU only. (true or false or one of auto; default auto)
        lora_r: Rank of the adapter. (a whole number of at least 1; default 16)
        lora_alpha: Scale of the adapter: its output is multiplied by `lora_alpha / lora_r`. (a number above 0; default 16)
        lora_dropout: Dropout on the adapter's input. Tokens shared by several examples share one mask (see `share_prefix`). (a number of at least 0 and below 1; default 0.0)
        lora_target_modules: Layers to adapt: `all-linear`, or names such as `[gate_proj, down_proj, up_proj]`. A name is the end of a layer's path, a module (`shared_experts`) or a pattern with `*`. all-linear is every linear layer of the language model but routers and the head. Routers, the head, and vision and audio towers need their own name: `gate`, `lm_head`, `vision_tower.*`. (a list such as [a, b] or text; default all-linear)
        lora_experts: Whether `all-linear`, and names that routed experts share with other layers, also adapt the routed experts of a mixture of experts. A name of their own, such as `experts`, reaches them anyway. (true or false; default True)
        lora_layers: Adapt only these layers of the language model, counted from 0: `0-11`, or `0-3,8,10-`. The head and towers, which their own names reach, are not among them. By default, all layers. (a list such as [a, b] or a whole number of at least 0 or numbers and ranges such as 0-3,8,10-)
        exclude_modules: Layers to leave without an adapter, although `lora_target_modules` reaches them: names in the same forms. (a list such as [a, b] or text)
        new_tokens: Tokens to add to the tokenizer, as a list such as `[<a>, <b>]` or a file with one a line. Only their rows of the embedding and the head are trained, beside the adapter; they begin as the mean of all rows. (a list such as [a, b] or text)
        modules_to_save: Modules to train whole beside the adapter, as PEFT's setting of this name: `[lm_head]`, `[embed_tokens]`, `[norm]`. An embedding and a head that share their weight are trained together. (a list such as [a, b] or text)
        use_rslora: Scale by `lora_alpha / sqrt(lora_r)` instead (Kalajdzievski 2023, arXiv:2312.03732). (true or false; default False)
        use_dora: Train magnitude and direction separately (DoRA, Liu et al. 2024, arXiv:2402.09353). (true or false; default False)
        batch_size: Examples, or pairs, in one step over all processes. Any number works. (a whole number of at least 1; default 16)
        micro_batch_size: Maximum number of examples, or pairs, in one forward pass. Affects memory and speed, never the result. (a whole number of at least 1; default 4)
        micro_batch_tokens: Maximum number of tokens in one forward pass; a longer example is processed alone. auto: as many as the memory forecast allows, tried out before the first step; `micro_batch_size` is then ignored. (a whole number of at least 1 or one of auto)
        share_prefix: Compute a prefix shared by examples of a micro-batch only once, from 16 tokens on. The prompt of a pair is always shared. (true or false; default True)
        num_epochs: Passes over the training rows. Fractions are allowed. (a number above 0; default 3)
        max_steps: Stop after this many steps. Overrides `num_epochs`. (a whole number of at least 1)
        learning_rate: Peak learning rate, reached after the warm-up. Other defaults: 1e-5 for `yeonma dpo`, and with `train` full 2e-5 and, for dpo, 1e-6. (a number above 0; default 0.0002)
        lr_scheduler: Learning rate schedule, by its name in transformers. (one of linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, greedy; default linear)
        lr_scheduler_kwargs: Extra arguments of the schedule, such as `{num_cycles: 2}`. (a mapping such as {a: 1}, with a space after each colon)
        warmup_steps: Steps until the learning rate reaches its peak. Overrides `warmup_ratio`. (a whole number of at least 0; default 0)
        warmup_ratio: Warm-up as a fraction of all steps. (a number of at least 0 and at most 1; default 0.0)
        token_loss: Loss of a token in supervised fine-tuning. nll: its negative log-likelihood. dft: that times the token's own probability, without gradient (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629). Evaluations always use nll. (one of nll, dft; default nll)
        optimizer: adamw, adamw_8bit (both moments in 8 bits; Dettmers et al. 2021, arXiv:2110.02861), or paged_adamw_8bit, whose state the GPU can page out. The 8-bit optimizers need bitsandbytes and a GPU. (one of adamw, adamw_8bit, paged_adamw_8bit; default adamw)
        loraplus_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): matrix B of the adapter learns at this many times the learning rate of A, which is `learning_rate`. The paper uses 16. By default, both learn alike. (a number of at least 1)
        weight_decay: Weight decay of AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101). With `train` full, only matrices have it, not biases and norms. (a number of at least 0; default 0.0)
        adam_beta1: AdamW's decay rate for the mean of the gradient. (a number of at least 0 and below 1; default 0.9)
        adam_beta2: AdamW's decay rate for the mean of the squared gradient. (a number of at least 0 and below 1; default 0.999)
        adam_epsilon: Term added to AdamW's denominator for numerical stability. (a number above 0; default 1e-08)
        max_grad_norm: Clip gradients to this norm. 0 turns clipping off. (a number of at least 0; default 1.0)
        group_by_length: Put rows of similar length into the same step. This only evens out step times: there is no padding to save. (true or false; default False)
        seed: Random seed for adapter initialisation, row order, the validation split and dropout. (a whole number of at least 0 and at most 4294967295; default 42)
        loss: Loss function, or a weighted sum such as `sigmoid:1,sft:0.5`. sigmoid is DPO (Rafailov et al. 2023, arXiv:2305.18290). simpo, cpo, orpo and sft need no reference model. kto, apo_zero_unpaired and bco take single answers with a `label` of true or false instead of pairs. (one of sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, discopop, apo_zero, apo_down, simpo, cpo, orpo, sft, kto, apo_zero_unpaired, bco or a weighted sum such as sigmoid:1,sft:0.5; default sigmoid)
        beta: Scale of the rewards. Higher values keep the model closer to the reference. (a number above 0; default 0.1)
        label_smoothing: Assumed fraction of pairs whose labels are flipped, for sigmoid (conservative DPO), sigmoid_norm, robust, aot, aot_unpaired, cpo and simpo. exo_pair needs a value above 0; its paper uses 0.001. (a number of at least 0 and below 0.5; default 0.0)
        sft_weight: Weight of the chosen answer's negative log-likelihood per token, added to the loss. By default, 1 for cpo and orpo, otherwise 0. (a number of at least 0)
        simpo_gamma: Target reward margin of simpo (Meng et al. 2024, arXiv:2405.14734). (a number of at least 0; default 0.5)
        discopop_tau: Temperature of discopop: over what range of margins it changes from the exponential to the logistic loss (Lu et al. 2024, arXiv:2406.08414). (a number above 0; default 0.05)
        f_divergence: Divergence from the reference that the rewards stand for (f-DPO, Wang et al. 2023, arXiv:2309.16240), for sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair and discopop. reverse_kl is DPO's own. (one of reverse_kl, forward_kl, js, alpha; default reverse_kl)
        f_alpha: The alpha of `f_divergence` alpha: near 0 like forward_kl, 1 is reverse_kl. (a number above 0; default 0.5)
        wpo_weights: Weight each pair by how likely the model itself would write its answers (WPO, Zhou et al. 2024, arXiv:2406.11827). Not for aot and aot_unpaired. (true or false; default False)
        kto_desirable_weight: Weight of answers labelled true in kto, apo_zero_unpaired and bco (Ethayarajh et al. 2024, arXiv:2402.01306). (a number above 0; default 1.0)
        kto_undesirable_weight: Weight of answers labelled false. Lower it when there are many of them. (a number above 0; default 1.0)
        eval_steps: Steps between evaluations. By default, evaluate after every epoch. The model is always evaluated before the first step and after the last. (a whole number of at least 1)
        keep_best: Save the adapter with the lowest validation loss instead of the last one. (true or false; default True)
        early_stopping_patience: Stop after this many evaluations in a row without a lower validation loss. (a whole number of at least 1)
        early_stopping_threshold: Minimum decrease of the loss that counts as lower. (a number of at least 0; default 0.0)
        card_rows: Validation rows to answer before and after training, for the model card. 0 turns this off. (a whole number of at least 0; default 5)
        output_dir: Folder for the adapter and the records of the run.
        overwrite: Replace what an earlier run left in `output_dir`. (true or false; default False)
        save_steps: Steps between checkpoints. By default, write one after every epoch. (a whole number of at least 1)
        save_total_limit: Keep only this many of the newest checkpoints, plus the best one. (a whole number of at least 1)
        resume_from_checkpoint: Continue from `latest` in `output_dir`, from a given checkpoint folder, or from `none`. (default latest)
        time_limit: Stop before this much time has passed, with a checkpoint and exit status 75: `11h30m`, `90m`, `45s` or `1:30:00`. Run the same command again to continue.
        logging_steps: Steps between printed and reported metrics. auto: a live line on a terminal, about a hundred lines elsewhere; trackers get every step. metrics.jsonl records every step anyway. (a whole number of at least 1 or one of auto; default auto)
        report_to: Trackers that also receive the metrics: tensorboard, wandb, trackio, mlflow. Each must be installed. (a list such as [tensorboard, wandb] or one of tensorboard, wandb, trackio, mlflow, none; default none)
        run_name: Name of the run in the trackers. By default, the name of `output_dir`.
        nproc: Number of processes to start on this machine. Under torchrun, torchrun decides. (a whole number of at least 1; default 1)
        config: YAML file of settings. Keywords win over it.
    """

def merge(
    adapter_dir: StrPath,
    *,
    output_dir: StrPath,
    base_model: StrPath | None = None,
    template: StrPath | None = None,
    max_shard_bytes: int = 5000000000,
    trust_remote_code: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    config: StrPath | None = None,
) -> MergeResult:
    """Merge an adapter into its base model and check the result.

    Returns the folder of the merged model, and how far its answers agree. Raises UserError if the merged model does not
    answer as the adapter on its base does; nothing is written then.

    Settings:
        adapter_dir: Output folder of a run, or one of its checkpoints. (required)
        output_dir: Folder to create for the merged model. (required)
        base_model: Name or folder of the base model, if it has moved since training or is quantised there.
        template: Template for an adapter that another tool made: a built-in template's name, a file, or the text itself. `chat` is the model's own chat template. Without one, the merged model has none either.
        max_shard_bytes: Maximum size of one weight file in bytes. Merging needs about this much memory. (a whole number of at least 1; default 5000000000)
        trust_remote_code: Allow running Python code that comes with the model. When off, such a model is refused. (true or false; default False)
        dtype: Data type for comparing the two models. auto: float32 if it fits into memory, otherwise the base model's own. The merged weights always keep theirs. (one of auto, float32, bfloat16, float16; default auto)
        device: Device for comparing the two models. auto: the GPU if there is one. Merging itself runs on the CPU. (one of auto, cpu, cuda; default auto)
        config: YAML file of settings. Keywords win over it.
    """

def push(
    folder: StrPath,
    *,
    repo: str,
    public: bool = False,
    base_model: StrPath | None = None,
    hide_paths: bool = False,
    message: str = "Upload with Yeonma",
    dry_run: bool = False,
    yes: bool = False,
    config: StrPath | None = None,
) -> PushResult:
    """Upload an adapter or a merged model to the Hugging Face hub. In a notebook, give `yes=True` or `dry_run=True`.

    Returns what was sent and the address of the commit. Raises UserError before anything is sent if the files contain
    secrets or names of this machine, and if the hub refuses.

    Settings:
        folder: Output folder of a run, one of its checkpoints, or a merged model. (required)
        repo: Repository on the hub: `owner/name`, or a name in your own account. It is created if it does not exist. (required)
        public: Make the repository public. When off, it is private, and an existing public repository is refused. (true or false; default False)
        base_model: Name of the base model on the hub, if training used a local folder. The uploaded files name it.
        hide_paths: Shorten each absolute path in the files to its last part, and hide home directories and the names of this machine's user and host. When off, files with these are refused. (true or false; default False)
        message: Commit message. (default Upload with Yeonma)
        dry_run: Show what would be uploaded without uploading it. (true or false; default False)
        yes: Upload without asking. Required when there is no terminal. (true or false; default False)
        config: YAML file of settings. Keywords win over it.
    """

def sft(
    *,
    data_path: Data,
    data_split: str = "train",
    data_revision: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    columns: dict[str, str] | None = None,
    template: StrPath | None = None,
    val_set_size: float = 0,
    val_data_path: Data | None = None,
    val_split: str | None = None,
    max_rows: int | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    cutoff_len: int = 2048,
    shrink: str | None = None,
    shrink_side: Literal["end", "start", "middle"] = "end",
    over_limit: Literal["drop", "error"] = "drop",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    train_on: Literal["all", "last", "marked"] = "all",
    thinking: Literal["auto", "keep", "drop", "empty"] = "auto",
    row_weights: str | None = None,
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None,
    parse_special_tokens: bool = False,
    cache_dir: StrPath | None = None,
    base_model: StrPath,
    model_revision: str | None = None,
    adapter: StrPath | None = None,
    trust_remote_code: bool = False,
    train: Literal["lora", "full"] = "lora",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none",
    shard: bool = False,
    gradient_checkpointing: bool | Literal["selective", "auto"] = False,
    torch_compile: bool | Literal["auto"] = "auto",
    lora_r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target_modules: list[str] | str = "all-linear",
    lora_experts: bool = True,
    lora_layers: list[int] | int | str | None = None,
    exclude_modules: list[str] | str | None = None,
    new_tokens: list[str] | str | None = None,
    modules_to_save: list[str] | str | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    batch_size: int = 16,
    micro_batch_size: int = 4,
    micro_batch_tokens: int | Literal["auto"] | None = None,
    share_prefix: bool = True,
    num_epochs: float = 3,
    max_steps: int | None = None,
    learning_rate: float = 0.0002,
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"] = "linear",
    lr_scheduler_kwargs: dict[str, int | float | str] | None = None,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    token_loss: Literal["nll", "dft"] = "nll",
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw",
    loraplus_ratio: float | None = None,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-08,
    max_grad_norm: float = 1.0,
    group_by_length: bool = False,
    seed: int = 42,
    eval_steps: int | None = None,
    keep_best: bool = True,
    early_stopping_patience: int | None = None,
    early_stopping_threshold: float = 0.0,
    card_rows: int = 5,
    output_dir: StrPath,
    overwrite: bool = False,
    save_steps: int | None = None,
    save_total_limit: int | None = None,
    resume_from_checkpoint: str = "latest",
    time_limit: str | None = None,
    logging_steps: int | Literal["auto"] = "auto",
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] | Literal["tensorboard", "wandb", "trackio", "mlflow"] | Literal["none"] = "none",
    run_name: str | None = None,
    nproc: int = 1,
    config: StrPath | None = None,
) -> RunResult:
    """Fine-tune a model on the answers in a table of examples.

    `data_path` and `val_data_path` may also be the rows themselves: a list of dicts, a pandas or polars DataFrame, or a
    `datasets.Dataset`.

    Returns the run: its folder, its losses, its card. Raises UserError for every mistake that `yeonma sft` reports, and
    RunFailed, a RuntimeError, if one of several processes (`nproc`) failed. An interrupt (Ctrl-C, or a notebook's stop
    button) and `time_limit` save a checkpoint and raise Stopped, a KeyboardInterrupt; the same call goes on from there.
    A second interrupt ends the call at once.

    Settings:
        data_path: Training rows: a .jsonl, .ndjson, .json, .csv, .tsv, .xlsx, .parquet or .arrow file (text files also as .gz or .zst), a folder of them, a `save_to_disk` folder, a bundled sample (`sample:news_en`, `sample:news_ko`), or a data set on the hub (`name` or `name:config`). A list of them is a mixture; an entry `{path: chats.jsonl, weight: 2}` has settings of its own. (text or a list such as [a, b]; required)
        data_split: Split to read from a hub data set or from a folder with several splits. A slice such as `train[:1000]` or `train[10%:20%]` works for every kind of data. (default train)
        data_revision: Branch, tag or commit of a hub data set.
        encoding: Character encoding of text files. It is never guessed. (default utf-8)
        delimiter: The character between the columns of .csv and .tsv files, such as `;` or `tab`. By default, the one of the ending, or another one if only that divides the header.
        columns: Maps template fields to columns with other names: `{document: body, answer: headline}`. `answer` is the template's last field; preference data also has `chosen`, `rejected` and `label`. `answers.text` is a value within a column, `json(output)` a value written as JSON. (a mapping such as {a: b}, with a space after each colon)
        template: Name of a built-in template, a template file, a bundled sample (`sample:title_en`), or the template text itself. By default, the built-in template whose fields match the columns.
        val_set_size: Rows to hold out of each data set for validation, as a count (1 or more) or a fraction (below 1). `seed` decides which. (a number of at least 0; default 0)
        val_data_path: Separate validation rows, in any format that `data_path` accepts; a list for a list. Slices in `data_split` do not apply to them. (text or a list such as [a, b])
        val_split: Validation rows from another split of the same data, such as `validation`, or from a slice such as `train[90%:]`.
        max_rows: Read only this many training rows of each data set, from the first on. Rows for `val_set_size` are drawn among them. (a whole number of at least 1)
        bad_rows: What to do with a row that cannot be read, does not fit the template or is refused by the model's chat template. error: stop the run. skip: leave it out and count it; the other rows keep their numbers. (one of error, skip; default error)
        cutoff_len: Maximum number of tokens in prompt and answer together. Longer rows are shortened in one prompt field, never in the answer. (a whole number of at least 1; default 2048)
        shrink: The prompt field to shorten. By default, the longest one in the row.
        shrink_side: Which part of the field to remove: the end, the start or the middle. (one of end, start, middle; default end)
        over_limit: What to do with a row whose frame and answer alone exceed `cutoff_len`. drop: leave it out and count it. error: stop the run. (one of drop, error; default drop)
        train_on_inputs: Train on the prompt as well as the answer. (true or false; default False)
        add_eos_token: End every answer with the tokenizer's end-of-sequence token and train on it. (true or false; default True)
        train_on: Which assistant turns of a conversation are trained. all: every turn that is not marked with weight 0 (`weight`, `loss` or `train`). last: only the last one. marked: only turns marked with a weight above 0. (one of all, last, marked; default all)
        thinking: Reasoning in assistant turns (`reasoning_content`, `thinking`, or a <think> block). auto: trained where a row has it; elsewhere what the model's chat template writes. keep: as auto, but rows without reasoning get no empty think block. drop: never trained. empty: rows without reasoning get an empty think block. (one of auto, keep, drop, empty; default auto)
        row_weights: The column with each row's weight in the loss: a number from 0 up, which multiplies the weights of its turns. Rows with weight 0 are left out. By default, all rows weigh 1.
        chat_template_kwargs: Arguments of the model's chat template, such as `{enable_thinking: false}`. A column of this name overrides them row by row. (a mapping such as {a: 1}, with a space after each colon)
        parse_special_tokens: Turn special-token text in the data, such as <|im_end|>, into these tokens: for text that was formatted with them. By default it is encoded as ordinary text, and counted. (true or false; default False)
        cache_dir: Folder for cached tokenised data and the SHA-256 of base models. By default, $YEONMA_CACHE or ~/.cache/yeonma.
        base_model: The model to fine-tune: a name on the hub or a local folder. An adapter folder stands for its base model with that adapter applied. (required)
        model_revision: Branch, tag or commit of the base model on the hub.
        adapter: Adapter folder to continue training from. Its rank, alpha, dropout, target modules, new tokens and whole modules are used; of these only `lora_dropout` may be changed.
        trust_remote_code: Allow running Python code that comes with the model. When off, such a model is refused. (true or false; default False)
        train: What is trained. lora: an adapter on the frozen base. full: all weights of the base (full fine-tuning), so that the output folder is a model of its own. A full run needs 16 bytes of memory per parameter beside activations, 18 with bfloat16. (one of lora, full; default lora)
        dtype: Data type of the frozen weights and the computation. auto: bfloat16 on a GPU that supports it, float32 on the CPU. With `train` full and bfloat16, the optimizer updates float32 copies of the weights. (one of auto, float32, bfloat16, float16; default auto)
        device: Device to train on. auto: the GPU if there is one. (one of auto, cpu, cuda; default auto)
        quantization: Quantise the frozen weights of linear layers: int8, nf4 (4-bit with double quantisation) or fp8. Uses less memory and changes the result. int8 and nf4 need bitsandbytes; fp8 is fast on GPUs of compute capability 8.9 or higher. (one of none, int8, nf4, fp8; default none)
        shard: Shard the base's weights over several processes (FSDP2), to train a model too large for one GPU; with `train` full, gradients and averages as well. Slower for a model that fits on one; the result is the same. (true or false; default False)
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. selective: only in every other layer. auto: chosen from the memory forecast. (true or false or one of selective, auto; default False)
        torch_compile: Compile norms, SwiGLU and rotary embeddings with torch.compile. Takes a few seconds at the start; results agree to rounding. auto: on a GPU only. (true or false or one of auto; default auto)
        lora_r: Rank of the adapter. (a whole number of at least 1; default 16)
        lora_alpha: Scale of the adapter: its output is multiplied by `lora_alpha / lora_r`. (a number above 0; default 16)
        lora_dropout: Dropout on the adapter's input. Tokens shared by several examples share one mask (see `share_prefix`). (a number of at least 0 and below 1; default 0.0)
        lora_target_modules: Layers to adapt: `all-linear`, or names such as `[gate_proj, down_proj, up_proj]`. A name is the end of a layer's path, a module (`shared_experts`) or a pattern with `*`. all-linear is every linear layer of the language model but routers and the head. Routers, the head, and vision and audio towers need their own name: `gate`, `lm_head`, `vision_tower.*`. (a list such as [a, b] or text; default all-linear)
        lora_experts: Whether `all-linear`, and names that routed experts share with other layers, also adapt the routed experts of a mixture of experts. A name of their own, such as `experts`, reaches them anyway. (true or false; default True)
        lora_layers: Adapt only these layers of the language model, counted from 0: `0-11`, or `0-3,8,10-`. The head and towers, which their own names reach, are not among them. By default, all layers. (a list such as [a, b] or a whole number of at least 0 or numbers and ranges such as 0-3,8,10-)
        exclude_modules: Layers to leave without an adapter, although `lora_target_modules` reaches them: names in the same forms. (a list such as [a, b] or text)
        new_tokens: Tokens to add to the tokenizer, as a list such as `[<a>, <b>]` or a file with one a line. Only their rows of the embedding and the head are trained, beside the adapter; they begin as the mean of all rows. (a list such as [a, b] or text)
        modules_to_save: Modules to train whole beside the adapter, as PEFT's setting of this name: `[lm_head]`, `[embed_tokens]`, `[norm]`. An embedding and a head that share their weight are trained together. (a list such as [a, b] or text)
        use_rslora: Scale by `lora_alpha / sqrt(lora_r)` instead (Kalajdzievski 2023, arXiv:2312.03732). (true or false; default False)
        use_dora: Train magnitude and direction separately (DoRA, Liu et al. 2024, arXiv:2402.09353). (true or false; default False)
        batch_size: Examples, or pairs, in one step over all processes. Any number works. (a whole number of at least 1; default 16)
        micro_batch_size: Maximum number of examples, or pairs, in one forward pass. Affects memory and speed, never the result. (a whole number of at least 1; default 4)
        micro_batch_tokens: Maximum number of tokens in one forward pass; a longer example is processed alone. auto: as many as the memory forecast allows, tried out before the first step; `micro_batch_size` is then ignored. (a whole number of at least 1 or one of auto)
        share_prefix: Compute a prefix shared by examples of a micro-batch only once, from 16 tokens on. The prompt of a pair is always shared. (true or false; default True)
        num_epochs: Passes over the training rows. Fractions are allowed. (a number above 0; default 3)
        max_steps: Stop after this many steps. Overrides `num_epochs`. (a whole number of at least 1)
        learning_rate: Peak learning rate, reached after the warm-up. Other defaults: 1e-5 for `yeonma dpo`, and with `train` full 2e-5 and, for dpo, 1e-6. (a number above 0; default 0.0002)
        lr_scheduler: Learning rate schedule, by its name in transformers. (one of linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, greedy; default linear)
        lr_scheduler_kwargs: Extra arguments of the schedule, such as `{num_cycles: 2}`. (a mapping such as {a: 1}, with a space after each colon)
        warmup_steps: Steps until the learning rate reaches its peak. Overrides `warmup_ratio`. (a whole number of at least 0; default 0)
        warmup_ratio: Warm-up as a fraction of all steps. (a number of at least 0 and at most 1; default 0.0)
        token_loss: Loss of a token in supervised fine-tuning. nll: its negative log-likelihood. dft: that times the token's own probability, without gradient (Dynamic Fine-Tuning, Wu et al. 2025, arXiv:2508.05629). Evaluations always use nll. (one of nll, dft; default nll)
        optimizer: adamw, adamw_8bit (both moments in 8 bits; Dettmers et al. 2021, arXiv:2110.02861), or paged_adamw_8bit, whose state the GPU can page out. The 8-bit optimizers need bitsandbytes and a GPU. (one of adamw, adamw_8bit, paged_adamw_8bit; default adamw)
        loraplus_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): matrix B of the adapter learns at this many times the learning rate of A, which is `learning_rate`. The paper uses 16. By default, both learn alike. (a number of at least 1)
        weight_decay: Weight decay of AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101). With `train` full, only matrices have it, not biases and norms. (a number of at least 0; default 0.0)
        adam_beta1: AdamW's decay rate for the mean of the gradient. (a number of at least 0 and below 1; default 0.9)
        adam_beta2: AdamW's decay rate for the mean of the squared gradient. (a number of at least 0 and below 1; default 0.999)
        adam_epsilon: Term added to AdamW's denominator for numerical stability. (a number above 0; default 1e-08)
        max_grad_norm: Clip gradients to this norm. 0 turns clipping off. (a number of at least 0; default 1.0)
        group_by_length: Put rows of similar length into the same step. This only evens out step times: there is no padding to save. (true or false; default False)
        seed: Random seed for adapter initialisation, row order, the validation split and dropout. (a whole number of at least 0 and at most 4294967295; default 42)
        eval_steps: Steps between evaluations. By default, evaluate after every epoch. The model is always evaluated before the first step and after the last. (a whole number of at least 1)
        keep_best: Save the adapter with the lowest validation loss instead of the last one. (true or false; default True)
        early_stopping_patience: Stop after this many evaluations in a row without a lower validation loss. (a whole number of at least 1)
        early_stopping_threshold: Minimum decrease of the loss that counts as lower. (a number of at least 0; default 0.0)
        card_rows: Validation rows to answer before and after training, for the model card. 0 turns this off. (a whole number of at least 0; default 5)
        output_dir: Folder for the adapter and the records of the run. (required)
        overwrite: Replace what an earlier run left in `output_dir`. (true or false; default False)
        save_steps: Steps between checkpoints. By default, write one after every epoch. (a whole number of at least 1)
        save_total_limit: Keep only this many of the newest checkpoints, plus the best one. (a whole number of at least 1)
        resume_from_checkpoint: Continue from `latest` in `output_dir`, from a given checkpoint folder, or from `none`. (default latest)
        time_limit: Stop before this much time has passed, with a checkpoint and exit status 75: `11h30m`, `90m`, `45s` or `1:30:00`. Run the same command again to continue.
        logging_steps: Steps between printed and reported metrics. auto: a live line on a terminal, about a hundred lines elsewhere; trackers get every step. metrics.jsonl records every step anyway. (a whole number of at least 1 or one of auto; default auto)
        report_to: Trackers that also receive the metrics: tensorboard, wandb, trackio, mlflow. Each must be installed. (a list such as [tensorboard, wandb] or one of tensorboard, wandb, trackio, mlflow, none; default none)
        run_name: Name of the run in the trackers. By default, the name of `output_dir`.
        nproc: Number of processes to start on this machine. Under torchrun, torchrun decides. (a whole number of at least 1; default 1)
        config: YAML file of settings. Keywords win over it.
    """

def verify(
    adapter_dir: StrPath,
    *,
    base_model: StrPath | None = None,
    trust_remote_code: bool = False,
    data_path: Data | None = None,
    data_split: str = "train",
    data_revision: str | None = None,
    encoding: str = "utf-8",
    served: str | None = None,
    model: str | None = None,
    config: StrPath | None = None,
) -> VerifyResult:
    """Check the folder of a run for damage and mismatches. Takes data as `sft`.

    Returns all findings; `is_well` says whether there are no differences. Raises UserError if there is nothing to
    check.

    Settings:
        adapter_dir: Output folder of a run, one of its checkpoints, or an adapter folder copied from there. (required)
        base_model: Name or folder of the base model, if it has moved since training.
        trust_remote_code: Allow running Python code that comes with the model. When off, such a base model is not checked. (true or false; default False)
        data_path: Data to check against what the adapter was trained on.
        data_split: Split to read from a hub data set, or from a `save_to_disk` folder with several splits. (default train)
        data_revision: Branch, tag or commit of a hub data set.
        encoding: Character encoding of text files, as in training. (default utf-8)
        served: Address of a server with OpenAI's API, such as `http://127.0.0.1:8000`: ask it the run's sample rows and say what differs from training, in place of the checks of the folder. $OPENAI_API_KEY is its key.
        model: The model's name on that server. By default, the name of the folder, or the only model there.
        config: YAML file of settings. Keywords win over it.
    """

"""A run's settings from the YAML file of another tool, with a remark for each of its keys without a counterpart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from yeonma.config.foreign_names import (
    IN_OTHER_WORDS,
    NOT_NEEDED,
    RENAMED,
    SAME_COMMAND,
    WITHOUT_COUNTERPART,
)
from yeonma.config.parse import Setting, config_from_keywords, settings_of
from yeonma.config.settings import (
    ADAPTER_SETTINGS,
    DEFAULTS,
    GROUPS,
    LrScheduler,
    Optimizer,
    RunConfig,
)
from yeonma.config.yaml_text import write_item
from yeonma.errors import Problem, UserError, brief
from yeonma.messages import counted, tr
from yeonma.shown import one_line

SHOWN = 60  # characters of a value in a remark
TRAININGS = tr("they are answers, whole texts and preferences")
OF_ONE_SET = {"path": "data_path", "split": "data_split", "revision": "data_revision"}
"""Key of an entry of data_path -> the setting of its own, where it has another name."""
REQUIRED = ("base_model", "data_path", "output_dir")
OPTIMIZERS: Mapping[object, str] = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""Names in transformers' Trainer -> ours. Paging the state of AdamW changes no number."""


@dataclass(frozen=True)
class Remark:
    """A key of the other tool's file that is not among the settings, and why."""

    key: str
    value: object
    why: str


@dataclass
class Conversion:
    """What was made of a file so far.

    given: its keys and values; those that are null do not count. settings: ours. reasons: setting -> where its value
    comes from, if not from one key.
    """

    tool: str
    path: str
    given: Mapping[str, Any]
    lines: Mapping[str, int]
    verb: str = "sft"
    settings: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    different: list[Remark] = field(default_factory=list)
    """What may change the result of the run."""
    not_needed: list[Remark] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which then needs no remark."""
        self.used.add(key)
        return self.given.get(key, default)

    def put(self, name: str, value: object, reason: str = "") -> None:
        self.settings[name] = value
        if reason:
            self.reasons[name] = reason

    def remark(self, key: str, why: str) -> None:
        """Says why a key, if the file has it, has no setting of its own although it may change the result."""
        if key in self.given:
            self.different.append(Remark(key, self.take(key), why))

    def no_use(self, key: str, why: str) -> None:
        if key in self.given:
            self.not_needed.append(Remark(key, self.take(key), why))

    def refuse(self, key: str, what: str, cure: str) -> UserError:
        """The error of a file that no run of ours stands for."""
        return UserError(what, place=f"{self.path}:{self.lines.get(key, 1)}: {key}", cure=cure)

    def take_batch(self, in_pass: int, passes: int, processes: int) -> None:
        self.put("batch_size", in_pass * passes * processes, f"{in_pass} x {passes} x {processes}")
        self.put("micro_batch_size", in_pass)

    def put_data(self, sets: Sequence[dict[str, Any]]) -> None:
        """One data set as settings of their own, several as entries of data_path."""
        if len(sets) == 1:
            for key, value in sets[0].items():
                self.put(OF_ONE_SET.get(key, key), value)
        else:
            self.put("data_path", list(sets))

    def finish(self, same: Collection[str], defaults: Mapping[str, object]) -> None:
        """Takes the keys that are left: those with our names and meaning, and those in the tables of foreign names.

        same: keys that mean what ours of that name mean. defaults: our settings whose default is another one there,
        with that default.
        """
        own = own_settings(self.verb)
        self.no_use("resume_from_checkpoint", SAME_COMMAND)
        self.no_use("torch_compile", tr("chosen when the model is loaded"))
        for key in self.given:
            ours = key if key in same else RENAMED.get(key)
            if key in self.used:
                continue
            if ours in own and ours not in self.settings:
                self.put(ours, self.take(key))
            elif key in NOT_NEEDED:
                self.no_use(key, NOT_NEEDED[key])
            elif self.given[key] in (False, 0, [], {}):
                self.no_use(key, tr("off in the file"))
            elif key in IN_OTHER_WORDS or key in WITHOUT_COUNTERPART:
                self.remark(key, IN_OTHER_WORDS.get(key) or WITHOUT_COUNTERPART[key])
            else:
                self.remark(key, tr("not known to yeonma convert: look at what it does"))
        unread = ADAPTER_SETTINGS if self.settings.get("train") == "full" else frozenset[str]()
        if "adapter" in self.settings:  # whose own shape is kept
            unread = unread | {"lora_r", "lora_alpha", "lora_target_modules"}
        self.settings = {name: value for name, value in self.settings.items() if name not in unread}
        for name, value in defaults.items():
            settled = name in unread or name in self.settings or name not in own
            if not settled and value != own[name].default:
                self.put(name, value, tr("the default of {tool}", tool=self.tool))

    def check(self) -> None:
        """Raises UserError for values that a run of ours would refuse."""
        stand_ins = dict.fromkeys(REQUIRED, "-")
        try:
            config_from_keywords(RunConfig, {**stand_ins, **self.settings}, groups=GROUPS[self.verb])
        except UserError as error:
            raise UserError(
                [
                    Problem(p.what, f"{self.path}: {p.place}" if p.place else self.path, p.cure)
                    for p in error.problems
                ]
            ) from None

    def text(self) -> str:
        """The settings as YAML for `--config`, in the order of docs/settings.md, and the remarks as comments."""
        order = [name for name in own_settings(self.verb) if name in self.settings]
        head = [
            tr(
                "# Made from {path} of {tool}, for: yeonma {verb} --config THIS_FILE",
                path=one_line(self.path),
                tool=self.tool,
                verb=self.verb,
            ),
            tr("# Look at the first rows with: yeonma inspect --config THIS_FILE")
            + (" --objective dpo" if self.verb == "dpo" else ""),
        ]
        lines = [f"{line}\n" for line in head]
        for name in order:
            item = write_item(name, self.settings[name])
            reason = self.reasons.get(name)
            lines.append(
                f"{item.removesuffix(chr(10))}  # {reason}\n" if reason and item.count("\n") == 1 else item
            )
        missing = [name for name in REQUIRED if name not in self.settings]
        lines += [tr("# {name}: still to be written\n", name=name) for name in missing]
        for title, remarks in (
            (tr("May change the result, and has no setting here"), self.different),
            (tr("Not needed"), self.not_needed),
        ):
            lines += [f"\n# {title}:\n"] if remarks else []
            for remark in remarks:
                value = brief(one_line(str(remark.value)), SHOWN)
                lines.append(f"#   {one_line(remark.key)}: {value}  ({remark.why})\n")
        return "".join(lines)


def own_settings(verb: str) -> dict[str, Setting]:
    """The settings of `yeonma sft` or `yeonma dpo`, by name."""
    return settings_of(GROUPS[verb], (), DEFAULTS[verb])


def take_optimizer(run: Conversion, key: str) -> None:
    """By its name in transformers' Trainer."""
    name = run.take(key)
    if name in OPTIMIZERS:
        run.put("optimizer", OPTIMIZERS[name])
    elif name is not None:
        run.remark(key, tr("there are {optimizer}", optimizer=", ".join(get_args(Optimizer))))


def take_schedule(run: Conversion, key: str) -> None:
    """By its name in transformers."""
    name = run.take(key)
    if name in get_args(LrScheduler):
        run.put("lr_scheduler", name)
    elif name is not None:
        run.remark(key, tr("no schedule of transformers that fits every run"))


def take_warmup(run: Conversion) -> None:
    steps = run.take("warmup_steps")
    if isinstance(steps, float) and 0 < steps < 1:  # transformers 5 takes a share there as well
        run.put("warmup_ratio", steps)
    elif steps:
        run.put("warmup_steps", int(steps))


def take_dtype(run: Conversion) -> None:
    for key, dtype in (
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("float16", "float16"),
    ):
        if run.take(key) is True:
            run.put("dtype", dtype)
    run.no_use("tf32", tr("float32 is computed in float32"))


def take_best(run: Conversion, *, has_validation: bool, stops_early: bool = False) -> None:
    """Which weights are left at the end. Both tools keep the last ones unless the file asks for the best."""
    best = run.take("load_best_model_at_end") is True or stops_early
    if has_validation and not best:
        run.put("keep_best", False, tr("the last weights, as in {tool}", tool=run.tool))


def with_packing(run: Conversion, keys: Sequence[str], tokens: int) -> None:
    """What a batch is where several examples make up one."""
    packs = counted(
        run.settings["batch_size"],
        "pack of up to {tokens} tokens",
        "packs of up to {tokens} tokens",
        tokens=tokens,
    )
    for key in keys:
        if run.take(key) is True:
            run.remark(
                key,
                tr("a step there has {packs}; batch_size counts examples: raise it to match", packs=packs),
            )


def columns_to_map(columns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The `columns` of an entry of data_path for field -> column; nothing where all have the field's own name."""
    mapped = {field: column for field, column in columns.items() if field != column}
    return {"columns": mapped} if mapped else {}

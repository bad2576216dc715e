"""Small preference data in every form, and whole runs of `yeonma dpo` on it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from tests.runs import SETTINGS, WORDS, Done, arguments, characters, command, model_folder
from tests.tokenizers import PLAIN_CHAT

PLAIN: Mapping[str, object] = {name: value for name, value in SETTINGS.items() if name != "template"}


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected; prompts of 1 to 12 words, no two alike; a rejected answer is longer."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 12))]
        rows.append(
            {
                "prompt": f"{number}. {' '.join(words)}.\ntitle: ",
                "chosen": " ".join(words[: draw.randint(1, 3)]),
                "rejected": f"{words[-1]} {draw.choice(WORDS)} and {draw.choice(WORDS)}",
            }
        )
    return rows


def labelled(count: int) -> list[dict[str, object]]:
    """Two of three are wanted; the last is the only one of its step."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
        for i, row in enumerate(pairs(count))
    ]


def dpo(output: Path, base: Path, data: Path, **settings: object) -> Done:
    """`yeonma dpo` with small settings, in this process. A mistake of the user's gives status 2."""
    wanted = {"base_model": base, "data_path": data, "output_dir": output, **PLAIN, **settings}
    if settings.get("max_steps") is not None and "num_epochs" not in settings:
        del wanted["num_epochs"]
    return command(output, "dpo", *arguments(wanted))


def tuned(output: Path, base: Path, data: Path, **settings: object) -> Done:
    """The same; it must succeed."""
    done = dpo(output, base, data, **settings)
    assert done.status == 0, done.err
    return done


def chat_folder(place: Path) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    model_folder(place)
    tokenizer = characters()
    tokenizer.chat_template = PLAIN_CHAT
    tokenizer.save_pretrained(place)
    return place

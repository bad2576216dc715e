"""What the READMEs show is what there is: commands whose settings are right, templates as the files have them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from yeonma.cli import VERBS
from yeonma.commands.demo import SAMPLES
from yeonma.config.parse import read_config
from yeonma.data import template

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
TUTORIAL = """\
torchrun --nproc_per_node=4 --master_port=1234 sft-trainer.py \\
    --base_model beomi/llama-2-ko-7b --data-path daekeun-ml/naver-news-summarization-ko \
--output_dir ./title-generator \\
    --batch_size 8 --micro_batch_size 1 --num_epochs 3 --learning_rate 1e-5 --cutoff_len 2048 --val_set_size 0 \\
    --lora_r 16 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules '[gate_proj, down_proj, up_proj]' \\
    --train_on_inputs False --add_eos_token True --group_by_length False --lr_scheduler 'linear' --warmup_steps 100
"""


def blocks(text: str) -> list[str]:
    """What stands between fences, without the indentation of the fence."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every `yeonma` command in the blocks."""
    lines = (line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines())
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(("yeonma ", "torchrun "))]
    whole = [each for each in words if each[1] != "--help" and "..." not in each]
    return [["yeonma", "sft", *each[4:]] if each[0] == "torchrun" else each for each in whole]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_command_has_settings_that_exist_and_fit(readme: Path) -> None:
    found = commands(readme.read_text(encoding="utf-8"))
    assert {"sft", "generate"} <= {words[1] for words in found}
    for _, verb, *words in found:
        known = VERBS[verb]
        assert (
            read_config(
                known.config,
                words,
                verb=verb,
                groups=known.groups,
                positional=known.positional,
                needless=known.needless,
            ).warnings
            == ()
        )


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_tutorials_command_stands_in_it_word_for_word(readme: Path) -> None:
    assert TUTORIAL in blocks(readme.read_text(encoding="utf-8"))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_templates_are_shown_as_their_files_have_them(readme: Path) -> None:
    shown = blocks(readme.read_text(encoding="utf-8"))
    built_in = template._BUILT_IN_FOLDER
    assert (built_in / "alpaca.txt").read_text(encoding="utf-8") in shown
    own = SAMPLES / "title_en.txt" if readme.name == "README.md" else built_in / "title.txt"
    assert own.read_text(encoding="utf-8") in shown


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_it_opens_with_the_two_commands(readme: Path) -> None:
    first = [
        line.split("#")[0].strip() for line in blocks(readme.read_text(encoding="utf-8"))[0].splitlines()
    ]
    assert first == ["make demo", "make test"]


def test_both_readmes_have_the_same_parts_in_the_same_order() -> None:
    # headings outside blocks alone: templates have some too, and the two show different ones
    plain = [re.sub(r"^ *```.*?^ *```$", "", path.read_text("utf-8"), flags=re.M | re.S) for path in READMES]
    english, korean = (re.findall(r"^(#+) (\d*)", text, re.MULTILINE) for text in plain)
    assert english == korean
    assert len(english) > 15


def test_the_tables_of_the_page_on_scale_are_those_of_its_script() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/scale.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

"""docs/extending.md: its diffs are applied to a copy of the package, and its commands are run there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters import tiny_base
from tests.pairs import pairs
from tests.runs import write_jsonl
from tests.tokenizers import byte_level

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(title: str) -> list[tuple[str, str]]:
    """The code blocks of a chapter, each with its language."""
    return BLOCK.findall(TEXT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0])


class Checkout:
    """A copy of the package that the page's diffs are applied to, with the files that its commands name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.followed: dict[str, str] = {}
        shutil.copytree(ROOT / "yeonma", folder / "yeonma", ignore=shutil.ignore_patterns("__pycache__"))
        self.base = tiny_base(folder / "base", byte_level())
        write_jsonl(folder / "pairs.jsonl", pairs(8))
        questions = [
            {"context": f"The mill has {number} floors.", "query": "How many floors?", "reply": str(number)}
            for number in range(12)
        ]
        write_jsonl(folder / "qa.jsonl", questions)

    def run(self, *words: str, stdin: str | None = None) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "YEONMA_CACHE": str(self.folder / "cache"),
        }
        done = subprocess.run(
            words, cwd=self.folder, env=environment, input=stdin, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def follow(self, title: str) -> str:
        """Applies the diffs of a chapter and runs its commands and Python code, once. Returns their output."""
        if title in self.followed:
            return self.followed[title]
        output = ""
        for language, block in code_blocks(title):
            if language == "diff":
                self.run("git", "apply", "-v", "-", stdin=block)
            elif language == "python":
                output += self.run(sys.executable, "-c", block.replace("BASE", str(self.base)))
            else:
                words = shlex.split(block.replace("BASE", str(self.base)))
                assert words[0] == "yeonma"
                output += self.run(sys.executable, "-m", *words)
        self.followed[title] = output
        return output


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("extending"))


def test_a_preference_loss_trains(checkout: Checkout) -> None:
    checkout.follow("A preference loss")
    assert (checkout.folder / "squared" / "adapter_model.safetensors").is_file()
    assert "loss: squared_hinge" in (checkout.folder / "squared" / "settings.yaml").read_text(
        encoding="utf-8"
    )


def test_a_built_in_template_is_chosen_by_its_columns(checkout: Checkout) -> None:
    output = checkout.follow("A built-in template")
    assert "template qa, because the columns are context, query, reply" in output
    assert "Q: How many floors?" in output


def test_an_attention_backend_computes_the_layers(checkout: Checkout) -> None:
    checkout.follow("A built-in template")  # its command reads that chapter's rows
    assert "attention dense" in checkout.follow("An attention backend")


def test_training_on_sampled_answers_lowers_the_loss(checkout: Checkout) -> None:
    output = checkout.follow("A task: learning from sampled answers")
    losses = [float(loss) for loss in re.findall(r"step \d: loss (-?[\d.]+)", output)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.01, output

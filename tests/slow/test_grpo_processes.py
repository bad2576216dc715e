"""`yeonma grpo` in two processes, and killed in the middle of a rollout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.zygote import Zygote, together
from tests.runs import arguments, articles, left_behind, model_folder, write_jsonl
from tests.unit.train.test_grpo import SETTINGS, drawn, grpo, reward_file, without_times

pytestmark = pytest.mark.slow


def test_two_processes_share_the_prompts_of_a_step(zygotes: Zygote, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(16))
    reward = f"{reward_file(tmp_path)}:letters"
    one = grpo(tmp_path / "one", base, data, reward=reward)
    assert one.status == 0, one.err
    options = {"base_model": base, "data_path": data, "output_dir": tmp_path / "two", "reward": reward}
    two = together(zygotes, "grpo", {**options, **SETTINGS})
    assert two.status == 0, two.err
    for ours, alone in zip(drawn(two.folder), drawn(one.folder), strict=True):
        assert {**ours, "logprobs": [], "advantage": 0} == {**alone, "logprobs": [], "advantage": 0}
        assert ours["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-3)
    for name, weight in two.weights.items():
        assert weight.sub(one.weights[name]).abs().max() < 1e-3


HOOK = """
import os, signal, sys
from yeonma.train import rollouts
from yeonma.cli import main
draw = rollouts._draw
def killed(*arguments):
    if arguments[-1] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*arguments)
rollouts._draw = killed
sys.exit(main(sys.argv[1:]))
"""


def test_killed_in_the_middle_of_a_rollout(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    data = write_jsonl(tmp_path / "rows.jsonl", articles(16))
    reward = f"{reward_file(tmp_path)}:letters"
    untouched = grpo(tmp_path / "one", base, data, reward=reward)
    assert untouched.status == 0, untouched.err
    options = {"base_model": base, "data_path": data, "output_dir": tmp_path / "out", "reward": reward}
    words = ["grpo", *arguments({**options, **SETTINGS})]
    killed = subprocess.run(
        [sys.executable, "-c", HOOK, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert max(answer["step"] for answer in drawn(tmp_path / "out")) == 5
    done = grpo(tmp_path / "out", base, data, reward=reward)
    assert done.status == 0, done.err
    assert "continuing after step 4" in done.out
    assert without_times(left_behind(done.folder)) == without_times(left_behind(untouched.folder))

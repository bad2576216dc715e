"""`yeonma grpo` on a tiny model: what it draws, what it learns, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Done, arguments, articles, command, left_behind, model_folder, write_jsonl
from yeonma.bounded.user_functions import UserFunctions
from yeonma.config.reward_settings import RewardSettings
from yeonma.errors import UserError
from yeonma.rewards.rewards import Answered, rewards_of
from yeonma.train.rollouts import seed_of

REWARD = """
import pathlib

def letters(row, answer):
    marker = pathlib.Path(__file__).with_name("broken")
    if marker.exists() and answer.startswith(marker.read_text()):
        raise RuntimeError("no judgement today")
    return {"letters": sum(letter in "abcdefghijklm" for letter in answer) / 8, "known": float("document" in row)}
"""
SETTINGS: dict[str, object] = {
    "template": "{document}\n{title}",
    "group_size": 4,
    "batch_size": 4,
    "max_new_tokens": 8,
    "rollout_batch_size": 16,
    "learning_rate": 3e-2,
    "lora_r": 4,
    "num_epochs": 2,
    "save_steps": 2,
    "card_rows": 0,
    "micro_batch_size": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(16))


def reward_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rewards.py"
    path.write_text(REWARD)
    return path


def grpo(output: Path, base: Path, data: Path, **settings: object) -> Done:
    wanted = {"base_model": base, "data_path": data, "output_dir": output, **SETTINGS, **settings}
    return command(output, "grpo", *arguments(wanted))


def drawn(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    place = tmp_path_factory.mktemp("grpo")
    done = grpo(place / "out", base, data, reward=f"{reward_file(place)}:letters")
    assert done.status == 0, done.err
    return done


def test_learns(untouched: Done) -> None:
    rewards = [step["reward"] for step in untouched.steps]
    assert len(rewards) == 8
    assert sum(rewards[-2:]) > sum(rewards[:2])


def test_rollouts(untouched: Done) -> None:
    answers = drawn(untouched.folder)
    assert len(answers) == 8 * 4 * 4
    for step in untouched.steps:
        own = [answer for answer in answers if answer["step"] == step["step"]]
        assert [(answer["unit"], answer["number"]) for answer in own] == [
            (unit, number) for unit in range(4) for number in range(4)
        ]
        assert step["reward"] == pytest.approx(sum(answer["reward"] for answer in own) / 16)
        for answer in own:
            assert answer["seed"] == seed_of(42, step["step"], answer["unit"], answer["number"])
            assert answer["reward"] == pytest.approx(sum(answer["rewards"].values()))
            assert len(answer["token_ids"]) == len(answer["logprobs"]) <= 8
            assert answer["ended"] == (answer["token_ids"][-1] == 2)  # </s>
        trained = {answer["row"] for answer in own if answer["advantage"]}
        rows = json.loads(
            (untouched.folder / "trained_rows.jsonl").read_text().splitlines()[step["step"] - 1]
        )
        assert set(rows["rows"]) == trained


def test_trainer_and_sampler_agree(untouched: Done) -> None:
    for step in untouched.steps:
        assert step["ratio_outside"] == 0.0
        assert step["ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("rollout_batch_size", [1, 3])
def test_answers_do_not_depend_on_how_many_are_drawn_at_once(
    tmp_path: Path, base: Path, data: Path, untouched: Done, rollout_batch_size: int
) -> None:
    reward = f"{reward_file(tmp_path)}:letters"
    done = grpo(
        tmp_path / "out", base, data, reward=reward, rollout_batch_size=rollout_batch_size, max_steps=1
    )
    assert done.status == 0, done.err
    first = [answer for answer in drawn(untouched.folder) if answer["step"] == 1]
    for one, other in zip(drawn(done.folder), first, strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)


def test_a_failing_reward_stops_the_run_which_then_goes_on(
    tmp_path: Path, base: Path, data: Path, untouched: Done
) -> None:
    reward = reward_file(tmp_path)
    victim = next(answer for answer in drawn(untouched.folder) if answer["step"] == 4 and answer["answer"])
    broken = reward.with_name("broken")
    broken.write_text(victim["answer"])
    failed = grpo(tmp_path / "out", base, data, reward=f"{reward}:letters")
    assert failed.status == 2
    assert "no judgement today" in failed.err and "rewards.py:7" in failed.err
    assert victim["answer"] in failed.err
    steps = len(failed.steps)
    assert steps <= 3 and (failed.folder / f"checkpoint-{steps}").is_dir()
    broken.unlink()
    done = grpo(tmp_path / "out", base, data, reward=f"{reward}:letters")
    assert done.status == 0, done.err
    assert without_times(left_behind(done.folder)) == without_times(left_behind(untouched.folder))


def without_times(files: dict[str, Any]) -> dict[str, Any]:
    """Without the checkpoints, of which the stopped run has one more, and what follows from times."""
    kept = {
        name: content
        for name, content in files.items()
        if not name.startswith("checkpoint-") and name not in ("manifest.json", "settings.yaml", "README.md")
    }
    for line in kept["metrics.jsonl"]:
        for name in ("drawing_seconds", "scoring_seconds"):
            line.pop(name, None)
    return kept


def test_several_updates_of_a_rollout(tmp_path: Path, base: Path, data: Path) -> None:
    reward = f"{reward_file(tmp_path)}:letters"
    done = grpo(tmp_path / "out", base, data, reward=reward, updates_per_rollout=3, max_steps=2)
    assert done.status == 0, done.err
    assert len(done.steps) == 2
    rates = [step["learning_rate"] for step in done.steps]
    assert rates == pytest.approx([3e-2, 3e-2 * 3 / 6])  # six updates, linearly to 0


def test_rewards_with_weights(tmp_path: Path, base: Path, data: Path) -> None:
    settings = {"reward": ["exact", "regex:[a-z]*"], "reward_weights": [2.0, 0.5], "max_steps": 1}
    done = grpo(tmp_path / "out", base, data, **settings)
    assert done.status == 0, done.err
    for answer in drawn(done.folder):
        parts = answer["rewards"]
        assert answer["reward"] == 2 * parts["exact"] + 0.5 * parts["regex"]
        assert parts["regex"] == float(
            all(letter in "abcdefghijklmnopqrstuvwxyz" for letter in answer["answer"])
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "exakt"}, 'no reward "exakt"'),
        ({"reward": "regex:("}, "is no regular expression"),
        ({"reward": "exact", "reward_weights": [1.0, 2.0]}, "2 weights for 1 reward"),
        ({"reward": ["exact", "exact"]}, "exact stands there twice"),
        ({"reward": "nowhere.py:letters"}, "cannot be read"),
        ({"reward": "exact", "train_on": "all"}, "only the last answer of a row is drawn"),
        ({"reward": "exact", "micro_batch_tokens": "auto"}, "not those that are drawn"),
        ({"reward": "exact", "shard": True}, "sharded weights need all processes"),
        ({"reward": "exact", "group_size": 1}, "group_size"),
        ({"reward": "exact", "max_new_tokens": 500}, "of the model's 512 positions"),
    ],
)
def test_mistakes(tmp_path: Path, base: Path, data: Path, settings: dict[str, object], message: str) -> None:
    done = grpo(tmp_path / "out", base, data, **settings)
    assert done.status == 2
    assert message in " ".join(done.err.split())
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_another_reward_is_another_run(tmp_path: Path, base: Path, data: Path) -> None:
    reward = reward_file(tmp_path)
    assert grpo(tmp_path / "out", base, data, reward=f"{reward}:letters", max_steps=1).status == 0
    reward.write_text(REWARD.replace("/ 8", "/ 4"))
    other = grpo(tmp_path / "out", base, data, reward=f"{reward}:letters", max_steps=1)
    assert other.status == 2 and "content of the functions in reward" in other.err


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("The sum is 0.75", 1.0), ("$\\frac{6}{8}$", 1.0), ("3/5", 0.0), ("none", 0.0), ("9^9^9^9^9", 0.0)],
)
def test_math(answer: str, reward: float) -> None:
    pytest.importorskip("math_verify")
    with UserFunctions() as functions:
        (found,) = rewards_of(RewardSettings(reward="math"), functions)
        assert found.scores([Answered({}, "row 1", "3/4", answer)]) == [{"math": reward}]
        with pytest.raises(UserError, match="no mathematical expression"):
            found.scores([Answered({}, "row 1", "", "3")])


def test_json_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}')
    with UserFunctions() as functions:
        (found,) = rewards_of(RewardSettings(reward=f"json_schema:{schema}"), functions)
        texts = ['{"city": "Busan"}', '{"city": 1}', '{"town": "Busan"}', "Busan", ""]
        scores = found.scores([Answered({}, "row 1", None, text) for text in texts])
        assert scores == [{"json_schema": value} for value in (1.0, 0.0, 0.0, 0.0, 0.0)]
        schema.write_text('{"type": "nothing"}')
    with UserFunctions() as functions, pytest.raises(UserError, match="nothing"):
        rewards_of(RewardSettings(reward=f"json_schema:{schema}"), functions)[0].scores(
            [Answered({}, "row 1", None, "{}")]
        )


def test_exact_needs_an_answer_of_the_row() -> None:
    with UserFunctions() as functions, pytest.raises(UserError, match="no answer of its own"):
        rewards_of(RewardSettings(reward="exact"), functions)[0].scores([Answered({}, "row 1", None, "3")])

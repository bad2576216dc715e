"""Values of `--loss`: one name, or a weighted sum."""

from __future__ import annotations

import pytest

from tests.unit.config.test_parse import REQUIRED
from yeonma.config.loss_sum import LABEL_LOSSES, PAIR_LOSSES, InvalidLoss, weighted_losses
from yeonma.config.parse import config_from_keywords, to_yaml
from yeonma.config.settings import GROUPS, RunConfig
from yeonma.errors import UserError


@pytest.mark.parametrize("name", PAIR_LOSSES + LABEL_LOSSES)
def test_every_name_is_a_sum_of_itself(name: str) -> None:
    assert weighted_losses(name) == ((name, 1.0),)
    assert weighted_losses(f" {name} : 0.5 ") == ((name, 0.5),)


def test_sums_keep_their_order_and_a_weight_left_out_is_1() -> None:
    assert weighted_losses("sigmoid:2, sft:5e-1,ipo") == (("sigmoid", 2.0), ("sft", 0.5), ("ipo", 1.0))


@pytest.mark.parametrize(
    ("text", "what", "cure"),
    [
        ("sigmod:1,sft:1", '"sigmod" is not a loss', 'did you mean "sigmoid"?'),
        ("sigmoid:1,", "a loss is missing", "write name:weight"),
        ("sigmoid:x", 'the weight of sigmoid, "x", is not a number above 0', "write sigmoid:0.5"),
        ("sigmoid:0", 'the weight of sigmoid, "0"', "write sigmoid"),
        ("sigmoid:-1", 'the weight of sigmoid, "-1"', "write sigmoid"),
        ("sigmoid:inf", 'the weight of sigmoid, "inf"', "write sigmoid"),
        ("sigmoid:nan", 'the weight of sigmoid, "nan"', "write sigmoid"),
        ("sigmoid:", 'the weight of sigmoid, ""', "write sigmoid"),
        ("sft,sigmoid,sft:2", "sft stands there twice", "write sft once"),
        ("hinge,kto:2", "kto learns from labelled answers and hinge from pairs", "one kind of data"),
    ],
)
def test_what_is_no_sum_is_said_with_a_cure(text: str, what: str, cure: str) -> None:
    with pytest.raises(InvalidLoss) as caught:
        weighted_losses(text)
    assert str(caught.value).startswith(what)
    assert cure in caught.value.cure


def loss_of(value: object) -> str:
    config = config_from_keywords(RunConfig, {**REQUIRED, "loss": value}, groups=GROUPS["dpo"]).config
    assert config.preference is not None
    assert f"loss: {value}" in to_yaml(config).replace("'", "").replace('"', "")
    return config.preference.loss


def test_settings_take_names_and_sums_and_refuse_the_rest_with_their_place() -> None:
    assert loss_of("exo_pair") == "exo_pair"
    assert loss_of("sigmoid:1,sft:0.5") == "sigmoid:1,sft:0.5"
    with pytest.raises(
        UserError, match=r'^loss: "sigmod:1,sft:2" is no sum of losses: "sigmod" is not a loss; did you mean'
    ):
        loss_of("sigmod:1,sft:2")
    with pytest.raises(
        UserError, match=r"^loss: sigmoyd is not valid; give one of sigmoid, .* or a weighted "
    ):
        loss_of("sigmoyd")

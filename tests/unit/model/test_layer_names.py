"""Names of layers are refused from the base's files exactly as the model without its weights would refuse them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from tests.runs import model_folder
from yeonma.errors import UserError
from yeonma.model.layer_names import MODEL_TYPES, check_layer_names, names_in_files
from yeonma.model.target_choice import TargetChoice, chosen_layers
from yeonma.model.targets import target_layers

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}


def saved(kind: str, folder: Path, *, tied: bool = True) -> tuple[Path, torch.nn.Module]:
    """A small model of a type, in a folder as transformers writes it."""
    torch.manual_seed(0)
    more = {"intermediate_size": 48, "vocab_size": 97, "pad_token_id": 0, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(kind, **SMALL, **more)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("kind", sorted(MODEL_TYPES))
def test_the_files_of_these_types_name_every_layer_as_the_model_does(kind: str, tmp_path: Path) -> None:
    assert not get_checkpoint_conversion_mapping(kind)
    for tied in (True, False):
        folder, model = saved(kind, tmp_path / f"tied {tied}", tied=tied)
        names = names_in_files(folder)
        assert names is not None
        layers = target_layers(model)
        assert set(names.leaves) == {layer.leaf for layer in layers}
        paths = {f".{path}." for path in names.modules}
        own = {name for layer in layers for name in layer.path.split(".")}
        unknown = {name for name in own if not any(f".{name}." in path for path in paths)}
        assert unknown <= {"model", "transformer"}
        assert names.numbers == (0, 1, 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi3"])
@pytest.mark.parametrize(
    ("targets", "excluded", "layers"),
    [
        (["q_porj"], None, None),
        (["qkv", "nosuch"], None, None),
        ("self_attn.fc", None, None),
        ("all-linear", ["nosuch", "q_projj"], None),
        ("all-linear", None, "0-7"),
        ("all-linear", None, 3),
    ],
)
def test_the_message_is_the_one_of_the_model(
    kind: str, targets: list[str] | str, excluded: list[str] | None, layers: int | str | None, tmp_path: Path
) -> None:
    folder, model = saved(kind, tmp_path)
    with pytest.raises(UserError) as early:
        check_layer_names(folder, targets, excluded, layers)
    with pytest.raises(UserError) as late:
        chosen_layers(model, TargetChoice(targets, True, layers, excluded))
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["*_proj"], ["model.layers.0"], ["lm_head"], ["mlp"], ["act_fn"], ["layers.1.mlp"], [""]],
)
def test_what_the_model_may_have_is_left_to_it(targets: list[str] | str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base")
    check_layer_names(folder, targets, None, "0-1")


def test_files_that_name_layers_otherwise_or_cannot_be_read_tell_nothing(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base")
    assert names_in_files(tmp_path) is None
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"llama"', '"mixtral"'))
    assert names_in_files(folder) is None
    check_layer_names(folder, ["gate_up_proj"], None, None)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes(b"no such file")
    assert names_in_files(folder) is None

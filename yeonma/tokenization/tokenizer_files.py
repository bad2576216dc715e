"""Tokenizer folders that transformers 4 and 5 read alike: as tokenizer.json says.

Transformers 5 has classes that split text by rules of their own, whatever the file says, and names of classes that
transformers 4 does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
KNOWN_TO_BOTH = "PreTrainedTokenizerFast"
"""Transformers 4 and 5 take tokenizer.json as it is under this name."""
_BYTE_LEVEL = "ByteLevel"
_ONLY_IN_5 = ("TokenizersBackend", "Qwen3_5Tokenizer")


def save_tokenizer_files(tokenizer: Any, folder: Path) -> None:
    """Saves the tokenizer under the name of a class that transformers 4 knows too."""
    tokenizer.save_pretrained(str(folder))
    path = folder / TOKENIZER_CONFIG
    if not path.is_file() or not (folder / TOKENIZER).is_file():
        return
    config = json.loads(path.read_text("utf-8"))
    if config.get("tokenizer_class") in _ONLY_IN_5 and "auto_map" not in config:
        # without the second, transformers 4 would also give token_type_ids, which most models refuse
        config |= {"tokenizer_class": KNOWN_TO_BOTH, "model_input_names": list(tokenizer.model_input_names)}
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n", "utf-8")


def splits_otherwise(tokenizer: Any, tokenizer_json: Path) -> bool:
    """Whether a tokenizer of one of transformers' own classes splits text into words otherwise than the file says.

    Byte-level files are compared rule by rule. Of others, which may say the same in several ways, only those are told
    that the class reads as byte-level ones: it would drop all blanks.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers.models."):
        return False
    published = json.loads(tokenizer_json.read_text("utf-8")).get("pre_tokenizer")
    own = backend.pre_tokenizer and json.loads(backend.pre_tokenizer.__getstate__())
    if _BYTE_LEVEL not in json.dumps(published):
        return _BYTE_LEVEL in json.dumps(own)
    return own is None or _splitting(own) != _splitting(published)


def _splitting(pre_tokenizer: Any) -> Any:
    """Without what only moves the offsets of tokens."""
    if isinstance(pre_tokenizer, dict):
        return {name: _splitting(value) for name, value in pre_tokenizer.items() if name != "trim_offsets"}
    return (
        [_splitting(value) for value in pre_tokenizer] if isinstance(pre_tokenizer, list) else pre_tokenizer
    )

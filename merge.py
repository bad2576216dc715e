"""`python merge.py --base_model_name_or_path BASE --peft_model_path OUT --output_dir MERGED` is `yeonma merge`."""

import sys

from yeonma.cli import main

TUTORIALS = {"--peft_model_path": "--adapter_dir", "--base_model_name_or_path": "--base_model"}


def renamed(word: str) -> str:
    name, equals, value = word.partition("=")
    return TUTORIALS.get(name.replace("-", "_").replace("__", "--", 1), name) + equals + value


if __name__ == "__main__":
    sys.exit(main(["merge", *map(renamed, sys.argv[1:])]))

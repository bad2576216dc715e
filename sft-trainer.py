"""`torchrun --nproc_per_node=4 sft-trainer.py ...` is `yeonma sft ...` in four processes."""

import sys

from yeonma.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))

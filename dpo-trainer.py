"""`torchrun --nproc_per_node=4 dpo-trainer.py ...` is `yeonma dpo ...` in four processes."""

import sys

from yeonma.cli import main

if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))

"""The base model with its adapter: loading, forests through it, log-probabilities, generation, the adapter folder."""

import logging

# Where bitsandbytes is installed, PEFT imports it, and on the CPU it asks for a package with products of its own (its
# `gemm_4bit`), which are not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

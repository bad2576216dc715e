"""The base model and LoRA: loading, quantisation, sharding, attention over forests, kernels, log-probabilities."""

import logging

# PEFT imports bitsandbytes if it is installed. On the CPU, bitsandbytes then asks for a package with its `gemm_4bit`
# product, which we do not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

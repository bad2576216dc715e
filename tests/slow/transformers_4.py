"""A program for a Python that has transformers 4: how it reads a folder. JSON in, JSON out."""

READER = """
import json, sys
import transformers
from transformers import AutoConfig, AutoTokenizer
request = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(request["folder"])
ids = [list(tokenizer.apply_chat_template(one, add_generation_prompt=True)) for one in request["messages"]]
try:
    config = AutoConfig.from_pretrained(request["folder"])
except (OSError, ValueError):
    config = None
print(json.dumps({
    "version": transformers.__version__,
    "ids": ids,
    "inputs": tokenizer.model_input_names,
    "rope_theta": getattr(config, "rope_theta", None),
    "dtype": str(getattr(config, "dtype", "")).removeprefix("torch."),
}))
"""

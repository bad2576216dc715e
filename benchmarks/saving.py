"""What saving costs: the time of a run's saves beside that of its steps, in one and the same run.

The saves are whole: written, flushed, read back, renamed, and old checkpoints removed. Both times are of the same
process on the same disk, so other work on the machine slows down both. Writes results/saving.json; --write-docs puts
its lines into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from machine import machine, versions
from sft import child, describe_data, model_to_use, save, write_page
from tables import saving_section, shown_command
from workloads import BATCH_SIZE, HERE, LORA_R, SAMPLE

PACKAGES = ("yeonma", "torch", "transformers", "peft", "safetensors", "tokenizers")
RESULT = HERE / "results" / "saving.json"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SAMPLE, help="training rows; else the bundled sample")
    parser.add_argument("--model", type=Path, help="a model folder; else the demo's model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument(
        "--disk", type=Path, help="a folder on the disk to save to; else the temporary folder"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--write-docs", action="store_true", help="put the lines into docs/benchmarks.md")
    asked = parser.parse_args(given)
    model = model_to_use(asked.model)
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-", dir=asked.disk) as place:
        settings = {
            "base_model": model,
            "data_path": asked.data.resolve(),
            "output_dir": f"{place}/out",
            "batch_size": asked.batch_size,
            "max_steps": asked.steps,
            "save_steps": asked.save_steps,
            "save_total_limit": 1,
            "lora_r": LORA_R,
            "card_rows": 0,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        job = {"folder": place, "output": f"{place}/out", "command": ["sft", *words]}
        child("one_saving.py", job, Path(place) / "log")
        result = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shown_command("saving.py", sys.argv[1:] if given is None else given),
            "machine": machine(),
            "versions": versions(PACKAGES),
            "model": Path(model).name,
            "data": describe_data(asked.data),
            "settings": {
                name: settings[name] for name in ("batch_size", "max_steps", "save_steps", "lora_r")
            },
            **json.loads((Path(place) / "measured.json").read_text("utf-8")),
        }
    save(asked.output, result)
    print(saving_section(result))
    if asked.write_docs:
        write_page("saving", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

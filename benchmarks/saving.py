"""What saving costs: the time of a run's saves beside that of its steps, in one and the same run.

The saves are whole: written, flushed, read back, renamed, and old checkpoints removed. Both times are of the same
process on the same disk, so other work on the machine slows down both. Writes results/saving.json; --write-docs puts
its lines into docs/benchmarks.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import HERE, benchmark_parser, describe_data, model_to_use, new_result, publish, run_script, save
from tables import saving_section
from workloads import BATCH_SIZE, LORA_R, SAMPLE

PACKAGES = ("yeonma", "torch", "transformers", "peft", "safetensors", "tokenizers")
RESULT = HERE / "results" / "saving.json"


def main(given: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, RESULT, compares=False)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="training rows; else the bundled sample")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument(
        "--disk", type=Path, help="a folder on the disk to save to; else the temporary folder"
    )
    options = parser.parse_args(given)
    result = new_result("saving.py", given, PACKAGES)
    model = model_to_use(options.model)
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-", dir=options.disk) as folder:
        settings = {
            "base_model": model,
            "data_path": str(options.data.resolve()),
            "output_dir": f"{folder}/out",
            "batch_size": options.batch_size,
            "max_steps": options.steps,
            "save_steps": options.save_steps,
            "save_total_limit": 1,
            "lora_r": LORA_R,
        }
        result |= {
            "model": Path(model).name,
            "data": describe_data(options.data),
            "settings": {
                name: settings[name] for name in ("batch_size", "max_steps", "save_steps", "lora_r")
            },
            **run_script("one_saving.py", {"folder": folder, "settings": settings}),
        }
    save(options.output, result)
    publish("saving", result, saving_section(result), write_docs=options.write_docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())

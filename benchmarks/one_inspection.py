"""One `yeonma inspect` of generated rows, with the most memory it held for itself, as a script with a job file."""

from __future__ import annotations

import json
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from harness import answer_job
from machine import own_bytes

SECONDS_BETWEEN_LOOKS = 0.02


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from yeonma.cli import main

    folder, over, most = Path(job["folder"]), threading.Event(), own_bytes("RssAnon")

    def watch() -> None:
        nonlocal most
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            most = max(most, own_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    settings = {
        "base_model": job["model"],
        "data_path": job["rows_file"],
        "cache_dir": str(folder / "inspected"),
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    with open(folder / "shown", "w", encoding="utf-8") as shown, redirect_stdout(shown):
        status = main(["inspect", *words, "--rows", "1", "--json"])
    over.set()
    watcher.join()
    if status:
        raise SystemExit(f"inspect ended with status {status}")
    audit = json.loads((folder / "shown").read_text("utf-8").splitlines()[-1])["audit"]
    return {"own_bytes": most, "rows": audit["sources"][0]["rows"], "tokens": audit["tokens_per_epoch"]}


if __name__ == "__main__":
    answer_job(measure)

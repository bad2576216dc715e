"""Forecasts on disk, keyed by settings, data and versions, so that a forecast is computed only once."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from yeonma import __version__
from yeonma.config.settings import RunConfig
from yeonma.inspect.forecast import Forecast, forecast_dict, forecast_of
from yeonma.language import language
from yeonma.run_folder.checkpoint import write_text_atomically
from yeonma.train.prepare import Prepared
from yeonma.train.target_device import TargetDevice

FORMAT = 8
"""Increased whenever a change of the code changes the numbers or the notes of the same run."""


def forecast_key(config: RunConfig, prepared: Prepared, target: TargetDevice, processes: int) -> str:
    """SHA-256 of everything on which a forecast without time depends."""
    model, plan = config.model, prepared.plan
    adapter = Path(prepared.adapter or "") / "adapter_config.json"
    content = [
        FORMAT,
        language(),  # that of the notes
        [*(version(package) for package in ("torch", "transformers", "peft")), __version__],
        prepared.config.to_json_string(),
        sha256(adapter.read_bytes()).hexdigest() if prepared.adapter else None,
        [
            str(target.device),
            target.planned,
            str(target.dtype(model)),
            model.train,
            model.gradient_checkpointing,
            model.quantization,
        ],
        [processes, model.shard],
        asdict(config.lora),
        asdict(config.step),
        prepared.dataset.train.store.key,
        [plan.total_steps, sha256(plan.positions.tobytes()).hexdigest(), plan.shares and plan.shares.weights],
    ]
    return sha256(json.dumps(content).encode()).hexdigest()


def read_forecast(folder: Path, key: str) -> Forecast | None:
    """The cached forecast; None if there is none or it cannot be read."""
    try:
        return forecast_of(json.loads(_path(folder, key).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_forecast(folder: Path, key: str, forecast: Forecast) -> None:
    """Cache a forecast. Does nothing if the folder cannot be written."""
    try:
        write_text_atomically(_path(folder, key), json.dumps(forecast_dict(forecast)))
    except OSError:
        return


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.forecast"

"""`yeonma convert`: the YAML file of LLaMA-Factory or Axolotl as settings for `yeonma sft` or `yeonma dpo`."""

from __future__ import annotations

import os

from yeonma.config import axolotl, llama_factory
from yeonma.config.conversion import Conversion
from yeonma.config.parse import config_text
from yeonma.config.settings import ConvertSettings
from yeonma.config.yaml_text import read_items
from yeonma.errors import UserError
from yeonma.files import output_file, replace_file
from yeonma.messages import counted, tr
from yeonma.streams import log_line, say_lines


def run(settings: ConvertSettings) -> int:
    """Writes the settings, with a comment for every key that has no counterpart, and names those on standard error.

    Raises UserError for a file of neither tool, and for a training that is none of ours.
    """
    conversion = converted(settings.file, settings.dataset_dir, settings.nproc)
    if settings.output is None:
        say_lines(conversion.text().removesuffix("\n"))
    else:
        output = output_file(settings.output, "--output", settings.file)
        replace_file(output, conversion.text().encode())
    for remark in conversion.different:
        log_line(f"{settings.file}: {remark.key}: {remark.why}")
    settings_text = counted(len(conversion.settings), "setting")
    remarks = counted(len(conversion.different), "remark")
    log_line(
        tr(
            "{tool}: {settings} for yeonma {verb}, {remarks} on what may change the result",
            tool=conversion.tool,
            settings=settings_text,
            verb=conversion.verb,
            remarks=remarks,
        )
    )
    return 0


def converted(path: str, dataset_dir: str | None, processes: int) -> Conversion:
    """The settings that a file of either tool stands for, checked."""
    lines, given = {}, {}
    for key, value, line in read_items(config_text(path), path):
        lines[str(key)] = line
        if value is not None:
            given[str(key)] = value
    if llama_factory.is_llama_factory(given):
        conversion = Conversion(llama_factory.TOOL, os.fspath(path), given, lines)
        llama_factory.convert(conversion, dataset_dir, processes)
    elif axolotl.is_axolotl(given):
        conversion = Conversion(axolotl.TOOL, os.fspath(path), given, lines)
        axolotl.convert(conversion, processes)
    else:
        raise UserError(
            tr("neither LLaMA-Factory's nor Axolotl's"),
            place=path,
            cure=tr(
                "a file of LLaMA-Factory has model_name_or_path and stage, one of Axolotl base_model and "
                "datasets"
            ),
        )
    conversion.check()
    return conversion

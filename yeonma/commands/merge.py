"""`yeonma merge`: merges an adapter into its base, and checks that the merged model gives the same answers."""

from __future__ import annotations

from yeonma.config.settings import MergeSettings
from yeonma.export.merged_model import merge, prepare_merge
from yeonma.files import new_output_folder
from yeonma.messages import tr
from yeonma.streams import say


def run(settings: MergeSettings) -> int:
    """Returns 0 if the merged model agrees with the adapter on its base, else 1, with nothing written.

    Raises UserError as `prepare_merge` and `merge`.
    """
    output = new_output_folder(settings.output_dir)
    agreement = merge(prepare_merge(settings, say), output, say)
    if not agreement.is_close:
        return 1
    say(tr("{output} is a complete model; it loads without the adapter's folder", output=output))
    return 0

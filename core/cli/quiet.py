"""The program's terminal: other libraries' progress bars off, so that the user sees one bar at a time, ours."""

from __future__ import annotations

from functools import partial

from ..quantised import hush


def hush_bitsandbytes() -> None:
    """Keep one note from the terminal: bitsandbytes, imported by peft where it is installed, looks for a CPU kernel on
    the Hub and tells everyone that it did not find it, also those who never asked for 4 bits on a CPU."""
    hush()


def quiet() -> None:
    """Switch off the bars of transformers ("Loading weights", "Writing model shards"), datasets and model cards.

    For a process that is all ours. The Hub's download bars stay: they are what a user waits for.
    """
    hush_bitsandbytes()
    import datasets  # type: ignore[import-untyped]
    from sentence_transformers.base import model_card
    from tqdm import tqdm  # type: ignore[import-untyped]
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    # "Computing widget examples" has no switch of its own.
    vars(model_card)["tqdm"] = partial(tqdm, disable=True)

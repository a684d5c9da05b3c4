"""Training on a CPU, ragged text: Burnish against Sentence Transformers; how cost grows with length, batch and model.

    python benchmarks/cpu.py --out benchmarks/results/cpu-DATE.jsonl

MiniLM's real shape, LoRA and full, in float32; one thing changes at a time. About five minutes on two quiet cores; the
load of the machine is on every line. Options are those of grid.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a script finds its siblings by their bare names, a type checker by the folder's
    from benchmarks import grid
else:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import grid

ARMS = "st-sdpa,burnish"
CELLS = (
    "all-MiniLM-L6-v2 lora16 128 16 natural",  # the middle
    "all-MiniLM-L6-v2 lora16 256 16 natural",  # length
    "all-MiniLM-L6-v2 lora16 128 64 natural",  # batch
    "all-MiniLM-L6-v2 full 128 16 natural",  # mode
    "all-MiniLM-L6-v2 lora16 128 16 fixed",  # no padding to leave out
    "distilbert-base-uncased lora16 128 16 natural",  # model
)
STEPS = "--cpu --steps 5 --warmup 1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells; see grid.py for the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return grid.main([f"--options={STEPS}", *given, *(f"{ARMS} {cell}" for cell in CELLS)])


if __name__ == "__main__":
    raise SystemExit(main())

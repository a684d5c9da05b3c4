"""What the memory plan measured and did not derive: `python benchmarks/fit_memory.py --write` writes it.

The numbers are of the fused backend under bfloat16 on CUDA, from the lines of Burnish in `benchmarks/results`
(`grid-*.jsonl` and `memory-*.jsonl`).
"""

KEPT = 1.008
"""What a layer keeps for its backward, as a multiple of `Shapes.kept` in 16 bits."""
OUTSIDE = 23.504
"""What a token holds outside the layers, in 16-bit rows of the hidden size: embeddings, pooling, and the last layer's
backward, which begins while all layers' activations are there."""
PRODUCTS = 1.232
"""The weights that the products of a step read, made anew in each: multiples of their size in 16 bits."""
WORKSPACE = 0.061
"""GiB of workspaces whatever the model, about two of cuBLAS's 32 MiB. A step that is captured has its own, beside those
of steps that are not: twice as much."""
AGAIN = 2.109
"""With checkpointing: what a layer takes while it is computed again and goes backward, as a multiple of `Shapes.widest`
in 16 bits."""

SELECTIVE = 0.43
"""With selective checkpointing: the share of KEPT that is kept."""
ASSUMED = ("SELECTIVE",)
"""Which of these no line has measured yet."""

FITTED = "2026-11-26, 65 lines, 8 models"
"""When, and on how many lines."""
WORST = 0.096
"""The largest error of a line, as a share of the measured peak."""
HELD_OUT = 0.106
"""The largest error of a line whose model was left out of the fit, one model at a time."""

"""What the memory plan measured and did not derive: `python benchmarks/fit_memory.py --write` writes it.

The numbers are of the fused backend under bfloat16 on CUDA, from the lines of Burnish in
`benchmarks/results/grid-*.jsonl`.
"""

KEPT = 1.028
"""What a layer keeps for its backward, as a multiple of `Shapes.kept` in 16 bits."""
OUTSIDE = 34.316
"""What a token holds outside the layers, in 16-bit rows of the hidden size: embeddings, pooling, and the last layer's
backward, which begins while all layers' activations are there."""
PRODUCTS = 1.272
"""The weights that the products of a step read, made anew in each: multiples of their size in 16 bits."""
WORKSPACE = 0.078
"""GiB that are there whatever the model: workspaces of cuBLAS, inputs, attention's bounds."""

SELECTIVE = 0.43
"""With selective checkpointing: the share of KEPT that is kept."""
CHECKPOINT = 1.0
"""With checkpointing: rows of the hidden size, 16 bits each, that a token keeps a layer: the layer's input."""
OFFLOAD = 0.0
"""The same on the device with checkpoints in host memory."""
ASSUMED = ("SELECTIVE", "CHECKPOINT", "OFFLOAD")
"""Which of these no line has measured yet."""

FITTED = "2026-11-26, 38 lines, 7 models"
"""When, and on how many lines."""
WORST = 0.077
"""The largest error of a line, as a share of the measured peak."""
HELD_OUT = 0.11
"""The largest error of a line whose model was left out of the fit, one model at a time."""

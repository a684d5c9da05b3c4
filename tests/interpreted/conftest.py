"""Triton's kernels under its interpreter, on the CPU.

Triton reads TRITON_INTERPRET once, when it is imported, which other tests may have done: these files are collected only
where it is set. `tests/numerics/test_triton.py` runs each in a process of its own.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

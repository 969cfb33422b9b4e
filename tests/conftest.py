"""For every suite."""

from __future__ import annotations

import os

# Before torch is imported, and inherited by daemons: the models here are so small that a second
# thread only waits, and on a busy machine waits long.
os.environ["OMP_NUM_THREADS"] = "1"

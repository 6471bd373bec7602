"""Tiny models only lose by more threads, here and in the processes that tests start."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

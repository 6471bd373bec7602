"""The large libraries: importing them takes seconds, and they draw progress bars of their own."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import sys
import time

from llmprune.common.console import PlainConsole
from llmprune.common.local_processes import is_first_of_launcher, is_own_process

_imports_began: float | None = None  # time.process_time()


def import_libraries(*, announced: bool) -> None:
    """Import torch and transformers, and print that this begins: it takes 10 s and more from a cold disk.

    No garbage is collected meanwhile, and what was imported is never searched for garbage: the imports make hardly any,
    and the searches take a fifth of the time to the first layer. ``announced``: print even where standard error is no
    terminal; the process that starts several prints it for them.
    """
    global _imports_began
    if "torch" in sys.modules:
        return
    _imports_began = time.process_time()
    if is_first_of_launcher() and not is_own_process() and (announced or sys.stderr.isatty()):
        print("Starting: loading torch and transformers", file=sys.stderr, flush=True)
    gc.disable()
    try:
        for name in ("torch", "transformers.modeling_utils"):
            importlib.import_module(name)
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # objects that are left at the exit are reported as leaks by triton


def seconds_of_imports() -> float | None:
    """Return the processor time since the slow imports began, to be called when they have ended; None without them."""
    return None if _imports_began is None else time.process_time() - _imports_began


def quiet_libraries() -> None:
    """Disable the progress bars of libraries unless standard error is a terminal, and the counting of loaded text.

    Disable also what bitsandbytes says about kernels.
    """
    count_no_loads()
    ignore_missing_kernels()
    if PlainConsole(stderr=True).is_terminal:
        return
    import transformers.utils.logging
    from huggingface_hub.utils import disable_progress_bars

    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    # datasets reads it on its import, which not every run makes
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def ignore_missing_kernels() -> None:
    """Have bitsandbytes not advise to install kernels of the hub, none of which is used here.

    It does when it is imported, which importing peft does too.
    """
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)


def count_no_loads() -> None:
    """Have datasets send no request to its counter when it reads a file, here and in processes that are started.

    Files of this machine are nobody's concern, and without a network each process waits seconds for the name server.
    """
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read when datasets is imported
    if "datasets" in sys.modules and os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] == "0":
        sys.modules["datasets"].config.HF_UPDATE_DOWNLOAD_COUNTS = False

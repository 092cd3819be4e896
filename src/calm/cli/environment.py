"""The environment of a command: set before torch and transformers are imported, which read it once.

Only the `calm` command changes its environment (and that of the processes it starts); `import calm` does not.
"""

import os
import sys
import warnings

# Variables by which a user has chosen how OpenMP threads wait.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def wait_passively() -> None:
    """Let idle OpenMP threads sleep instead of spinning, unless the user has chosen otherwise.

    A thread that spins takes a core from other work, and every parallel region waits for the thread whose core was
    taken: beside other load, training on the CPU is many times slower (benchmarks/threads.py).
    """
    if any(name in os.environ for name in _WAITING):
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"  # GNU's OpenMP, which torch's wheels for Linux contain
    os.environ["KMP_BLOCKTIME"] = "0"  # Intel's and LLVM's, which still spin for 200 ms with a passive policy


def quieten_libraries() -> None:
    """Keep other libraries' notices and progress bars out of our output; CALM_DEBUG=1 shows them again."""
    if os.environ.get("CALM_DEBUG"):
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", module="torch")
    warnings.filterwarnings("ignore", module="transformers")
    if "transformers.utils.logging" in sys.modules:  # the variables come too late
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

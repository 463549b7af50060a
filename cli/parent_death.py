"""Children that end with their parent, however it ends (prctl(2), PR_SET_PDEATHSIG).

Each function is for `preexec_fn`: it runs in the child before the program does.
"""

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_with_parent() -> None:
    """By SIGTERM, for a child that has children of its own to end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

"""Garbage collection of Python in a process that serves tokens by the thousand."""

import gc

COLLECT_AFTER = 20_000  # objects more than the last time; Python's own 700 are fewer than one step brings


def spare_what_is_loaded() -> None:
    """To be called when all is loaded: what is there now is never looked at again, and the rest less often.

    Else a quarter of the processor time goes to it, and now and then a tenth of a second at once.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)

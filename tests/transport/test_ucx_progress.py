"""The compiled loop: it needs no cache, and no address is compiled in."""

from __future__ import annotations

import os
import subprocess
import sys

import numba.core.caching
import pytest

from pdengine.transport import ucx_progress

PRINT_CACHE_HITS = """
from pdengine.transport.ucx_progress import compile_loop
print(sum(compile_loop().run.stats.cache_hits.values()))
"""


def test_it_compiles_where_no_cache_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in (numba.core.caching.CompileResultCacheImpl, numba.core.caching.CodeLibraryCacheImpl):
        monkeypatch.setattr(cache, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        ucx_progress._compile(cache=True)
    assert ucx_progress.compile_loop().error_handler.address


def test_another_process_loads_it_from_the_cache(tmp_path: object) -> None:
    environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", PRINT_CACHE_HITS],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert hits == ["0", "1"]

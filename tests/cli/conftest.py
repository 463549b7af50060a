import os

import pytest


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of the person who runs the tests; which libucp to load stays theirs."""
    for name in list(os.environ):
        if name.startswith("PDENGINE_") and name != "PDENGINE_UCX_LIB":
            monkeypatch.delenv(name)

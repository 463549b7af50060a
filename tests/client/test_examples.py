"""The examples of docs/client.md, run as they stand there against two real routers with scripted workers."""

import re
from pathlib import Path
from typing import Any

import pytest
from router_thread import RouterThread

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_examples(page: str, *addresses: str) -> int:
    """Run all blocks in order in one namespace, as a reader would; how many there are."""
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(page))
    try:
        for block in blocks:
            code = block[1].replace("tcp://127.0.0.1:5555", addresses[0])
            for name, address in zip(("tcp://router-a:5555", "tcp://router-b:5555"), addresses, strict=True):
                code = code.replace(name, address)
            line = page.count("\n", 0, block.start(1))
            exec(compile("\n" * line + code, PAGE, "exec"), names)  # errors name the line of the page
    finally:
        if "client" in names:
            names["client"].close()
    return len(blocks)


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    with RouterThread() as first, RouterThread() as second:
        assert run_examples(PAGE.read_text(), first.address, second.address) >= 10
    assert "temperature" in capsys.readouterr().out


def test_a_broken_example_is_noticed() -> None:
    page = "# A page\n\n```python\nfrom pdengine.client import Client\nClient.no_such_thing()\n```\n"
    with pytest.raises(AttributeError, match="no_such_thing") as caught:
        run_examples(page, "tcp://127.0.0.1:1", "tcp://127.0.0.1:1")
    assert caught.traceback[-1].lineno == 4

"""The ZeroMQ client library, blocking and asyncio.

from pdengine.client import Client

with Client("tcp://127.0.0.1:5555") as client:
    print(client.generate("The capital of France is", max_tokens=8).text)
"""

from pdengine.client.arguments import GenerateOptions
from pdengine.client.async_client import AsyncClient
from pdengine.client.async_stream import AsyncStream
from pdengine.client.client import Client, Stream
from pdengine.client.results import (
    Cancelled,
    Choice,
    Completion,
    Delta,
    Failed,
    GenerateError,
    Rejected,
    RouterUnavailable,
    TimedOut,
)
from pdengine.transport.messages import Status, TokenLogprobs, TransferStats, Usage

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Choice",
    "Client",
    "Completion",
    "Delta",
    "Failed",
    "GenerateError",
    "GenerateOptions",
    "Rejected",
    "RouterUnavailable",
    "Status",
    "Stream",
    "TimedOut",
    "TokenLogprobs",
    "TransferStats",
    "Usage",
]

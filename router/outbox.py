"""What goes to clients: all deltas of one engine step for one client in one message."""

from collections.abc import Callable
from dataclasses import dataclass, field

from pdengine.transport.messages import Delta, Deltas, Message
from pdengine.transport.sockets import SendFailed


@dataclass
class _Waiting:
    """messages: that go after the deltas."""

    deltas: list[Delta] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)


class Outbox:
    """Deltas wait for `flush`, and what is sent to the same client meanwhile waits behind them.

    Sending one message costs more than all else that is done for a token, so it is not done for each.

    send: raises SendFailed if the client is gone or does not read. on_failure: is told of that.
    """

    def __init__(
        self, send: Callable[[bytes, Message], None], on_failure: Callable[[bytes, SendFailed], None]
    ) -> None:
        self._send_now = send
        self._on_failure = on_failure
        self._waiting: dict[bytes, _Waiting] = {}

    def add(self, client: bytes, delta: Delta) -> None:
        """Whoever calls this calls `flush` before it gives up control."""
        waiting = self._waiting.get(client)
        if waiting is None:
            waiting = self._waiting[client] = _Waiting()
        waiting.deltas.append(delta)

    def send(self, client: bytes, message: Message) -> None:
        waiting = self._waiting.get(client)
        if waiting is not None:
            waiting.messages.append(message)
        else:
            self._send(client, message)

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for client, parts in waiting.items():
            if self._send(client, Deltas(parts.deltas)):
                for message in parts.messages:
                    self._send(client, message)

    def _send(self, client: bytes, message: Message) -> bool:
        try:
            self._send_now(client, message)
        except SendFailed as error:
            self._on_failure(client, error)
            return False
        return True

"""Between a worker that has the KV cache of a prompt and the one that shall get it.

Until a decode worker has taken a lease over, the router renews and releases it with the same messages.
"""

from pdengine.transport.messages.shared import Malformed, Message


class RenewLeases(Message, frozen=True):
    """sequence: returned in the answer, so that the asker knows when it asked."""

    sequence: int
    lease_ids: list[int]


class ReleaseLeases(Message, frozen=True):
    lease_ids: list[int]


class LeasesRenewed(Message, frozen=True):
    """lost: leases that have expired or never existed."""

    sequence: int
    renewed: list[int]
    lost: list[int]


class EndPush(Message, frozen=True):
    """Nobody wants this attempt any more: write nothing more for it, and answer PushEnded."""

    request_id: str
    attempt: int


class PushEnded(Message, frozen=True):
    """Nothing is written for this attempt any more, and nothing will be."""

    request_id: str
    attempt: int


PeerRequest = RenewLeases | ReleaseLeases | EndPush
PeerReply = LeasesRenewed | PushEnded | Malformed

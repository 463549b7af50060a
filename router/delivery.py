"""What workers write, on its way to the clients: tokens to text, to deltas, and to the end of a request."""

from collections.abc import Callable

from pdengine.router.attempts import Attempts
from pdengine.router.ledger import Answer, Ledger, Request
from pdengine.router.outbox import Outbox
from pdengine.router.registry import WorkerEntry
from pdengine.transport.messages import (
    Delta,
    Finished,
    Outcome,
    Prefilled,
    PromptLogprobs,
    PromptScored,
    ReleaseLeases,
    StepTokens,
    TokenUpdate,
)


class Delivery:
    """release: tells a worker of a lease that nobody wants. end: gives a request its outcome."""

    def __init__(
        self,
        ledger: Ledger,
        attempts: Attempts,
        outbox: Outbox,
        *,
        release: Callable[[WorkerEntry, ReleaseLeases], None],
        end: Callable[[Request, Outcome], None],
    ) -> None:
        self._ledger = ledger
        self._attempts = attempts
        self._outbox = outbox
        self._release = release
        self._end = end

    def take_step(self, message: StepTokens) -> None:
        for token in message.updates:
            self._take_token(token)
        self._outbox.flush()

    def take_prefilled(self, worker: WorkerEntry, message: Prefilled) -> None:
        request = self._ledger.current(message.request_id, message.attempt)
        unfinished = [] if request is None else request.unfinished
        expected = [(choice.index, len(choice.output_ids)) for choice in unfinished]
        if request is None or [(token.choice, token.position) for token in message.tokens] != expected:
            if message.lease is not None:
                self._release(worker, ReleaseLeases([message.lease.lease_id]))
            if request is not None:
                self._attempts.retry(request, "its worker sent other tokens than were asked for")
            return
        request.lease, request.lease_accepted = message.lease, False
        for choice, token in zip(unfinished, message.tokens, strict=True):
            if not self._deliver(request, choice, token):
                break
        self._outbox.flush()
        if self._ledger.current(message.request_id, message.attempt) is None or message.pushed:
            return  # it has ended, or its worker is to be another one; or Pushed follows
        if request.lease is None:
            self._attempts.retry(request, "the prefill worker gave no lease on its KV cache")
            return
        self._attempts.place_decode(request)

    def take_prompt_scored(self, message: PromptScored) -> None:
        """What comes again, from the next worker after a failure, was told by the first."""
        request = self._ledger.current(message.request_id, message.attempt)
        if request is None or request.prompt_logprobs is None or not request.lacks_prompt_logprobs:
            return
        known = request.prompt_logprobs
        num_again = len(known) + 1 - message.position
        if num_again < 0 or message.position < 1:
            self._attempts.retry(request, "log probabilities of its prompt were lost")
            return
        missing = len(request.prompt_ids) - 1 - len(known)
        known += message.logprobs[num_again : num_again + missing]
        if not request.lacks_prompt_logprobs:
            self._outbox.send(request.client, PromptLogprobs(request.tag, known))
            request.prompt_logprobs = None  # told, and needed nowhere else

    def _take_token(self, token: TokenUpdate) -> None:
        request = self._ledger.current(token.request_id, token.attempt)
        choice = None if request is None else request.find_choice(token.choice)
        if request is None or choice is None or token.position < len(choice.output_ids):
            return
        if token.position > len(choice.output_ids):
            self._attempts.retry(request, "tokens of its worker were lost")
            return
        if not self._deliver(request, choice, token):
            return
        if token.finish_reason is None and choice.finish_reason is not None:
            self._attempts.give_up_answer(request, choice.index)

    def _deliver(self, request: Request, choice: Answer, token: TokenUpdate) -> bool:
        """Stream one token; with the last one of the last answer the request ends. Whether it goes on as it
        is."""
        wants_logprobs = request.sampling.logprobs is not None
        if (wants_logprobs and token.logprobs is None) or request.lacks_prompt_logprobs:
            self._attempts.retry(request, "its worker sent no log probabilities")
            return False
        text = choice.append(token.token_id, token.finish_reason)
        logprobs = [token.logprobs] if wants_logprobs and token.logprobs is not None else None
        self._outbox.add(
            request.client,
            Delta(request.tag, text, [token.token_id], choice.index, choice.finish_reason, logprobs),
        )
        if choice.finish_reason is None or request.unfinished:
            return True
        if token.finish_reason is None:  # of a stop string the worker knows nothing
            self._attempts.withdraw(request)
        self._end(request, _finished(request))
        return False


def _finished(request: Request) -> Finished:
    return Finished(
        request.tag,
        [choice.finish_reason for choice in request.choices if choice.finish_reason is not None],
        request.usage(),
        prefill_worker=request.prefill_worker,
        decode_worker=request.decode_worker,
        attempts=request.attempt,
        transfer=request.transfer,
    )

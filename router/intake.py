"""What is made of a request before it is placed: the tokens of its prompt, their names, its stop strings."""

from dataclasses import dataclass
from pathlib import Path

from pdengine.models.config import load_config
from pdengine.models.fingerprint import model_fingerprint
from pdengine.models.tokenizer import IncrementalDetokenizer, Tokenizer
from pdengine.router.admission import check_fits, check_prompt_ids, check_request, tokenize
from pdengine.router.ledger import Request
from pdengine.router.prefixes import PromptPrefix, name_prefix
from pdengine.router.registry import Limits
from pdengine.router.stop_strings import StopSearch, StopStrings
from pdengine.transport.messages import Generate


@dataclass(frozen=True)
class Parts:
    """prefix: None if the prefix cache shall not be used. include_stop: texts have what ends them."""

    prompt_ids: list[int]
    prefix: PromptPrefix | None
    stops: StopStrings | None
    include_stop: bool


class Intake:
    """model: fingerprint of the checkpoint in `directory`. Raises CheckpointError."""

    def __init__(self, directory: Path) -> None:
        self._vocab_size = load_config(directory).vocab_size
        self._tokenizer = Tokenizer.load(directory)
        self.model = model_fingerprint(directory)

    def check(self, message: Generate) -> None:
        """Raise InvalidRequest for a field out of range; the prompt is not looked at."""
        check_request(message, self._vocab_size)

    def read(self, message: Generate, limits: Limits, block_size: int | None) -> Parts:
        """Takes long for a long prompt: call it off the event loop. One that is too long goes no further than
        it must. Raises InvalidRequest.
        """
        prompt_ids = tokenize(message.prompt, self._tokenizer)
        check_fits(len(prompt_ids), message.sampling, limits)
        check_prompt_ids(prompt_ids, self._vocab_size)
        prefix = None
        if block_size is not None and message.sampling.prompt_logprobs is None:
            prefix = name_prefix(self.model, message.cache_salt, prompt_ids, block_size)
        stops = StopStrings(message.stop) if message.stop else None
        return Parts(prompt_ids, prefix, stops, message.include_stop)

    def begin(self, request: Request, parts: Parts) -> None:
        """Make a request ready to be placed."""
        request.prompt_ids, request.prefix = parts.prompt_ids, parts.prefix
        for choice in request.choices:
            choice.detokenizer = IncrementalDetokenizer(self._tokenizer, request.prompt_ids)
            choice.include_stop = parts.include_stop
            if parts.stops is not None:
                choice.search = StopSearch(parts.stops, shows_match=parts.include_stop)

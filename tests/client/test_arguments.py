"""What the keyword arguments of a request become, and what the router says of logprobs."""

import asyncio
from typing import Any

import pytest
from fake_cluster import on_event_loop
from scripted_router import routers_and_client

from pdengine.client import GenerateOptions, TokenLogprobs
from pdengine.client.arguments import to_request
from pdengine.transport import messages
from pdengine.transport.messages import Cancel, Generate, SamplingParams, TokenPrompt
from pdengine.transport.sockets import MessageTooLong


def test_every_field_has_an_argument_and_the_other_way_round() -> None:
    fields = {*Generate.__struct_fields__, *SamplingParams.__struct_fields__} - {"tag", "prompt", "sampling"}
    assert set(GenerateOptions.__annotations__) == fields


def test_what_is_left_out_has_the_default_of_the_message() -> None:
    assert to_request([1], {}) == Generate(0, TokenPrompt([1]))


def test_the_arguments_travel() -> None:
    request = to_request(
        [1],
        {
            "stop": "end",
            "stop_token_ids": {3},
            "logit_bias": {5: -1, 6: 0.5},
            "min_tokens": 2,
            "presence_penalty": 0.1,
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.1,
            "logprobs": 0,
            "prompt_logprobs": 3,
        },
    )
    assert request.stop == ("end",)
    assert request.sampling == SamplingParams(
        stop_token_ids=(3,),
        logit_bias={5: -1.0, 6: 0.5},
        min_tokens=2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logprobs=0,
        prompt_logprobs=3,
    )
    assert to_request([1], {"stop": iter(["a", "b"])}).stop == ("a", "b")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_token": 5}, "unknown argument: max_token"),
        ({"tag": 5}, "unknown argument: tag"),
        ({"stop": [1]}, "stop"),
        ({"stop": None}, "stop is NoneType"),
        ({"stop_token_ids": 5}, "stop_token_ids is int"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": None}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"repetition_penalty": "1"}, "repetition_penalty"),
        ({"min_tokens": None}, "min_tokens"),
    ],
)
def test_a_wrong_argument_is_named(options: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        to_request([1], options)


@on_event_loop
async def test_logprobs_come_with_their_tokens() -> None:
    first, second = TokenLogprobs(-0.5, 1, [(4, -0.5)]), TokenLogprobs(-2.0, 3, [(9, -0.1)])
    async with routers_and_client(1) as ([router], client):
        stream = client.stream([7, 8], n=2, logprobs=1, prompt_logprobs=1)
        waiting = asyncio.create_task(stream.__anext__())
        tag = (await router.expect(Generate)).tag
        router.send(messages.PromptLogprobs(tag, [second]))
        deltas = [
            messages.Delta(tag, "a", [4], 0, None, [first]),
            messages.Delta(tag, "b", [5], 1, "stop", [second]),
            messages.Delta(tag + 1, "nobody's", [5], 0, None, None),
            messages.Delta(tag, "c", [6, 7], 0, "stop", [second, first]),
        ]
        router.send(messages.Deltas(deltas))
        router.finish(tag, n=2)
        assert (await waiting).logprobs == [first]
        assert stream.prompt_logprobs == [second]
        assert [delta.logprobs async for delta in stream] == [[second], [second, first]]
        completion = stream.completion
        assert [choice.logprobs for choice in completion.choices] == [[first, second, first], [second]]
        assert (completion.logprobs, completion.prompt_logprobs) == ([first, second, first], [second])


@on_event_loop
async def test_a_request_that_is_too_long_hurts_nobody_else() -> None:
    async with routers_and_client(1) as ([router], client):
        with pytest.raises(MessageTooLong, match="too long: the limit is"):
            await client.generate("x" * 70_000_000)
        await router.expect(Cancel)
        await asyncio.gather(client.generate([7]), router.answer(1))

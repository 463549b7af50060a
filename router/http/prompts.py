"""What a request asks about, from its body to token ids."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias

from pdengine.models.tokenizer import Tokenizer
from pdengine.router.admission import InvalidRequest, check_length, check_not_empty
from pdengine.router.http.errors import ApiError
from pdengine.router.http.fields import NEUTRAL_IN_MESSAGE, check_unknown
from pdengine.router.http.requests import (
    ChatMessageBody,
    CompletionBody,
    TemplateBody,
    ToolCall,
    extras,
)
from pdengine.transport.messages import TextPrompt, TokenPrompt


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them. options: of `ChatTemplate.render`."""

    messages: list[dict[str, Any]]
    options: Mapping[str, Any]


Asked: TypeAlias = TextPrompt | TokenPrompt | Conversation

# They are parsed on the loop, and what stands in strings is not counted when the body arrives.
MAX_ARGUMENTS_CHARACTERS = 2**19


def prompts_of(body: CompletionBody) -> list[Asked]:
    match body.prompt:
        case str(text):
            return [TextPrompt(text)]
        case [int(), *_] as token_ids:
            return [TokenPrompt(token_ids)]  # type: ignore[arg-type]
        case prompts:
            return [TextPrompt(p) if isinstance(p, str) else TokenPrompt(p) for p in prompts]  # type: ignore[arg-type]


def conversation_of(messages: list[ChatMessageBody], body: TemplateBody) -> Conversation:
    """Raises ApiError for a field of a message that the prompt would not show, for two ends of it, and for
    tool calls with long arguments."""
    for index, message in enumerate(messages):
        check_unknown(extras(message), NEUTRAL_IN_MESSAGE, where=f"messages[{index}].")
    calls = [call for message in messages for call in message.tool_calls or ()]
    num_characters = sum(len(call.function.arguments) for call in calls)
    if num_characters > MAX_ARGUMENTS_CHARACTERS:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"messages: the arguments of tool_calls have {num_characters} characters in all, the limit is "
            f"{MAX_ARGUMENTS_CHARACTERS}",
            param="messages",
        )
    if body.continue_final_message and body.add_generation_prompt:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            "add_generation_prompt: not with continue_final_message",
            param="add_generation_prompt",
        )
    options = {
        "add_generation_prompt": body.opens_answer,
        "continue_final_message": bool(body.continue_final_message),
        "tools": body.tools or None,
        "documents": body.documents or None,
        "variables": body.template_variables,
    }
    return Conversation([_of_message(message) for message in messages], options)


def encode(prompt: Asked, tokenizer: Tokenizer, *, add_special_tokens: bool | None) -> list[int]:
    """Token ids of any kind of prompt. Takes long for long text: call it off the event loop.

    add_special_tokens: None is what is right for this kind. Raises InvalidRequest.
    """
    try:
        match prompt:
            case TokenPrompt(token_ids):
                pass
            case TextPrompt(text):
                check_length(len(text))
                adds = add_special_tokens is not False
                token_ids = tokenizer.encode(text, add_special_tokens=adds) if text else []
            case Conversation(messages, options):
                text = tokenizer.chat_template().render(messages, **options)
                check_length(len(text))
                token_ids = tokenizer.encode(text, add_special_tokens=bool(add_special_tokens))
    except InvalidRequest:
        raise
    except ValueError as error:  # not valid Unicode, no chat template, or one that fails
        raise InvalidRequest("prompt", str(error)) from error
    check_not_empty(token_ids)
    return token_ids


def _of_message(message: ChatMessageBody) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        fields["tool_calls"] = [_of_call(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            fields[name] = value
    return fields


def _of_call(call: ToolCall) -> dict[str, Any]:
    """Templates expect arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):  # the model wrote it so
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}

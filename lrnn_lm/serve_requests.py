"""What `lrnn serve` adds to transformers' server: a mistake in a request is told with status 400.

transformers answers most mistakes with 500 and a traceback in the log. What it does not know it leaves out:
one text for `n: 3`, no `logprobs`. Here those are refused, and each request of a batch has its own settings.
"""

import json
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

# Fields of OpenAI's protocol that transformers' server does not read, and the values that ask for nothing.
_NOT_READ = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),  # as a number, it asks for those of the text itself
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
}
_MOST_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_TEXT = ("text", "input_text", "output_text")  # types of the parts of a message


def tell_mistakes(start: str) -> None:
    """Have the handlers of transformers' server tell mistakes. start: the text of an empty prompt."""
    from transformers.cli.serving import chat_completion, completion, response, utils

    for handler, asked in (
        (completion.CompletionHandler, "prompt"),
        (chat_completion.ChatCompletionHandler, "messages"),
        (response.ResponseHandler, "input"),
    ):
        handler.handle_request = _telling(handler.handle_request, asked, start)

    class BatchManager(utils.CBGenerateManager):
        """One whose requests have their own settings, where the model's batch can."""

        def init_cb(self, model: Any, gen_config: Any) -> None:
            super().init_cb(model, gen_config)
            if hasattr(self._cb, "configure"):
                self._cb.configure(gen_config)  # its request is added before the server gets to another one

    utils.CBGenerateManager = BatchManager


def _telling(handle: Callable[..., Any], asked: str, start: str) -> Callable[..., Any]:
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    @wraps(handle)
    async def handle_request(self: Any, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await handle(self, checked(body, asked, start), request_id)
        except HTTPException as error:
            status, message = error.status_code, str(error.detail)
        except (ValueError, TemplateError) as error:  # the latter where a chat template refuses messages
            status, message = 400, str(error)
        # In OpenAI's form: their client shows the message of no other.
        told = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": told}, status_code=status)

    return handle_request


def checked(body: dict[str, Any], asked: str, start: str) -> dict[str, Any]:
    """A request without what says nothing; ValueError for one that the server cannot answer as it asks.

    asked: the field that is answered, `prompt` (of which `start` is the default), `messages` or `input`.
    """
    json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is no text: a ValueError
    body = {key: value for key, value in body.items() if value is not None and value not in ([], {}, "")}
    for name in (*_MOST_TOKENS, "seed", "n", "best_of", "top_logprobs"):  # some clients write 16.0
        if isinstance(value := body.get(name), float) and value.is_integer():
            body[name] = int(value)
    for name, nothing in _NOT_READ.items():
        if name in body and not any(type(body[name]) is type(no) and body[name] == no for no in nothing):
            raise ValueError(f"{name}: this server does not know it; leave it out")
    for name in _MOST_TOKENS:
        _check_number(body, name, 1, whole=True)
    _check_number(body, "seed", -(2**63), 2**64 - 1, whole=True)
    _check_number(body, "temperature", 0)
    _check_number(body, "top_p", 0, 1)
    _check_number(body, "frequency_penalty", -2)
    if "logit_bias" in body:
        if asked != "messages":
            raise ValueError("logit_bias: this server knows it for chats only; leave it out")
        body["logit_bias"] = _biases(body["logit_bias"])
    if "stop" in body:
        stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError(f"stop must be a text or a list of texts, not {stops!r}")
        body["stop"] = [stop for stop in stops if stop] or None
    if asked == "prompt":
        prompt = body.get("prompt", start)
        body["prompt"] = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    elif asked not in body:
        raise ValueError(f"{asked}: give at least one message")
    elif asked == "messages":
        _check_messages(body["messages"])
        # As a dumped answer has them: beside tool_calls, even none, transformers does not read the text.
        body["messages"] = [
            {key: value for key, value in message.items() if value is not None and value != []}
            for message in body["messages"]
        ]
    return body


def _biases(biases: Any) -> dict[str, float]:
    try:
        return {token: float(bias) for token, bias in biases.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"logit_bias must be numbers by token, not {biases!r}") from None


def _check_number(
    body: dict[str, Any], name: str, least: float, most: float = math.inf, whole: bool = False
) -> None:
    value = body.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name} must be a {'whole ' * whole}number, not {value!r}")
    if not least <= value <= most or value == math.inf:
        limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be {limits}, not {value!r}")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise ValueError("messages must be a list of objects, each with a role and a content")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{number}] must be an object with a role and a content")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        for part in parts:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ValueError(f"messages[{number}].content must be a text, or a list of parts with a type")
            if part["type"] not in _TEXT or not isinstance(part.get("text"), str):
                raise ValueError(f"messages[{number}]: this model reads text only, not {part['type']!r}")

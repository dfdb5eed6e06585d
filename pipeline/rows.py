"""Raw values of a data file to checked rows, as the training script will read them. Pure: opens no file.

Formats, roles and words agree with the block `data rows` of scripts/train_sft.py; tests/test_rows.py compares them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.dataset_facts import Problem
from pipeline.errors import redact

FORMATS = "`messages`, `prompt` + `completion`, `conversations` (from/value) or `text`"
PAIRS = "`prompt` + `chosen` + `rejected`, or `chosen` + `rejected` with the same beginning"
ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"}
JSON_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class BadRow(Exception):
    """A row that training refuses: what is wrong with it, and the edit that mends it."""

    def __init__(self, problem: Problem, message: str, hint: str) -> None:
        super().__init__(message)
        self.problem, self.message, self.hint = problem, message, hint


@dataclass(frozen=True)
class DataRow:
    """A checked row. `prompt` and `completion` are both text, or both lists of messages.

    Of a pair of answers `completion` is the chosen one.
    """

    format: str
    prompt: Any
    completion: Any
    tools: list[Any] | None = None
    rejected: Any = None

    @property
    def is_chat(self) -> bool:
        """Whether the row is made of messages."""
        return isinstance(self.completion, list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation of a chat row."""
        return [*self.prompt, *self.completion] if self.is_chat else []

    @property
    def assistant_turns(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def kind(self) -> str:
        """The format in words."""
        return f"`{self.format}` of {'messages' if self.is_chat else 'plain text'}"

    @property
    def is_same(self) -> bool:
        """Whether both answers of a pair are the same: there is nothing to prefer."""
        return bool(self.completion == self.rejected)

    def with_rejected(self) -> "DataRow":
        """The row with its other answer in the place of the chosen one."""
        return replace(self, completion=self.rejected)

    def alternates(self) -> bool:
        """After system messages, user and assistant take turns, beginning with the user. Tools count as users."""
        spoken = [m["role"] for m in self.messages if m["role"] not in ("system", "developer")]
        return all((role == "assistant") == bool(index % 2) for index, role in enumerate(spoken))

    def digest(self) -> str:
        """Hash of what the row teaches: equal for equal rows, in whatever format and key order they are written."""
        content = [self.messages, self.tools] if self.is_chat else [self.prompt + self.completion, None]
        content += [] if self.rejected is None else [self.rejected]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()


def check_row(raw: Any, pairs: bool = False) -> DataRow:
    """The row that `raw` describes, by the first format whose columns it has; with `pairs`, two answers.

    Raises:
        BadRow: no known format, or something in it that training cannot use.
    """
    if not isinstance(raw, Mapping):
        known = PAIRS if pairs else FORMATS
        raise BadRow(Problem.FORMAT, f"a row is a JSON object, this is {kind_of(raw)}", f"write {known}")
    if pairs:
        return _answers(raw)
    given = {key for key, value in raw.items() if value is not None}
    if "messages" in given:
        return DataRow("messages", [], _messages(raw["messages"], "messages"), _tools(raw))
    if given >= {"prompt", "completion"}:
        return _pair(raw)
    if "conversations" in given:
        turns = raw["conversations"]
        renamed = [_renamed(turn) for turn in turns] if isinstance(turns, list) else turns
        return DataRow("conversations", [], _messages(renamed, "conversations"), _tools(raw))
    if "text" in given:
        return DataRow("text", "", _text(raw["text"], "text"))
    hint = f"write `method: dpo`, or rows of {FORMATS}" if given >= {"chosen", "rejected"} else f"write {FORMATS}"
    raise BadRow(Problem.FORMAT, f"no known format: the row has {_columns(raw)}", hint)


def _columns(raw: Mapping[str, Any]) -> str:
    columns = ", ".join(f"`{shown(key)}`" for key in list(raw)[:8]) or "no columns"
    return columns + (f" and {len(raw) - 8} more" if len(raw) > 8 else "")


def shown(value: object, longest: int = 60) -> str:
    """Text of a row for a message: cut, without tokens, with escapes for what would steer a terminal."""
    text = redact(str(value))
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return JSON_NAMES.get(type(value), "a number")


def parse_line(text: bytes) -> tuple[Any, str]:
    """The JSON value of a line, or what is wrong with it."""
    try:
        return json.loads(text.decode("utf-8-sig")), ""
    except (ValueError, RecursionError) as error:
        return None, _json_fault(error)


def _json_fault(error: Exception) -> str:
    """The decoder's words without its own line numbers: it saw one line."""
    match error:
        case json.JSONDecodeError():
            return f"not JSON: {error.msg.removesuffix(' starting at')} at character {error.pos + 1}"
        case UnicodeDecodeError():
            return f"not UTF-8 text: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
        case RecursionError():
            return "not JSON that can be read: nested too deep"
    return "not JSON that can be read: a number of thousands of digits"


def _pair(raw: Mapping[str, Any]) -> DataRow:
    prompt, completion = raw["prompt"], raw["completion"]
    match prompt, completion:
        case str(), str():
            return DataRow("prompt/completion", _text(prompt, "prompt"), _text(completion, "completion"))
        case list(), list():
            asked = _messages(prompt, "prompt", answered=False)
            return DataRow("prompt/completion", asked, _messages(completion, "completion"), _tools(raw))
    message = f"`prompt` is {kind_of(prompt)} and `completion` is {kind_of(completion)}"
    raise BadRow(Problem.FORMAT, message, "make both text, or both lists of messages")


def _answers(raw: Mapping[str, Any]) -> DataRow:
    """A pair of answers; their prompt is a column, or how both begin."""
    prompt, chosen, rejected = (raw.get(key) for key in ("prompt", "chosen", "rejected"))
    if chosen is None or rejected is None:
        hint = f"write {PAIRS}, or `method: qlora`"
        raise BadRow(Problem.FORMAT, f"no pair of answers: the row has {_columns(raw)}", hint)
    match prompt, chosen, rejected:
        case ((str() | None), str(), str()):
            asked, one, other = _text_answers(prompt, chosen, rejected)
            return DataRow("chosen/rejected", asked, one, None, other)
        case ((list() | str() | None), list(), list()):
            said, best, worst = _chat_answers(prompt, chosen, rejected)
            return DataRow("chosen/rejected", said, best, _tools(raw), worst)
    kinds = ", ".join(f"`{key}` is {kind_of(raw.get(key))}" for key in ("prompt", "chosen", "rejected"))
    raise BadRow(Problem.FORMAT, kinds, "make all three text, or all three lists of messages")


def _text_answers(prompt: str | None, chosen: str, rejected: str) -> tuple[str, str, str]:
    one, other = _text(chosen, "chosen"), _text(rejected, "rejected")
    if prompt is None:
        prompt = _beginning(one, other).removesuffix(" ")  # the blank before a word belongs to the answer
        one, other = one[len(prompt) :], other[len(prompt) :]
        _require_prompt(prompt)
    return _text(prompt, "prompt"), one, other


def _chat_answers(prompt: Any, chosen: list[Any], rejected: list[Any]) -> tuple[list[dict[str, Any]], ...]:
    """Prompt and answers, as messages. Answers that are whole conversations may say the prompt again."""
    answers = [_messages(chosen, "chosen"), _messages(rejected, "rejected")]
    asked = _messages(prompt, "prompt", answered=False) if isinstance(prompt, list) else []
    begun = _beginning(*answers)
    if begun and (begun[: len(asked)] == asked if asked else prompt in (None, begun[-1]["content"])):
        asked, answers = begun, [answer[len(begun) :] for answer in answers]
    elif isinstance(prompt, str):
        message = "`prompt` is text, and `chosen` is a list that does not begin with it"
        raise BadRow(Problem.FORMAT, message, "make all three lists of messages")
    _require_prompt(asked)
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer[-1]["role"] != "assistant":
            message = f"`{name}` does not end with the assistant"
            raise BadRow(Problem.ROLES, message, "end it with the answer to compare")
    return asked, *answers


def _require_prompt(prompt: Any) -> None:
    if not prompt:
        message = "no `prompt`, and `chosen` and `rejected` begin differently"
        raise BadRow(Problem.FORMAT, message, f"write {PAIRS}")


def _beginning(left: Any, right: Any) -> Any:
    """The characters or messages that both begin with, less the last of each: that much is always an answer."""
    pairs = enumerate(zip(left[:-1], right[:-1], strict=False))
    same = next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)) - 1)
    return left[:same]


def _messages(value: Any, name: str, answered: bool = True) -> list[dict[str, Any]]:
    """Checked messages; with `answered`, one of them is the assistant's."""
    if not isinstance(value, list):
        raise BadRow(Problem.FORMAT, f"`{name}` is {kind_of(value)}", "write a list of {role, content}")
    if not value:
        raise BadRow(Problem.CONTENT, f"`{name}` is empty", "remove the row, or write its messages")
    messages = [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]
    if answered and all(message["role"] != "assistant" for message in messages):
        raise BadRow(Problem.ROLES, f"no assistant turn in `{name}`", "remove the row, or add the answer to learn")
    return messages


def _message(message: Any, name: str) -> dict[str, Any]:
    """One message without null fields (Parquet fills them in), its content as text."""
    if not isinstance(message, dict):
        raise BadRow(Problem.FORMAT, f"`{name}` is {kind_of(message)}", "write an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(Problem.ROLES, f"`{name}` has the role `{shown(role)}`", f"use one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    only_calls = role == "assistant" and message.get("tool_calls") and content in (None, "")
    content = "" if only_calls else _text(content, f"{name}.content")
    return {key: value for key, value in message.items() if value is not None} | {"content": content}


def _renamed(turn: Any) -> Any:
    """A `{from, value}` turn as `{role, content}`; anything else as it is, for the checks to name."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker = turn["from"]
    return {"role": SPEAKERS.get(str(speaker), speaker), "content": turn.get("value")}


def _text(value: Any, name: str) -> str:
    """`value`, when it is text with something in it."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(Problem.CONTENT, f"`{name}` is empty", "remove the row, or write the text")
    if not isinstance(value, str):
        raise BadRow(Problem.CONTENT, f"`{name}` is {kind_of(value)}", "write text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # `\ud83d` alone is valid JSON, and no tokenizer takes it
        raise BadRow(
            Problem.CONTENT,
            f"`{name}` has half a character, `\\u{ord(value[error.start]):04x}`",
            "write the character whole, or remove it",
        ) from error
    return value


def _tools(raw: Mapping[str, Any]) -> list[Any] | None:
    """Tool descriptions: a list, or the same list as JSON text."""
    tools = raw.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(
                Problem.FORMAT, f"`tools` is not JSON: {error}", "write a list of tool descriptions"
            ) from error
    if tools is not None and not isinstance(tools, list):
        raise BadRow(Problem.FORMAT, f"`tools` is {kind_of(tools)}", "write a list of tool descriptions")
    return tools or None

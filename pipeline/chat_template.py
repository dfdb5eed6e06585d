"""A base's Jinja chat template, run in a sandbox with what transformers 5.23 gives it. Opens no file."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # not characters of any text: they go around what a template marks as generated
# The oldest sandbox without a known way out; templates of a base are somebody else's code.
SAFE_JINJA = (3, 1, 6)
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers passes each under the others' name


def has_template(files: Mapping[str, str]) -> bool:
    """Whether a base with these files can show conversations."""
    return bool(template_texts(files))


def template_texts(files: Mapping[str, str]) -> dict[str, str]:
    """Chat templates by name (`default`, `tool_use`), from whichever file holds them."""
    if files.get("chat_template.jinja"):
        return {"default": files["chat_template.jinja"]}
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _object(files.get(name, "")).get("chat_template")
        if isinstance(found, str) and found:
            return {"default": found}
        if isinstance(found, list):
            return {one["name"]: one["template"] for one in found if isinstance(one, dict) and "template" in one}
    return {}


def _special_tokens(files: Mapping[str, str]) -> dict[str, str]:
    named = _object(files.get("special_tokens_map.json", "")) | _object(files.get("tokenizer_config.json", ""))
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items() if k.endswith("_token")}
    return {key: value for key, value in texts.items() if isinstance(value, str)}


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class ChatTemplate:
    """A base's Jinja chat template in a sandbox, given what transformers gives it.

    Raises:
        ValueError: a jinja2 whose sandbox has known holes, or a template that is not Jinja.
    """

    def __init__(self, files: Mapping[str, str], now: datetime) -> None:
        import jinja2

        if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < SAFE_JINJA:
            raise ValueError(f"jinja2 {jinja2.__version__} is too old to run a template in (3.1.6 is safe)")
        self.special = _special_tokens(files)
        texts = template_texts(files)
        self.marks_turns = bool(MARKERS.search(texts.get("default", "")))
        # A template may also stumble over the types of its input; the training script would end there too.
        self.refusals = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)
        plain, marking = _sandbox("", "", now), _sandbox(OPEN, CLOSE, now)
        try:
            self._plain = {name: plain.from_string(text) for name, text in texts.items()}
            self._marking = {name: marking.from_string(text) for name, text in texts.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the base's chat template is not Jinja: {error}") from error

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        """The conversation as text, ending with the opening of an answer if `prompt`."""
        return self._render(self._plain, messages, tools, prompt)

    def render_marked(
        self, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation, and where the generated stretches of it start and end."""
        pieces = re.split(f"([{OPEN}{CLOSE}])", self._render(self._marking, messages, tools, False))
        text, starts, marks = "", [0], []
        for piece in pieces:
            if piece == OPEN:
                starts.append(len(text))
            elif piece == CLOSE:
                marks.append((starts.pop(), len(text)))
            else:
                text += piece
        return text, marks

    def _render(
        self, compiled: Mapping[str, Any], messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool
    ) -> str:
        if "default" not in compiled:
            raise ValueError("the base has no chat template")
        chosen = compiled["tool_use"] if tools and "tool_use" in compiled else compiled["default"]
        named = [_with_reasoning(message) for message in messages]
        given = {"messages": named, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        return str(chosen.render(**{**self.special, **given}))


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _sandbox(before: str, after: str, now: datetime) -> Any:
    """A Jinja sandbox with the tags, filters and functions that chat templates use; `before` and `after` go around
    what stands in `{% generation %}`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_around"), [], [], body).set_lineno(line)

        def _around(self, caller: Callable[[], str]) -> str:
            return before + caller() + after

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now.strftime}
    return environment

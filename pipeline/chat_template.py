"""A base's Jinja chat template, run in a sandbox with what transformers 5.23 gives it. Opens no file.

A template is somebody else's code, so its work is bounded: loop rounds, the size of what it makes, and as a last resort
seconds and memory. No template known here needs a hundredth of it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from pipeline.guard import Exceeded, guarded

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # not characters of any text: they go around what a template marks as generated
# The oldest sandbox without a known way out; templates of a base are somebody else's code.
SAFE_JINJA = (3, 1, 6)
LONGEST_TEMPLATE = 100_000  # characters; the longest known here has 30,000
ROUNDS = 100_000  # of all loops and macros of one rendering
ROUNDS_OF_ALL = 2_000_000
LARGEST_VALUE = 1_000_000  # characters or items that one operator may make
GROWTH, FREE, FREE_OF_ALL = 8, 100_000, 1_000_000  # characters out: so many for each one in, and so many besides
SECONDS, MEGABYTES, SLOW_S = 0.3, 250, 0.02  # of one rendering; slower ones share SECONDS
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


class BadTemplate(ValueError):
    """A base's chat template that cannot be used."""


class TooMuchWork(Exception):
    """One rendering exceeded what a template may do."""


class Spent(Exception):
    """All renderings since `renew` together took what they may; none of them was out of bounds."""


class ChatTemplate:
    """A base's Jinja chat template in a sandbox, given what transformers gives it.

    A rendering that does too much is one of `refusals`; after it every other one is refused at once.

    Raises:
        ValueError: a jinja2 whose sandbox has known holes.
        BadTemplate: a template that is not Jinja, or too much of it.
    """

    def __init__(self, files: Mapping[str, str], now: datetime) -> None:
        import jinja2

        if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < SAFE_JINJA:
            raise ValueError(f"jinja2 {jinja2.__version__} is too old to run a template in (3.1.6 is safe)")
        self.special = _special_tokens(files)
        texts = template_texts(files)
        self.marks_turns = bool(MARKERS.search(texts.get("default", "")))
        # A template may also stumble over the types of its input; the training script would end there too.
        stumbles = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
        self.refusals = (jinja2.TemplateError, TooMuchWork, *stumbles)
        self._work = _Work()
        if sum(map(len, texts.values())) > LONGEST_TEMPLATE:
            raise BadTemplate(f"the base's chat template has more than {LONGEST_TEMPLATE:,} characters")
        plain, marking = _sandbox("", "", now, self._work), _sandbox(OPEN, CLOSE, now, self._work)
        try:
            with guarded(SECONDS, MEGABYTES):
                self._plain = {name: plain.from_string(text) for name, text in texts.items()}
                self._marking = {name: marking.from_string(text) for name, text in texts.items()}
        except jinja2.TemplateSyntaxError as error:
            raise BadTemplate(f"the base's chat template is not Jinja: {error}") from error
        except Exceeded as error:
            raise BadTemplate(f"the base's chat template takes {error} to be read") from None
        except (RecursionError, SyntaxError, OverflowError, ValueError) as error:
            raise BadTemplate(f"the base's chat template is not Jinja: {type(error).__name__}") from error

    def renew(self) -> None:
        """Begin to count the work of all renderings anew."""
        self._work.renew()

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
        # `repr`: what may be output depends on the size of what was put in.
        return self._work.bounded(len(repr((named, tools))), lambda: chosen.generate(**{**self.special, **given}))


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


class _Work:
    """What a template's renderings have done; counts the same on every machine, but for the last resort."""

    def __init__(self) -> None:
        self.fault, self.largest = "", LARGEST_VALUE
        self.renew()

    def renew(self) -> None:
        self.rounds = self.rounds_of_all = self.size_in = self.size_out = 0
        self.slow_s = 0.0

    def round(self) -> str:
        """One more round of a loop, or call of a macro."""
        self.rounds += 1
        if self.rounds > ROUNDS:
            raise TooMuchWork(f"more than {ROUNDS:,} rounds of its loops")
        return ""

    def bounded(self, size: int, start: Callable[[], Iterator[str]]) -> str:
        """The joined pieces of a rendering of `size` characters."""
        if self.fault:
            raise TooMuchWork(self.fault)
        written = self.size_out > FREE_OF_ALL + GROWTH * self.size_in
        if written or self.rounds_of_all > ROUNDS_OF_ALL or self.slow_s > SECONDS:
            raise Spent
        self.rounds, self.largest = 0, LARGEST_VALUE + GROWTH * size
        try:
            with guarded(SECONDS, MEGABYTES) as guard:
                text = self._joined(start(), FREE + GROWTH * size)
            self.slow_s += guard.took if guard.took > SLOW_S else 0.0
        except Exceeded as error:
            self.fault = f"it takes {error}"
        except TooMuchWork as error:
            self.fault = f"it takes {error}"
        if self.fault:
            raise TooMuchWork(self.fault)
        self.rounds_of_all += self.rounds
        self.size_in, self.size_out = self.size_in + size, self.size_out + len(text)
        return text

    def _joined(self, pieces: Iterator[str], most: int) -> str:
        kept, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > most:
                raise TooMuchWork(f"more than {most:,} characters")
            kept.append(piece)
        return "".join(kept)

    def operate(self, operator: str, left: Any, right: Any) -> None:
        """Refuse an operator whose result would be huge, before it is made."""
        if operator == "**":
            large = isinstance(right, int) and abs(right) > 64
        elif operator == "*":
            sizes = [len(one) if hasattr(one, "__len__") else one for one in (left, right)]
            large = all(isinstance(one, int) for one in sizes) and abs(sizes[0] * sizes[1]) > 2**64
            if hasattr(left, "__len__") or hasattr(right, "__len__"):
                large = all(isinstance(one, int) for one in sizes) and sizes[0] * sizes[1] > self.largest
        elif operator == "%":
            large = isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{5}|\*)", left) is not None
        else:
            large = hasattr(left, "__len__") and hasattr(right, "__len__") and len(left) + len(right) > self.largest
        if large:
            raise TooMuchWork(f"more than an operator `{operator}` may make")


def _sandbox(before: str, after: str, now: datetime, work: _Work) -> Any:
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

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            work.operate(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def round(self) -> str:
            return work.round()

        def _generate(self, source: nodes.Template, *given: Any, **more: Any) -> str:
            loops: list[Any] = list(source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
            for node in loops:
                call = nodes.Call(nodes.EnvironmentAttribute("round"), [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
                node.set_environment(self)
            return super()._generate(source, *given, **more)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = as_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now.strftime}
    return environment

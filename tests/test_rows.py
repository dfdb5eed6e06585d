"""Rows of every format, good and bad; and the same verdict as the training script gives."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset_facts import Problem
from pipeline.rows import BadRow, check_row

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/train_sft.py"
USER, REPLY = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
GOOD = [
    {"messages": [USER, REPLY]},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, REPLY], "text": None, "tools": "[]"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
            REPLY,
        ]
    },
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [{"type": "function"}]},
    {"messages": [USER, REPLY | {"name": None}], "instruction": "x"},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": [USER], "completion": [REPLY]},
    {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]},
    {"conversations": [USER, REPLY]},
    {"text": "Once upon a time."},
    {"messages": None, "text": "Once upon a time."},
]
BAD: list[tuple[Any, Problem, str]] = [
    ([USER, REPLY], Problem.FORMAT, "a row is a JSON object, this is a list"),
    (None, Problem.FORMAT, "this is null"),
    ({}, Problem.FORMAT, "the row has no columns"),
    ({"instruction": "x", "output": "y"}, Problem.FORMAT, "the row has `instruction`, `output`"),
    ({"prompt": "x"}, Problem.FORMAT, "the row has `prompt`"),
    ({"messages": "Hello"}, Problem.FORMAT, "`messages` is text"),
    ({"messages": ["Hello"]}, Problem.FORMAT, "`messages[0]` is text"),
    ({"messages": []}, Problem.CONTENT, "`messages` is empty"),
    ({"messages": [USER]}, Problem.ROLES, "no assistant turn in `messages`"),
    ({"messages": [{"role": "bot", "content": "x"}, REPLY]}, Problem.ROLES, "`messages[0]` has the role `bot`"),
    ({"messages": [{"from": "human", "value": "x"}]}, Problem.ROLES, "has the role `None`"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, Problem.CONTENT, "`messages[1].content` is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, Problem.CONTENT, "`messages[1].content` is empty"),
    ({"messages": [USER, {"role": "assistant", "content": 4}]}, Problem.CONTENT, "`messages[1].content` is a number"),
    ({"messages": [USER, REPLY], "tools": "{"}, Problem.FORMAT, "`tools` is not JSON"),
    ({"messages": [USER, REPLY], "tools": {}}, Problem.FORMAT, "`tools` is an object"),
    ({"prompt": "x", "completion": [REPLY]}, Problem.FORMAT, "`prompt` is text and `completion` is a list"),
    ({"prompt": "x", "completion": ""}, Problem.CONTENT, "`completion` is empty"),
    ({"prompt": [USER], "completion": [USER]}, Problem.ROLES, "no assistant turn in `completion`"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, Problem.ROLES, "has the role `narrator`"),
    ({"text": 5}, Problem.CONTENT, "`text` is a number"),
    ({"text": "half \ud83d"}, Problem.CONTENT, "`text` has half a character"),
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_sft_rows", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("raw", GOOD, ids=lambda raw: "+".join(raw))
def test_good_rows_are_read_as_the_script_reads_them(raw: dict, script: ModuleType) -> None:
    row, theirs = check_row(raw), script.clean_row("x:1", raw)
    assert (row.format, row.prompt, row.completion, row.tools, row.is_chat) == (
        *(theirs.format, theirs.prompt, theirs.completion, theirs.tools),
        theirs.is_chat,
    )
    assert row.kind == script.describe(theirs)


@pytest.mark.parametrize(("raw", "problem", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_rows_are_named(raw: Any, problem: Problem, message: str, script: ModuleType) -> None:
    with pytest.raises(BadRow) as caught:
        check_row(raw)
    assert caught.value.problem is problem
    assert message in caught.value.message
    assert caught.value.hint
    with pytest.raises(script.InputError):
        script.clean_row("x:1", raw)


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
turn = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "bot", None]),
        "content": scalars | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": scalars}), max_size=2),
        "from": st.sampled_from(["human", "gpt", "system", "nobody"]),
        "value": scalars,
        "tool_calls": scalars,
    },
)
turns = st.lists(turn | scalars, max_size=3) | scalars
rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("messages", "conversations", "prompt", "completion"), turns),
        "text": scalars,
        "tools": scalars | st.lists(scalars, max_size=1),
    },
)


@settings(max_examples=400, deadline=None)
@given(raw=rows | scalars)
def test_the_verdict_is_the_scripts(raw: Any, script: ModuleType) -> None:
    try:
        theirs = script.clean_row("x:1", raw)
    except script.InputError:
        with pytest.raises(BadRow):
            check_row(raw)
        return
    row = check_row(raw)
    assert (row.format, row.prompt, row.completion, row.tools) == (
        *(theirs.format, theirs.prompt, theirs.completion),
        theirs.tools,
    )


@pytest.mark.parametrize(
    ("roles", "alternates"),
    [
        ("user assistant", True),
        ("system user assistant user assistant", True),
        ("user assistant tool assistant", True),
        ("assistant user", False),
        ("user user assistant", False),
        ("user assistant assistant", False),
        ("user system assistant", True),
    ],
)
def test_alternation(roles: str, alternates: bool) -> None:
    row = check_row({"messages": [{"role": role, "content": "x"} for role in roles.split()]})
    assert row.alternates() is alternates


def test_digest_is_that_of_the_content() -> None:
    same = [GOOD[0], {"messages": [dict(reversed(USER.items())), REPLY], "id": 7}, GOOD[7], GOOD[6]]
    assert len({check_row(raw).digest() for raw in same}) == 1
    assert check_row(GOOD[0]).digest() != check_row({"messages": [USER, REPLY, USER]}).digest()


def test_assistant_turns() -> None:
    row = check_row({"prompt": [USER], "completion": [REPLY, USER, REPLY]})
    assert row.assistant_turns == [1, 3]
    assert check_row({"text": "x"}).assistant_turns == []

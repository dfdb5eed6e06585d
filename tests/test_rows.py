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


OTHER = {"role": "assistant", "content": "Go away."}
ASKED = {"role": "user", "content": "Once more?"}
# What is read of a pair: prompt, chosen, rejected.
PAIRS: list[tuple[dict[str, Any], tuple[Any, Any, Any]]] = [
    ({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, ("2 + 2 =", " 4", " 5")),
    ({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER], "id": 7}, ([USER], [REPLY], [OTHER])),
    ({"prompt": None, "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ([USER], [REPLY], [OTHER])),
    ({"prompt": [USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ([USER], [REPLY], [OTHER])),
    ({"prompt": "Hello?", "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ([USER], [REPLY], [OTHER])),
    (
        {"prompt": [USER], "chosen": [USER, REPLY, ASKED, REPLY], "rejected": [USER, REPLY, ASKED, OTHER]},
        ([USER, REPLY, ASKED], [REPLY], [OTHER]),
    ),
    ({"chosen": [USER, REPLY, ASKED, REPLY], "rejected": [USER, OTHER]}, ([USER], [REPLY, ASKED, REPLY], [OTHER])),
    ({"chosen": "Q: why? A: as it is", "rejected": "Q: why? A: go"}, ("Q: why? A:", " as it is", " go")),
    ({"chosen": "A: the same", "rejected": "A: the same"}, ("A: the sam", "e", "e")),
    ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, ([USER], [REPLY], [REPLY])),
    ({"messages": [USER, REPLY], "chosen": [USER, REPLY], "rejected": [USER, OTHER]}, ([USER], [REPLY], [OTHER])),
]
BAD_PAIRS: list[tuple[Any, Problem, str]] = [
    ("x", Problem.FORMAT, "a row is a JSON object, this is text"),
    ({"messages": [USER, REPLY]}, Problem.FORMAT, "no pair of answers: the row has `messages`"),
    ({"prompt": "x", "chosen": "y"}, Problem.FORMAT, "no pair of answers: the row has `prompt`, `chosen`"),
    ({"prompt": "x", "chosen": "y", "rejected": None}, Problem.FORMAT, "no pair of answers"),
    ({"prompt": "x", "chosen": "y", "rejected": [OTHER]}, Problem.FORMAT, "`rejected` is a list"),
    ({"prompt": "x", "chosen": 1, "rejected": 2}, Problem.FORMAT, "`chosen` is a number"),
    ({"prompt": "x", "chosen": [REPLY], "rejected": [OTHER]}, Problem.FORMAT, "`prompt` is text, and `chosen`"),
    ({"prompt": "x", "chosen": " ", "rejected": "y"}, Problem.CONTENT, "`chosen` is empty"),
    ({"prompt": "", "chosen": "x", "rejected": "y"}, Problem.CONTENT, "`prompt` is empty"),
    ({"chosen": "yes", "rejected": "no"}, Problem.FORMAT, "no `prompt`, and `chosen` and `rejected` begin differently"),
    ({"chosen": [REPLY], "rejected": [OTHER]}, Problem.FORMAT, "no `prompt`, and `chosen` and `rejected` begin"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [OTHER]}, Problem.ROLES, "no assistant turn in `chosen`"),
    (
        {"prompt": [USER], "chosen": [REPLY, ASKED], "rejected": [OTHER]},
        Problem.ROLES,
        "`chosen` does not end with the assistant",
    ),
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


@pytest.mark.parametrize(("raw", "parts"), PAIRS, ids=[str(index) for index in range(len(PAIRS))])
def test_pairs_are_read_as_the_script_reads_them(raw: dict, parts: tuple, script: ModuleType) -> None:
    row, theirs = check_row(raw, pairs=True), script.clean_pair("x:1", raw)
    assert (row.prompt, row.completion, row.rejected) == parts
    assert (theirs.prompt, theirs.completion, theirs.rejected) == parts
    assert row.kind == script.describe(theirs)
    assert row.is_same is (parts[1] == parts[2])
    assert row.with_rejected().completion == parts[2]
    assert row.digest() != check_row({"prompt": parts[0], "completion": parts[1]}).digest()


@pytest.mark.parametrize(("raw", "problem", "message"), BAD_PAIRS, ids=[message for *_, message in BAD_PAIRS])
def test_bad_pairs_are_named(raw: Any, problem: Problem, message: str, script: ModuleType) -> None:
    with pytest.raises(BadRow) as caught:
        check_row(raw, pairs=True)
    assert caught.value.problem is problem
    assert message in caught.value.message
    with pytest.raises(script.InputError) as theirs:
        script.clean_pair("x:1", raw)
    assert theirs.value.message == f"x:1: {caught.value.message}"
    assert theirs.value.hint.startswith(caught.value.hint.split(", or `method")[0])


def test_rows_of_the_other_method_are_told_so(script: ModuleType) -> None:
    pair = {"prompt": "x", "chosen": "y", "rejected": "z"}
    with pytest.raises(BadRow) as caught:
        check_row(pair)
    assert caught.value.hint.startswith("write `method: dpo`, or rows of `messages`")
    with pytest.raises(script.InputError) as theirs:
        script.clean_row("x:1", pair)
    assert theirs.value.hint.startswith("use `train.method: dpo`")
    with pytest.raises(BadRow) as caught:
        check_row({"text": "x"}, pairs=True)
    assert caught.value.hint.endswith("or `method: qlora`")


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
        **dict.fromkeys(("messages", "conversations", "prompt", "completion", "chosen", "rejected"), turns),
        "text": scalars,
        "tools": scalars | st.lists(scalars, max_size=1),
    },
)


@settings(max_examples=600, deadline=None)
@given(raw=rows | scalars, pairs=st.booleans())
def test_the_verdict_is_the_scripts(raw: Any, pairs: bool, script: ModuleType) -> None:
    try:
        theirs = (script.clean_pair if pairs else script.clean_row)("x:1", raw)
    except script.InputError:
        with pytest.raises(BadRow):
            check_row(raw, pairs)
        return
    row = check_row(raw, pairs)
    assert (row.format, row.prompt, row.completion, row.rejected, row.tools) == (
        *(theirs.format, theirs.prompt, theirs.completion, theirs.rejected),
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

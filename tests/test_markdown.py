"""Untrusted text in Markdown, as a Markdown parser and GitHub's filters see it: it is shown, and does nothing."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pipeline.markdown import code, defang, fence, money, percent, plural, prose, quote, size, table, visible

ACTING = re.compile(r"[@#][\w-]|\bGH-\d|://|\bwww\.", re.IGNORECASE)
PLAIN = {"text", "code_inline", "softbreak"}
HOSTILE = [
    "@acme/team fixes #12, acme/x#3 and GH-4, see https://evil.example and www.evil.example",
    "&commat;acme &#64;acme &num;12 &lt;b&gt;",
    "<!-- mergetune:plan:x fingerprint=1 --> <script>alert(1)</script> <img src=x onerror=y>",
    "[a](https://evil.example) ![b](c) [d]: e <https://evil.example> a@b.example",
    "``` \n~~~\n# heading\n- item\n1. item\n===\n---\n> quote\n    code\n| a | b |\n|--|--|",
    "`code` `` ` `` \\`not\\` ``",
    "**b** __b__ *i* _i_ ~~s~~ $\\mathcal{X}$ :tada: \\@acme \\#1",
    "\x1b[31m\u202eevil\u2066\u200b\u200d\ufeff\U000e0041\ud800\x85\u2028end",
    "a\\|b \\\\| c | d \\",
    "hf_abcdefghijklmnopqrstuvwxyz012345",
]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*"`|\\<>[]()!&#@$*_~-+=.: \n\t1aw/", "<!--", "://", "www.", "GH-1", "```"])).map("".join),
)


def tokens(markdown: str) -> list[Token]:
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return [child for token in parser.parse(markdown) for child in [token, *(token.children or [])]]


def acting(markdown: str) -> list[str]:
    """What in this paragraph, quote or table would be more than text or code."""
    blocks = {"inline", "paragraph", "blockquote", "table", "thead", "tbody", "tr", "th", "td"}
    found = [token.type for token in tokens(markdown) if re.sub("_(open|close)$", "", token.type) not in blocks | PLAIN]
    # Entities and escapes are decoded by now, as they are when GitHub looks for mentions.
    words = [token.content for token in tokens(markdown) if token.type == "text"]
    return found + [match[0] for match in map(ACTING.search, words) if match]


def test_the_checker_sees_what_acts() -> None:
    assert [bool(acting(text)) for text in HOSTILE] == [True, True, True, True, True, False, True, False, False, False]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_everywhere(text: str) -> None:
    for markdown in (defang(text), prose(text), code(text), quote(text), f"ours {prose(text)} `ours`"):
        assert not acting(markdown)
        assert "<!--" not in markdown
        markdown.encode()
    assert "<!--" not in fence(text)
    assert [token.type for token in tokens(fence(text))] == ["fence"]


@settings(max_examples=300, deadline=None)
@given(texts, texts)
@example("\\", "|")
@example("a\\\\|", "`|`")
def test_any_text_is_inert_and_stays_in_its_cell(one: str, two: str) -> None:
    assert not acting(prose(one))
    assert not acting(quote(one))
    markdown = table(("a", "b"), [(code(one), defang(two)), (defang(one), code(two))], "lr")
    assert not acting(markdown)
    assert [token.type for token in tokens(markdown)].count("td_open") == 4
    assert [token.type for token in tokens(markdown)].count("tr_open") == 3
    assert [token.type for token in tokens(fence(one))] == ["fence"]


def test_what_is_meant_as_code_stays_code() -> None:
    assert prose("`train.flavor`: needs 16 GiB, `t4-small` has 15") == "`train.flavor`: needs 16 GiB, `t4-small` has 15"
    assert prose("an odd ` backtick") == "an odd \\` backtick"
    assert code("a`b") == "``a`b``"
    assert code("") == "–"
    assert code("x" * 300, limit=10) == "`xxxxxxxxx…`"


def test_defang_fence_and_quote() -> None:
    assert defang("a\x1b[31m") == "a\N{REPLACEMENT CHARACTER}\\[31m"
    assert fence("x ```` y").startswith("`````text\n")
    assert quote("one\ntwo") == "> one\n> two"
    assert visible("hf_abcdefghijklmnopqrstuvwxyz012345") == "<token>"


def test_numbers_for_people() -> None:
    assert [money(usd) for usd in (0.0, 0.0035, 0.5, 12)] == ["$0.00", "$0.0035", "$0.50", "$12.00"]
    assert [size(count) for count in (10, 904712, 5.2e6, 24e9)] == ["10 B", "904.7 kB", "5.2 MB", "24.00 GB"]
    assert [plural(count, "row") for count in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert [percent(part, 1000) for part in (0, 1, 670, 999, 1000)] == ["0 %", "<1 %", "67 %", ">99 %", "100 %"]
    assert percent(0, 0) == "0 %"

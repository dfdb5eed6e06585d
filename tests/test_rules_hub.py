"""Rules about Hub names and secrets: each passes the good experiment and fails a bad one."""

import pytest
from examples import GOOD, changed
from rule_cases import expect, place, run

from pipeline.errors import excerpt
from pipeline.rules.hub import nothing_secret, repositories_named

TOKENS = [
    "hf_" + "A1b2C3d4" * 4,
    "hf_oauth_eyJhbGciOi.eyJzY29wZSI6.x-y_z",
    "hf_jwt_eyJhbGciOi.eyJz",
    "ghp_" + "a1B2" * 9,
]


@pytest.mark.parametrize("rule", [repositories_named, nothing_secret])
def test_ok(rule) -> None:
    assert run(rule) is None
    assert run(rule, changed("held-out loss falls below 1.2", "costs $5; hf_transfer, hf_internal-testing")) is None


@pytest.mark.parametrize(
    ("repo", "message", "hint"),
    [
        ("acme/" + "x" * 84, "has 97 characters, the Hub takes 96", f"write `repo: acme/{'x' * 83}`"),
        ("acme/coach-", "starts or ends a name", "write `repo: acme/coach`"),
        ("acme/coach.", "starts or ends a name", "write `repo: acme/coach`"),
        ("acme/coach.git", "ends in `.git`", "write `repo: acme/coach`"),
        ("acme/modèle", "a character the Hub does not take", "write `repo: acme/modle`"),
    ],
)
def test_bad_name(repo, message, hint) -> None:
    text = changed("acme/coach-12b", repo)
    expect(run(repositories_named, text), message, hint, place(text, repo))


def test_full_training_makes_no_adapter() -> None:
    text = changed("method: qlora", "method: full", changed("^(merge|gguf|evaluate): .*\n", ""))
    text = changed("^  lora: .*\n", "", changed("^gguf: .*\n", "", changed("^evaluate: .*\n", "", text)))
    assert run(repositories_named, changed("acme/coach-12b", "acme/" + "x" * 91, text)) is None


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    ("pattern", "replacement", "key"),
    [
        ("held-out loss falls below 1.2", "with {}", "hypothesis"),
        ("q_proj, k_proj", "q_proj, {}", "train.lora.targets"),
        ("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  sft: {{hub_token: {}}}", "train.sft.hub_token"),
        ("^  learning_rate: 2e-4$", "  learning_rate: 2e-4\n  sft: {{{}: 1}}", "train.sft"),
    ],
)
def test_bad_token(token, pattern, replacement, key) -> None:
    finding = run(nothing_secret, changed(pattern, replacement.format(token)))
    assert f"`{key}` holds something of the shape of an access token" in finding.message
    assert "revoke the token" in finding.hint
    assert finding.at.line > 0
    assert token not in finding.as_text() + str(finding.as_dict())
    assert token not in excerpt(f"x {token} y")


@pytest.mark.parametrize("said", ["$HF_TOKEN", "${HF_TOKEN}", "${{ secrets.HF_TOKEN }}", "$API_KEY"])
def test_bad_placeholder(said) -> None:
    text = changed("^  learning_rate: 2e-4$", f'  learning_rate: 2e-4\n  sft:\n    hub_token: "{said}"')
    finding = run(nothing_secret, text)
    expect(finding, "which nothing fills in", "remove it from `train.sft.hub_token`", place(text, f'"{said}'))
    assert "secret `HF_TOKEN`" in finding.hint
    assert "hub_token" not in GOOD

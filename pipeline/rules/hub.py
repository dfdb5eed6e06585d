"""Rules about the Hub that need no network: names it accepts, and secrets that must not stand in a file."""

import re
from collections.abc import Iterator
from typing import Any

from pipeline.errors import TOKEN, excerpt
from pipeline.experiment import Method
from pipeline.rules.rule import Subject, Verdict

# The Hub's limit, with the namespace: huggingface_hub 2.4.0, utils/_validators.py.
LONGEST_REPO = 96
PLACEHOLDER = re.compile(r"\$\{\{[^}]{0,200}\}\}|\$\{[^}]{0,200}\}|\$[A-Za-z_]*(?:TOKEN|SECRET|PASSWORD|KEY)\b")


def repositories_named(subject: Subject) -> Verdict | None:
    """Every repository of the output has a name the Hub accepts

    Why: `repo-adapter` and `repo-GGUF` are made from `repo`; a name refused after training is found hours later.
    Fix: ASCII letters, digits, `-`, `_`, `.`; no `-` or `.` at an end, no `.git`; 96 characters with the suffix.
    """
    repo = subject.file.experiment.output.repo
    suffixes = _suffixes(subject)
    fault = next((fault for suffix in suffixes if (fault := _name_fault(repo + suffix))), _name_fault(repo))
    if fault is None:
        return None
    namespace, name = repo.split("/")
    room = LONGEST_REPO - len(namespace) - 1 - max(map(len, suffixes))
    tidy = re.sub(r"[^A-Za-z0-9._-]", "", name.removesuffix(".git"))[: max(room, 1)].strip("-._") or "my-model"
    return Verdict("output.repo", fault, f"write `repo: {namespace}/{tidy}`")


def nothing_secret(subject: Subject) -> Verdict | None:
    """No token and no token placeholder stands in the file

    Why: Who can read the repository can use the token; and nothing expands `$HF_TOKEN` here: the job would get the
    nine characters. Anyone who pushes to a public repository has published the token.
    Fix: Remove it, revoke it where it was made, and let the workflow pass the repository's secret.
    """
    for key, text in _texts(subject.file.text.data, ""):
        shown = f"`{key}`" if key else "a key"
        if TOKEN.search(text):
            hint = "remove it, and revoke the token in the settings of the account that made it: it is in the history"
            return Verdict(key or "name", f"{shown} holds something of the shape of an access token", hint)
        if found := PLACEHOLDER.search(text):
            hint = f"remove it from {shown}; a job gets its token from the repository's secret `HF_TOKEN`"
            return Verdict(key or "name", f"{shown} holds `{excerpt(found[0])}`, which nothing fills in", hint)
    return None


def _suffixes(subject: Subject) -> list[str]:
    experiment = subject.file.experiment
    adapter = [] if experiment.train.method is Method.FULL else ["-adapter"]
    return ["", *adapter, *(["-GGUF"] if experiment.gguf else [])]


def _name_fault(repo: str) -> str | None:
    """What the Hub has against a repository id, or None."""
    if len(repo) > LONGEST_REPO:
        return f"`{repo}` has {len(repo)} characters, the Hub takes {LONGEST_REPO}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        return f"`{repo}` has a character the Hub does not take"
    if "--" in repo or ".." in repo:
        return f"`{repo}` has `--` or `..`, which the Hub refuses"
    if repo.endswith(".git"):
        return f"`{repo}` ends in `.git`, which the Hub refuses"
    if any(part[0] in "-." or part[-1] in "-." for part in repo.split("/")):
        return f"`{repo}` starts or ends a name with `-` or `.`, which the Hub refuses"
    return None


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every text of the file with the dotted key it stands at; a key's own text with its parent's."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            inner = key if TOKEN.search(str(name)) else f"{key}.{name}".lstrip(".")
            yield from _texts(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value

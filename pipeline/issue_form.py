"""The text of an issue made with the form `Propose an experiment`, to an experiment. Asks and writes nothing.

The text is anybody's. It becomes values of a file that has to pass the schema and to hold just what was answered; a
person reads it before it is proposed, and nothing runs this by itself.
"""

import re
import textwrap
from collections.abc import Mapping

from pipeline.errors import UserError, excerpt
from pipeline.experiment import Experiment, Method
from pipeline.loader import parse_experiment
from pipeline.train_sections import DPO_RATE
from pipeline.yaml_text import HIDDEN, NULLS

LABELS = (
    "name",
    "hypothesis",
    "base.model",
    "data.dataset",
    "train.method",
    "train.flavor",
    "output.repo",
    "budget.max_usd",
)  # of .github/ISSUE_TEMPLATE/experiment.yml, in its order; a test compares them
MAY_BE_EMPTY = {"train.flavor"}
NO_ANSWER = "_No response_"  # what GitHub writes for a field that was left empty
MOST = 65_536  # characters of an issue on GitHub
FLAVOR = "a10g-large"
PLAIN = re.compile(r"[A-Za-z0-9./][\w./-]{0,200}", re.ASCII)
SKELETON = """\
# yaml-language-server: $schema=./_schema.json
# Made from an issue, which says nothing of what is commented here. Every field is explained in docs/experiment.md.
name: {name}
hypothesis: >-
{hypothesis}
base:
  model: {base} # then pin it: `revision:` with a commit
data:
  dataset: {dataset} # one of the Hub: pin its `revision:` too
  eval: {{fraction: 0.05}} # held out of the data; or {{split: validation}}, or {{dataset: path}}
train:
  method: {method}
  flavor: {flavor} # `mergetune fit experiments/{name}.yaml` says which fit
  timeout: 4h # the worst case of the price
  learning_rate: {rate}
{merge}gguf: {{flavor: t4-medium, timeout: 1h, quants: [Q4_K_M, Q8_0]}}
output: {{repo: {output}, private: true}}
budget: {{max_usd: {budget}}}
"""


def experiment_of_issue(body: str, name: str | None = None) -> tuple[str, str]:
    """Name and text of the experiment that an issue asks for; `name` replaces the issue's own.

    Raises:
        UserError: not such an issue, an answer is missing or given twice, or the schema refuses one.
    """
    said = answers(body)
    if name:
        said["name"] = name
    full = said["train.method"] == Method.FULL
    text = SKELETON.format(
        name=_scalar(said["name"]),
        hypothesis=_folded(said["hypothesis"]),
        base=_scalar(said["base.model"]),
        dataset=_scalar(said["data.dataset"]),
        method=_scalar(said["train.method"]),
        flavor=_scalar(said["train.flavor"] or FLAVOR),
        rate={Method.FULL.value: "2e-5", Method.DPO.value: DPO_RATE}.get(said["train.method"], "2e-4"),
        merge="" if full else "merge: {flavor: t4-medium, timeout: 1h}\n",
        output=_scalar(said["output.repo"]),
        budget=_scalar(said["budget.max_usd"].removeprefix("$")),
    )
    made = parse_experiment(text, "the experiment of this issue").experiment
    _same(made, said)
    return made.name, text


def answers(body: str) -> dict[str, str]:
    """The answer to every question of the form, on one line each.

    Raises:
        UserError: not such an issue, or an answer is missing, given twice or holds what cannot be seen.
    """
    if len(body) > MOST:
        raise UserError(f"the issue has more than {MOST:,} characters", "it is the wrong text", exit_code=2)
    text = body.replace("\r\n", "\n").replace("\r", "\n")
    if hidden := HIDDEN.search(text):
        raise UserError(f"the issue holds an invisible character, U+{ord(hidden[0]):04X}", "write it anew", exit_code=2)
    parts = re.split(rf"(?m)^### ({'|'.join(map(re.escape, LABELS))})[ \t]*$", text)
    labels = parts[1::2]
    # A heading inside of an answer would put words into another field's mouth.
    if twice := [label for label in LABELS if labels.count(label) > 1]:
        raise UserError(
            f"`{twice[0]}` is answered twice in the issue", "remove the heading that is no question's", exit_code=2
        )
    given = {label: " ".join(answer.split()) for label, answer in zip(labels, parts[2::2], strict=True)}
    said = {label: "" if given.get(label) == NO_ANSWER else given.get(label, "") for label in LABELS}
    if missing := [label for label in LABELS if not said[label] and label not in MAY_BE_EMPTY]:
        hint = f"write `### {missing[0]}` and the answer below it, as the form does"
        raise UserError(f"the issue does not answer `{missing[0]}`", hint, exit_code=2)
    return said


def _scalar(text: str) -> str:
    """A YAML scalar that is read back as this text; what looks like anything else stands in quotes."""
    if PLAIN.fullmatch(text) and text not in NULLS:
        return text
    return "'" + text.replace("'", "''") + "'"


def _folded(text: str) -> str:
    """The lines of a folded block: broken between words, they are read back as one line."""
    return textwrap.fill(
        text, 110, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _same(made: Experiment, said: Mapping[str, str]) -> None:
    """That the file says what the issue said, and no more."""
    read = {
        "name": made.name,
        "hypothesis": made.hypothesis,
        "base.model": made.base.model,
        "data.dataset": made.data.dataset,
        "train.method": str(made.train.method),
        "train.flavor": made.train.flavor,
        "output.repo": made.output.repo,
    }
    for label, value in read.items():
        if said[label] and value != said[label]:
            words = f"`{label}` cannot be taken from the issue: `{excerpt(said[label])}`"
            raise UserError(words, "write the experiment by hand: `mergetune init NAME`", exit_code=2)

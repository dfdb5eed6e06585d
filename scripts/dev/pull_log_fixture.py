"""Turn a failed job's log into a fixture of `mergetune diagnose`, with tokens, names and addresses scrubbed.

python scripts/dev/pull_log_fixture.py flash-attn-on-t4 job.log
python scripts/dev/pull_log_fixture.py flash-attn-on-t4 6974ec4657a10a9d296cb981 --namespace acme --hide secret-project

It writes tests/logs/NAME.log, and what `diagnose` says of it to NAME.json. Read both before you commit them: correct
NAME.json where the diagnosis is wrong, then mend pipeline/causes/.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.diagnose import diagnose
from pipeline.diagnose_request import read_source, stage_in
from pipeline.errors import UserError, redact
from pipeline.facts import Facts
from pipeline.loader import load_experiment
from pipeline.models import CATALOGUE
from pipeline.plan import make_plan
from pipeline.remedy import remedy

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "tests/logs"
EXPERIMENT = ROOT / "experiments/examples/chat-qlora.yaml"  # whose values the fixtures' fixes name
# What says who and where: people, machines, home folders, package indexes, ids of requests and of commits.
SCRUBBED = (
    (re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{1,64}){1,4}"), "ada@example.org"),
    (re.compile(r"(/home|/Users)/[^/\s\"']{1,64}"), r"\1/ada"),
    (re.compile(r"/[\w./-]{1,200}?/(lib/python3\.\d+/(?:site|dist)-packages)"), r"/usr/local/\1"),
    (re.compile(r"/[\w./-]{1,200}?/(lib/python3\.\d+/)(?!site-packages|dist-packages)"), r"/usr/local/\1"),
    (re.compile(r"\b(?!127\.0\.0\.1)\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b(?!\.\d)"), "192.0.2.1"),
    (re.compile(r"(?m)^(Looking in (?:links|indexes): ).*"), r"\1/srv/wheels"),
    (re.compile(r"(Request ID: )[^\s)]{1,100}"), r"\1Root=1-0"),
    (
        re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
        "00000000-0000-0000-0000-000000000000",
    ),
    (re.compile(r"\bip-\d+-\d+-\d+-\d+\b"), "ip-192-0-2-1"),
)


def main() -> int:
    """Read, scrub, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the fixture: what failed, in words with dashes")
    parser.add_argument("source", help="a log file, a job id, or - for standard input")
    parser.add_argument("--namespace", help="whose job it is")
    parser.add_argument("--hide", action="append", default=[], metavar="WORD", help="a name to replace by `acme`")
    given = parser.parse_args()
    try:
        log = read_source(given.source, given.namespace)
    except UserError as error:
        print(error.as_text(), file=sys.stderr)
        return error.exit_code
    words = [*given.hide, *([given.namespace] if given.namespace else [])]
    print(write_fixture(given.name, log.text, dict.fromkeys(words, "acme"), log.message))
    return 0


def write_fixture(name: str, text: str, hidden: Mapping[str, str], message: str = "") -> str:
    """Write both files; returns a line about them."""
    clean, said = scrubbed(text, hidden), scrubbed(message, hidden).strip()
    (LOGS / f"{name}.log").write_text(clean, encoding="utf-8")
    known = expectation(clean, said)
    (LOGS / f"{name}.json").write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"{name}: {known['id'] or 'not known'}: {known['evidence']}"


def scrubbed(text: str, hidden: Mapping[str, str]) -> str:
    """The log without tokens, people, machines and the given words; longer words are replaced first."""
    for word in sorted(hidden, key=len, reverse=True):
        text = text.replace(word, hidden[word])
    text = redact(text)
    for pattern, instead in SCRUBBED:
        text = pattern.sub(instead, text)
    return text.rstrip() + "\n"


def expectation(log: str, message: str = "") -> dict[str, object]:
    """What `diagnose` says of a log, with the fix for the example experiment."""
    found = diagnose(log, message)
    experiment = load_experiment(EXPERIMENT).experiment
    plan = make_plan(experiment, Facts(shape=CATALOGUE[experiment.base.model]))
    stage = next(stage for stage in plan.stages if stage.name is stage_in(log))
    said = {"message": message} if message else {}
    return said | {
        "id": found.id,
        "cause": found.cause,
        "evidence": found.evidence,
        "transient": found.transient,
        "fix": remedy(found, plan, stage, log),
    }


if __name__ == "__main__":
    raise SystemExit(main())

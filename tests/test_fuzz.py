"""No input makes a check raise anything but its own error, none takes long, and none takes much memory.

The tests draw the same inputs every time. To look for new ones, for as long as it takes:

    python tests/test_fuzz.py --times 50
"""

import argparse
import copy
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from examples import GOOD  # noqa: E402

from pipeline.check import check_files  # noqa: E402
from pipeline.errors import InvalidExperiment, Severity, UserError  # noqa: E402
from pipeline.facts import Facts  # noqa: E402
from pipeline.loader import parse_experiment  # noqa: E402
from pipeline.plan import make_fingerprint  # noqa: E402
from pipeline.settings import Settings  # noqa: E402

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "experiments/examples"
CORPUS = ROOT / "tests/experiments/bad"
SECONDS = 2
LINES = GOOD.splitlines()
FRAGMENTS = [
    *(
        "{",
        "[",
        "]",
        "}",
        ":",
        "- ",
        "\t",
        "&a ",
        "*a",
        "!!x",
        "'",
        '"',
        "|",
        ">",
        "%",
        "@",
        "\u202e",
        "💥",
        "1e999",
        "~",
    ),
    *(
        "\n",
        "\r",
        "\x00",
        "\x85",
        "\ufeff",
        "? ",
        "<<: ",
        "---\n",
        "...\n",
        "${X}",
        "$HF_TOKEN",
        "0o7",
        "1:30",
        "-.inf",
    ),
    *("{{", "{}", "%s", "\\", '"\\ud800"', "null", "yes", "../", "./", "~/x.jsonl", "9" * 400, "🇺", "а"),
]
# Everything an experiment may name lies here, small: the quickstart's base without its weights, and a few rows.
EXPERIMENT = """\
name: fuzz
hypothesis: nothing breaks
base: {model: ./base}
data: {dataset: rows.jsonl, eval: {dataset: heldout.jsonl}}
train:
  method: lora
  flavor: cpu-upgrade
  timeout: 10m
  max_length: 128
  gradient_accumulation: 2
  lora: {r: 8, targets: [q_proj], rank_pattern: {q_proj: 4}}
  sft: {warmup_steps: 2, model_init_kwargs: {attn_implementation: sdpa}}
  script: job.py
merge: {timeout: 10m}
gguf: {timeout: 10m, quants: [Q8_0]}
evaluate: {timeout: 10m, prompts: prompts.jsonl}
output: {repo: acme/fuzz}
budget: {max_usd: 1}
"""
BASE = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
JOB = '# /// script\n# dependencies = ["trl==1.16.0"]\n# ///\nimport trl\n\ntrl.SFTTrainer(model="x").push_to_hub()\n'


def rows(count: int) -> str:
    texts = [
        ({"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"tell {n}"}) for n in range(count)
    ]
    return "".join(json.dumps({"messages": turns}) + "\n" for turns in texts)


FILES: dict[str, bytes] = {
    "pyproject.toml": b"[tool.mergetune]\n",
    "fuzz.yaml": EXPERIMENT.encode(),
    "rows.jsonl": rows(6).encode(),
    "heldout.jsonl": rows(9)[-200:].split("\n", 1)[1].encode(),
    "prompts.jsonl": b'{"prompt": "a"}\n',
    "job.py": JOB.encode(),
    **{f"base/{name}": (EXAMPLES / "tiny-docs-llama" / name).read_bytes() for name in BASE},
}
numbers = itertools.count()


def in_repository(changed: dict[str, bytes], work: Path) -> None:
    """Check `fuzz.yaml` in a repository of its own: what is read is remembered by path."""
    root = work / str(next(numbers))
    for name, content in {**FILES, **changed}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        judge(root)
    finally:
        shutil.rmtree(root)


def judge(root: Path) -> None:
    """Nothing but findings with words and a place, in time; a `UserError` is an answer too."""
    started = time.monotonic()
    try:
        result = check_files([root / "fuzz.yaml"], root, Settings(namespaces=("acme",)))
    except UserError as error:
        assert error.message
        assert error.exit_code in (1, 2)
    else:
        assert result.exit_code in (0, 1, 2)
        assert (result.exit_code == 0) == (not result.errors)
        for finding in result.findings:
            assert finding.message
            assert finding.at.path == "fuzz.yaml"
            assert finding.hint or finding.severity is not Severity.ERROR
            assert finding.at.line or "the file is empty" in finding.message or "KiB" in finding.message, finding
            finding.as_text().encode()
            json.dumps(finding.as_dict(), ensure_ascii=False).encode()
    assert time.monotonic() - started < SECONDS


def parsed(text: str) -> None:
    """The loader and the fingerprint alone, in memory."""
    started = time.monotonic()
    try:
        make_fingerprint(parse_experiment(text, "fuzz.yaml").experiment, Facts())
    except InvalidExperiment as error:
        assert error.findings
        assert all(finding.message and finding.at.path == "fuzz.yaml" for finding in error.findings)
        assert error.as_text()
    assert time.monotonic() - started < SECONDS


words = st.one_of(
    *(st.text(max_size=30), st.sampled_from(FRAGMENTS), st.floats().map(str), st.integers().map(str)),
    st.characters(categories=("Cc", "Cf", "Zl", "Zs")),
)
scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(FRAGMENTS)),
    st.sampled_from(["rows.jsonl", "base", "./base", "./", ".", "x.parquet", "a/b", "qlora", "full", "t4-small", "1h"]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
seeds = [
    FILES["fuzz.yaml"],
    *(path.read_bytes() for path in sorted([*EXAMPLES.glob("*.yaml"), *CORPUS.rglob("*.yaml")])),
]


@st.composite
def mutated_bytes(draw: Any, sources: list[bytes]) -> bytes:
    """One of the sources with stretches removed, doubled, or replaced by something else."""
    content = draw(st.sampled_from(sources))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 2, 8, 60])))
        new = draw(st.binary(max_size=6) | words.map(lambda word: word.encode("utf-8", "surrogatepass")))
        content = content[:start] + draw(st.sampled_from([new, b"", content[start:end] * 2])) + content[end:]
    return content


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node below the top."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def mutated_structure(draw: Any, source: Any) -> Any:
    """The value with one to three nodes replaced, removed, renamed or doubled."""
    value = copy.deepcopy(source)
    for _ in range(draw(st.integers(1, 3))):
        where = sorted(places(value), key=repr)
        if not where:
            return draw(values)
        *parents, last = draw(st.sampled_from(where))
        holder = value
        for key in parents:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"])):
            case "replace":
                holder[last] = draw(values)
            case "remove":
                del holder[last]
            case "rename" if isinstance(holder, dict):
                holder[draw(words)] = holder.pop(last)
            case _:
                holder[last] = [holder[last], copy.deepcopy(holder[last])]
    return value


def dumped(value: Any) -> bytes:
    """As YAML; half characters stay what they are, and are then not UTF-8."""
    return yaml.dump(value, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


EXPERIMENT_DATA = yaml.safe_load(EXPERIMENT)
FIRST_ROW = json.loads(rows(1))
CONFIG = json.loads(FILES["base/config.json"])
small = ["config.json", "tokenizer_config.json", "chat_template.jinja"]
broken_base = st.sampled_from(small).flatmap(
    lambda name: mutated_bytes([FILES[f"base/{name}"]]).map(lambda content: {f"base/{name}": content})
)


@dataclass(frozen=True)
class Property:
    """What is drawn, how often in the tests, and what must hold."""

    name: str
    drawn: st.SearchStrategy[Any]
    times: int
    holds: Callable[[Any, Path], None]


def _files(name: str) -> Callable[[Any, Path], None]:
    return lambda content, work: in_repository({name: content}, work)


PROPERTIES = (
    Property("any text", st.text(max_size=400), 300, lambda text, _: parsed(text)),
    Property("any bytes", st.binary(max_size=200), 150, _files("fuzz.yaml")),
    Property("changed files", mutated_bytes(seeds), 300, _files("fuzz.yaml")),
    Property("changed structure", mutated_structure(EXPERIMENT_DATA).map(dumped), 250, _files("fuzz.yaml")),
    Property("any structure", values.map(dumped), 150, _files("fuzz.yaml")),
    Property("changed rows", mutated_bytes([FILES["rows.jsonl"]]), 70, _files("rows.jsonl")),
    Property(
        *(
            "changed values in rows",
            st.lists(mutated_structure(FIRST_ROW).map(as_json), max_size=4).map(b"\n".join),
            70,
        ),
        _files("rows.jsonl"),
    ),
    Property("changed held-out rows", mutated_bytes([FILES["heldout.jsonl"]]), 30, _files("heldout.jsonl")),
    Property("changed config", mutated_structure(CONFIG).map(as_json), 70, _files("base/config.json")),
    Property("changed base", broken_base, 60, lambda files, work: in_repository(files, work)),
    Property("changed tokenizer", mutated_bytes([FILES["base/tokenizer.json"]]), 40, _files("base/tokenizer.json")),
    Property("changed script", mutated_bytes([FILES["job.py"]]), 60, _files("job.py")),
)


def try_out(tried: Property, work: Path, times: int = 1, fixed: bool = True) -> None:
    """Draw and judge; always the same inputs when `fixed`."""
    chosen = settings(
        max_examples=tried.times * times,
        derandomize=fixed,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(tried.drawn)(lambda drawn: tried.holds(drawn, work)))()


@pytest.mark.parametrize("tried", PROPERTIES, ids=lambda tried: tried.name)
def test_nothing_breaks(tried: Property, tmp_path: Path) -> None:
    try_out(tried, tmp_path)


def main() -> None:
    """Draw new inputs, many times as often as the tests do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how many times as many inputs (default: 20)")
    times = parser.parse_args().times
    for tried in PROPERTIES:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as work:
            try_out(tried, Path(work), times, fixed=False)
        print(f"{tried.name}: {tried.times * times} inputs, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

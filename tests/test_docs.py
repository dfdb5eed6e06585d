"""The docs say what is so: generated pages are fresh, links lead somewhere, and shown commands print what is shown."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "experiments/README.md"])
SHOWN = [
    (page, match[1], match[2])
    for page in PAGES
    for match in re.finditer(r"(?m)^```console\n\$ (mergetune .*)\n((?:.*\n)*?)```$", page.read_text(encoding="utf-8"))
]
VERBS = sorted(
    {verb for page in PAGES for verb in re.findall(r"`mergetune ([a-z-]+)", page.read_text(encoding="utf-8"))}
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow  # `make lint` asks the same
def test_generated_files_are_fresh() -> None:
    done = run([sys.executable, "scripts/dev/generate_docs.py", "--check"])
    assert done.returncode == 0, done.stderr


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@each_page
def test_named_paths_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target
    for path in re.findall(r"`((?:pipeline|scripts|tests|benchmarks|experiments|requirements)/[\w/.-]*\w)`", text):
        assert (ROOT / path).exists() or "my-experiment" in path, f"{page.name}: {path}"


@pytest.mark.parametrize("verb", VERBS)
def test_a_named_command_is_one_we_have(verb: str) -> None:
    assert run([sys.executable, "-m", "pipeline", verb, "--help"]).returncode == 0


@pytest.mark.parametrize(("page", "command", "output"), SHOWN, ids=[row[1] for row in SHOWN])
def test_a_shown_command_prints_what_is_shown(page: Path, command: str, output: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    done = run([sys.executable, "-m", "pipeline", *words[1:]])
    printed = done.stderr + done.stdout
    assert [line.rstrip() for line in printed.strip().splitlines()] == output.strip().splitlines()


def test_there_are_shown_commands() -> None:
    assert len(SHOWN) >= 2


def test_every_dependency_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for block in re.findall(r"(?ms)^(?:dependencies|train|dev) = \[\n(.*?)^\]", text):
        for line in block.strip().splitlines():
            assert re.search(r'",\s+# \w', line), line


def test_requirement_files_pin_everything_and_name_no_index() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert lines
        pin = r"[\w.-]+==[\w.]+(; sys_platform == '\w+')?"
        assert all(re.fullmatch(pin, line) for line in lines), path.name

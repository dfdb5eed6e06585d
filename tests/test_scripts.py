"""What every job script has in common: header, usage, shared functions, and how it reads and refuses a request.

What they do with an output repo is in test_scripts_hub.py.
"""

import ast
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
STAGES = {"train_sft": "train", "train_mlx": "train", "merge_adapter": "merge", "convert_gguf": "gguf"}
STAGES |= {"evaluate": "evaluate"}
# No stage, and no run.json: the one is for people, the other for `mergetune plan --trace`.
TOOLS = {"convert_adapter", "trace_memory"}
JOBS = [script for script in SCRIPTS if script.stem in STAGES]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
each_job = pytest.mark.parametrize("script", JOBS, ids=lambda path: path.stem)


def header(script: Path) -> dict[str, object]:
    """The PEP 723 metadata of a script."""
    match = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", script.read_text(encoding="utf-8"))
    assert match, script.name
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in match[1].splitlines(True)))


def shared_blocks(script: Path) -> dict[str, str]:
    """Name to text of every `# --- shared: NAME. … ---` block."""
    text = script.read_text(encoding="utf-8")
    found = re.finditer(r"(?ms)^# --- shared: ([a-z ]+?)\.? .*?^# --- end shared: \1 ---$", text)
    return {match[1].strip(): match[0] for match in found}


def call(script: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_scripts_are_the_stages() -> None:
    assert {script.stem for script in SCRIPTS} == STAGES.keys() | TOOLS


@each_script
def test_pins_are_exact_and_the_ones_installed_here(script: Path) -> None:
    lines = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8").lower().replace("_", "-").splitlines()
    locked = dict(line.partition(";")[0].split("==") for line in lines if not line.startswith("#"))
    meta = header(script)
    assert meta["requires-python"] == ">=3.11"
    assert meta["tool"]["uv"]["exclude-newer"]
    for dependency in meta["dependencies"]:
        # `mlx[cpu]`: what Linux needs; on a Mac the extra is empty.
        found = re.fullmatch(r"([a-z0-9_-]+)(?:\[cpu\])?==([0-9][\w.]*)", dependency)
        assert found, dependency
        assert locked[found[1].replace("_", "-")] == found[2]


@each_script
def test_what_a_script_imports_stands_in_its_header(script: Path) -> None:
    names = {"yaml": "pyyaml", "PIL": "pillow", "google": "protobuf", "skbuild_core": "scikit-build-core"}
    declared = {re.split(r"\[|==", wanted)[0].replace("-", "_") for wanted in header(script)["dependencies"]}
    imported = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    # llama_cpp comes with the pinned llama.cpp source, gguf and conversion with its converter; none is installed.
    outside = imported - set(sys.stdlib_module_names) - {"llama_cpp", "gguf", "conversion"}
    assert {names.get(name, name).replace("-", "_") for name in outside} <= declared


def test_shared_blocks_are_the_same_lines_everywhere() -> None:
    texts: dict[str, set[str]] = {}
    for script in SCRIPTS:
        blocks = shared_blocks(script)
        assert {"protocol", "hub"} <= blocks.keys() or script.stem in TOOLS, script.name
        for name, text in blocks.items():
            texts.setdefault(name, set()).add(text)
    assert {name: len(versions) for name, versions in texts.items()} == dict.fromkeys(texts, 1)


def test_training_and_evaluation_prepare_rows_with_the_same_lines() -> None:
    train, evaluate = (shared_blocks(ROOT / f"scripts/{name}.py") for name in ("train_sft", "evaluate"))
    assert set(train) == set(evaluate)
    assert len(train) >= 2


def test_both_training_scripts_prepare_rows_with_the_same_lines() -> None:
    torch, mlx, tool = (
        shared_blocks(ROOT / f"scripts/{name}.py") for name in ("train_sft", "train_mlx", "convert_adapter")
    )
    assert set(mlx) == {*torch, "mlx adapter"}
    assert set(tool) == {"mlx adapter"}


# What is the same in both for another reason than a shared block: train_sft.py has its own around it.
SAME = "TrainingFailed LongestFirst check_rows load_tokenizer warn_dropped checkpoints hashed_inputs read_json"


@pytest.mark.parametrize("name", SAME.split())
def test_both_training_scripts_have_this_in_common(name: str) -> None:
    texts = [(ROOT / f"scripts/{script}.py").read_text(encoding="utf-8") for script in ("train_sft", "train_mlx")]
    found = [[n for n in ast.parse(text).body if getattr(n, "name", "") == name] for text in texts]
    assert [len(nodes) for nodes in found] == [1, 1]
    assert ast.unparse(found[0][0]) == ast.unparse(found[1][0])


def test_a_trace_sees_the_adapter_that_is_trained() -> None:
    """The call that makes the adapter is the same, and so is what of a base with pictures is left out of it."""
    trees = [
        ast.parse((ROOT / f"scripts/{name}.py").read_text(encoding="utf-8")) for name in ("train_sft", "trace_memory")
    ]
    calls = [
        [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "LoraConfig"]
        for tree in trees
    ]
    assert len(calls[0]) == 1
    assert calls[0] == calls[1]
    left_out = [
        [
            ast.unparse(n.value)
            for n in tree.body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "NOT_TEXT"
        ]
        for tree in trees
    ]
    assert len(left_out[0]) == 1
    assert left_out[0] == left_out[1]


@each_script
def test_help_shows_how_to_run_it(script: Path) -> None:
    done = call(script, "--help")
    assert done.returncode == 0
    assert f"python scripts/{script.name}" in done.stdout


@each_job
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is not a run.json of schema 1"),
        ('{"schema": 2}', "is not a run.json of schema 1"),
        ('{"schema": 1, "stage": "other"}', "is for stage `other`, this script is"),
    ],
)
def test_a_request_that_is_none(script: Path, content: str | None, said: str, tmp_path: Path) -> None:
    request = tmp_path / "run.json"
    if content is not None:
        request.write_text(content)
    done = call(script, str(request))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "\n\nhint: " in done.stderr
    assert "Traceback" not in done.stderr
    events = [json.loads(line.removeprefix("MERGETUNE ")) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["error"]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """One of the scripts, for the functions that all of them have."""
    spec = importlib.util.spec_from_file_location("merge_adapter", ROOT / "scripts/merge_adapter.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    sys.modules["merge_adapter"] = made
    spec.loader.exec_module(made)
    return made


def write_request(folder: Path, **parts: Any) -> str:
    (folder / "run.json").write_text(json.dumps({"schema": 1, "stage": "merge", "inputs": {}, "output": {}, **parts}))
    return str(folder / "run.json")


def test_a_request_with_all_its_folders_stays_as_it_is(module: ModuleType, tmp_path: Path) -> None:
    inputs = {"base": {"repo": "acme/base", "revision": "abc"}, "adapter": {"path": "/data/adapter"}}
    parts = {"inputs": inputs, "output": {"path": "/out"}, "work": "/work"}
    run = module.load_run(write_request(tmp_path, **parts), "merge")
    assert {key: run[key] for key in parts} == parts
    assert module.said_inputs(run) == inputs


def test_a_request_for_another_machine_finds_its_files_and_folders_there(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(b"{}")
    inputs = {"data": {"path": "rows.jsonl", "sha256": hashlib.sha256(b"{}").hexdigest()}}
    run = module.load_run(write_request(tmp_path, inputs=inputs, output={"repo": "acme/x", "folder": ""}), "merge")
    assert run["inputs"]["data"]["path"] == str(tmp_path / "rows.jsonl")
    assert module.said_inputs(run) == inputs
    output, work = Path(run["output"]["path"]), Path(run["work"])
    assert (output.name, work.name) == ("artifact", "work")
    assert output.parent == work.parent and output.parent.parent == tmp_path and not list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("source", "commit", "pull", "told"),
    [
        ("https://github.com/acme/models", "ab" * 20, 12, ["commit", "pull request"]),
        ("https://github.com/acme/models", "ab" * 20, None, ["commit"]),
        ("https://x.example/a](javascript:alert(1))", "ab" * 20, 12, []),
        ("https://github.com/acme/models", "<b>", "1)", []),
    ],
)
def test_a_card_links_only_to_what_is_a_link(
    module: ModuleType, source: str, commit: str, pull: object, told: list[str]
) -> None:
    provenance = {"repository": source, "commit": commit, "pull_request": pull}
    assert list(module.origin({"provenance": provenance})) == told
    assert module.origin({}) == {}


def test_an_error_never_repeats_a_token(module: ModuleType) -> None:
    said = module.one_line_of(ValueError("Illegal header value b'Bearer hf_oauth_abcd.efgh-ijkl'\nMore"))
    assert said == "Illegal header value b'Bearer hf_…' More"

"""Facts read from a repository's files, and which files are experiments."""

import hashlib
import json
from pathlib import Path

import pytest
from examples import GOOD, changed

from pipeline.errors import UserError
from pipeline.loader import parse_experiment
from pipeline.models import CATALOGUE
from pipeline.settings import Settings, find_root, load_settings
from pipeline.workspace import content_hash, find_experiments, folder_of, read_content, read_facts, shown_path

LOCAL = changed(
    "google/gemma-3-12b-it, revision: 96b6f1e", "./base", changed("dataset: acme/coach", "dataset: d.jsonl")
)


def test_facts_of_in_repo_data_and_base(tmp_path: Path) -> None:
    rows = '{"text": "abcd"}\n\n{"text": "efgh"}\n'
    (tmp_path / "d.jsonl").write_text(rows)
    (tmp_path / "base").mkdir()
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    facts = read_facts(parse_experiment(LOCAL).experiment, tmp_path)
    assert facts.missing == ()
    assert facts.content["d.jsonl"] == hashlib.sha256(rows.encode()).hexdigest()
    assert facts.shape is not None
    assert facts.shape.hidden == 64


def test_what_is_not_there_is_missing_and_unknown(tmp_path: Path) -> None:
    facts = read_facts(parse_experiment(LOCAL).experiment, tmp_path)
    assert facts.missing == ("./base", "d.jsonl")
    assert facts.shape is None
    assert read_facts(parse_experiment(GOOD).experiment, tmp_path).shape == CATALOGUE["google/gemma-3-12b-it"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "is not there"),
        ("{", "is not JSON: Expecting property name"),
        ("[" * 100_000, "is not JSON: "),
        ("[]", "is not a JSON object"),
        ('{"text_config": []}', "has `text_config: []`, which is not an object"),
        ('{"model_type": ["llama"]}', "has `model_type: ['llama']`, which is not a text"),
        ('{"hidden_size": -1}', "has `hidden_size: -1`, which is no size of a model"),
        ('{"text_config": {"vocab_size": "two"}}', "has `vocab_size: two`, which is no size"),
        ('{"model_type": "llama"}', ""),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str | None, fault: str) -> None:
    (tmp_path / "base").mkdir()
    if text is not None:
        (tmp_path / "base/config.json").write_text(text)
    facts = read_facts(parse_experiment(LOCAL).experiment, tmp_path)
    assert facts.config_fault.startswith(fault)
    assert (facts.config is None) == bool(facts.config_fault) == bool(fault)


def test_a_path_counts_as_there_only_as_what_it_is_for(tmp_path: Path) -> None:
    root, outside = tmp_path / "here", tmp_path / "outside"
    for folder in (root / "base", root / "folder.jsonl", outside):
        folder.mkdir(parents=True)
    for file in (root / "d.jsonl", root / "file.jsonl", outside / "d.jsonl"):
        file.write_text("{}")
    (root / "leaves").symlink_to(outside)
    (root / "stays").symlink_to("base")
    (root / "loop").symlink_to("loop")

    def missing(base: str, data: str) -> tuple[str, ...]:
        text = changed("./base", base, changed("d.jsonl", data, LOCAL))
        return read_content(parse_experiment(text).experiment, root)[1]

    assert missing("./base", "d.jsonl") == missing("./stays", "file.jsonl") == ()
    for bad in ("./file.jsonl", "./", "./leaves", "./loop"):
        assert missing(bad, "d.jsonl") == (bad,)
    for bad in ("./folder.jsonl", "./leaves/d.jsonl", "./loop/d.jsonl"):
        assert missing("./base", bad) == (bad,)


def test_a_link_to_itself_has_a_name_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert shown_path(tmp_path / "loop.yaml", tmp_path) == "loop.yaml"
    assert folder_of(tmp_path / "loop.yaml") == tmp_path
    assert folder_of(tmp_path) == tmp_path


def test_a_folders_hash_covers_names_and_contents(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> Path:
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        return tmp_path / name

    hashes = [
        content_hash(folder("one", {"a": "1", "b": "2"})),
        content_hash(folder("two", {"a": "2", "b": "1"})),
        content_hash(folder("three", {"a": "12"})),
    ]
    assert len(set(hashes)) == 3
    assert content_hash(folder("four", {"a": "1", "b": "2"})) == hashes[0]


def test_experiments_are_found_and_the_archive_is_left_out(tmp_path: Path) -> None:
    for name in ("experiments/a.yaml", "experiments/examples/b.yaml", "experiments/archive/c.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    found = [path.name for path in find_experiments(tmp_path, [])]
    assert found == ["a.yaml", "b.yaml"]
    one = tmp_path / "experiments/a.yaml"
    assert find_experiments(tmp_path, [one, one]) == [one]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no experiment"):
        find_experiments(tmp_path, [tmp_path / "empty"])


def test_root_and_settings(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    with pytest.raises(UserError, match="not inside a mergetune repository"):
        find_root(tmp_path / "experiments")
    (tmp_path / "pyproject.toml").write_text('[tool.mergetune]\nnamespaces = ["acme"]\n')
    assert find_root(tmp_path / "experiments") == tmp_path
    assert load_settings(tmp_path) == Settings(namespaces=("acme",))
    assert shown_path(tmp_path / "experiments/x.yaml", tmp_path) == "experiments/x.yaml"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[tool.mergetune]\nnamespace = ['a']\n", "`tool.mergetune.namespace`"),
        ("[tool.mergetune]\nmax_usd_per_run = 0\n", "greater than 0"),
        ("[tool.mergetune]\nx = = 1\n", "not TOML"),
    ],
)
def test_bad_settings(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text(toml)
    with pytest.raises(UserError, match=message) as caught:
        load_settings(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, ""),
        ({"tokenizer_config.json": "{}"}, ""),
        ({"tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, "{{ x }}"),
        ({"chat_template.jinja": "{{ y }}", "tokenizer_config.json": '{"chat_template": "{{ x }}"}'}, "{{ y }}"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default"}]}'}, None),
        ({"chat_template.json": "{}"}, None),
    ],
)
def test_a_base_without_a_chat_template_is_known_to_have_none(
    tmp_path: Path, files: dict[str, str], template: str | None
) -> None:
    (tmp_path / "base").mkdir()
    for name, text in {"config.json": "{}", **files}.items():
        (tmp_path / "base" / name).write_text(text)
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    assert read_facts(parse_experiment(LOCAL).experiment, tmp_path).chat_template == template

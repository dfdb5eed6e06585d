"""The same experiment with MLX: what its file may say, what makes another run of it, what a torch run never notices."""

import json

import pytest
import yaml
from examples import GOOD, MAC, changed
from jsonschema import Draft202012Validator

from pipeline.errors import InvalidExperiment
from pipeline.experiment import Experiment
from pipeline.facts import Facts
from pipeline.loader import parse_experiment
from pipeline.plan import as_mlx, in_repo_paths, make_fingerprint, make_plan
from pipeline.plan_changes import Version, compare
from pipeline.run_json import make_inputs, make_run_json

PLAIN = changed("  flavor: a10g-large\n  timeout: 4h\n", "  backend: mlx\n")
HERE = changed("mlx-community/gemma-3-12b-it-4bit", "./bases/gemma-4bit", MAC)


def fingerprint(text: str, facts: Facts | None = None) -> str:
    return make_fingerprint(parse_experiment(text).experiment, facts or Facts())


def fault(text: str) -> tuple[str, str, int]:
    with pytest.raises(InvalidExperiment) as caught:
        parse_experiment(text)
    (finding,) = caught.value.findings
    return finding.message, finding.hint, finding.at.line


def test_the_backend_makes_another_run() -> None:
    assert fingerprint(PLAIN) != fingerprint(GOOD)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("it-4bit", "it-8bit"),
        ("num_layers: 16", "num_layers: 8"),
        (", num_layers: 16", ""),
        ("revision: 1a2b3c4", "revision: abc"),
    ],
)
def test_what_mlx_is_told_decides_the_result(pattern: str, replacement: str) -> None:
    assert fingerprint(changed(pattern, replacement, MAC)) != fingerprint(MAC)


def test_the_chip_does_not() -> None:
    for flavor in ("  flavor: m1\n", "  flavor: local\n", ""):
        assert fingerprint(changed("  flavor: m3-max\n", flavor, MAC)) == fingerprint(MAC)


def test_a_base_of_this_repository_enters_by_content() -> None:
    assert in_repo_paths(parse_experiment(HERE).experiment) == ("./bases/gemma-4bit",)
    one, two = (Facts(content={"./bases/gemma-4bit": letter * 64}) for letter in "ab")
    assert fingerprint(HERE, one) != fingerprint(HERE, two)


def test_run_with_mlx_is_the_run_that_the_file_would_name() -> None:
    asked = as_mlx(parse_experiment(GOOD).experiment)
    assert make_fingerprint(asked, Facts()) == fingerprint(PLAIN)
    assert (asked.train.flavor, asked.train.timeout) == ("local", None)
    written = parse_experiment(MAC).experiment
    assert as_mlx(written) is written


def test_a_torch_experiments_request_says_nothing_of_it() -> None:
    resolved = parse_experiment(GOOD).experiment.resolved()
    assert not {"backend", "mlx"} & set(resolved["train"])
    assert parse_experiment(MAC).experiment.resolved()["train"]["backend"] == "mlx"


def test_the_request_names_both_bases() -> None:
    plan = make_plan(parse_experiment(MAC).experiment, Facts())

    def source(name: str, kind: str, revision: str | None) -> dict[str, str | None]:
        return {"repo": name, "revision": revision}

    inputs = make_inputs(plan, plan.stages[0].name, source, lambda stage: {})
    assert inputs["base"] == {"repo": "google/gemma-3-12b-it", "revision": "96b6f1e"}
    assert inputs["mlx_base"] == {"repo": "mlx-community/gemma-3-12b-it-4bit", "revision": "1a2b3c4"}
    request = make_run_json(plan, plan.stages[0], 1, inputs, {"path": "x"})
    assert request["experiment"]["train"]["mlx"]["num_layers"] == 16
    assert "mlx_base" not in make_inputs(plan, plan.stages[1].name, source, lambda stage: {})


@pytest.mark.parametrize("missing", ["flavor: a10g-large", "timeout: 4h"])
def test_a_job_has_to_say_where_and_how_long(missing: str) -> None:
    key = missing.partition(":")[0]
    message, hint, line = fault(changed(f"^  {missing}\n", ""))
    assert (message, line) == (f"`train.{key}` is missing", 9)
    assert hint == f"add `{missing}` under `train`"


def test_both_are_missed_at_once() -> None:
    with pytest.raises(InvalidExperiment) as caught:
        parse_experiment(changed("  flavor: a10g-large\n  timeout: 4h\n", ""))
    assert [f.message for f in caught.value.findings] == ["`train.flavor` is missing", "`train.timeout` is missing"]


def test_mlx_without_its_backend_would_be_passed_over() -> None:
    message, hint, line = fault(changed("  epochs: 3", "  epochs: 3\n  mlx: {num_layers: 4}"))
    assert "`mlx` is read by `backend: mlx` alone" in message
    assert (hint, line) == ("remove `mlx`, or write `backend: mlx`", 13)


def test_an_unknown_backend_is_one_fault() -> None:
    message, hint, _ = fault(changed("  backend: mlx", "  backend: mxl", PLAIN))
    assert "`train.backend` is `mxl`" in message
    assert "`torch` or `mlx`" in hint


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        (GOOD, True),
        (MAC, True),
        (PLAIN, True),
        (changed("  timeout: 4h\n", ""), False),
        (changed("  flavor: a10g-large\n", ""), False),
        (changed("  backend: mlx", "  backend: torch", PLAIN), False),
    ],
)
def test_an_editor_says_the_same(text: str, is_good: bool) -> None:
    schema = json.loads(json.dumps(Experiment.model_json_schema()))
    assert Draft202012Validator(schema).is_valid(yaml.safe_load(text.replace("2e-4", "0.0002"))) is is_good


def test_the_change_of_backend_is_shown_to_the_reviewer() -> None:
    versions = [parse_experiment(text).experiment for text in (GOOD, MAC)]
    changes = compare(*(Version(one, make_plan(one, Facts())) for one in versions))
    by_field = {change.field: change for change in changes.fields}
    assert (by_field["train.backend"].before, by_field["train.backend"].after) == (None, "mlx")
    assert by_field["train.mlx.base"].decides
    assert not by_field["train.flavor"].decides
    assert changes.same_run is False

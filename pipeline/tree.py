"""The experiments of main as runs, and everything a submit sends: reads and resolves, submits nothing."""

import secrets
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.actions import Seen, Submit
from pipeline.check import gather_facts
from pipeline.errors import UserError
from pipeline.facts import Facts
from pipeline.fields import is_path
from pipeline.launch import Order
from pipeline.loader import load_experiment
from pipeline.plan import Plan, StageName, make_fingerprint, make_plan, make_run_id
from pipeline.remote import FOLDER, Remote, as_json
from pipeline.run_json import Source, make_inputs, make_run_json
from pipeline.workspace import find_experiments, read_content, shown_path
from pipeline.world import Tree, Wanted

EXAMPLES = "examples"  # checked and tested, never launched


def read_tree(root: Path, commit: str) -> Tree:
    """Every experiment of the checkout at `commit`; a file that cannot be read is broken, not absent."""
    wanted: list[Wanted] = []
    broken: set[str] = set()
    folder = root / "experiments"
    for path in find_experiments(root, []) if any(folder.rglob("*.y*ml")) else []:
        if EXAMPLES in path.relative_to(folder).parts:
            continue
        try:
            wanted.append(wanted_run(path, root))
        except UserError:
            broken.add(path.stem)
    return Tree(commit, tuple(wanted), frozenset(broken))


def wanted_run(path: Path, root: Path) -> Wanted:
    """One experiment as a run. Its plan is made when it is asked for: finished runs never need one.

    Raises:
        UserError: the file or a file that it names cannot be read.
    """
    file = load_experiment(path, shown_path(path, root))
    experiment = file.experiment
    content, missing = read_content(experiment, root)
    if missing:
        raise UserError(f"`{missing[0]}` is not in this repository", "commit the file, or correct the path")
    run_id = make_run_id(experiment, make_fingerprint(experiment, Facts(content=content)))
    namespace = experiment.output.repo.split("/")[0]

    def plan() -> Plan:
        return make_plan(experiment, gather_facts(experiment, root))

    return Wanted(experiment.name, run_id, namespace, plan, path, experiment)


def make_order(
    root: Path, remote: Remote, label: str, provenance: Mapping[str, Any], plan: Plan, submit: Submit, seen: Seen
) -> Order:
    """An attempt ready to submit: script, `run.json` and in-repo inputs for the claim, revisions pinned.

    Raises:
        HubError: a revision cannot be resolved.
    """
    stage, attempt = submit.stage, submit.attempt
    files: dict[str, bytes | Path] = {}
    content, _ = read_content(plan.experiment, root)
    pins = _pins(seen)

    def source(name: str, kind: str, revision: str | None) -> Source:
        if is_path(name):
            path = f"inputs/{list(content).index(name)}/{PurePosixPath(name).name}"
            files.update(_copies(root / name, path))
            return {"path": path, "sha256": content[name]}
        pinned = pins.get((kind, name)) or remote.resolve(name, kind, revision)
        return {"repo": name, "revision": pinned, "type": kind}

    def artifact(made: StageName) -> Source:
        view = seen.views[made]
        return {"repo": plan.repo(made), "revision": view.head, "type": "model", "run_id": plan.run_id}

    inputs = make_inputs(plan, stage.name, source, artifact)
    folder = f"{FOLDER}/{plan.run_id}/{stage.name}" if stage.name is StageName.EVALUATE else ""
    output = {"repo": plan.repo(stage.name), "folder": folder}
    device = "cuda" if stage.flavor.gpus else "cpu"
    more = {"device": device, "provenance": dict(provenance), **stage.request()}
    files["run.json"] = as_json(make_run_json(plan, stage, attempt, inputs, output, **more))
    script = PurePosixPath(stage.script).name
    files[script] = root / stage.script
    labels = _labels(plan, stage.name, attempt, label, provenance)
    there = [job for job in seen.jobs if (job.stage, job.attempt) == (stage.name, attempt)] if submit.nodes else []
    nodes = submit.nodes or tuple(range(stage.parallel.nodes))
    mounted = next((job.revision for job in there if job.revision), "")
    return Order(plan, stage, attempt, secrets.token_hex(8), files, script, labels, nodes, mounted)


def _pins(seen: Seen) -> dict[tuple[str, str], str]:
    """Commits that an earlier stage or attempt of this run was made from: later ones take the same."""
    pins: dict[tuple[str, str], str] = {}
    for view in seen.views.values():
        inputs = (view.request or {}).get("inputs")
        for source in inputs.values() if isinstance(inputs, dict) else ():
            named = source if isinstance(source, dict) else {}
            kind, repo, revision = (named.get(key) for key in ("type", "repo", "revision"))
            if isinstance(kind, str) and isinstance(repo, str) and isinstance(revision, str):
                pins.setdefault((kind, repo), revision)
    return pins


def _copies(source: Path, target: str) -> dict[str, bytes | Path]:
    if not source.is_dir():
        return {target: source}
    return {f"{target}/{p.relative_to(source).as_posix()}": p for p in sorted(source.rglob("*")) if p.is_file()}


def _labels(plan: Plan, stage: StageName, attempt: int, label: str, provenance: Mapping[str, Any]) -> dict[str, str]:
    """How the job is found again; only letters, digits, `-` and `_` are safe."""
    labels = {
        "experiment": plan.experiment.name,
        "run": plan.run_id,
        "stage": stage.value,
        "attempt": str(attempt),
        "repo": label,
    }
    number = provenance.get("pull_request")
    return labels | ({"pr": str(number)} if number else {})

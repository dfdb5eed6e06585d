"""Imports point down only: every module of pipeline/ has a layer, and a pure layer touches no world."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "errors": 0,
    "events": 0,
    "yaml_hints": 0,
    "yaml_text": 0,
    "fields": 0,
    "train_sections": 0,
    "experiment": 0,
    "sweep": 0,
    "variants": 0,
    "loader": 0,
    "settings": 0,
    "flavors": 0,
    "apple": 0,
    "mac": 1,
    "mac_words": 1,
    "mlx_models": 0,
    "models": 0,
    "attention": 1,
    "settled": 1,
    "traced": 0,
    "trace": 2,
    "facts": 0,
    "hub_facts": 0,
    "unvouched": 0,
    "markdown": 1,
    "plan_changes": 1,
    "sweep_plan": 1,
    "rehearse_sweep": 3,
    "sweep_rules": 1,
    "sweep_sections": 1,
    "train_lines": 1,
    "plan_preview": 1,
    "plan_sections": 1,
    "plan_details": 1,
    "plan_comment": 1,
    "plan_request": 3,
    "world": 3,
    "closing": 3,
    "adapter_folder": 2,
    "this_machine": 2,
    "handover": 3,
    "tree": 3,
    "hub": 2,
    "hub_files": 2,
    "hub_look": 1,
    "hub_token": 1,
    "host_memory": 1,
    "twin_families": 1,
    "rehearsal_place": 1,
    "book": 1,
    "repository": 2,
    "remote": 1,
    "run_json": 1,
    "actions": 1,
    "reconcile": 1,
    "nodes": 1,
    "live": 1,
    "loss_chart": 1,
    "hypothesis": 1,
    "preferences": 1,
    "usage": 1,
    "result_comment": 1,
    "result_sections": 1,
    "curve_notes": 1,
    "diagnose": 1,
    "causes": 1,
    "log_lines": 1,
    "tracebacks": 1,
    "telling": 1,
    "remedy": 1,
    "remedy_gpu": 1,
    "pace": 1,
    "loss_trend": 1,
    "oom": 1,
    "diagnose_request": 3,
    "cli_diagnose": 4,
    "launch": 3,
    "stopping": 3,
    "controller": 3,
    "gather": 3,
    "trl_fields": 2,
    "converter_architectures": 0,
    "dataset_facts": 0,
    "rows": 1,
    "read_rows": 1,
    "guard": 1,
    "chat_template": 1,
    "tokens": 1,
    "dataset": 2,
    "fit": 1,
    "twin": 2,
    "rehearsal_rows": 2,
    "rehearse": 3,
    "rehearse_mlx": 2,
    "fit_request": 3,
    "charts": 1,
    "memory": 1,
    "parallel": 1,
    "cost": 1,
    "plan": 1,
    "rules": 1,
    "report": 1,
    "progress": 1,
    "backends": 2,
    "workspace": 2,
    "scaffold": 2,
    "check": 3,
    "online": 3,
    "local_run": 3,
    "pull_request": 1,
    "github_api": 2,
    "github": 2,
    "cli_runs": 4,
    "hf_run": 3,
    "hf_world": 3,
    "run_verbs": 3,
    "comments": 1,
    "preflight": 3,
    "announce": 3,
    "chatops": 3,
    "doctor": 3,
    "cli_github": 4,
    "review": 3,
    "workflow_run": 3,
    "board": 1,
    "board_chart": 1,
    "board_page": 1,
    "board_request": 3,
    "board_summary": 1,
    "cli_board": 4,
    "setup_recipes": 1,
    "issue_form": 1,
    "cli": 4,
    "cli_checks": 4,
    "__main__": 4,
    "__init__": 0,
}
IMPURE = {"os", "time", "subprocess", "shutil", "socket", "httpx", "httpx2", "huggingface_hub", "torch", "random"}
# The display of progress is thin I/O around the pure `advance`; it needs a clock to keep a log short.
PURE_EXCEPT = {"progress": {"time"}}
# Hugging Face Jobs is one half of the Hub's client and asks through the other half's connection, as GitHub does.
MAY_IMPORT = {("backends", "hub"), ("github", "github_api")}
TORCH_STACK = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"}
MODULES = sorted((ROOT / "pipeline").rglob("*.py"))


def part_of(path: Path) -> str:
    """`pipeline/rules/rule.py` belongs to `rules`, `pipeline/plan.py` is `plan`."""
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "pipeline" else {f"pipeline.{a.name}" for a in node.names}
            assert node.level == 0, f"{path}: relative import"
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    layer = LAYERS[part_of(path)]
    for name in imports_of(path):
        if name.startswith("pipeline.") and name != "pipeline.__version__":
            other = name.split(".")[1]
            assert LAYERS[other] <= layer, f"{path.name} (layer {layer}) imports {other} (layer {LAYERS[other]})"
            if layer == 2 and other != part_of(path) and (part_of(path), other) not in MAY_IMPORT:
                assert LAYERS[other] < 2, f"layer 2 modules do not import each other: {path.name} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_layer_one_is_pure(path: Path) -> None:
    part = part_of(path)
    if LAYERS[part] == 1:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & (IMPURE - PURE_EXCEPT.get(part, set()))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pipeline_never_imports_the_training_stack(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports_of(path)} & TORCH_STACK


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_job_scripts_import_nothing_of_ours(path: Path) -> None:
    ours = {"pipeline", *(script.stem for script in (ROOT / "scripts").glob("*.py"))}
    assert not {name.split(".")[0] for name in imports_of(path)} & ours

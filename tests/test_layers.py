"""Imports point down only: every module of pipeline/ has a layer, and a pure layer touches no world."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "errors": 0,
    "yaml_text": 0,
    "fields": 0,
    "experiment": 0,
    "loader": 0,
    "settings": 0,
    "flavors": 0,
    "models": 0,
    "facts": 0,
    "trl_fields": 2,
    "converter_architectures": 0,
    "dataset_facts": 0,
    "rows": 1,
    "chat_template": 1,
    "tokens": 1,
    "dataset": 2,
    "fit": 1,
    "twin": 2,
    "rehearsal_rows": 2,
    "rehearse": 3,
    "fit_request": 3,
    "charts": 1,
    "memory": 1,
    "cost": 1,
    "plan": 1,
    "rules": 1,
    "report": 1,
    "progress": 1,
    "backends": 2,
    "workspace": 2,
    "scaffold": 2,
    "check": 3,
    "local_run": 3,
    "cli": 4,
    "__main__": 4,
    "__init__": 0,
}
IMPURE = {"os", "time", "subprocess", "shutil", "socket", "httpx", "httpx2", "huggingface_hub", "torch", "random"}
# The display of progress is thin I/O around the pure `advance`; it needs a clock to keep a log short.
PURE_EXCEPT = {"progress": {"time"}}
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
            if layer == 2 and other != part_of(path):
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

"""An adapter as a local training leaves it, and an experiment that waits for one, for tests of handing it in."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from hub_story import EXPERIMENT, ROOT, Story

from pipeline.tree import wanted_run

MAC = EXPERIMENT.replace("  flavor: cpu-upgrade\n  timeout: 45m\n", "  backend: mlx\n")


def merge_mac(story: Story, stages: str = "merge gguf", name: str = "tiny") -> None:
    """Put an experiment with `backend: mlx` on main; of the stages after training, only those."""
    script = story.clone / "scripts/train_mlx.py"
    if not script.exists():
        shutil.copy(ROOT / "tests/stand_in_stage.py", script)
    text = MAC.format(revision=story.base_revision).replace("name: tiny", f"name: {name}")
    gone = tuple(f"{stage}:" for stage in ("merge", "gguf") if stage not in stages.split())
    story.merge(name, "".join(line for line in text.splitlines(True) if not (gone and line.startswith(gone))))


def make_adapter(story: Story, folder: Path, weights: bytes = b"weights", name: str = "tiny", **changed: Any) -> Path:
    """The artifact of a local training of `name`, as scripts/train_mlx.py leaves it; `changed` in its manifest."""
    plan = wanted_run(story.clone / f"experiments/{name}.yaml", story.clone).plan()
    config = {"peft_type": "LORA", "base_model_name_or_path": "acme/tiny-base", "r": 4}
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": weights,
        "mlx/adapters.safetensors": weights,
        "README.md": b"---\nbase_model: acme/tiny-base\n---\n# tiny\n",
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    manifest = {
        "schema": 1,
        "run_id": plan.run_id,
        "fingerprint": plan.fingerprint,
        "stage": "train",
        "attempt": 1,
        "finished_at": "2026-11-28T06:00:00+00:00",
        "duration_s": 12.5,
        "inputs": {
            "base": {"repo": "acme/tiny-base", "revision": story.base_revision, "type": "model"},
            "data": {"path": f"{story.clone}/data/rows.jsonl", "sha256": "0" * 64},
        },
        "trained_on": {"model": "acme/tiny-base", "revision": story.base_revision, "quantization": None},
        "metrics": {"train_loss": 1.5, "steps": 6},
        "versions": {"mlx": "0.32.4", "mlx-lm": "0.32.2"},
        "files": [
            {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for path, content in files.items()
        ],
        **changed,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder

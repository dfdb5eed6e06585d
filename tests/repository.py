"""A small mergetune repository in a temporary folder, and the command run in it as a person would."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = """\
name: small
hypothesis: a test of the machinery
base: {model: ./base}
data: {dataset: data.jsonl, eval: {fraction: 0.1}}
train: {method: lora, flavor: cpu-upgrade, timeout: 10m}
merge: {timeout: 10m}
gguf: {timeout: 10m, quants: [Q8_0]}
evaluate: {timeout: 10m, prompts: prompts.jsonl}
output: {repo: acme/small}
budget: {max_usd: 1}
"""
# A job script of the contract's shape that needs no torch: it copies its stage's name into its artifact. Knobs come
# from files beside run.json's work folder, so that a test can make it slow, fail or die without touching our code.
SCRIPT = textwrap.dedent(
    """\
    import hashlib, json, os, signal, sys, time
    from pathlib import Path

    if sys.argv[1] == "prepare":
        sys.exit(0)
    run = json.loads(Path(sys.argv[1]).read_text())
    work, out, knobs = Path(run["work"]), Path(run["output"]["path"]), Path(KNOBS)
    def emit(event, **fields):
        print("MERGETUNE " + json.dumps({"event": event, "time": time.time(), **fields}), flush=True)
    def knob(name):
        path = knobs / f"{run['stage']}.{name}"
        return path.read_text() if path.exists() else None
    def stop(*_):
        (work / "stopped").write_text("tidy")
        emit("interrupted")
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    with (knobs / "log").open("a") as log:
        log.write(run["stage"] + "\\n")
    emit("start", stage=run["stage"], run_id=run["run_id"])
    print("some library's chatter")
    if text := knob("error"):
        emit("error", **json.loads(text))
        sys.exit(2)
    if knob("crash"):
        raise RuntimeError("the sky fell")
    if knob("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    steps = int(knob("slow") or 3)
    for step in range(1, steps + 1):
        emit("step", step=step, total=steps, loss=2.0 / step, tokens_per_s=100.0)
        time.sleep(0.05)
    out.mkdir(parents=True)
    (out / "result.safetensors").write_text(run["stage"])
    digest = hashlib.sha256(run["stage"].encode()).hexdigest()
    entry = {"path": "result.safetensors", "bytes": len(run["stage"]), "sha256": digest}
    manifest = {
        "schema": 1, **{key: run[key] for key in ("run_id", "stage", "attempt", "inputs")},
        "duration_s": 0.1, "measured": {"peak_memory_gib": 0.1}, "versions": {"python": "3"}, "files": [entry],
        "metrics": {"steps": 3, "rows": 2, "tokens_trained": 10, "tokens_per_s": 100.0},
        "history": [{"step": 1, "loss": 2.0}],
    }
    if run["stage"] == "evaluate":
        manifest["metrics"] = {"before": {"loss": 2, "perplexity": 7}, "after": {"loss": 1, "perplexity": 3},
            "loss_change_percent": -50.0, "tokens": 9, "rows": 1}
    if not knob("no_manifest"):
        (out / "manifest.json").write_text(json.dumps(manifest))
    emit("end", stage=run["stage"])
    """
)


@dataclass(frozen=True)
class Repository:
    """A repository at `root` whose job scripts are stand-ins driven by files in `knobs`."""

    root: Path

    @property
    def knobs(self) -> Path:
        return self.root / "knobs"

    @property
    def experiment(self) -> Path:
        return self.root / "experiments/small.yaml"

    def set(self, name: str, text: str = "1") -> None:
        (self.knobs / name).write_text(text)

    def clear(self, name: str) -> None:
        (self.knobs / name).unlink()

    def started(self) -> list[str]:
        """The stages whose scripts were started, in order."""
        log = self.knobs / "log"
        return log.read_text().split() if log.exists() else []

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "120"}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pipeline", *arguments]

    def call(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `mergetune ARGUMENTS` in the repository's root."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def call_unprivileged(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """As `call`, with file permissions in force even for root; skips where root cannot be put aside."""
        drop: list[str] = []
        if os.geteuid() == 0:
            drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
            if (
                not shutil.which("setpriv")
                or subprocess.run([*drop, "true"], capture_output=True, check=False).returncode
            ):
                pytest.skip("running as root, and setpriv cannot put its rights aside")
        command = [*drop, *self.command(*arguments)]
        return subprocess.run(
            command, cwd=self.root, env=self.environment(), capture_output=True, text=True, timeout=120, check=False
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start `mergetune ARGUMENTS` and return at once."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_folder(self) -> Path:
        """The folder of the one run there is."""
        (folder,) = (self.root / "runs").iterdir()
        return folder

    def manifest(self, stage: str) -> dict[str, object]:
        return json.loads((self.run_folder() / stage / "artifact/manifest.json").read_text())


def make_repository(root: Path) -> Repository:
    """Lay out a repository with one experiment and stand-in job scripts."""
    for folder in ("experiments/examples", "scripts", "base", "knobs"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").write_text('[tool.mergetune]\nnamespaces = ["acme"]\n')
    (root / "experiments/small.yaml").write_text(EXPERIMENT)
    for example in (ROOT / "experiments/examples").glob("*.yaml"):
        (root / "experiments/examples" / example.name).write_text(example.read_text(encoding="utf-8"))
    rows = [{"prompt": f"what is {number}?", "completion": f"it is {number}"} for number in range(40)]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (root / "base/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (root / "base/chat_template.jinja").write_text("{{ messages }}")
    for name in ("train_sft", "merge_adapter", "convert_gguf", "evaluate"):
        (root / f"scripts/{name}.py").write_text(SCRIPT.replace("KNOBS", repr(str(root / "knobs"))))
    return Repository(root)

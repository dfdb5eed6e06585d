"""The MLX part of a rehearsal: what its training runs on, or what stands in where there is no MLX. Trains nothing."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.experiment import Backend, Experiment
from pipeline.facts import Facts, MlxHere
from pipeline.mac import mlx_bits
from pipeline.mlx_models import MLX, MLX_LM
from pipeline.plan import mlx_base

QUANTISED, TWIN_BITS = "./twin-mlx", 4
GROUP = 32  # divides every size of a twin
NOT_HERE = (
    "the train stage was NOT rehearsed: MLX is not installed for this Python, and torch trained in its place, so that "
    f'there is something to merge; `pip install "mlx[cpu]=={MLX}" "mlx-lm=={MLX_LM}"`, then rehearse again'
)


def is_stood_in_for(experiment: Experiment, here: MlxHere | None) -> bool:
    """Whether torch has to train in place of an MLX that is not installed."""
    return experiment.train.backend is Backend.MLX and (here is None or None in (here.mlx, here.mlx_lm))


def twin_bits(experiment: Experiment, config: Mapping[str, Any] | None) -> int | None:
    """Bits of the twin's MLX form: as the base's; None: the twin itself is trained on."""
    bits = mlx_bits(experiment, config) or TWIN_BITS
    return bits if bits < 16 else None


def substituted(experiment: Experiment, facts: Facts) -> tuple[str, ...]:
    """What stands in for the model that MLX trains on."""
    bits, other = twin_bits(experiment, facts.mlx_config), mlx_base(experiment)
    if other is None or bits is None or is_stood_in_for(experiment, facts.mlx_here):
        return ()
    return (f"the twin, quantised by MLX to {bits} bits, stands for `{other}`",)


def change_training(train: dict[str, Any], experiment: Experiment, facts: Facts, layers: int) -> None:
    """Change the training's values for the twin: an MLX base of its own, no more layers than it has; or torch."""
    mlx, bits = dict(train.pop("mlx", None) or {}), twin_bits(experiment, facts.mlx_config)
    if is_stood_in_for(experiment, facts.mlx_here):
        train |= {"backend": Backend.TORCH.value, "method": "lora", "flavor": "cpu-upgrade", "timeout": 3600}
        return
    kept = {"num_layers": min(mlx["num_layers"], layers)} if mlx.get("num_layers") else {}
    kept |= {"base": QUANTISED} if bits else {}
    if kept:
        train["mlx"] = kept


def make_base(folder: Path, bits: int | None) -> None:
    """Make of `folder/twin` what MLX trains on.

    Raises:
        UserError: mlx-lm cannot load the twin, and so not the base either.
    """
    _write_vocabulary(folder / "twin")
    if bits is not None:
        _quantise(folder, bits)


def _quantise(folder: Path, bits: int) -> None:
    """The twin's quantised form, by mlx-lm's own converter."""
    log = folder / "twin-mlx.log"
    command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", "twin", "--mlx-path", QUANTISED]
    command += ["--quantize", "--q-bits", str(bits), "--q-group-size", str(GROUP)]
    with log.open("wb") as out:
        done = subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = (lines or ["no output"])[-1][:300]
        raise UserError(f"mlx-lm cannot quantise the twin of the base: {last}", f"the whole log: `{log}`")


def _write_vocabulary(twin: Path) -> None:
    """Say the size of the vocabulary where mlx-lm looks for it, in a base with a vision tower.

    Its own default is the real base's, which a twin with a smaller vocabulary does not have.
    """
    path = twin / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config.get("text_config")
    if isinstance(text, dict) and "vocab_size" in text and "vocab_size" not in config:
        path.write_text(json.dumps({**config, "vocab_size": text["vocab_size"]}, indent=2), encoding="utf-8")

"""What `mergetune fit` is asked: an experiment file, a base of the catalogue, or a folder. Prints nothing."""

from functools import partial
from pathlib import Path

from pipeline.errors import UserError
from pipeline.experiment import Method, nearest
from pipeline.fit import Fit, fit_table
from pipeline.loader import load_experiment
from pipeline.memory import MemorySpec, spec_of
from pipeline.models import CATALOGUE, ModelShape
from pipeline.settings import find_root
from pipeline.sweep_plan import heaviest
from pipeline.workspace import folder_of, read_facts, shape_in, shown_path


def fit_of_experiment(path: Path) -> tuple[str, tuple[Fit, ...]]:
    """Title and table for an experiment's own method and adapter.

    Raises:
        InvalidExperiment: the file cannot be read or breaks the schema.
        UserError: the base's shape is not known.
    """
    root = find_root(folder_of(path))
    experiment = load_experiment(path, shown_path(path, root)).experiment
    shape = read_facts(experiment, root).shape
    if shape is None:
        raise _unknown(experiment.base.model)
    return f"Fit of `{experiment.name}`", fit_table(partial(spec_of, heaviest(experiment, shape), shape), shape)


def fit_of_model(model: str, method: str, rank: int) -> tuple[str, tuple[Fit, ...]]:
    """Title and table for a base, by name or folder, with an adapter of `rank` on every linear layer.

    Raises:
        UserError: no such method, or the base's shape is not known.
    """
    if method not in list(Method):
        hint = "write `--method qlora`, `lora`, `full` or `dpo`"
        raise UserError(f"there is no method `{method}`", hint, exit_code=2)
    shape: ModelShape | None = CATALOGUE.get(model) or shape_in(Path(model))
    if shape is None:
        raise _unknown(model)
    pairs = method == Method.DPO
    spec = MemorySpec(seq=1, micro_batch=2 if pairs else 1, padded=pairs, method=Method(method), rank=rank)
    return f"Fit of `{model}`, {method}, rank {rank}", fit_table(lambda _: spec, shape)


def _unknown(model: str) -> UserError:
    near = nearest(model, CATALOGUE)
    meant = f"did you mean `{near}`? Else pass" if near else "pass"
    message = f"the shape of `{model}` is not known here"
    return UserError(message, f"{meant} a folder with its config.json: `mergetune fit --model ./folder`", exit_code=2)

"""`mergetune init`: a new experiment from an example, its comments kept, or from an issue. Overwrites nothing."""

import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.experiment import nearest
from pipeline.fields import NAME


def write_experiment(root: Path, name: str, example: str) -> Path:
    """Copy `experiments/examples/<example>.yaml` to `experiments/<name>.yaml` under its new name.

    Raises:
        UserError: not a name, no such example, or the file is there already.
    """
    if not NAME.fullmatch(name):
        tidy = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "my-experiment"
        raise UserError(
            f"`{name}` is not a name: lower-case letters, digits and `-`", f"`mergetune init {tidy}`", exit_code=2
        )
    examples = {path.stem: path for path in sorted((root / "experiments" / "examples").glob("*.yaml"))}
    if example not in examples:
        near = nearest(example, examples)
        hint = f"`mergetune init {name} --from {near}`" if near else f"there are: {', '.join(examples)}"
        raise UserError(f"there is no example `{example}`", hint, exit_code=2)
    text = examples[example].read_text(encoding="utf-8").replace("$schema=../_schema.json", "$schema=./_schema.json")
    text = re.sub(r"(?m)^name: .*$", f"name: {name}", text, count=1)
    return write_new(root, name, text)


def write_new(root: Path, name: str, text: str) -> Path:
    """Write `experiments/<name>.yaml`.

    Raises:
        UserError: the file is there already, or cannot be written.
    """
    target = root / "experiments" / f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError as error:
        shown = target.relative_to(root)
        raise UserError(f"`{shown}` is there already", "choose another name, or edit that file", exit_code=2) from error
    except OSError as error:
        raise UserError(f"`{target}` cannot be written: {error.strerror}", "check the folder's permissions") from error
    return target

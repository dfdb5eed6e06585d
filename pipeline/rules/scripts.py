"""Rules about the text of the job scripts: what is known to fail, or to leak, on the machine. Runs none of them."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache

from pipeline.errors import TOKEN, Severity
from pipeline.rules.hub import PLACEHOLDER
from pipeline.rules.rule import Subject, Verdict
from pipeline.rules.script_text import (
    called,
    header_of,
    is_pinned,
    jobs_table,
    package,
    packages_of,
    printing_line,
    requirements,
    source_of,
    tree_of,
)

# Arguments of SFTTrainer in older TRL, and where each went: trl 1.16.0, trainer/sft_trainer.py.
MOVED = {
    "tokenizer": "`processing_class=`",
    "model_init_kwargs": "`SFTConfig(model_init_kwargs=…)`",
    "max_seq_length": "`SFTConfig(max_length=…)`",
    "dataset_text_field": "`SFTConfig(dataset_text_field=…)`",
    "packing": "`SFTConfig(packing=…)`",
}
UPLOADS = {"push_to_hub", "upload_folder", "upload_large_folder", "upload_file", "create_commit"}


def script_parses(subject: Subject) -> Verdict | None:
    """A custom script is Python

    Why: A syntax error shows only after the machine was started and the packages were installed.
    Fix: Mend the line.
    """
    script = subject.file.experiment.train.script
    if script is None or script not in subject.facts.scripts:
        return None
    try:
        ast.parse(subject.facts.scripts[script])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        return Verdict("train.script", f"`{script}:{line}` is not Python: {_reason(error)}", f"mend line {line}")
    return None


def script_has_header(subject: Subject) -> Verdict | None:
    """Every job script says its packages, each pinned

    Why: Without the header the job has no package at all; with `trl>=0.12` it gets today's release, and the arguments
    that worked last month are errors.
    Fix: A PEP 723 header with `==` for every package.
    """
    for path, text in subject.facts.scripts.items():
        if header_of(text) is None:
            hint = f"start `{path}` with `# /// script`, `# dependencies = […]`, `# ///`"
            return _verdict(path, subject, f"`{path}` has no readable PEP 723 header", hint)
        for wanted in requirements(text):
            if not is_pinned(wanted):
                name = package(wanted)
                hint = f"write `{name}=={_pin_elsewhere(subject, name) or '<version>'}` in its header"
                return _verdict(path, subject, f"`{path}` does not pin `{wanted}`", hint)
    return None


def no_flash_attn(subject: Subject) -> Verdict | None:
    """No job script depends on flash-attn

    Why: It has no wheels, is built against a torch that is not installed yet, and needs a compiler the image lacks.
    Fix: Depend on `kernels` and write `attn_implementation: kernels-community/flash-attn2` (Ampere or newer).
    """
    for path, text in subject.facts.scripts.items():
        for wanted in requirements(text):
            if package(wanted) == "flash-attn":
                hint = f"in its header, replace `{wanted}` by `kernels==0.18.2`"
                return _verdict(path, subject, f"`{path}` depends on `flash-attn`, which cannot be built there", hint)
    return None


def no_secrets_table(subject: Subject) -> Verdict | None:
    """No job script asks for secrets in `[tool.hf-jobs]`

    Why: `hf jobs uv run` reads those names from the environment of whoever submits, and sends their values: a pull
    request could ask for any variable of the runner.
    Fix: Remove the entry; the token is passed by the workflow.
    """
    for path, text in subject.facts.scripts.items():
        table = jobs_table(text)
        for key in ("secrets", "env"):
            if key in table:
                message = f"`{path}` asks for `{key}` in `[tool.hf-jobs]`"
                return _verdict(path, subject, message, f"remove `{key}` from that table")
    return None


def no_login(subject: Subject) -> Verdict | None:
    """No job script logs in to the Hub

    Why: huggingface_hub finds `HF_TOKEN` by itself; `login()` fails on some tokens, and without one it waits for a
    person while the GPU is billed.
    Fix: Remove the call.
    """
    for path, call in _calls(subject, "login"):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        if owner is None or source_of(owner) in ("huggingface_hub", "hf", "hub", "HfApi()"):
            hint = f"remove line {call.lineno} of `{path}`; `HF_TOKEN` is found without it"
            return _verdict(path, subject, f"`{path}:{call.lineno}` calls `login()`", hint)
    return None


def no_token_text(subject: Subject) -> Verdict | None:
    """No job script holds a token, or a placeholder for one

    Why: A token in a committed file is published; a placeholder such as `$HF_TOKEN` in Python is just nine characters.
    Fix: Let huggingface_hub read `HF_TOKEN` from the environment.
    """
    for path, text in subject.facts.scripts.items():
        if line := _token_line(text):
            message = f"`{path}:{line}` holds something of the shape of an access token"
            return _verdict(path, subject, message, f"remove it from line {line}, and revoke the token")
        if line := _placeholder_line(text):
            message = f"`{path}:{line}` passes a placeholder such as `$HF_TOKEN` as text: nothing fills it in"
            return _verdict(path, subject, message, f"remove it from line {line}; `HF_TOKEN` is read by itself")
    return None


def trainer_arguments_exist(subject: Subject) -> Verdict | None:
    """SFTTrainer gets only arguments it has

    Why: An argument of an older TRL is a TypeError after the base was downloaded.
    Fix: Write it where the pinned TRL wants it.
    """
    for path, call in _calls(subject, "SFTTrainer"):
        for keyword in call.keywords:
            if keyword.arg in MOVED:
                message = f"`{path}:{call.lineno}` passes `{keyword.arg}=` to `SFTTrainer`, which has no such argument"
                hint = f"write {MOVED[keyword.arg]} instead of `{keyword.arg}=` in `{path}`"
                return _verdict(path, subject, message, hint)
    return None


def pushes_at_the_end(subject: Subject) -> Verdict | None:
    """A script that turns Hub pushing on also pushes at the end

    Why: The trainer's own pushes run in the background and lose their errors: a token without write access shows as
    success, and the model is gone with the machine. Only the call after training raises.
    Fix: Call `trainer.push_to_hub()` last.
    """
    for path, text in subject.facts.scripts.items():
        if line := _unpushed_line(text):
            message = f"`{path}:{line}` sets `push_to_hub=True`, and nothing calls `trainer.push_to_hub()`"
            return _verdict(path, subject, message, f"end `{path}` with `trainer.push_to_hub()`")
    return None


def prints_no_secret(subject: Subject) -> Verdict | None:
    """No job script prints what it read as a secret

    Why: Job logs are kept and readable later, and nothing masks a secret in them.
    Fix: Remove the print, or print only whether it is set.
    """
    for path, text in subject.facts.scripts.items():
        if line := printing_line(text):
            hint = f"remove line {line} of `{path}`, or print only whether it is set"
            return _verdict(path, subject, f"`{path}:{line}` prints a secret into the job's log", hint)
    return None


def processor_has_pillow(subject: Subject) -> Verdict | None:
    """A custom script that loads a vision-language processor installs Pillow

    Why: The image processor is loaded even for text rows, and its import error names neither the base nor the cure.
    Fix: Add `pillow` to the header, or load the tokenizer instead.
    """
    script, config = subject.file.experiment.train.script, subject.facts.config or {}
    text = subject.facts.scripts.get(script or "")
    if script is None or text is None or "vision_config" not in config:
        return None
    if packages_of(text) & {"pillow", "torchvision"} or not _loads_processor(tree_of(text)):
        return None
    message = f"`{script}` loads the processor of `{subject.file.experiment.base.model}`, which needs Pillow"
    return Verdict("train.script", message, f"add `pillow==<version>` to the header of `{script}`")


def _verdict(path: str, subject: Subject, message: str, hint: str, severity: Severity = Severity.ERROR) -> Verdict:
    """A finding about a script stands at the key that names it, or at the stage that runs it."""
    key = "train.script" if path == subject.file.experiment.train.script else "train"
    return Verdict(key, message, hint, severity)


def _pin_elsewhere(subject: Subject, name: str) -> str | None:
    """The version another script of the plan pins a package to."""
    wanted = (wanted for text in subject.facts.scripts.values() for wanted in requirements(text))
    return next((one.split("==")[1].strip() for one in wanted if package(one) == name and "==" in one), None)


def _calls(subject: Subject, name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a function or method `name`, with the script it stands in."""
    for path, text in subject.facts.scripts.items():
        if f"{name}(" in text:
            for node in ast.walk(tree_of(text)):
                if isinstance(node, ast.Call) and called(node) == name:
                    yield path, node


# The next three are cached by text: a thousand experiments share one job script. Each answers a line, 0 for none.


@lru_cache(maxsize=256)
def _token_line(text: str) -> int:
    found = TOKEN.search(text)
    return text.count("\n", 0, found.start()) + 1 if found else 0


@lru_cache(maxsize=256)
def _placeholder_line(text: str) -> int:
    if "$HF_TOKEN" not in text and "${HF_TOKEN}" not in text:
        return 0
    texts = (n for n in ast.walk(tree_of(text)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return next((node.lineno for node in texts if PLACEHOLDER.fullmatch(node.value)), 0)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _unpushed_line(text: str) -> int:
    """The line that turns Hub pushing on, when nothing in the script uploads after it."""
    if not re.search(r"push_to_hub\s*=\s*True", text):
        return 0
    calls = [node for node in ast.walk(tree_of(text)) if isinstance(node, ast.Call)]
    if any(called(call) in UPLOADS for call in calls):
        return 0
    return next((call.lineno for call in calls if any(_turns_on_push(keyword) for keyword in call.keywords)), 0)


def _turns_on_push(keyword: ast.keyword) -> bool:
    return keyword.arg == "push_to_hub" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True


def _loads_processor(tree: ast.Module) -> bool:
    """`AutoProcessor.from_pretrained`, or an SFTTrainer left to load the processor itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if source_of(node.func) == "AutoProcessor.from_pretrained":
                return True
            if called(node) == "SFTTrainer" and "processing_class" not in {keyword.arg for keyword in node.keywords}:
                return True
    return False


def _reason(error: BaseException) -> str:
    return error.msg if isinstance(error, SyntaxError) else type(error).__name__

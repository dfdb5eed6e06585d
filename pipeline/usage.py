"""Commands that use what a run made, as they work when pasted: download, llama.cpp, Ollama, Transformers, PEFT. Pure.

Every repository is named at its commit, so that a later run does not change what a comment shows.
"""

import re
import shlex
from dataclasses import dataclass

from pipeline.book import RUN_ID
from pipeline.markdown import visible

QUESTION = "In one sentence, how does a lighthouse help sailors at night?"
REPO = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
FILE = re.compile(r"[\w.-]+\.gguf")
LONGEST_QUESTION = 120


@dataclass(frozen=True)
class Made:
    """A repository that a stage filled, at the commit it left."""

    repo: str
    revision: str

    @property
    def is_named(self) -> bool:
        """Whether both are what they must be to stand in a command."""
        return bool(REPO.fullmatch(self.repo) and COMMIT.fullmatch(self.revision))


@dataclass(frozen=True)
class Snippet:
    """One way to use a result: what it needs in words, and the text to paste in a language."""

    title: str
    language: str
    text: str


def question_of(prompt: object) -> str:
    """A prompt of the evaluation as a question to try: one short line, else our own."""
    text = " ".join(visible(prompt).split()) if isinstance(prompt, str) else ""
    return text if 0 < len(text) <= LONGEST_QUESTION else QUESTION


def llama_cpp(made: Made, file: str, question: str) -> list[Snippet]:
    """Download one GGUF file; serve it, ask it once, or hand it to Ollama."""
    if not made.is_named or not FILE.fullmatch(file):
        return []
    name = file.removesuffix(".gguf").lower()
    asked = shlex.quote(question)
    fetch = f"hf download {made.repo} {file} --revision {made.revision} --local-dir ."
    ollama = f"printf 'FROM ./{file}\\n' > Modelfile\nollama create {name} -f Modelfile\nollama run {name} {asked}"
    return [
        Snippet("Download (a private repository needs `hf auth login` once)", "sh", fetch),
        Snippet("A server with a chat page on http://127.0.0.1:8080", "sh", f"llama-server -m {file} --port 8080"),
        Snippet("One answer in the terminal", "sh", f"llama-cli -m {file} -st -p {asked}"),
        Snippet("With Ollama", "sh", ollama),
    ]


def transformers(made: Made, question: str, chat: bool) -> list[Snippet]:
    """The merged model in Python."""
    if not made.is_named:
        return []
    lines = [
        "from transformers import pipeline",
        "",
        f'generate = pipeline("text-generation", "{made.repo}", revision="{made.revision}", dtype="bfloat16")',
    ]
    if chat:
        lines.append(f'turns = [{{"role": "user", "content": {_literal(question)}}}]')
        lines.append('print(generate(turns, max_new_tokens=100)[0]["generated_text"][-1]["content"])')
    else:
        lines.append(f'print(generate({_literal(question)}, max_new_tokens=100)[0]["generated_text"])')
    return [Snippet("With Transformers", "python", "\n".join(lines))]


def peft(made: Made) -> list[Snippet]:
    """The adapter alone on its base, in Python."""
    if not made.is_named:
        return []
    text = (
        "from peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{made.repo}", revision="{made.revision}", dtype="bfloat16")'
    )
    return [Snippet("The adapter with PEFT", "python", text)]


def again(commit: str, path: str, run_id: str) -> list[Snippet]:
    """The same run on a machine of one's own, from the commit that launched it."""
    known = COMMIT.fullmatch(commit) and re.fullmatch(r"experiments/[\w./-]+\.ya?ml", path) and RUN_ID.fullmatch(run_id)
    if not known:
        return []
    return [Snippet(f"Make `{run_id}` again", "sh", f"git checkout {commit}\nmergetune run {path}")]


def _literal(text: str) -> str:
    """Text as a Python string literal with double quotes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

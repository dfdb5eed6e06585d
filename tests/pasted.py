"""The code blocks of a comment, run as a reader would: pasted into a terminal or into Python, one after the other."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_tools import install

BLOCK = re.compile(r"^(?P<marks>`{3,})(?P<language>sh|python)\n(?P<text>.*?)\n(?P=marks)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Pasted:
    """One block and what came of it."""

    text: str
    code: int
    out: str


def blocks(comment: str) -> list[tuple[str, str]]:
    """Language and text of every block that is meant to be run."""
    return [(found["language"], found["text"]) for found in BLOCK.finditer(comment)]


def paste(comment: str, folder: Path, environment: Mapping[str, str]) -> list[Pasted]:
    """Run every block in `folder`, a shell's with `set -e`; llama.cpp's tools and ours are on the PATH."""
    tools = install(folder.parent / "tools")
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    given = {**environment, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = []
    for language, text in blocks(comment):
        command = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        ran = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=300, check=False)
        done.append(Pasted(text, ran.returncode, ran.stdout + ran.stderr))
    return done

"""llama-cli, llama-server and ollama where there are none: each really loads the file, with llama.cpp's own library.

Their flags are those of the tools; `install` puts them into a folder for a PATH. The library and its bindings are the
ones that the gguf stage has built.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
NAMES = ("llama-cli", "llama-server", "ollama")


def install(folder: Path) -> Path:
    """The tools by their names in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        tool = folder / name
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        tool.chmod(0o755)
    return folder


def main() -> None:
    """What the name that it was called by does."""
    import convert_gguf

    if "LLAMA_CPP_LIB_PATH" not in os.environ:
        environment = convert_gguf.child_environment(convert_gguf.prepare_llama_cpp())
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    name, *arguments = sys.argv[1:]
    {"llama-cli": llama_cli, "llama-server": llama_server, "ollama": ollama}[name](arguments)


def llama_cli(arguments: list[str]) -> None:
    """One answer."""
    parser = argparse.ArgumentParser("llama-cli")
    parser.add_argument("-m", "--model", required=True, type=Path)
    parser.add_argument("-st", "--single-turn", action="store_true", required=True)
    parser.add_argument("-p", "--prompt", required=True)
    given = parser.parse_args(arguments)
    print(answer(given.model, given.prompt))


def llama_server(arguments: list[str]) -> None:
    """Loads the file, as a server does before it listens."""
    parser = argparse.ArgumentParser("llama-server")
    parser.add_argument("-m", "--model", required=True, type=Path)
    parser.add_argument("--port", required=True, type=int)
    given = parser.parse_args(arguments)
    print(f"{given.model}: {len(answer(given.model, 'Hello'))} characters, port {given.port}")


def ollama(arguments: list[str]) -> None:
    """`create NAME -f MODELFILE` remembers the file, `run NAME PROMPT` answers with it."""
    known = Path.home() / "ollama.json"
    models = json.loads(known.read_text()) if known.exists() else {}
    match arguments:
        case ["create", name, "-f", modelfile]:
            lines = dict(line.split(" ", 1) for line in Path(modelfile).read_text().splitlines())
            models[name] = str(Path(lines["FROM"]).resolve(strict=True))
            known.write_text(json.dumps(models))
        case ["run", name, prompt]:
            print(answer(Path(models[name]), prompt))
        case _:
            sys.exit(f"ollama: {arguments} is no use of it that is known here")


def answer(path: Path, prompt: str) -> str:
    """The likeliest tokens after a prompt."""
    import convert_gguf
    import llama_cpp.llama_cpp as lib

    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    params: Any = lib.llama_model_default_params()
    params.use_extra_bufts = False
    model = lib.llama_model_load_from_file(os.fsencode(path), params) or sys.exit(f"`{path}` does not load")
    vocab, settings = lib.llama_model_get_vocab(model), lib.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = 1
    context = lib.llama_init_from_model(model, settings)
    ids = convert_gguf.greedy_answer(lib, context, vocab, convert_gguf.token_ids(lib, vocab, prompt))
    return convert_gguf.detokenize(lib, vocab, ids)


if __name__ == "__main__":
    main()

"""Pin what pyproject.toml asks for, with everything that comes along, into requirements/*.txt.

    python scripts/dev/lock_requirements.py

Asks pip what it would install into an empty environment. The files name versions, never an index.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = {"core": ".", "hub": ".[hub,count]", "train": ".[train,hub,count]", "dev": ".[train,hub,count,mlx,dev]"}
# What is made for one system alone, and comes along only there.
ONLY = {"mlx-cpu": "; sys_platform == 'linux'", "mlx-metal": "; sys_platform == 'darwin'"}


def resolve(target: str) -> dict[str, str]:
    """Name to version of everything an install of `target` needs, less ourselves."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
        target,
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    wanted = [item["metadata"] for item in json.loads(answer.stdout)["install"]]
    # `2.13.0+cpu` is where a wheel came from, not what is asked for.
    return {m["name"].lower(): m["version"].split("+")[0] for m in wanted if m["name"] != "mergetune"}


def main() -> None:
    """Resolve the widest set first, so that the narrower files agree with it."""
    pins = resolve(FILES["dev"])
    for name, target in FILES.items():
        names = pins if name == "dev" else resolve(target)
        text = f"# `make lock` wrote this: what `pip install {target}` needs.\n"
        text += "".join(
            f"{package}=={pins.get(package, version)}{ONLY.get(package, '')}\n"
            for package, version in sorted(dict(names).items())
        )
        (ROOT / "requirements" / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"requirements/{name}.txt: {len(names)} packages")


if __name__ == "__main__":
    main()

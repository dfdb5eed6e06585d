"""Bring what opens pages on this machine: Chromium and npm from Debian, a driver from npm. What is there stays.

    python scripts/dev/browser.py

The tests of the run board need them, and so do the pictures of `render_markdown.py`.
"""

import os
import shutil
import subprocess
import sys

from render_markdown import BROWSERS, Unable, renderer

APT_S = 600
FONTS = "fonts-dejavu-core"


def main() -> int:
    """Install what is missing, say what there is."""
    missing = [] if any(map(shutil.which, BROWSERS)) else ["chromium", FONTS]
    missing += [] if shutil.which("node") and shutil.which("npm") else ["nodejs", "npm"]
    try:
        if missing:
            _install(missing)
        tools = renderer()
    except Unable as reason:
        print(f"error: no browser: {reason}", file=sys.stderr)
        return 1
    print(f"{tools.browser}, driven by {tools.node} with {tools.packages}")
    return 0


def _install(packages: list[str]) -> None:
    if not shutil.which("apt-get"):
        raise Unable(f"there is no apt-get to bring {', '.join(packages)}; install them as your system does")
    root = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        try:
            subprocess.run(
                [*root, "apt-get", "--quiet", "--quiet", *command], env=environment, timeout=APT_S, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Unable(f"`apt-get {command[0]}` did not work: {error}") from error


if __name__ == "__main__":
    sys.exit(main())

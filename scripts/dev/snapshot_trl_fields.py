"""Write pipeline/trl_fields.json from the installed TRL and transformers, or with `--check` say that it is stale.

python scripts/dev/snapshot_trl_fields.py
python scripts/dev/snapshot_trl_fields.py --check

Reads their source as text; imports neither. Run it after a pinned version changes.
"""

import argparse
import json
import sys
import sysconfig
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.trl_fields import DPO, SFT, SNAPSHOT, read_source


def current() -> dict[str, Any]:
    """What the installed versions accept, without the date."""
    site = Path(sysconfig.get_paths()["purelib"])
    versions = {name: metadata.version(name) for name in ("trl", "transformers")}
    sft, dpo = ([dict(sorted(part.items())) for part in read_source(site, config)] for config in (SFT, DPO))
    return {"versions": versions, "types": sft[0], "choices": sft[1], "dpo": {"types": dpo[0], "choices": dpo[1]}}


def committed() -> dict[str, Any]:
    """The snapshot in the repository without its date; empty when there is none."""
    if not SNAPSHOT.exists():
        return {}
    held: dict[str, Any] = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return {key: value for key, value in held.items() if key != "as_of"}


def main() -> int:
    """Write or compare; exit code 1 when `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is stale")
    check = parser.parse_args().check
    now = current()
    if now == committed():
        return 0
    if check:
        print(f"{SNAPSHOT.name} is stale: run `python scripts/dev/snapshot_trl_fields.py`", file=sys.stderr)
        return 1
    dated = {"as_of": datetime.now(UTC).date().isoformat(), **now}
    SNAPSHOT.write_text(json.dumps(dated, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {SNAPSHOT.name}: {len(now['types'])} fields of trl {now['versions']['trl']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

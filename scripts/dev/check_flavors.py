"""Compare pipeline/flavors.py with what the Hub says about its Jobs hardware today, and bring it up to date.

    python scripts/dev/check_flavors.py
    python scripts/dev/check_flavors.py --write

Prints a table of differences. Exit code 0: the catalogue agrees (with `--write`: it does now); 1: it differs, or
something is left for a person; 2: the Hub could not be asked, or its answer cannot be one. A flavor that vanished stays
in the catalogue until a person removes it. The question is public: no token is sent.
"""

import argparse
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).resolve().parents[2] / "pipeline/flavors.py"
TIMEOUT_S = 20
# A process can allocate this part of the memory on a GPU's box: 14.56 of 16 GB on a T4 up to 139.7 of 141 on an H200.
ALLOCATABLE = (0.9, 1.0)
GB = {"GB": 1, "TB": 1000}
COLUMNS = ("usd_per_hour", "vcpus", "ram_gib", "disk_gb", "gpu", "gpus", "vram_gib")


class NoAnswer(Exception):
    """The Hub could not be asked, or what it said cannot be the list of its hardware."""


@dataclass(frozen=True)
class Row:
    """One flavor in the catalogue's terms; `box_gb` is the memory of one GPU as it is sold."""

    name: str
    usd_per_hour: float
    vcpus: int
    ram_gib: int
    disk_gb: int
    gpu: str | None = None
    gpus: int = 0
    vram_gib: float = 0.0
    box_gb: float = 0.0


@dataclass(frozen=True)
class Difference:
    """One cell; `by_hand` where `--write` leaves it alone, with the reason."""

    flavor: str
    field: str
    ours: object
    hub: object
    by_hand: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, compare, print, and with `--write` rewrite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the catalogue's data and its date")
    parser.add_argument("--endpoint", help="address of the Hub (default: huggingface_hub's own)")
    today = datetime.now(UTC).date()
    parser.add_argument("--as-of", type=date.fromisoformat, default=today, help="date to write (default: today, UTC)")
    parser.add_argument("--catalogue", type=Path, default=CATALOGUE, help="the file to compare and to write")
    chosen = parser.parse_args(arguments)
    ours = read_catalogue(chosen.catalogue)
    try:
        hub, skipped = fetch_hardware(chosen.endpoint, {row.gpu for row in ours.values() if row.gpu})
        require_whole(ours, hub)
    except NoAnswer as error:
        print(f"error: {error}\n\nhint: try again later; the catalogue is unchanged", file=sys.stderr)
        return 2
    found = compare(ours, hub)
    print(render(found), end="")
    print("".join(f"not for training: {line}\n" for line in skipped), end="")
    left = [one for one in found if one.by_hand]
    if chosen.write:
        write_catalogue(chosen.catalogue, updated(ours, hub, found), chosen.as_of)
        print(f"wrote {chosen.catalogue.name}, as of {chosen.as_of}" + (f"; {len(left)} left by hand" if left else ""))
        return int(bool(left))
    return int(bool(found))


def read_catalogue(path: Path) -> dict[str, Row]:
    """The flavors of the file by name, in its order."""
    flavors = runpy.run_path(str(path))["FLAVORS"]
    return {name: Row(name, *(getattr(one, column) for column in COLUMNS)) for name, one in flavors.items()}


def fetch_hardware(endpoint: str | None, gpus: set[str]) -> tuple[dict[str, Row], list[str]]:
    """The Hub's flavors by name, in its order, and those without a GPU that torch's CUDA build knows.

    Raises:
        NoAnswer: not reachable, not a success, not the list, or a row with a figure that cannot be read.
    """
    import httpx2
    from huggingface_hub import HfApi, set_client_factory

    # The client's own has no timeout and would wait for ever.
    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=TIMEOUT_S))
    try:
        answered = HfApi(endpoint=endpoint).list_jobs_hardware(token=False)
        rows = [read_row(one, gpus) for one in answered if not one.accelerator or one.accelerator.type == "gpu"]
    except (httpx2.HTTPError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoAnswer(f"the Hub's hardware list cannot be read: {type(error).__name__}: {error}") from error
    if len({row.name for row in rows}) < len(rows):
        raise NoAnswer("the Hub's hardware list names a flavor twice")
    skipped = [f"`{o.name}` ({o.accelerator.model})" for o in answered if o.accelerator and o.accelerator.type != "gpu"]
    return {row.name: row for row in rows}, skipped


def read_row(one: Any, gpus: set[str]) -> Row:
    """A `JobHardwareInfo` in our terms. `quantity` and `vram` are text, and `vram` is that of all GPUs together.

    Raises:
        ValueError: a figure that cannot be read, or a price per something else than a minute.
    """
    if one.unit_label != "minute":
        raise ValueError(f"`{one.name}` is priced per {one.unit_label}")
    usd = float(one.unit_cost_micro_usd) * 60 / 1e6
    vcpus, ram, disk = int(_number(one.cpu, "vCPU")), _gigabytes(one.ram), _gigabytes(one.ephemeral_storage)
    if not one.accelerator:
        return Row(one.name, usd, vcpus, int(ram), int(disk))
    count = int(one.accelerator.quantity)
    if count < 1:
        raise ValueError(f"`{one.name}` has {count} GPUs")
    gpu = known_gpu(one.accelerator.model, gpus) or one.accelerator.model
    return Row(one.name, usd, vcpus, int(ram), int(disk), gpu, count, 0.0, _gigabytes(one.accelerator.vram) / count)


def known_gpu(model: str, gpus: set[str]) -> str | None:
    """The catalogue's word for a GPU: the longest one whose words the Hub's name has."""
    words = f" {model.casefold()} "
    return max((gpu for gpu in gpus if f" {gpu.casefold()} " in words), key=len, default=None)


def require_whole(ours: dict[str, Row], hub: dict[str, Row]) -> None:
    """Raise NoAnswer for an answer with less than half of our flavors: it was cut off, they did not all vanish."""
    known = sum(name in hub for name in ours)
    if 2 * known < len(ours):
        raise NoAnswer(f"the answer has {known} of the catalogue's {len(ours)} flavors: it is not the whole list")


def compare(ours: dict[str, Row], hub: dict[str, Row]) -> list[Difference]:
    """Every difference, in the catalogue's order, new flavors last."""
    known = {row.gpu for row in ours.values()}
    found: list[Difference] = []
    for name, row in ours.items():
        if name not in hub:
            found.append(Difference(name, "flavor", "there", "gone", "remove it here if it is not coming back"))
        else:
            found += compare_row(row, hub[name])
    for name, row in hub.items():
        if name not in ours:
            why = "" if row.gpu in known else f"add what `{row.gpu}` can do to pipeline/cost.py first"
            found.append(Difference(name, "flavor", "not there", f"new, ${row.usd_per_hour:.2f}/h", why))
    return found


def compare_row(row: Row, hub: Row) -> list[Difference]:
    """Differences of one flavor. Prices arrive in whole millionths of a dollar a minute."""
    found = [
        Difference(row.name, field, getattr(row, field), getattr(hub, field))
        for field in ("vcpus", "ram_gib", "disk_gb", "gpus")
        if getattr(row, field) != getattr(hub, field)
    ]
    if round(row.usd_per_hour / 60 * 1e6) != round(hub.usd_per_hour / 60 * 1e6):
        found.insert(0, Difference(row.name, "usd_per_hour", row.usd_per_hour, rounded(hub.usd_per_hour)))
    if row.gpu != hub.gpu:
        found.append(Difference(row.name, "gpu", row.gpu, hub.gpu, "another machine under the same name"))
    elif row.gpu and not ALLOCATABLE[0] * hub.box_gb <= row.vram_gib <= ALLOCATABLE[1] * hub.box_gb:
        why = "measure what a process can allocate on it"
        found.append(Difference(row.name, "vram_gib", row.vram_gib, f"{hub.box_gb:g} GB a GPU", why))
    return found


def rounded(usd: float) -> float:
    """Dollars an hour, without what a price in millionths a minute adds: 0.01002 is 0.01."""
    cents = round(usd, 2)
    return cents if round(cents / 60 * 1e6) == round(usd / 60 * 1e6) else round(usd, 5)


def render(found: list[Difference]) -> str:
    """A table of differences."""
    if not found:
        return "no difference\n"
    cells = [("flavor", "field", "catalogue", "hub", "")]
    cells += [(d.flavor, d.field, str(d.ours), str(d.hub), f"by hand: {d.by_hand}" if d.by_hand else "") for d in found]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


def updated(ours: dict[str, Row], hub: dict[str, Row], found: list[Difference]) -> list[Row]:
    """Our rows with the Hub's figures, but for what is left by hand; new ones behind the last with the same GPU."""
    left = {one.flavor for one in found if one.by_hand}
    rows = [row if row.name in left else _merged(row, hub[row.name]) for row in ours.values()]
    vram = {row.gpu: row.vram_gib for row in ours.values()}
    for name, row in hub.items():
        if name in ours or name in left:
            continue
        place = max(index for index, other in enumerate(rows) if other.gpu == row.gpu)
        rows.insert(place + 1, _merged(row, row, vram[row.gpu]))
    return rows


def write_catalogue(path: Path, rows: list[Row], as_of: date) -> None:
    """Replace the rows and the date in the file's text; everything else stays."""
    text = path.read_text(encoding="utf-8")
    names = dict(re.findall(r'"([^"]+)", \d+, ([A-Z]\w*)\),', text))  # a GPU's word: the constant of its memory
    lines = "".join(f"    {_line(row, names)}\n" for row in rows)
    text, tables = re.subn(r"(?ms)^_ALL = \(\n.*?^\)\n", lambda _: f"_ALL = (\n{lines})\n", text)
    text, dates = re.subn(r'(?m)^AS_OF = ".*"$', f'AS_OF = "{as_of}"', text)
    if (tables, dates) != (1, 1):
        raise SystemExit(f"`{path}` has no `_ALL = (` or no `AS_OF`: its form has changed; this script must follow")
    path.write_text(text, encoding="utf-8")


def _merged(row: Row, hub: Row, vram_gib: float | None = None) -> Row:
    same = round(row.usd_per_hour / 60 * 1e6) == round(hub.usd_per_hour / 60 * 1e6) and row is not hub
    usd = row.usd_per_hour if same else rounded(hub.usd_per_hour)
    vram = row.vram_gib if vram_gib is None else vram_gib
    return Row(row.name, usd, hub.vcpus, hub.ram_gib, hub.disk_gb, row.gpu, hub.gpus, vram)


def _line(row: Row, names: dict[str, str]) -> str:
    price = f"{row.usd_per_hour:.2f}" if round(row.usd_per_hour, 2) == row.usd_per_hour else f"{row.usd_per_hour:g}"
    figures = f'"{row.name}", {price}, {row.vcpus}, {row.ram_gib}, {row.disk_gb}'
    return f'Flavor({figures}, "{row.gpu}", {row.gpus}, {names[row.gpu]}),' if row.gpu else f"Flavor({figures}),"


def _number(text: str, unit: str) -> float:
    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?) ?{unit}s?", text.strip())
    if not match:
        raise ValueError(f"`{text}` is not a number of {unit}")
    return float(match[1])


def _gigabytes(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(GB|TB)", text.strip())
    if not match:
        raise ValueError(f"`{text}` is not a size in GB or TB")
    return float(match[1]) * GB[match[2]]


if __name__ == "__main__":
    sys.exit(main())

"""scripts/dev/check_flavors.py against a loopback Hub, through the real client: the table, the rewrite, bad answers."""

import json
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, CATALOGUE = ROOT / "scripts/dev/check_flavors.py", ROOT / "pipeline/flavors.py"
# Memory of one GPU as it is sold.
BOX_GB = {"T4": 16, "L4": 24, "A10G": 24, "L40S": 48, "A100": 80, "H200": 141, "RTX PRO 6000": 96}


def hardware(name: str, cpu: int, ram: int, disk: int, micro_usd: int, gpu: str = "", gpus: int = 1) -> dict[str, Any]:
    """One entry as `GET /api/jobs/hardware` writes it."""
    accelerator = {"type": "gpu", "model": gpu, "quantity": str(gpus), "manufacturer": "Nvidia"}
    accelerator["vram"] = f"{BOX_GB.get(gpu, 32) * gpus} GB"
    return {
        "name": name,
        "prettyName": name.title(),
        "cpu": f"{cpu} vCPU",
        "ram": f"{ram} GB",
        "ephemeralStorage": f"{disk} GB",
        "accelerator": accelerator if gpu else None,
        "unitCostMicroUSD": micro_usd,
        "unitCostUSD": micro_usd / 1e6,
        "unitLabel": "minute",
    }


def as_today() -> list[dict[str, Any]]:
    """What the Hub would answer if the catalogue were right."""
    flavors = runpy.run_path(str(CATALOGUE))["FLAVORS"].values()
    sizes = ((f, round(f.usd_per_hour / 60 * 1e6)) for f in flavors)
    return [hardware(f.name, f.vcpus, f.ram_gib, f.disk_gb, usd, f.gpu or "", f.gpus) for f, usd in sizes]


@dataclass
class Hub:
    """A loopback server of one route."""

    answer: Any = None  # JSON, or bytes as they are
    status: int = 200
    cut: int = 0  # bytes left out at the end
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub(as_today())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append((self.path, self.headers.get("Authorization")))
            known = self.path == "/api/jobs/hardware"
            body = state.answer if isinstance(state.answer, bytes) else json.dumps(state.answer).encode()
            self.send_response(state.status if known else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - state.cut])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    copy = tmp_path / "flavors.py"
    copy.write_bytes(CATALOGUE.read_bytes())
    return copy


def check(hub: Hub, catalogue: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--endpoint", hub.address, "--catalogue", str(catalogue)]
    environment = {"PATH": "/usr/bin:/bin", "HF_TOKEN": "hf_0123456789abcdefghij", "HF_HOME": str(catalogue.parent)}
    environment["NO_PROXY"] = "127.0.0.1"
    return subprocess.run(
        [*command, "--as-of", "2027-02-03", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )


def flavors(path: Path) -> dict[str, Any]:
    return dict(runpy.run_path(str(path))["FLAVORS"])


def test_the_same(hub: Hub, catalogue: Path) -> None:
    result = check(hub, catalogue)
    assert (result.stdout, result.stderr, result.returncode) == ("no difference\n", "", 0)
    assert hub.requests == [("/api/jobs/hardware", None)]  # and no token went along


def test_writing_the_same_changes_the_date_alone(hub: Hub, catalogue: Path) -> None:
    assert check(hub, catalogue, "--write").returncode == 0
    old, new = CATALOGUE.read_text(encoding="utf-8"), catalogue.read_text(encoding="utf-8")
    changed = [pair for pair in zip(old.splitlines(), new.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [new for _, new in changed] == ['AS_OF = "2027-02-03"']


def test_differences(hub: Hub, catalogue: Path) -> None:
    by_name = {one["name"]: one for one in hub.answer}
    by_name["a10g-large"].update(unitCostMicroUSD=30000, ram="48 GB")
    by_name["cpu-basic"]["ephemeralStorage"] = "1 TB"
    by_name["a100x4"]["accelerator"].update(quantity="2", vram="160 GB")
    result = check(hub, catalogue)
    assert result.returncode == 1
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["flavor", "field", "catalogue", "hub"],
        ["cpu-basic", "disk_gb", "50", "1000"],
        ["a10g-large", "usd_per_hour", "1.5", "1.8"],
        ["a10g-large", "ram_gib", "46", "48"],
        ["a100x4", "gpus", "4", "2"],
    ]
    assert catalogue.read_bytes() == CATALOGUE.read_bytes()

    result = check(hub, catalogue, "--write")
    assert result.returncode == 0
    assert "wrote flavors.py, as of 2027-02-03" in result.stdout
    a10g, cpu = flavors(catalogue)["a10g-large"], flavors(catalogue)["cpu-basic"]
    assert (a10g.usd_per_hour, a10g.ram_gib, a10g.vram_gib, cpu.disk_gb) == (1.8, 48, 22.06, 1000)
    assert check(hub, catalogue).returncode == 0
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(catalogue)]
    assert subprocess.run(ruff, capture_output=True, timeout=60, check=False).returncode == 0


def test_prices_below_a_cent(hub: Hub, catalogue: Path) -> None:
    next(one for one in hub.answer if one["name"] == "cpu-basic")["unitCostMicroUSD"] = 208  # $0.0125 an hour
    assert check(hub, catalogue, "--write").returncode == 0
    assert flavors(catalogue)["cpu-basic"].usd_per_hour == pytest.approx(0.0125, abs=1e-4)
    assert check(hub, catalogue).returncode == 0


def test_vram_is_the_total_of_all_gpus(hub: Hub, catalogue: Path) -> None:
    """40 GB on each of four is another GPU than 80; no script knows what a process can allocate on it."""
    next(one for one in hub.answer if one["name"] == "a100x4")["accelerator"]["vram"] = "160 GB"
    result = check(hub, catalogue, "--write")
    assert result.returncode == 1
    assert "a100x4  vram_gib  79.15      40 GB a GPU  by hand: measure what a process can allocate" in result.stdout
    assert flavors(catalogue)["a100x4"].vram_gib == 79.15


def test_new_flavors(hub: Hub, catalogue: Path) -> None:
    hub.answer.insert(0, hardware("h200x2", 46, 512, 6000, 166667, "H200", 2))
    hub.answer.append(hardware("b300", 24, 256, 3000, 120000, "B300"))
    neuron = hardware("inf2x6", 24, 384, 500, 50000, "Inferentia2", 6)
    neuron["accelerator"].update(type="neuron", manufacturer="AWS")
    hub.answer.append(neuron)
    result = check(hub, catalogue, "--write")
    assert result.returncode == 1
    assert "new, $10.00/h" in result.stdout
    assert "by hand: add what `B300` can do to pipeline/cost.py first" in result.stdout
    assert "not for training: `inf2x6` (Inferentia2)" in result.stdout
    assert "1 left by hand" in result.stdout
    written = flavors(catalogue)
    assert list(written) == [*flavors(CATALOGUE), "h200x2"]
    assert (written["h200x2"].usd_per_hour, written["h200x2"].gpus, written["h200x2"].vram_gib) == (10, 2, 139.7)


def test_a_flavor_that_vanished_is_told_and_kept(hub: Hub, catalogue: Path) -> None:
    hub.answer = [one for one in hub.answer if one["name"] != "t4-small"]
    for arguments in ((), ("--write",)):
        result = check(hub, catalogue, *arguments)
        assert result.returncode == 1
        assert "t4-small  flavor  there      gone  by hand: remove it here" in result.stdout
    assert "t4-small" in flavors(catalogue)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": []}, "it is not the whole list"),
        ({"answer": as_today()[:5]}, "has 5 of the catalogue's 20 flavors: it is not the whole list"),
        ({"cut": 700}, "cannot be read"),
        ({"answer": b'[{"name": "cpu-basic"'}, "cannot be read: JSONDecodeError"),
        ({"answer": {"error": "later"}}, "cannot be read"),
        ({"answer": [{"name": "cpu-basic"}]}, "cannot be read: KeyError"),
        ({"answer": [None]}, "cannot be read"),
        ({"answer": as_today() + as_today()[:1]}, "names a flavor twice"),
        ({"answer": [{**one, "unitLabel": "hour"} for one in as_today()]}, "`cpu-basic` is priced per hour"),
        ({"answer": [{**one, "ram": "N/A"} for one in as_today()]}, "`N/A` is not a size in GB or TB"),
        ({"status": 503}, "cannot be read"),
        ({"status": 401}, "cannot be read"),
    ],
)
def test_an_answer_that_cannot_be_one(hub: Hub, catalogue: Path, change: dict[str, Any], message: str) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    result = check(hub, catalogue, "--write")
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert catalogue.read_bytes() == CATALOGUE.read_bytes()


def test_nobody_answers(catalogue: Path) -> None:
    result = check(Hub(address="http://127.0.0.1:9"), catalogue)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the Hub's hardware list cannot be read: ")

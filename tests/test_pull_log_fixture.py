"""scripts/dev/pull_log_fixture.py: a failed job's log without tokens, people and machines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts/dev"))

import pull_log_fixture  # noqa: E402


@pytest.mark.parametrize(
    ("line", "clean"),
    [
        ("token hf_" + "Ab1" * 10, "token <token>"),
        ("cd /home/maria/run && ls /Users/jo/x", "cd /home/ada/run && ls /Users/ada/x"),
        ("mail maria.s@uni.example", "mail ada@example.org"),
        ("connect 10.12.0.7:443", "connect 192.0.2.1:443"),
        ("(Request ID: Root=1-64c20bc3-1d8c;055e)", "(Request ID: Root=1-0)"),
        ("job 055e011f-9ecd-4145-8055-394d9c223361", "job 00000000-0000-0000-0000-000000000000"),
        (
            'File "/opt/x/envs/y/lib/python3.10/site-packages/trl/a.py"',
            'File "/usr/local/lib/python3.10/site-packages/trl/a.py"',
        ),
        ("ip-10-0-3-4: secret-lab/coach", "ip-192-0-2-1: acme/coach"),
        ("torch 2.13.0, 3.5 GiB", "torch 2.13.0, 3.5 GiB"),
    ],
)
def test_scrubbed(line: str, clean: str) -> None:
    assert pull_log_fixture.scrubbed(line, {"secret-lab": "acme"}) == f"{clean}\n"


def test_both_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "job.log"
    log.write_text("loading\nOSError: [Errno 28] No space left on device: '/home/maria/out'\n")
    monkeypatch.setattr(pull_log_fixture, "LOGS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pull_log_fixture.py", "disk", str(log)])
    assert pull_log_fixture.main() == 0
    assert "/home/ada/out" in (tmp_path / "disk.log").read_text()
    assert json.loads((tmp_path / "disk.json").read_text()) == {
        "id": "disk-full",
        "cause": "the disk is full",
        "evidence": "OSError: [Errno 28] No space left on device: '/home/ada/out'",
        "transient": False,
        "fix": "`train.flavor: a10g-large → l40sx1`",
    }


def test_a_log_that_is_not_there() -> None:
    command = [sys.executable, "scripts/dev/pull_log_fixture.py", "x", "nowhere.log"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: `nowhere.log` is neither a file nor a job id")

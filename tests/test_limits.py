"""What is made to be slow or large is checked by a process of its own, in 2 s of CPU and 500 MB of memory."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_fuzz import EXPERIMENT, FILES, FIRST_ROW, ROOT, SECONDS, as_json, rows

pytestmark = pytest.mark.slow

MEGABYTES = 500
HALF = 120 * 1024  # bytes of a text that is still read: half of yaml_text.MAX_BYTES


def template(text: str) -> dict[str, bytes]:
    return {"base/chat_template.jinja": text.encode(), "rows.jsonl": rows(2_000).encode()}


HUGE: dict[str, Callable[[], dict[str, bytes]]] = {
    "brackets": lambda: {"fuzz.yaml": b"name: " + b"[" * (2 * HALF)},
    "braces": lambda: {"fuzz.yaml": b"{a: " * (HALF // 2)},
    "dashes": lambda: {"fuzz.yaml": b"- " * HALF},
    "question marks": lambda: {"fuzz.yaml": b"? " * HALF},
    "aliases": lambda: {"fuzz.yaml": b"a: &a [x]\nb: [" + b"*a, " * (HALF // 4) + b"]\n"},
    "keys": lambda: {"fuzz.yaml": b"".join(b"kez%d: 1\n" % number for number in range(19_000))},
    "one key": lambda: {"fuzz.yaml": FILES["fuzz.yaml"] + b"k" * HALF + b": 1\n"},
    "keys of train.sft": lambda: {
        "fuzz.yaml": EXPERIMENT.replace(
            "sft: {", "sft: {" + "".join(f"learning{n}: 1, " for n in range(9_000))
        ).encode()
    },
    "quotes": lambda: {"fuzz.yaml": FILES["fuzz.yaml"] + b"x: " + b"''" * HALF},
    "placeholders": lambda: {"fuzz.yaml": EXPERIMENT.replace("nothing breaks", "${" * (HALF // 2)).encode()},
    "a long flavor": lambda: {"fuzz.yaml": EXPERIMENT.replace("cpu-upgrade", "a10g" * (HALF // 4)).encode()},
    "a long repository": lambda: {"fuzz.yaml": EXPERIMENT.replace("acme/fuzz", "acme/" + "a-" * (HALF // 2)).encode()},
    "one long row": lambda: {"rows.jsonl": b'{"text": "' + b"x" * 100_000_000 + b'"}\n'},
    "a row of brackets": lambda: {"rows.jsonl": b"[" * 20_000_000},
    "many rows": lambda: {"rows.jsonl": rows(5_000).encode() * 60},
    "many bad rows": lambda: {"rows.jsonl": b"{\n" * 1_000_000},
    "many empty lines": lambda: {"rows.jsonl": b"\n" * 3_000_000},
    "a row of a million keys": lambda: {"rows.jsonl": as_json({str(n): n for n in range(500_000)})},
    "a conversation of many turns": lambda: {"rows.jsonl": as_json({"messages": FIRST_ROW["messages"] * 3_000})},
    "a large config": lambda: {"base/config.json": as_json({str(n): n for n in range(500_000)})},
    "a template of nested loops": lambda: template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a template that multiplies": lambda: template("{{ 'a' * 10**9 }}"),
    "a template that pads": lambda: template("{{ messages[0].content|center(1000000000) }}"),
    "a template that doubles": lambda: template(
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
    ),
    "a template that filters": lambda: template(
        "{% for a in range(9000) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "a template that says much": lambda: template("{{ 'a' * 900000 }}{{ 'a' * 900000 }}"),
    "rows of 90,000 characters": lambda: template("{{ messages[0].content }}{{ 'a' * 90000 }}"),
    "a long template": lambda: template("{{ messages }}" * 7_000),
    "a deep template": lambda: template(f"{{{{ {'(' * 9_000}1{')' * 9_000} }}}}"),
    "a long script": lambda: {"job.py": b"x = (" + b"1 + " * 50_000 + b"1)\n"},
}


# The peak is what the process itself says at its end: ru_maxrss begins with that of the process that started it.
COMMAND = """
from pathlib import Path
from pipeline.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text().splitlines()
    Path("peak").write_text(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("name", HUGE)
def test_nothing_takes_long_or_much(name: str, tmp_path: Path) -> None:
    for path, content in {**FILES, **HUGE[name]()}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    command = [sys.executable, "-c", COMMAND, "check", "fuzz.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("wb") as said:
        child = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    text = (tmp_path / "said").read_text(errors="replace")
    peak_mib = int((tmp_path / "peak").read_text()) / 1024
    assert " template" not in name or "`./base`" in text or "chat template" in text
    shutil.rmtree(tmp_path)
    assert child.returncode in (0, 1, 2), text[-2000:]
    assert "Traceback" not in text
    assert usage.ru_utime + usage.ru_stime < SECONDS
    assert peak_mib < MEGABYTES

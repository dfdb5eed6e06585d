"""What this machine is, for the record of who trained where. Names no host, no user and no address."""

import platform
import subprocess
from pathlib import Path


def describe_machine() -> dict[str, str]:
    """System, its version, the processor's kind and its name on the box."""
    system = platform.system()
    version = platform.mac_ver()[0] if system == "Darwin" else platform.release()
    return {"system": f"{system} {version}".strip(), "machine": platform.machine(), "chip": _chip(system)}


def _chip(system: str) -> str:
    """`Apple M3 Max`, or what the kernel calls the processor."""
    if system == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        return answer.stdout.strip() or "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")

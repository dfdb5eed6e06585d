"""Network groups of the loopback Hub: which names a job's Python finds, all of them this machine. Starts nothing."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from servers.hub_http import HubError
from servers.hub_jobs import Job

GROUP, ALIAS = re.compile(r"[a-z0-9-]{1,46}"), re.compile(r"[a-z0-9-]{1,34}")
# A member is found under its aliases from its start to its end; nobody else is, and nobody from outside the group.
RESOLVER = """\
import os, socket
from pathlib import Path

_ask = socket.getaddrinfo


def getaddrinfo(host, *more, **given):
    prefix = os.environ["HF_NETWORK_GROUP_PREFIX"]
    if isinstance(host, str) and host.startswith(prefix):
        if not any(Path({folder!r}).glob(host.removeprefix(prefix) + ".*")):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        host = "127.0.0.1"
    return _ask(host, *more, **given)


socket.getaddrinfo = getaddrinfo
"""


def check_network(body: dict[str, Any]) -> None:
    """A 400 for a group or an alias that the Hub does not take; its description, as old as it is, has neither."""
    network = body.get("network")
    if network is None:
        return
    aliases = network.get("aliases", [])
    if not GROUP.fullmatch(str(network.get("group"))) or not all(ALIAS.fullmatch(alias) for alias in aliases):
        raise HubError(400, "Invalid input: network")
    if len(set(aliases)) < len(aliases):
        raise HubError(400, "Invalid input: network aliases must be unique")


def join_group(job: Job, root: Path, folder: Path) -> dict[str, str]:
    """Put the job's aliases where the other members look; the variables that it finds them by."""
    network = job.spec.get("network")
    if network is None:
        return {}
    group = _folder(job, root)
    group.mkdir(parents=True, exist_ok=True)
    for alias in network.get("aliases", []):
        (group / f"{alias}.{job.id}").touch()
    (folder / "network").mkdir()
    (folder / "network/sitecustomize.py").write_text(RESOLVER.replace("{folder!r}", repr(str(group))))
    name = network["group"]
    found = {"HF_NETWORK_GROUP_HOSTNAME": name, "HF_NETWORK_GROUP_PREFIX": f"{name}-"}
    return {**found, "PYTHONPATH": str(folder / "network")}


def leave_group(job: Job, root: Path) -> None:
    """Nobody finds the job any more."""
    if job.spec.get("network"):
        for path in _folder(job, root).glob(f"*.{job.id}"):
            with suppress(FileNotFoundError):
                path.unlink()


def _folder(job: Job, root: Path) -> Path:
    return root / "networks" / job.namespace / job.spec["network"]["group"]

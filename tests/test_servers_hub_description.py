"""The loopback Hub's answers against the Hub's own API description, path by path."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import get_session
from jsonschema import Draft202012Validator
from servers.hub import LoopbackHub
from servers.hub_description import description
from servers.hub_scene import OAUTH, READ, SCOPED, WRITE, populated_hub

from scripts.dev.cut_openapi import cut

REPO = "/api/models/{namespace}/{repo}"
# Where the description and the installed client disagree, the client wins: what the description says, and why not.
EXCEPTIONS = {
    # The client reads `path` of every row of a tree; the description has no such property.
    (REPO + "/tree/{rev}/{path}", "Additional properties are not allowed ('path' was unexpected)"),
    # The client reads `oid` and `size` of a row's `lfs`; the description has `pointerSize` alone.
    (REPO + "/paths-info/{rev}", "Additional properties are not allowed ('oid', 'size' were unexpected)"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with populated_hub(tmp_path, monkeypatch) as hub:
        hub.execute_jobs = False
        hub.add_repo("acme/m", {"README.md": b"hi", "d/w.bin": b"\0" * 9})
        yield hub


def test_the_cut_holds_what_is_served_and_nothing_else(hub):
    assert cut(description()) == description()
    for template in description()["paths"]:
        path = re.sub(r"\{\w+\}", "x", template)
        assert any(route.pattern.fullmatch(path) for route in hub.routes), template


def ask(hub: LoopbackHub, method: str, path: str, token: str = WRITE, **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    answer = get_session().request(method, hub.url + path, headers=headers, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def faults(method: str, template: str, answer: Any) -> list[str]:
    """What the described schema says against the answer, less the exceptions."""
    operation = description()["paths"][template][method.lower()]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    found = Draft202012Validator(schema).iter_errors(answer)
    return [f"{error.json_path}: {error.message}" for error in found if (template, error.message) not in EXCEPTIONS]


JOB = {"dockerImage": "python", "command": ["true"], "flavor": "t4-small", "secrets": {"HF_TOKEN": "x"}}
FORM = {"paths": ["README.md", "d", "d/w.bin"], "expand": "false"}
FILES = {"files": [{"path": "new.bin", "size": 1, "sample": "AA=="}, {"path": "README.md", "size": 2, "sample": ""}]}
HEADER = json.dumps({"key": "header", "value": {"summary": "x"}})
CALLS = [
    ("GET", "/api/whoami-v2", "/api/whoami-v2", {"token": WRITE}),
    ("GET", "/api/whoami-v2", "/api/whoami-v2", {"token": READ}),
    ("GET", "/api/whoami-v2", "/api/whoami-v2", {"token": SCOPED}),
    ("GET", "/api/whoami-v2", "/api/whoami-v2", {"token": OAUTH}),
    ("GET", "/api/agent-harnesses", "/api/agent-harnesses", {}),
    ("POST", "/api/repos/create", "/api/repos/create", {"json": {"name": "new", "organization": "acme"}}),
    ("GET", REPO + "/commits/{rev}", "/api/models/acme/m/commits/main", {}),
    ("GET", REPO + "/refs", "/api/models/acme/m/refs", {}),
    ("PUT", REPO + "/settings", "/api/models/acme/m/settings", {"json": {"gated": "manual"}}),
    ("GET", REPO + "/tree/{rev}/{path}", "/api/models/acme/m/tree/main/d?expand=true", {}),
    ("POST", REPO + "/paths-info/{rev}", "/api/models/acme/m/paths-info/main", {"data": FORM}),
    ("POST", REPO + "/preupload/{rev}", "/api/models/acme/m/preupload/main", {"json": FILES}),
    ("POST", REPO + "/commit/{rev}", "/api/models/acme/m/commit/main", {"content": HEADER}),
    ("GET", REPO + "/xet-write-token/{rev}", "/api/models/acme/m/xet-write-token/main", {}),
    ("GET", "/api/jobs/hardware", "/api/jobs/hardware", {}),
    ("POST", "/api/jobs/{namespace}/auth-check/{perms}", "/api/jobs/acme/auth-check/write", {}),
    ("GET", "/api/jobs/{namespace}/count", "/api/jobs/acme/count?stage=RUNNING", {}),
]


@pytest.mark.parametrize(("method", "template", "path", "more"), CALLS)
def test_answers_obey_the_description(hub, method, template, path, more):
    assert faults(method, template, ask(hub, method, path, **more)) == []


@pytest.mark.parametrize("stage", ["SCHEDULING", "RUNNING", "ERROR"])
def test_jobs_obey_the_description_in_every_stage(hub, stage):
    made = ask(hub, "POST", "/api/jobs/acme", json=JOB)
    assert faults("POST", "/api/jobs/{namespace}", made) == []
    if stage != "SCHEDULING":
        hub.start_job(made["id"])
    if stage == "ERROR":
        hub.finish_job(made["id"], stage, message="Job timeout")
    base, one = "/api/jobs/{namespace}", f"/api/jobs/acme/{made['id']}"
    assert faults("GET", base, ask(hub, "GET", "/api/jobs/acme")) == []
    assert faults("GET", base + "/{jobId}", ask(hub, "GET", one)) == []
    labelled = ask(hub, "PUT", one + "/labels", json={"labels": {"a": "b"}})
    assert faults("PUT", base + "/{jobId}/labels", labelled) == []
    assert faults("POST", base + "/{jobId}/cancel", ask(hub, "POST", one + "/cancel")) == []

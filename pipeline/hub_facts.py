"""What only the Hub knows about an experiment, as values. Asks nothing, and never holds a token's value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pipeline.experiment import Experiment, Method


class Access(StrEnum):
    """How the Hub answered a question; an outage is an answer of its own, never taken for absence.

    `MISSING` is all the Hub says of a repository that is not there or that this token may not see. `MOVED` answers a
    commit whose parent is no longer the head, `NO_CREDIT` a submit (402): no question asked before it can tell.
    """

    READABLE = "readable"
    GATED = "gated"
    MISSING = "missing"
    NO_REVISION = "no such revision"
    NO_FILE = "no such file"
    FORBIDDEN = "forbidden"
    UNAUTHORIZED = "unauthorized"
    NO_CREDIT = "no credit"
    MOVED = "moved"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"


class TokenKind(StrEnum):
    """What a token is, by its own shape and by what the Hub says of it."""

    NONE = "none"
    PLACEHOLDER = "placeholder"
    OAUTH = "oauth"
    READ = "read"
    WRITE = "write"
    FINE_GRAINED = "fineGrained"
    UNKNOWN = "unknown"


class OutputState(StrEnum):
    """Whose an output repository is. `EMPTY`: it exists and holds nothing but housekeeping files."""

    ABSENT = "absent"
    EMPTY = "empty"
    OURS = "ours"
    FOREIGN = "foreign"
    NO_ACCESS = "no access"
    UNKNOWN = "unknown"


class HubError(Exception):
    """The Hub did not do what was asked: what kind of answer it was, and its words without any token."""

    def __init__(self, access: Access, detail: str) -> None:
        super().__init__(f"{access}: {detail}")
        self.access = access
        self.detail = detail


@dataclass(frozen=True)
class Probe:
    """The answer to one question; `detail` is the reason of one that was not yes."""

    access: Access
    detail: str = ""


@dataclass(frozen=True)
class Scope:
    """What a fine-grained token may do to one entity: a `user`, an `org`, a `model` and so on."""

    kind: str
    name: str
    permissions: frozenset[str]


@dataclass(frozen=True)
class TokenFacts:
    """What is known of the token; `probe` is whoami's answer (readable: the Hub knows it).

    `orgs` maps an organisation's name to the account's role in it; `can_read_gated` is None where the Hub does not say.
    """

    kind: TokenKind
    probe: Probe
    user: str | None = None
    orgs: Mapping[str, str] = field(default_factory=dict)
    scopes: tuple[Scope, ...] = ()
    can_read_gated: bool | None = None
    expires_at: datetime | None = None

    def may(self, permission: str, name: str) -> bool:
        """Whether a scope gives `permission` on the entity `name` (the Hub's names ignore case)."""
        return any(permission in scope.permissions and scope.name.lower() == name.lower() for scope in self.scopes)


@dataclass(frozen=True)
class SourceFacts:
    """A base or dataset on the Hub: may it be read, which commit its revision is, and the newest when none."""

    repo: str
    revision: str | None
    probe: Probe
    sha: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class OutputFacts:
    """One repository the plan writes; `write` is the Hub's answer to whether this token may (None: it is not there)."""

    repo: str
    state: OutputState
    write: Probe | None = None


@dataclass(frozen=True)
class HubFacts:
    """One look at the Hub, at `asked_at`. A base or dataset in the repository itself is None.

    `launches` says that this token will submit and write; a token that only reads for a reviewer is asked for less.
    """

    endpoint: str
    namespace: str
    asked_at: datetime
    token: TokenFacts
    jobs: Probe | None = None
    base: SourceFacts | None = None
    dataset: SourceFacts | None = None
    outputs: tuple[OutputFacts, ...] = ()
    launches: bool = True


@dataclass(frozen=True)
class Fetched:
    """Files of one Hub repository at a commit, on this disk; none when they could not be had, and `probe` says why."""

    probe: Probe
    sha: str | None = None
    folder: Path | None = None
    files: tuple[Path, ...] = ()


def planned_repos(experiment: Experiment) -> tuple[str, ...]:
    """The model repositories that the stages of an experiment make, in their order."""
    repo = experiment.output.repo
    if experiment.train.method is Method.FULL:
        made = [repo]
    else:
        made = [f"{repo}-adapter", *([repo] if experiment.merge else [])]
    return (*made, *([f"{repo}-GGUF"] if experiment.gguf else []))


class HubClient(Protocol):
    """The questions that facts are made of; every method raises `HubError` for an answer that is not yes."""

    @property
    def endpoint(self) -> str:
        """The Hub's address."""
        ...

    def token_facts(self) -> TokenFacts:
        """The account and the token as the Hub describes them."""
        ...

    def resolve(self, repo: str, kind: str, revision: str | None) -> str:
        """The commit of a revision; of the newest one without."""
        ...

    def files(self, repo: str, kind: str, revision: str | None) -> dict[str, int]:
        """Size in bytes of every file, by path."""
        ...

    def read(self, repo: str, kind: str, path: str, revision: str, limit: int) -> bytes:
        """A file's content, refused when larger than `limit` bytes."""
        ...

    def download(self, repo: str, kind: str, path: str, revision: str, target: Path, limit: int) -> None:
        """A file's content into `target`, which appears only when it is complete."""
        ...

    def may_read(self, repo: str, kind: str) -> None:
        """Raises unless the token may read the repository's files."""
        ...

    def may_write(self, repo: str, kind: str = "model") -> None:
        """Raises unless the token may commit to the repository, which exists."""
        ...

    def may_start_jobs(self, namespace: str) -> None:
        """Raises unless the token may start jobs in the namespace."""
        ...

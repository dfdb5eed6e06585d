"""The Hub through its own client: questions with a timeout, few retries and typed answers. Decides nothing.

The token and the endpoint are always explicit, so that no stored login answers in their place. What shows that a token
can write without leaving a mark is the Hub's own write check for a repository that exists and the token's scopes for
one that does not; the last proof is the claim's commit. No check here creates anything.
"""

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_url,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, JobNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status

from pipeline.errors import redact
from pipeline.hub_facts import Access, HubError, TokenFacts
from pipeline.hub_token import read_token, token_shape

T = TypeVar("T")
# The header X-Error-Code, rather than the client's exceptions: those take any 401 about a repository for absence.
CODES = {
    "GatedRepo": Access.GATED,
    "RepoNotFound": Access.MISSING,
    "RevisionNotFound": Access.NO_REVISION,
    "EntryNotFound": Access.NO_FILE,
}
STATUSES = {
    401: Access.UNAUTHORIZED,
    402: Access.NO_CREDIT,
    403: Access.FORBIDDEN,
    409: Access.MOVED,
    412: Access.MOVED,
}
# Not one answer but a bad moment: asked again, and an outage when it lasts. 404 without the Hub's own error code comes
# from something else than a Hub.
MOMENTS = frozenset({404, 408, 425, 429})
# What the client lets through when an answer breaks off or is not the Hub's: no word about what was asked.
FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Hub:
    """The Hub at one endpoint with one token; every method raises `HubError` for an answer that is not yes."""

    api: HfApi = field(repr=False)
    endpoint: str
    unusable: TokenFacts | None
    timeout_s: float
    attempts: int
    sleep: Callable[[float], None] = field(repr=False)

    def token_facts(self) -> TokenFacts:
        """The account and the token as the Hub describes them; what cannot be a token is not sent there."""
        return self.unusable or self.ask(lambda: read_token(self.api.whoami(token=self.api.token), str(self.api.token)))

    def resolve(self, repo: str, kind: str, revision: str | None) -> str:
        """The commit of a revision; of the newest one without."""
        sha = self.ask(lambda: self._info(repo, kind, revision).sha)
        if not sha:
            raise HubError(Access.UNREACHABLE, f"the answer about `{repo}` has no commit")
        return str(sha)

    def files(self, repo: str, kind: str, revision: str | None) -> dict[str, int]:
        """Size in bytes of every file, by path."""
        siblings = self.ask(lambda: self._info(repo, kind, revision, files_metadata=True).siblings)
        if siblings is None:
            raise HubError(Access.UNREACHABLE, f"the answer about `{repo}` has no list of files")
        return {file.rfilename: file.size or 0 for file in siblings}

    def read(self, repo: str, kind: str, path: str, revision: str, limit: int) -> bytes:
        """A file's content, refused when larger than `limit` bytes."""
        sink = io.BytesIO()
        self._fetch(hf_hub_url(repo, path, repo_type=kind, revision=revision, endpoint=self.endpoint), sink, limit)
        return sink.getvalue()

    def download(self, repo: str, kind: str, path: str, revision: str, target: Path, limit: int) -> None:
        """A file's content into `target`, which appears only when it is complete."""
        url = hf_hub_url(repo, path, repo_type=kind, revision=revision, endpoint=self.endpoint)
        part = target.with_name(f"{target.name}.part")
        with part.open("wb") as sink:
            self._fetch(url, sink, limit)
        part.replace(target)

    def may_read(self, repo: str, kind: str) -> None:
        """Raises unless the token may read the repository's files."""
        self.ask(lambda: self.api.auth_check(repo, repo_type=kind))

    def may_write(self, repo: str, kind: str = "model") -> None:
        """Raises unless the token may commit to the repository, which exists."""
        self.ask(lambda: self.api.auth_check(repo, repo_type=kind, write=True))

    def may_start_jobs(self, namespace: str) -> None:
        """Raises unless the token may start jobs in the namespace; whether they can be paid is not asked."""
        url = f"{self.endpoint}/api/jobs/{quote(namespace, safe='')}/auth-check/write"
        self.ask(lambda: hf_raise_for_status(get_session().post(url, headers=self._headers())))

    def create(self, repo: str, kind: str = "model") -> bool:
        """Make a private repository; False when there is one of that name."""
        try:
            self.ask(lambda: self.api.create_repo(repo, repo_type=kind, private=True, exist_ok=False), attempts=1)
        except HubError as error:
            if error.access is Access.MOVED:
                return False
            raise
        return True

    def commit(
        self, repo: str, operations: Iterable[CommitOperationAdd | CommitOperationDelete], message: str, parent: str
    ) -> str:
        """Commit on top of `parent` and return the new commit; `MOVED` when the head is another.

        Asked once: an answer that was lost may have been a yes, which only a new look at the head can tell.
        """
        info = self.ask(
            lambda: self.api.create_commit(repo, operations, commit_message=message, parent_commit=parent), attempts=1
        )
        return str(info.oid)

    def ask(self, call: Callable[[], T], attempts: int | None = None) -> T:
        """The call's result; asked again with growing waits as long as nothing answers.

        Raises:
            HubError: any answer that is not yes, told from no answer at all (`UNREACHABLE`).
        """
        attempts = attempts or self.attempts
        for attempt in range(1, attempts + 1):
            try:
                return call()
            except FAILURES as failure:
                error = self._error(failure)
            if error.access is not Access.UNREACHABLE or attempt == attempts:
                break
            self.sleep(2.0 ** (attempt - 1))
        raise error

    def _info(self, repo: str, kind: str, revision: str | None, files_metadata: bool = False) -> Any:
        # The client's own default here is None: no timeout at all.
        return self.api.repo_info(
            repo, repo_type=kind, revision=revision, timeout=self.timeout_s, files_metadata=files_metadata
        )

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(token=self.api.token)

    def _fetch(self, url: str, sink: BinaryIO, limit: int) -> None:
        def once() -> None:
            sink.seek(0)
            sink.truncate()
            with get_session().stream("GET", url, headers=self._headers()) as response:
                if response.is_error:
                    response.read()
                hf_raise_for_status(response)
                for chunk in response.iter_bytes(1 << 20):
                    if sink.tell() + len(chunk) > limit:
                        raise HubError(Access.REFUSED, f"larger than {limit:,} bytes")
                    sink.write(chunk)

        self.ask(once)

    def _error(self, failure: Exception) -> HubError:
        access = _access(failure)
        if isinstance(failure, HfHubHTTPError):
            said = failure.server_message or failure.response.reason_phrase
            words = f"{failure.response.status_code} {said}"
        elif isinstance(failure, httpx2.TimeoutException):
            words = f"no answer within {self.timeout_s:g} s"
        elif isinstance(failure, OfflineModeIsEnabled):
            words = "`HF_HUB_OFFLINE` is set"
        elif isinstance(failure, (httpx2.HTTPError, OSError, HFValidationError)):
            words = str(failure) or type(failure).__name__
        else:
            words = "an answer that is not the Hub's, or broke off"
        return HubError(access, self._clean(words))

    def _clean(self, words: str) -> str:
        """One short line in which the token, whatever its shape, does not stand."""
        if isinstance(self.api.token, str):
            words = words.replace(self.api.token, "<token>")
        return redact(" ".join(words.split()))[:200]


def open_hub(
    endpoint: str,
    token: str | None,
    *,
    timeout_s: float = 30.0,
    attempts: int = 3,
    sleep: Callable[[float], None] = time.sleep,
) -> Hub:
    """The Hub at `endpoint`; without a token, or with a text that cannot be one, every question is an anonymous one.

    The client's connection is shared by the whole process and has no timeout: from here on it has this one.
    """

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(timeout_s)
        return made

    set_client_factory(client)
    endpoint = endpoint.rstrip("/")
    unusable = token_shape(token)
    api = HfApi(endpoint=endpoint, token=(token or "").strip() if unusable is None else False)
    return Hub(api, endpoint, unusable, timeout_s, attempts, sleep)


def _access(failure: Exception) -> Access:
    """What kind of answer a failure of the client is. Absence is believed only where the Hub itself says so."""
    if isinstance(failure, HFValidationError):
        return Access.MISSING
    if not isinstance(failure, HfHubHTTPError):
        return Access.UNREACHABLE
    status, said = failure.response.status_code, failure.server_message or ""
    code = failure.response.headers.get("X-Error-Code", "")
    if code in CODES:
        return CODES[code]
    # A fine-grained token without that right is answered a plain 403, with this sentence and no error code.
    if status == 403 and "public gated repositories" in said:
        return Access.GATED
    if isinstance(failure, JobNotFoundError):  # also what the client makes of a namespace that is not there
        return Access.MISSING
    return STATUSES.get(status, Access.UNREACHABLE if status >= 500 or status in MOMENTS else Access.REFUSED)

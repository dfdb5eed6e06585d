"""Submit a stage exactly once, and end a run for good: the protocol of claim, post and fence.

Jobs have no idempotency key, and a post may work though its answer is an error. So a submit is first a claim, a commit
that only one can make (compare-and-swap on the head), and every job's first act is to pass the fence, another commit
that only one can make. Whoever is killed between two steps leaves a claim that the next tick reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.hub_facts import Access, HubError
from pipeline.plan import Plan, Stage
from pipeline.reconcile import Limits
from pipeline.remote import (
    CLAIM,
    NOBODY,
    WINNER,
    Claim,
    Clock,
    JobSpec,
    Remote,
    StageView,
    as_json,
    stage_folder,
)

MOUNT = "/mergetune"
CAS_TRIES = 8  # a head that moves more often than this in a row is not moved by us
CANCEL_ROUNDS = 5
SETTLE_S = 20.0  # what a listing may need to show a job whose post got no answer; doubled each time


@dataclass(frozen=True)
class Order:
    """An attempt at a stage, ready to submit: the files of its claim by name, and who asks (`by`, drawn anew)."""

    plan: Plan
    stage: Stage
    attempt: int
    by: str
    files: Mapping[str, bytes | Path]
    script: str
    labels: Mapping[str, str]

    @property
    def repo(self) -> str:
        """The repository the stage writes to."""
        return self.plan.repo(self.stage.name)

    @property
    def namespace(self) -> str:
        """Who pays."""
        return self.repo.split("/")[0]

    @property
    def folder(self) -> str:
        """Where the claim stands in the repository."""
        return stage_folder(self.plan.run_id, self.stage.name)


@dataclass(frozen=True)
class Submitted:
    """One job runs for this attempt."""

    job_id: str


@dataclass(frozen=True)
class Elsewhere:
    """Somebody else does it, or did it."""

    why: str


@dataclass(frozen=True)
class Unanswered:
    """Nobody can say whether a job was started; the claim keeps count, and a later tick looks again."""

    why: str


Outcome = Submitted | Elsewhere | Unanswered


def submit_stage(remote: Remote, clock: Clock, order: Order, limits: Limits) -> Outcome:
    """Start one job for this attempt, or find out that somebody else has.

    Raises:
        HubError: refused (no credit, no right …) or not reachable before anything was started.
    """
    if order.stage.flavor.local:
        raise ValueError(f"{order.stage.name} of {order.plan.run_id} is trained on a Mac: it is never a job")
    view = open_repo(remote, order)  # 1. look
    for posts in range(_posts(view, order) + 1, limits.posts + 1):
        if taken := taken_by_another(view, order, clock.now(), limits):
            return taken
        claim = Claim(order.attempt, clock.now(), order.by, posts)
        revision = claim_stage(remote, clock, order, view, claim, limits)  # 2. claim
        if isinstance(revision, Elsewhere):
            return revision
        try:
            job_id = _post(remote, clock, order, claim, revision, limits)  # 3. post
        except HubError:  # refused: there is no job, and the next tick need not wait for a lease
            _rewrite(remote, order, claim, replace(claim, at=0.0, posts=posts - 1), "Give back the claim")
            raise
        if job_id:
            noted = replace(claim, job_id=job_id)
            _rewrite(remote, order, claim, noted, "Note the job")  # 4. write the id; 5. is the job's: the fence
            return Submitted(job_id)
        view = remote.view(order.repo, order.folder)
    return Unanswered("the Hub answered every submit with an error, and no job of them is to be seen")


def close_fence(remote: Remote, repo: str, folder: str, last: int | None = None) -> StageView:
    """Let no job of any attempt so far pass: the one that was submitted a moment ago finds the fence shut.

    `last` is the latest attempt it is meant for: when a later one was submitted meanwhile, nothing is shut.

    Raises:
        HubError: it could not be closed.
    """
    for _ in range(CAS_TRIES):
        view = remote.view(repo, folder)
        if view.head is None or view.attempt == 0:
            return view  # nothing was ever submitted here
        if last is not None and view.attempt > last:
            return view
        if view.winner and (view.winner.attempt, view.winner.job_id) == (view.attempt, NOBODY):
            return view
        shut = as_json({"attempt": view.attempt, "job_id": NOBODY})
        try:
            remote.commit(repo, view.head, "Stop this stage: no job passes", {f"{folder}/{WINNER}": shut})
        except HubError as error:
            if error.access not in (Access.MOVED, Access.UNREACHABLE):
                raise
    raise HubError(Access.UNREACHABLE, f"the fence of `{repo}` could not be closed")


def cancel_jobs(remote: Remote, clock: Clock, namespace: str, labels: Mapping[str, str], known: set[str]) -> set[str]:
    """Cancel until no job with these labels is live; returns the ids. A listing may not show `known` ones yet.

    Raises:
        HubError: a job could not be cancelled.
    """
    ended: set[str] = set()
    for _ in range(CANCEL_ROUNDS):
        live = {job.id for job in remote.jobs(namespace, labels, live=True)}
        unlisted = (remote.inspect(namespace, job_id) for job_id in sorted(known - live))
        live |= {job.id for job in unlisted if job and job.is_live}
        if not live:
            return ended
        for job_id in sorted(live):
            remote.cancel(namespace, job_id)
        ended |= live
        clock.sleep(2)
    raise HubError(Access.REFUSED, f"{len(live)} jobs were asked to stop and still run: {', '.join(sorted(live))}")


def open_repo(remote: Remote, order: Order) -> StageView:
    view = remote.view(order.repo, order.folder)
    if view.head is not None:
        return view
    remote.create_repo(order.repo, order.plan.experiment.output.private)
    view = remote.view(order.repo, order.folder)
    if view.head is None:
        raise HubError(Access.UNREACHABLE, f"`{order.repo}` was made and is not visible yet")
    return view


def taken_by_another(view: StageView, order: Order, now: float, limits: Limits) -> Elsewhere | None:
    """Why this attempt is not ours to submit: the world may have moved since the decision."""
    claim = view.claim
    if view.manifest and view.manifest.get("run_id") == order.plan.run_id:
        return Elsewhere("the artifact is there")
    if view.winner and view.winner.attempt >= order.attempt:
        return Elsewhere("a job of this attempt has passed the fence, or it was cancelled")
    if claim is None or claim.attempt < order.attempt:
        return None
    if claim.attempt > order.attempt or claim.job_id is not None:
        return Elsewhere("this or a later attempt was submitted")
    if claim.by == order.by:
        return None
    return Elsewhere("it is being submitted elsewhere") if now - claim.at < limits.lease_s else None


def _posts(view: StageView, order: Order) -> int:
    same = view.claim and view.claim.attempt == order.attempt
    return view.claim.posts if view.claim and same else 0


def claim_stage(
    remote: Remote, clock: Clock, order: Order, view: StageView, claim: Claim, limits: Limits
) -> str | Elsewhere:
    """Commit the claim; returns the commit that the job mounts."""
    files = {f"{order.folder}/{name}": content for name, content in order.files.items()}
    files[f"{order.folder}/{CLAIM}"] = claim.as_bytes()
    message = f"Claim {order.stage.name} of {order.plan.run_id}, attempt {order.attempt}"
    for _ in range(CAS_TRIES):
        if view.head is None:
            raise HubError(Access.MISSING, f"`{order.repo}` is gone")
        try:
            return remote.commit(order.repo, view.head, message, files)
        except HubError as error:
            if error.access not in (Access.MOVED, Access.UNREACHABLE):
                raise
        # The head moved, or the answer was lost: look whose claim it is now.
        view = remote.view(order.repo, order.folder)
        if view.claim and (view.claim.by, view.claim.posts) == (order.by, claim.posts) and view.head:
            return view.head
        if taken := taken_by_another(view, order, clock.now(), limits):
            return taken
    return Elsewhere(f"the head of `{order.repo}` keeps moving")


def _post(remote: Remote, clock: Clock, order: Order, claim: Claim, revision: str, limits: Limits) -> str | None:
    """Start the job. An error that says nothing is followed by looking for it, for longer than listings lag.

    Raises:
        HubError: refused, so that there surely is no job.
    """
    if clock.now() - claim.at > limits.lease_s / 2:
        return None  # too slow: by the time this post works, somebody else may hold the claim
    try:
        return remote.submit(_spec(order, revision))
    except HubError as error:
        if error.access is not Access.UNREACHABLE:
            raise
    for wait in (SETTLE_S, 2 * SETTLE_S, 4 * SETTLE_S):
        clock.sleep(wait)
        try:
            found = remote.jobs(order.namespace, {"run": order.plan.run_id, "stage": order.stage.name}, live=False)
        except HubError:
            continue  # whatever this says, it does not say that there is no job
        if ours := [job for job in found if job.attempt == order.attempt]:
            return max(ours, key=lambda job: job.is_live).id
    return None


def _rewrite(remote: Remote, order: Order, claim: Claim, new: Claim, what: str) -> None:
    """Replace our claim, as long as it is ours. Losing this costs a listing or a lease's wait, no money."""
    path, message = f"{order.folder}/{CLAIM}", f"{what} of {order.stage.name}, attempt {order.attempt}"
    for _ in range(CAS_TRIES):
        try:
            view = remote.view(order.repo, order.folder)
            if view.head is None or view.claim is None or view.claim.by != claim.by:
                return  # the claim went to somebody else
            remote.commit(order.repo, view.head, message, {path: new.as_bytes()})
            return
        except HubError as error:
            if error.access not in (Access.MOVED, Access.UNREACHABLE):
                return  # a token revoked just now: whoever looks next finds the claim or the job


def _spec(order: Order, revision: str) -> JobSpec:
    folder = f"{MOUNT}/{order.folder}"
    return JobSpec(
        namespace=order.namespace,
        flavor=order.stage.flavor.name,
        timeout_s=order.stage.timeout_s,
        command=("uv", "run", f"{folder}/{order.script}", f"{folder}/run.json"),
        repo=order.repo,
        revision=revision,
        mount=MOUNT,
        labels=order.labels,
    )

"""Submit a stage exactly once: the protocol of claim, post and fence. What stops it again is in stopping.py.

Jobs have no idempotency key, and a post may work though its answer is an error. So a submit is first a claim, a commit
that only one can make (compare-and-swap on the head), and every job's first act is to pass the fence, another commit
that only one can make. Whoever is killed between two steps leaves a claim that the next tick reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from pipeline.actions import Limits
from pipeline.hub_facts import Access, HubError
from pipeline.plan import Plan, Stage
from pipeline.remote import (
    CLAIM,
    NOBODY,
    Claim,
    Clock,
    JobSpec,
    Remote,
    StageView,
    Winner,
    stage_folder,
)
from pipeline.stopping import CAS_TRIES, cancel_jobs

MOUNT = "/mergetune"
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
    nodes: tuple[int, ...] = (0,)  # to start now
    mounted: str = ""  # the commit that nodes which are there mount; the others get the same

    @property
    def count(self) -> int:
        """How many nodes the attempt has, those that are there included."""
        return self.stage.parallel.nodes

    @property
    def is_begun(self) -> bool:
        """Whether only some of its nodes are to be started."""
        return len(self.nodes) < self.count

    @property
    def network_group(self) -> str | None:
        """The name under which its nodes find each other and no other attempt's; None for one node."""
        own = sha256(f"{self.labels['repo']} {self.plan.run_id} {self.stage.name} {self.attempt}".encode()).hexdigest()
        return f"mt-{own[:24]}" if self.count > 1 else None

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
    """Start this attempt's job, on several nodes one for each, or find out that somebody else has.

    Raises:
        HubError: refused (no credit, no right …) or not reachable before anything was started.
    """
    if order.stage.flavor.local:
        raise ValueError(f"{order.stage.name} of {order.plan.run_id} is trained on a Mac: it is never a job")
    view = open_repo(remote, order)  # 1. look
    for posts in range(_posts(view, order) + 1, limits.posts + 1):
        if taken := taken_by_another(view, order, clock.now(), limits):
            return taken
        known = view.claim if view.claim and view.claim.attempt == order.attempt else Claim(order.attempt, 0, "")
        claim = replace(known, at=clock.now(), by=order.by, posts=posts)
        revision = claim_stage(remote, clock, order, view, claim, limits)  # 2. claim
        if isinstance(revision, Elsewhere):
            return revision
        order = replace(order, mounted=order.mounted or revision)
        job_ids = _post_nodes(remote, clock, order, claim, limits)  # 3. post; 4. write the ids; 5. is the job's: fence
        if len(job_ids) == len(order.nodes):
            return Submitted(job_ids[0])
        order = replace(order, nodes=order.nodes[len(job_ids) :])
        view = remote.view(order.repo, order.folder)
    return Unanswered("the Hub answered every submit with an error, and no job of them is to be seen")


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
    if view.winner and view.winner.attempt >= order.attempt and not _is_first_node(view.winner, order):
        return Elsewhere("a job of this attempt has passed the fence, or it was cancelled")
    if claim is None or claim.attempt < order.attempt:
        return None
    if claim.attempt > order.attempt or claim.ended or len(claim.job_ids) >= order.count:
        return Elsewhere("this or a later attempt was submitted")
    if claim.by == order.by:
        return None
    return Elsewhere("it is being submitted elsewhere") if now - claim.at < limits.lease_s else None


def _is_first_node(winner: Winner, order: Order) -> bool:
    """Whether the fence was passed by the first node of this attempt, of which only other nodes are to be started."""
    return winner.attempt == order.attempt and winner.job_id != NOBODY and 0 not in order.nodes


def _posts(view: StageView, order: Order) -> int:
    same = view.claim and view.claim.attempt == order.attempt
    return view.claim.posts if view.claim and same else 0


def claim_stage(
    remote: Remote, clock: Clock, order: Order, view: StageView, claim: Claim, limits: Limits
) -> str | Elsewhere:
    """Commit the claim; returns the commit that the job mounts."""
    # All nodes of an attempt mount the same commit: the files of one that has begun are there and stay.
    staged = {} if order.mounted else order.files
    files = {f"{order.folder}/{name}": content for name, content in staged.items()}
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


def _post_nodes(remote: Remote, clock: Clock, order: Order, claim: Claim, limits: Limits) -> list[str]:
    """Start the nodes one after the other and note each; returns the ids, up to the first that nobody knows of.

    Raises:
        HubError: refused. What was started of this attempt is stopped.
    """
    job_ids: list[str] = []
    for node in order.nodes:
        try:
            job_id = _post(remote, clock, order, claim, node, limits)
        except HubError as error:
            _withdraw(remote, clock, order, claim, node, error, started=bool(job_ids))
            raise
        if job_id is None:
            break
        job_ids.append(job_id)
        _rewrite(remote, order, claim, partial(Claim.with_job, job_id=job_id), "Note the job")
    return job_ids


def _withdraw(
    remote: Remote, clock: Clock, order: Order, claim: Claim, node: int, error: HubError, started: bool
) -> None:
    """After a refusal: nothing of the attempt may run on, and the next tick need not wait for a lease."""
    if not started and not claim.job_ids and not order.is_begun:  # there is no job
        give_back = partial(replace, at=0.0, posts=claim.posts - 1)
        _rewrite(remote, order, claim, give_back, "Give back the claim")
        return
    why = f"node {node + 1} of {order.count} was refused: {error.detail}"
    _rewrite(remote, order, claim, partial(replace, ended=why), "End the attempt")
    ours = ("repo", "run", "stage", "attempt")
    labels = {key: order.labels[key] for key in ours}
    cancel_jobs(remote, clock, order.namespace, labels, remote.view(order.repo, order.folder).job_ids)


def _post(remote: Remote, clock: Clock, order: Order, claim: Claim, node: int, limits: Limits) -> str | None:
    """Start the job. An error that says nothing is followed by looking for it, for longer than listings lag.

    Raises:
        HubError: refused, so that there surely is no job.
    """
    if clock.now() - claim.at > limits.lease_s / 2:
        return None  # too slow: by the time this post works, somebody else may hold the claim
    try:
        return remote.submit(_spec(order, node))
    except HubError as error:
        if error.access is not Access.UNREACHABLE:
            raise
    for wait in (SETTLE_S, 2 * SETTLE_S, 4 * SETTLE_S):
        clock.sleep(wait)
        try:
            found = remote.jobs(order.namespace, {"run": order.plan.run_id, "stage": order.stage.name}, live=False)
        except HubError:
            continue  # whatever this says, it does not say that there is no job
        if ours := [job for job in found if (job.attempt, job.node) == (order.attempt, node)]:
            return max(ours, key=lambda job: job.is_live).id
    return None


def _rewrite(remote: Remote, order: Order, claim: Claim, change: Callable[[Claim], Claim], what: str) -> None:
    """Change our claim, as long as it is ours. Losing this costs a listing or a lease's wait, no money."""
    path, message = f"{order.folder}/{CLAIM}", f"{what} of {order.stage.name}, attempt {order.attempt}"
    for _ in range(CAS_TRIES):
        try:
            view = remote.view(order.repo, order.folder)
            if view.head is None or view.claim is None or view.claim.by != claim.by:
                return  # the claim went to somebody else
            remote.commit(order.repo, view.head, message, {path: change(view.claim).as_bytes()})
            return
        except HubError as error:
            if error.access not in (Access.MOVED, Access.UNREACHABLE):
                return  # a token revoked just now: whoever looks next finds the claim or the job


def _spec(order: Order, node: int) -> JobSpec:
    folder = f"{MOUNT}/{order.folder}"
    return JobSpec(
        namespace=order.namespace,
        flavor=order.stage.flavor.name,
        timeout_s=order.stage.timeout_s,
        command=("uv", "run", f"{folder}/{order.script}", f"{folder}/run.json"),
        repo=order.repo,
        revision=order.mounted,
        mount=MOUNT,
        labels=order.labels if order.count == 1 else {**order.labels, "node": str(node)},
        # Not in run.json: that is the same commit for all nodes.
        environment={} if order.count == 1 else {"MERGETUNE_NODE": str(node)},
        network_group=order.network_group,
        network_aliases=() if order.count == 1 else (f"node-{node}",),
    )

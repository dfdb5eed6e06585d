"""Stop what was submitted: shut a fence, cancel jobs, end the nodes of an attempt. Starts and closes nothing."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from pipeline.hub_facts import Access, HubError
from pipeline.remote import CLAIM, NOBODY, WINNER, Clock, Remote, StageView, as_json

CAS_TRIES = 8  # a head that moves more often than this in a row is not moved by us
CANCEL_ROUNDS = 5


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


def end_attempt(remote: Remote, repo: str, folder: str, attempt: int, jobs: Collection[str], why: str) -> None:
    """Stop the nodes of an attempt that cannot go on, after saying in its claim that we do it and why.

    Without that note their end would look like a person's wish, and nothing would be tried again. Only the jobs that
    were seen are stopped: a later attempt may have begun since.

    Raises:
        HubError: it could not be noted, or a job not be cancelled.
    """
    for _ in range(CAS_TRIES):
        view = remote.view(repo, folder)
        if view.head is None or view.claim is None or view.claim.attempt < attempt:
            return  # the world has moved: the next tick looks again
        if view.claim.ended or view.claim.attempt > attempt:  # of an earlier attempt nothing is judged any more
            break
        try:
            ended = replace(view.claim, ended=why)
            remote.commit(repo, view.head, f"End attempt {attempt}: {why}", {f"{folder}/{CLAIM}": ended.as_bytes()})
            break
        except HubError as error:
            if error.access not in (Access.MOVED, Access.UNREACHABLE):
                raise
    else:
        raise HubError(Access.UNREACHABLE, f"the end of attempt {attempt} could not be noted in `{repo}`")
    for job_id in jobs:
        remote.cancel(repo.split("/")[0], job_id)

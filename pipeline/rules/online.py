"""Rules about what only the Hub knows. They speak when it was asked (`check --online`) and are silent otherwise.

Whether an account has credit for Jobs is in none of them: no endpoint tells, a submit without credit is answered 402.
"""

from pipeline.errors import Severity
from pipeline.hub_facts import Access, HubFacts, OutputState, Probe, SourceFacts, TokenKind
from pipeline.rules.rule import Subject, Verdict
from pipeline.rules.token import entity, explained, launching, same_name, token_page, token_recipe


def hub_answers(subject: Subject) -> Verdict | None:
    """The Hub answered every question

    Why: An outage is no answer: a repository that could not be looked up is not free, a base not missing.
    Fix: Check again when the Hub answers; `HF_ENDPOINT` says which Hub is asked, `HF_HUB_OFFLINE` forbids asking.
    """
    hub = subject.facts.hub
    silent = [(what, probe) for what, probe in _answers(hub) if probe.access is Access.UNREACHABLE] if hub else []
    if hub is None or not silent:
        return None
    asked = ", ".join(what for what, _ in silent)
    message = f"could not ask the Hub at `{hub.endpoint}` about {asked}: {silent[0][1].detail}"
    path = subject.file.at("output.repo").path
    return Verdict("output.repo", message, f"run `mergetune check --online {path}` again when it answers")


def jobs_are_allowed(subject: Subject) -> Verdict | None:
    """The Hub lets this token start jobs in the output's namespace

    Why: This asks the Hub itself, whatever the token's scopes look like. It does not tell whether there is credit: an
    account without any is told at the first submit (402), before anything runs.
    Fix: `job.write` on the namespace; in an organisation also a role that may run jobs.
    """
    hub = launching(subject)
    if hub is None or hub.jobs is None or not _refused(hub.jobs) or explained(subject):
        return None
    message = f"the Hub does not let the token start jobs in {entity(hub)}: {hub.jobs.detail}"
    return Verdict("output.repo", message, token_recipe(hub))


def base_is_readable(subject: Subject) -> Verdict | None:
    """The base can be read with the token

    Why: A gated base answers a job without access in its first minute, after the wait for a GPU.
    Fix: Accept the terms on the base's page with the token's account, and let the token read gated repositories.
    """
    hub = subject.facts.hub
    if hub is None or hub.base is None:
        return None
    return _source(hub, hub.base, "base.model", f"{hub.endpoint}/{hub.base.repo}")


def dataset_is_readable(subject: Subject) -> Verdict | None:
    """The dataset can be read with the token

    Why: As with the base: a job finds out after the wait for a GPU.
    Fix: Correct the name, accept its terms, or give the token's account access.
    """
    hub = subject.facts.hub
    if hub is None or hub.dataset is None:
        return None
    return _source(hub, hub.dataset, "data.dataset", f"{hub.endpoint}/datasets/{hub.dataset.repo}")


def revisions_exist(subject: Subject) -> Verdict | None:
    """The pinned revisions are there

    Why: A revision with a typing error fails in the job.
    Fix: A commit of that repository; the hint names the newest.
    """
    hub = subject.facts.hub
    sources = {"base.revision": hub.base, "data.revision": hub.dataset} if hub else {}
    for key, source in sources.items():
        if source is not None and source.probe.access is Access.NO_REVISION:
            message = f"`{source.revision}` is no commit, branch or tag of `{source.repo}`"
            hint = f"write `revision: {source.head}`, its newest commit" if source.head else f"remove `{key}`"
            return Verdict(key, message, hint)
    return None


def outputs_are_free(subject: Subject) -> Verdict | None:
    """The output repositories are new, empty or ours

    Why: A run replaces what is in them. One without a trace of an earlier run is somebody's own work.
    Fix: Another name, or empty the repository first if it really is to be replaced.
    """
    hub = subject.facts.hub
    taken = next((o.repo for o in hub.outputs if o.state is OutputState.FOREIGN), None) if hub else None
    if hub is None or taken is None:
        return None
    experiment = subject.file.experiment
    other = f"{hub.namespace}/{experiment.name}"
    other = other if not same_name(other, experiment.output.repo) else f"{other}-2"
    message = f"`{taken}` exists and nothing in it comes from a run of mergetune"
    return Verdict("output.repo", message, f"write another name, such as `repo: {other}`")


def outputs_are_writable(subject: Subject) -> Verdict | None:
    """The output repositories that exist can be written with the token

    Why: Without it the results of hours are refused at the push.
    Fix: `repo.write` on the namespace or on that repository.
    """
    hub = launching(subject)
    if hub is None or explained(subject):
        return None
    for output in hub.outputs:
        foreign = output.state is OutputState.FOREIGN
        if output.write is not None and _refused(output.write) and not foreign:
            message = f"`{output.repo}` exists and the token may not write it: {output.write.detail}"
            return Verdict("output.repo", message, f"give the token `repo.write` on {entity(hub)} at {token_page(hub)}")
    return None


def _answers(hub: HubFacts) -> list[tuple[str, Probe]]:
    """What was asked, in words, with its answer."""
    asked = [("the token", hub.token.probe)]
    asked += [(f"`{source.repo}`", source.probe) for source in (hub.base, hub.dataset) if source]
    asked += [(f"jobs in `{hub.namespace}`", hub.jobs)] if hub.jobs else []
    return asked + [(f"`{output.repo}`", output.write) for output in hub.outputs if output.write]


def _source(hub: HubFacts, source: SourceFacts, key: str, page: str) -> Verdict | None:
    account = f"the account `{hub.token.user}`" if hub.token.user else "an account"
    # Without any token a private source looks like a missing one: a reviewer is told, a pull request not stopped.
    severity = Severity.WARNING if hub.token.kind is TokenKind.NONE else Severity.ERROR
    if source.probe.access is Access.GATED:
        who = f"the token of `{hub.token.user}`" if hub.token.user else "a request without a token"
        message = f"`{source.repo}` is gated, and {who} may not read it"
        hint = f"accept its terms at `{page}` with {account}"
        if hub.token.kind is TokenKind.FINE_GRAINED and not hub.token.can_read_gated:
            hint = f"{hint}, and enable access to public gated repositories for the token at {token_page(hub)}"
        return Verdict(key, message, hint, severity)
    if source.probe.access is Access.MISSING:
        message = f"`{source.repo}` is not on the Hub, or is private and not shown to this token"
        owner = source.repo.split("/")[0]
        access = f"give {account} access at `{page}`"
        if hub.token.kind is TokenKind.FINE_GRAINED:
            access = f"give the token `repo.content.read` on `{owner}` at {token_page(hub)}"
        return Verdict(key, message, f"correct `{key}`, or {access}", severity)
    if _refused(source.probe) and source.probe.access is not Access.NO_REVISION:
        message = f"the Hub refuses to show `{source.repo}`: {source.probe.detail}"
        return Verdict(key, message, f"look at `{page}` with {account}", severity)
    return None


def _refused(probe: Probe) -> bool:
    return probe.access not in (Access.READABLE, Access.UNREACHABLE)

"""Rules about the token that launches: its shape, role, scopes and days. They speak when the Hub was asked."""

from datetime import timedelta

from pipeline.hub_facts import Access, HubFacts, OutputState, TokenKind
from pipeline.rules.rule import Subject, Verdict

NEEDED = ("repo.write", "job.write")
# The roles of an organisation's member that may not make a repository: whoami's `roleInOrg`, the Hub's API description.
READERS = ("read", "no_access")


def token_is_there(subject: Subject) -> Verdict | None:
    """There is a token to launch with

    Why: A job writes its results to the Hub; it has no token unless one is passed.
    Fix: Make a fine-grained token and store it as the repository's secret `HF_TOKEN`.
    """
    hub = launching(subject)
    if hub is None or hub.token.kind is not TokenKind.NONE:
        return None
    return Verdict("output.repo", "no Hub token: `HF_TOKEN` is not set, or empty", token_recipe(hub))


def token_is_a_value(subject: Subject) -> Verdict | None:
    """The token is a token's value, not the name of one

    Why: Nothing expands `$HF_TOKEN` or `${{ secrets.HF_TOKEN }}` on its way to a job: it would get these very
    characters as its token. (Only one chat tool replaces them, with its own session's token.)
    Fix: Pass the secret through `env:` in the workflow; on a laptop, `export HF_TOKEN=` with the value.
    """
    hub = subject.facts.hub
    if hub is None or hub.token.kind is not TokenKind.PLACEHOLDER:
        return None
    message = f"`HF_TOKEN` holds {hub.token.probe.detail}, not a token: nothing fills it in, a job would get it as is"
    return Verdict("output.repo", message, token_recipe(hub))


def token_is_accepted(subject: Subject) -> Verdict | None:
    """The Hub knows the token

    Why: A revoked, expired or mistyped token fails every job in its first minute.
    Fix: Make a new one and replace the secret.
    """
    hub = subject.facts.hub
    if hub is None or hub.token.kind in (TokenKind.NONE, TokenKind.PLACEHOLDER):
        return None
    if hub.token.probe.access in (Access.READABLE, Access.UNREACHABLE):
        return None
    message = f"the Hub at `{hub.endpoint}` does not accept the token: revoked, expired or mistyped"
    return Verdict("output.repo", f"{message} ({hub.token.probe.detail})", token_recipe(hub))


def token_is_personal(subject: Subject) -> Verdict | None:
    """The token is no OAuth token

    Why: `hf_oauth_` tokens come from a browser login (`hf auth login`) or a chat tool's session. They expire, some in
    hours, at most in 30 days, and are renewed only where the login was: a job holds a copy that dies under it.
    Fix: Make a fine-grained token of your own with `repo.write` and `job.write` on the output's namespace.
    """
    hub = launching(subject)
    if hub is None or hub.token.kind is not TokenKind.OAUTH:
        return None
    ends = hub.token.expires_at
    when = f"at {ends:%Y-%m-%d %H:%M} UTC" if ends else "in hours, at most in 30 days"
    message = "`HF_TOKEN` is an OAuth token (`hf_oauth_`), from a browser login or a chat tool's session"
    return Verdict("output.repo", f"{message}: it expires {when}, and a job's copy is not renewed", token_recipe(hub))


def token_outlives_plan(subject: Subject) -> Verdict | None:
    """The token is valid until the last stage can have ended

    Why: A token that expires under a running job loses the work: the results can no longer be pushed.
    Fix: A token that lasts longer than all timeouts together and the waits between the stages.
    """
    hub = launching(subject)
    if hub is None or hub.token.expires_at is None or hub.token.kind is TokenKind.OAUTH:
        return None
    experiment = subject.file.experiment
    stages = [experiment.train, experiment.merge, experiment.gguf, experiment.evaluate]
    ends = hub.asked_at + timedelta(seconds=sum(stage.timeout or 0 for stage in stages if stage))
    if ends < hub.token.expires_at:
        return None
    message = f"the token expires {hub.token.expires_at:%Y-%m-%d %H:%M} UTC, the stages may run until"
    return Verdict("output.repo", f"{message} {ends:%Y-%m-%d %H:%M} UTC and wait in queues besides", token_recipe(hub))


def token_writes(subject: Subject) -> Verdict | None:
    """The token is no read token

    Why: A read token passes everything that merely looks, also creating a repository that exists, and fails at the
    push, after the hours that were paid for.
    Fix: A fine-grained token with `repo.write` and `job.write` on the output's namespace.
    """
    hub = launching(subject)
    if hub is None or hub.token.kind is not TokenKind.READ:
        return None
    message = f"the token of `{hub.token.user}` has the role `read`: it can neither start a job nor push a result"
    return Verdict("output.repo", message, token_recipe(hub))


def account_may_write(subject: Subject) -> Verdict | None:
    """The token's account may make repositories in the output's namespace

    Why: A token can do no more than the account it belongs to.
    Fix: Another namespace in `output.repo`, or a role with write in that organisation.
    """
    hub = launching(subject)
    if hub is None or hub.token.user is None or same_name(hub.namespace, hub.token.user):
        return None
    role = next((role for org, role in hub.token.orgs.items() if same_name(org, hub.namespace)), None)
    if role is not None and role not in READERS:
        return None
    is_what = f"has the role `{role}` in" if role else "is not a member of"
    message = f"the token's account `{hub.token.user}` {is_what} the organisation `{hub.namespace}`"
    name = subject.file.experiment.output.repo.split("/")[-1]
    hint = f"write `repo: {hub.token.user}/{name}`, or ask an admin of `{hub.namespace}` for the role `write`"
    return Verdict("output.repo", message, hint)


def token_reaches_namespace(subject: Subject) -> Verdict | None:
    """A fine-grained token has its permissions where the results go

    Why: Permissions are given entity by entity: what a token may do as its user, it may not do in an organisation.
    Fix: Give it `repo.write` and `job.write` on the user or the organisation that `output.repo` names.
    """
    hub = launching(subject)
    if hub is None or hub.token.kind is not TokenKind.FINE_GRAINED:
        return None
    lacking = [permission for permission in NEEDED if _lacks(hub, permission)]
    if lacking:
        elsewhere = sorted(
            {f"{scope.kind} `{scope.name}`" for scope in hub.token.scopes if set(lacking) & scope.permissions}
        )
        said = " and ".join(f"`{permission}`" for permission in lacking)
        besides = f" (it has some on {', '.join(elsewhere)})" if elsewhere else ""
        message = f"the fine-grained token has no {said} on {entity(hub)}{besides}"
        return Verdict("output.repo", message, f"give the token {said} on {entity(hub)} at {token_page(hub)}")
    absent = [output.repo for output in hub.outputs if output.state is OutputState.ABSENT]
    if not absent or _in_groups(hub, "repo.write") or hub.token.may("repo.write", hub.namespace):
        return None
    message = f"the token may write `{absent[0]}`, which is not there, and may not create it"
    return Verdict("output.repo", message, f"create it as its owner: `hf repos create {absent[0]} --private`")


def launching(subject: Subject) -> HubFacts | None:
    """The facts when this token is to launch with: a reviewer's token need not be able to write."""
    hub = subject.facts.hub
    return hub if hub is not None and hub.launches else None


def explained(subject: Subject) -> bool:
    """Whether a rule about the token itself says why it is refused: one cause, one finding."""
    return any(rule(subject) for rule in (token_is_personal, token_writes, account_may_write, token_reaches_namespace))


def entity(hub: HubFacts) -> str:
    """The output's namespace in words: whose it is."""
    if hub.token.user and same_name(hub.token.user, hub.namespace):
        return f"the user `{hub.namespace}`"
    known = any(same_name(org, hub.namespace) for org in hub.token.orgs)
    return f"the {'organisation' if known else 'namespace'} `{hub.namespace}`"


def token_page(hub: HubFacts) -> str:
    """Where tokens are made and changed."""
    return f"`{hub.endpoint}/settings/tokens`"


def token_recipe(hub: HubFacts) -> str:
    """The way to the token that launching needs."""
    needed = " and ".join(f"`{permission}`" for permission in NEEDED)
    return f"make a fine-grained token at {token_page(hub)} with {needed} on {entity(hub)}, and put it into `HF_TOKEN`"


def same_name(one: str, other: str) -> bool:
    """The Hub's names ignore case."""
    return one.lower() == other.lower()


def _lacks(hub: HubFacts, permission: str) -> bool:
    if hub.token.may(permission, hub.namespace) or _in_groups(hub, permission):
        return False
    if permission == "job.write":
        return hub.jobs is None or hub.jobs.access is not Access.READABLE
    return any(not hub.token.may(permission, output.repo) for output in hub.outputs)


def _in_groups(hub: HubFacts, permission: str) -> bool:
    """A resource group's repositories are not listed: what it gives is left to the Hub's own answers."""
    return any(scope.kind == "resource-group" and permission in scope.permissions for scope in hub.token.scopes)

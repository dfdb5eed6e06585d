"""The loopback GitHub's answers about issues, comments and reactions."""

from servers.github_bodies import comment_body, issue_body, reaction_body
from servers.github_http import Refused, page
from servers.github_state import BOT, RANKS, Comment, GitHubWorld, Issue, Pull, Reaction
from servers.hub_http import Answer, Call, Route, json_answer, route

LONGEST_BODY = 65_536
ISSUES = "/repos/{owner}/{repo}/issues"
AREAS = ("issues", "pull-requests")


def issue_routes() -> list[Route]:
    """What is served here."""
    return [
        route("GET", ISSUES, _issues),
        route("POST", ISSUES, _open_issue),
        route("GET", ISSUES + "/comments/{comment_id}", _comment),
        route("PATCH", ISSUES + "/comments/{comment_id}", _edit_comment),
        route("DELETE", ISSUES + "/comments/{comment_id}", _delete_comment),
        route("GET", ISSUES + "/comments/{comment_id}/reactions", _reactions),
        route("POST", ISSUES + "/comments/{comment_id}/reactions", _react),
        route("GET", ISSUES + "/{number}", _issue),
        route("PATCH", ISSUES + "/{number}", _edit_issue),
        route("GET", ISSUES + "/{number}/comments", _comments),
        route("POST", ISSUES + "/{number}/comments", _post_comment),
    ]


def _areas(found: Issue | Pull) -> tuple[str, ...]:
    return AREAS if isinstance(found, Pull) else ("issues",)


def _checked(text: str) -> str:
    if len(text) > LONGEST_BODY:
        raise Refused(422, f"Validation Failed: body is too long (maximum is {LONGEST_BODY} characters)")
    return text


def _issues(world: GitHubWorld, call: Call, **_: str) -> Answer:
    state, labels, creator = call.first("state", "open"), call.first("labels"), call.first("creator")
    wanted = set(filter(None, labels.split(",")))
    rows: list[Issue | Pull] = sorted([*world.issues.values(), *world.pulls.values()], key=lambda row: -row.number)
    shown = [
        issue_body(world, row)
        for row in rows
        if state in ("all", "open" if row.open else "closed")
        and wanted <= set(row.labels if isinstance(row, Issue) else [])
        and creator in ("", row.author)
    ]
    return page(world, call, shown)


def _open_issue(world: GitHubWorld, call: Call, **_: str) -> Answer:
    login = world.need(call, "write", "issues", rank="read")
    body, number = call.json(), world.next_number()
    named = [label if isinstance(label, str) else label["name"] for label in body.get("labels", [])]
    issue = Issue(number, str(body["title"]), _checked(body.get("body") or ""), login, named, world.clock())
    world.issues[number] = issue
    return json_answer(issue_body(world, issue), 201)


def _issue(world: GitHubWorld, call: Call, number: str, **_: str) -> Answer:
    return json_answer(issue_body(world, world.conversation(number)))


def _edit_issue(world: GitHubWorld, call: Call, number: str, **_: str) -> Answer:
    found = world.conversation(number)
    world.need(call, "write", *_areas(found))
    body = call.json()
    found.title = str(body.get("title", found.title))
    found.body = _checked(body.get("body", found.body) or "")
    found.open = body.get("state", "open" if found.open else "closed") == "open"
    return json_answer(issue_body(world, found))


def _comments(world: GitHubWorld, call: Call, number: str, **_: str) -> Answer:
    found = world.conversation(number)
    rows = [comment for comment in world.comments.values() if comment.number == found.number]
    return page(world, call, [comment_body(world, comment) for comment in sorted(rows, key=lambda row: row.id)])


def _post_comment(world: GitHubWorld, call: Call, number: str, **_: str) -> Answer:
    found = world.conversation(number)
    login = world.need(call, "write", *_areas(found), rank="read")
    # What a lock leaves: people with write access. An Actions token is not one of them.
    if found.locked and (login == BOT or RANKS.index(world.people.get(login, "none")) < RANKS.index("write")):
        raise Refused(403, "Unable to create comment because issue is locked.")
    now = world.clock()
    comment = Comment(world.new_id(), found.number, login, _checked(call.json()["body"]), now, now)
    world.comments[comment.id] = comment
    return json_answer(comment_body(world, comment), 201)


def _comment(world: GitHubWorld, call: Call, comment_id: str, **_: str) -> Answer:
    return json_answer(comment_body(world, world.comment(comment_id)))


def _edit_comment(world: GitHubWorld, call: Call, comment_id: str, **_: str) -> Answer:
    comment = world.comment(comment_id)
    world.need(call, "write", *_areas(world.conversation(comment.number)))
    comment.body, comment.updated_at = _checked(call.json()["body"]), world.clock()
    comment.edits += 1
    return json_answer(comment_body(world, comment))


def _delete_comment(world: GitHubWorld, call: Call, comment_id: str, **_: str) -> Answer:
    comment = world.comment(comment_id)
    world.need(call, "write", *_areas(world.conversation(comment.number)))
    del world.comments[comment.id]
    return Answer(204)


def _reactions(world: GitHubWorld, call: Call, comment_id: str, **_: str) -> Answer:
    rows = [reaction for reaction in world.reactions if reaction.comment_id == world.comment(comment_id).id]
    return page(world, call, [reaction_body(world, reaction) for reaction in rows])


def _react(world: GitHubWorld, call: Call, comment_id: str, **_: str) -> Answer:
    comment = world.comment(comment_id)
    login = world.need(call, "write", *_areas(world.conversation(comment.number)), rank="read")
    content = call.json()["content"]
    for known in world.reactions:
        if (known.comment_id, known.content, known.user) == (comment.id, content, login):
            return json_answer(reaction_body(world, known))
    reaction = Reaction(world.new_id(), comment.id, content, login, world.clock())
    world.reactions.append(reaction)
    return json_answer(reaction_body(world, reaction), 201)

"""Hand a locally trained adapter to the chain: claim the train stage as a job does, upload, manifest last.

Claim and fence are one commit: there is no job between them that could lose. Who is killed anywhere and runs it again
with the same adapter goes on, because the claim's name is drawn from the adapter's own hashes; another adapter finds
the stage taken.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pipeline.actions import Seen, Submit
from pipeline.adapter_folder import Adapter, files_digest, read_adapter
from pipeline.errors import UserError
from pipeline.hub_facts import Access, HubError
from pipeline.launch import Elsewhere, Order, claim_stage, open_repo, taken_by_another
from pipeline.plan import Plan, StageName
from pipeline.remote import LOCAL, MANIFEST, WINNER, Claim, StageView, Winner, as_json, stage_folder
from pipeline.run_verbs import find_run
from pipeline.stopping import CAS_TRIES
from pipeline.world import World

TRAIN = StageName.TRAIN


@dataclass(frozen=True)
class Offer:
    """An adapter and the stage it is for. `done`: it is there already."""

    plan: Plan
    adapter: Adapter
    view: StageView
    attempt: int
    done: bool = False

    @property
    def repo(self) -> str:
        """Where it goes."""
        return self.plan.repo(TRAIN)

    @property
    def folder(self) -> str:
        """Where its claim and its manifest stand in there."""
        return stage_folder(self.plan.run_id, TRAIN)

    @property
    def name(self) -> str:
        """What takes the place of a job's id: the same for the same adapter."""
        return f"{LOCAL}{self.adapter.digest[:16]}"

    @property
    def mine(self) -> Winner:
        """The fence as this adapter shuts it."""
        return Winner(self.attempt, self.name)


def offer_adapter(world: World, name: str, folder: Path) -> Offer:
    """Look whether the adapter in `folder` can be handed in for the experiment `name`. Changes nothing.

    Raises:
        UserError: no such run, not trained on a Mac, closed, another adapter's, or the folder is not its adapter.
        HubError: the Hub could not be asked.
    """
    run, book = find_run(world, name), world.book.read_book()
    plan = run.plan()
    if not plan.stages[0].flavor.local:
        message = f"`{run.name}` is trained by a job: its file does not say `backend: mlx`"
        hint = f"write `backend: mlx` under `train` in experiments/{run.name}.yaml, in a pull request"
        raise UserError(message, hint)
    if not book.is_open(run.run_id):
        last = book.rounds[run.run_id][-1]
        raise UserError(f"`{run.run_id}` is closed: {last.text}", f"`mergetune retry {run.name}` opens it again")
    adapter = read_adapter(folder, plan)
    view = world.remote.view(plan.repo(TRAIN), stage_folder(plan.run_id, TRAIN))
    closed = book.closed_attempts(run.run_id).get(TRAIN, 0)
    offer = Offer(plan, adapter, view, max(view.attempt, closed + 1))
    if not _is_there(plan, view):
        return offer
    if files_digest(view.manifest) != adapter.digest:
        message = f"`{offer.repo}` holds another adapter of `{plan.run_id}`: the stage is done"
        raise UserError(message, "a change to the experiment is a new run, with an adapter of its own")
    return replace(offer, done=True)


def hand_in(world: World, offer: Offer, trained_by: str, machine: Mapping[str, str]) -> None:
    """Claim the stage, upload the adapter, write its manifest last.

    Raises:
        UserError: somebody else's adapter, or a cancel, came first.
        HubError: the Hub refused, or did not answer; running it again goes on.
    """
    order = _order(world, offer)
    view = open_repo(world.remote, order)
    if view.winner != offer.mine:
        if taken := taken_by_another(view, order, world.clock.now(), world.limits):
            _refuse(offer, taken.why)
        claim = Claim(offer.attempt, world.clock.now(), offer.name, 1, offer.name)
        claimed = claim_stage(world.remote, world.clock, order, view, claim, world.limits)
        if isinstance(claimed, Elsewhere):
            _refuse(offer, claimed.why)
    _commit(world, offer, f"train of {offer.plan.run_id}: adapter trained on a Mac", offer.adapter.files)
    manifest = as_json(_manifest(world, offer, order, trained_by, machine))
    names = (f"{offer.folder}/{MANIFEST}", MANIFEST)
    _commit(world, offer, f"train of {offer.plan.run_id}: manifest", dict.fromkeys(names, manifest))


def _order(world: World, offer: Offer) -> Order:
    """The claim as a job has it, with script, request and inputs, and the fence beside it."""
    # Later stages take the commits that the training read, not those that the names lead to by now.
    trained_from = replace(offer.view, request={"inputs": offer.adapter.manifest.get("inputs")})
    seen = Seen({TRAIN: trained_from})
    order = world.order(offer.plan, Submit(offer.plan.stages[0], offer.attempt), seen, offer.attempt)
    fence = as_json({"attempt": offer.attempt, "job_id": offer.name})
    return replace(order, by=offer.name, files={**order.files, WINNER: fence})


def _manifest(world: World, offer: Offer, order: Order, trained_by: str, machine: Mapping[str, str]) -> dict[str, Any]:
    """The training's own manifest, with the inputs as the claim says them (no folder of this machine) and by whom."""
    said = offer.adapter.manifest
    request = _request(order)
    handed_in = datetime.fromtimestamp(world.clock.now(), UTC).isoformat(timespec="seconds")
    provenance = {
        **request.get("provenance", {}),
        "trained_by": trained_by,
        "trained_at": said.get("finished_at"),
        "handed_in_at": handed_in,
        "versions": said.get("versions", {}),
        **machine,
    }
    return {
        **said,
        "attempt": offer.attempt,
        "inputs": request.get("inputs", {}),
        "trained_on": _without_folder(offer.plan, said.get("trained_on")),
        "job_id": offer.name,
        "provenance": provenance,
    }


def _without_folder(plan: Plan, trained_on: Any) -> Any:
    """`trained_on` with the path as the experiment writes it."""
    if not isinstance(trained_on, dict) or "path" not in trained_on:
        return trained_on
    mlx = plan.experiment.train.mlx
    return {**trained_on, "path": (mlx and mlx.base) or plan.experiment.base.model}


def _request(order: Order) -> dict[str, Any]:
    content = order.files["run.json"]
    assert isinstance(content, bytes)
    request: dict[str, Any] = json.loads(content)
    return request


def _commit(world: World, offer: Offer, message: str, files: Mapping[str, bytes | Path]) -> None:
    """One commit by whoever holds the fence. Asked again after a lost answer: the same files twice are one change."""
    for _ in range(CAS_TRIES):
        view = world.remote.view(offer.repo, offer.folder)
        if view.head is None or view.winner != offer.mine:
            _refuse(offer, "it was cancelled")
        if _is_there(offer.plan, view):
            return
        try:
            world.remote.commit(offer.repo, str(view.head), message, files)
            return
        except HubError as error:
            if error.access not in (Access.MOVED, Access.UNREACHABLE):
                raise
        world.clock.sleep(1)
    raise HubError(Access.UNREACHABLE, f"`{offer.repo}` took no commit in {CAS_TRIES} tries")


def _is_there(plan: Plan, view: StageView) -> bool:
    return bool(view.manifest and view.manifest.get("run_id") == plan.run_id)


def _refuse(offer: Offer, why: str) -> NoReturn:
    name = offer.plan.experiment.name
    message = f"the train stage of `{offer.plan.run_id}` is not this adapter's: {why}"
    raise UserError(message, f"to start over: `mergetune cancel {name}`, then `mergetune retry {name}`")

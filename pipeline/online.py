"""What the Hub adds to the facts of a check: its answers, and the files of bases and datasets. Judges nothing."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pipeline.cost import finished_run
from pipeline.dataset import can_read
from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.facts import FinishedRun, FromHub
from pipeline.fields import is_path
from pipeline.hub_facts import Access, Fetched, HubFacts, Probe, SourceFacts, planned_repos
from pipeline.hub_files import fetch_base_files, fetch_dataset_files
from pipeline.hub_look import Interview, fetch_hub_facts
from pipeline.repository import Repository

ENDPOINT = "https://huggingface.co"


@dataclass
class Online:
    """One check's look at the Hub: nothing is asked or fetched twice. `notes` say what could not be read, and why."""

    interview: Interview
    cache: Path
    launches: bool = True
    finished: tuple[FinishedRun, ...] = ()
    notes: list[str] = field(default_factory=list)
    fetched: dict[tuple[str, ...], Fetched] = field(default_factory=dict)

    def look(self, experiment: Experiment, now: datetime) -> tuple[HubFacts, FromHub]:
        """The Hub's answers about an experiment, and its base's and dataset's files where they can be read."""
        repos = planned_repos(experiment)
        hub = fetch_hub_facts(experiment, repos, self.interview, now, launches=self.launches)
        base, data = experiment.base.model, experiment.data
        split = data.eval.split if data.eval else None
        found = None if is_path(base) else self._base(base, hub)
        if is_path(data.dataset):
            return hub, FromHub(found)
        rows = self._rows(experiment, data.split, hub)
        return hub, FromHub(found, rows, self._rows(experiment, split, hub) if split and rows else ())

    def _base(self, repo: str, hub: HubFacts) -> Path | None:
        commit = self._commit(repo, hub.base, hub)
        if commit is None:
            return None
        if ("base", repo, commit) not in self.fetched:
            got = _tried(lambda: fetch_base_files(self.interview.hub, repo, commit, self.cache))
            self.fetched["base", repo, commit] = got
        got = self.fetched["base", repo, commit]
        if got.folder is None:
            self._note(repo, got.probe.detail)
        return got.folder

    def _rows(self, experiment: Experiment, split: str, hub: HubFacts) -> tuple[Path, ...]:
        repo, subset = experiment.data.dataset, experiment.data.subset
        commit = self._commit(repo, hub.dataset, hub)
        if commit is None:
            return ()
        key = ("data", repo, commit, split, subset or "")
        if key not in self.fetched:
            client, cache = self.interview.hub, self.cache
            self.fetched[key] = _tried(lambda: fetch_dataset_files(client, repo, commit, split, subset, cache))
        got = self.fetched[key]
        files = tuple(file for file in got.files if can_read(file))
        if not files:
            self._note(repo, got.probe.detail or "its files are Parquet, and `pyarrow` is not installed")
        return files

    def _commit(self, repo: str, source: SourceFacts | None, hub: HubFacts) -> str | None:
        """The commit to fetch from; without one, a note says what was in the way."""
        if source is not None and source.sha is not None and not self.interview.silence:
            return source.sha
        if source is None:
            why = f"the token is refused ({hub.token.probe.detail})"
        else:
            why = source.probe.detail or str(source.probe.access)
        self._note(repo, self.interview.silence or why)
        return None

    def _note(self, repo: str, why: str) -> None:
        note = f"the files of `{repo}` were not read: {why}"
        if note not in self.notes:
            self.notes.append(note)


def go_online(
    environment: Mapping[str, str], endpoint: str | None = None, read_only: bool = False, root: Path | None = None
) -> Online:
    """Open the Hub as the environment says, and the book of finished runs of the repository at `root`.

    `HF_TOKEN` launches. `HF_READ_TOKEN` alone, or `read_only`, looks for a reviewer: what a launch needs is not asked.
    """
    from pipeline.hub import open_hub

    launch, reader = environment.get("HF_TOKEN"), environment.get("HF_READ_TOKEN")
    read_only = read_only or bool(reader and not launch)
    hub = open_hub(endpoint or environment.get("HF_ENDPOINT") or ENDPOINT, (reader or launch) if read_only else launch)
    finished, note = read_finished(root) if root else ((), "")
    notes = [note] if note else []
    return Online(Interview(hub), cache_folder(environment), not read_only, finished, notes)


def read_finished(root: Path) -> tuple[tuple[FinishedRun, ...], str]:
    """How long the finished runs of this repository took, from the tags of its remote; and a note where they tell none.

    An estimate is better with them and as honest without: nothing fails here.
    """
    if not (root / ".git").exists():
        return (), ""
    try:
        closed = Repository(root).read_book().closed
    except UserError as error:
        return (), f"finished runs do not correct the estimates: {error.message}"
    stages = [(name, said) for run in closed for name, said in dict(run.summary.get("stages") or {}).items()]
    runs = (finished_run({**said, "stage": name}) for name, said in stages if isinstance(said, dict))
    return tuple(run for run in runs if run is not None), ""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where files of the Hub are kept, by commit. Any of it may be deleted at any time."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergetune/hub"


def _tried(fetch: Callable[[], Fetched]) -> Fetched:
    try:
        return fetch()
    except OSError as error:  # a full disk, a cache that may not be written
        return Fetched(Probe(Access.REFUSED, f"they could not be kept in the cache: {error}"))

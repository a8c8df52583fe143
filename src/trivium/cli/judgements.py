"""The verbs that keep the judgements: `people` for who may give them, `database` for what they are kept in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trivium.cli.options import PlaceOptions, parse
from trivium.config import ConfigError, suggest


@dataclass(frozen=True, kw_only=True)
class DatabaseOptions(PlaceOptions):
    """Which database is meant."""

    database: str = ""
    """A file, or postgresql://user@host/name; by default preferences.db of the workspace."""

    def location(self) -> str | Path:
        """Return where it is."""
        return self.database or self.place() / "preferences.db"


@dataclass(frozen=True, kw_only=True)
class NameOptions(DatabaseOptions):
    """What `people revoke` understands."""

    name: Annotated[str, tyro.conf.Positional]
    """Who."""


@dataclass(frozen=True, kw_only=True)
class InviteOptions(NameOptions):
    """What `people invite` understands."""

    role: Literal["annotator", "lead", "admin"] = "annotator"
    """`annotator` ranks and writes; `lead` sees the review too; `admin` is there for what comes."""
    url: str = "http://127.0.0.1:8765"
    """The address under which people reach the page."""
    valid_days: float = 7.0
    """After how many days the link opens nothing any more."""


@dataclass(frozen=True, kw_only=True)
class FileOptions(DatabaseOptions):
    """What `database backup`, `restore` and `export` understand."""

    file: Annotated[Path, tyro.conf.Positional]
    """The file that is written, or read."""
    collection: str | None = None
    """Export the judgements of this collection alone."""
    schema: Literal["rankings", "pairs", "unpaired"] = "rankings"
    """Export whole `rankings`, `pairs` (prompt, chosen, rejected), or `unpaired` labels (KTO)."""


@dataclass(frozen=True, kw_only=True)
class PriorityOptions(DatabaseOptions):
    """What `database prioritise` understands."""

    model: str = "reward_model@latest"
    """The reward model: a run of the workspace, or the path of a Hugging Face folder."""
    collection: str | None = None
    """Order the tasks of this collection alone."""


@dataclass(frozen=True, kw_only=True)
class VersionOptions(DatabaseOptions):
    """What `database downgrade` understands."""

    version: Annotated[int, tyro.conf.Positional]
    """The schema to go back to."""


def run(verb: str, words: Sequence[str]) -> int:
    """Run `people` or `database` with the words after it."""
    actions = ACTIONS[verb]
    if not words or words[0] not in actions:
        if words[:1] in (["--help"], ["-h"]):
            print(f"usage: trivium {verb} {{{', '.join(actions)}}} [OPTIONS]      (each has its own --help)")
            return 0
        meant = f"no {words[0]!r}{suggest(words[0], tuple(actions))}" if words else "what is to be done is missing"
        raise ConfigError(f"trivium {verb}: {meant}; there are {', '.join(actions)}")
    return actions[words[0]](words[1:])


def _invite(words: Sequence[str]) -> int:
    options = parse(InviteOptions, "people invite", words, "Make a link that opens an account, once.")
    from trivium.preferences.store import People, Store

    if options.valid_days <= 0:
        raise ConfigError(f"--valid-days {options.valid_days}: must be above 0")
    with Store(options.location()) as store:
        token = People(store).invite(options.name, options.role, valid_s=options.valid_days * 86_400)
    print(f"{options.url.rstrip('/')}/#invitation={token}")
    print(f"for {options.name} alone: it signs in whoever opens it first, within {options.valid_days:g} days")
    return 0


def _list(words: Sequence[str]) -> int:
    options = parse(DatabaseOptions, "people list", words, "Show who has an account.")
    from trivium.preferences.store import People, Store

    with Store(options.location(), create=False) as store:
        found = People(store).all()
    for person in found:
        state = "revoked" if person.revoked else "signed in" if person.signed_in else "not signed in"
        print(f"{person.name:<30} {person.role:<10} {state}")
    if not found:
        print("nobody yet; `trivium people invite NAME` makes a link")
    return 0


def _revoke(words: Sequence[str]) -> int:
    options = parse(NameOptions, "people revoke", words, "Shut somebody out at once; what they judged stays.")
    from trivium.preferences.store import People, Store

    with Store(options.location(), create=False) as store:
        People(store).revoke(options.name)
    print(f"{options.name} is signed out and cannot come back; their judgements stay")
    return 0


def _backup(words: Sequence[str]) -> int:
    options = parse(FileOptions, "database backup", words, "Write a whole copy, also while people rank.")
    from trivium.preferences.store import versions

    versions.backup(options.location(), options.file)
    print(f"written to {options.file}")
    return 0


def _restore(words: Sequence[str]) -> int:
    options = parse(FileOptions, "database restore", words, "Put a backup in the place of the database.")
    from trivium.preferences.store import versions

    kept = versions.restore(options.file, options.location())
    print(f"restored from {options.file}" + (f"; what was there is now {kept}" if kept else ""))
    return 0


def _export(words: Sequence[str]) -> int:
    options = parse(FileOptions, "database export", words, "Write the rankings as JSON Lines.")
    from trivium.preferences.store import Store

    with Store(options.location(), create=False) as store:
        number = store.export_jsonl(options.file, options.collection, schema=options.schema)
    print(f"{number} lines written to {options.file}")
    return 0


def _prioritise(words: Sequence[str]) -> int:
    options = parse(PriorityOptions, "database prioritise", words, "Ask first what a reward model is least sure of.")
    from trivium.preferences.store import Store
    from trivium.rewards.learned import LearnedReward
    from trivium.rewards.uncertainty import uncertainties
    from trivium.runs.registry import resolve

    place = options.place()
    found = resolve(place, options.model, base=Path.cwd())
    folder = Path(found) if os.sep in found else place / found.rsplit("-", 1)[0] / found / "model"
    with Store(options.location(), create=False) as store:
        open_ = [t for t in store.tasks(options.collection) if t.purpose == "rank" and t.judgements < t.overlap]
        prompts = store.prompts(task.prompt_id for task in open_)
        completions = store.completions(name for task in open_ for name in task.completion_ids)
        asked = [(prompts[task.prompt_id], [completions[name] for name in task.completion_ids]) for task in open_]
        unsure = uncertainties(LearnedReward.from_folder(folder), asked)
        store.set_priorities({task.id: value for task, value in zip(open_, unsure, strict=True)})
    print(f"{len(open_)} open tasks are now asked in the order of what {options.model} is least sure of")
    return 0


def _upgrade(words: Sequence[str]) -> int:
    options = parse(DatabaseOptions, "database upgrade", words, "Bring the schema up to this version of Trivium.")
    from trivium.preferences.store import Store, schema

    with Store(options.location(), create=False) as store:
        print(f"{store.name} has schema {schema.SCHEMA_VERSION}")
    return 0


def _downgrade(words: Sequence[str]) -> int:
    options = parse(VersionOptions, "database downgrade", words, "Go back to the schema of an earlier Trivium.")
    from trivium.preferences.store import versions

    versions.downgrade(options.location(), options.version)
    print(f"schema {options.version}; the next command of this version of Trivium would bring it up again")
    return 0


ACTIONS: dict[str, dict[str, Callable[[Sequence[str]], int]]] = {
    "people": {"invite": _invite, "list": _list, "revoke": _revoke},
    "database": {
        "backup": _backup,
        "restore": _restore,
        "export": _export,
        "prioritise": _prioritise,
        "upgrade": _upgrade,
        "downgrade": _downgrade,
    },
}
"""What each verb can do."""

"""`graphopt tune --list`, `--export`, `--import`, `--merge` and `--prune`: what is done with a store of records."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.tools.table import format_table, wants_text, write_json

if TYPE_CHECKING:
    from graphopt.backends.tuner.record import Record
    from graphopt.backends.tuner.store import Change, Store

MOST_DAYS = 36500
ACTIONS = ("list", "export", "imported", "merge", "prune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the store")
    only = group.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print all records, those that ship with graphopt too")
    only.add_argument("--export", metavar="FILE", help="write all records to one file, a line of JSON each")
    only.add_argument("--import", dest="imported", metavar="FILE", help="add the records of an exported file")
    only.add_argument("--merge", metavar="STORE", help="add the records of another store, a folder")
    help = "keep the best record of each workload and hardware, and drop damaged lines"
    only.add_argument("--prune", action="store_true", help=help)
    help = "with --prune: also drop what was measured more than DAYS ago"
    group.add_argument("--older-than", metavar="DAYS", type=float, help=help)
    help = "with --prune: also drop what was measured on these devices, as --list names them"
    group.add_argument("--device", metavar="NAME", nargs="+", help=help)
    help = "the store's folder instead of the user's, $XDG_CACHE_HOME/graphopt/tuning or ~/.cache/graphopt/tuning"
    group.add_argument("--store", metavar="DIR", help=help)


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    from graphopt.backends.tuner.store import Store

    adds = arguments.imported is not None or arguments.merge is not None
    store = Store.user() if arguments.store is None else open_store(arguments.store, new=adds)
    result, text = act(store, arguments)
    write_json(arguments, {"store": str(store.path), **result})
    if wants_text(arguments):
        print(text)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for options that do not go together."""
    if not any(getattr(arguments, name) not in (None, False) for name in ACTIONS):
        raise UsageError("nothing to do; give MODEL, or one of --list, --export, --import, --merge, --prune")
    for option, value in (("--older-than", arguments.older_than), ("--device", arguments.device)):
        if value is not None and not arguments.prune:
            raise UsageError(f"{option} has no effect without --prune; add that or leave it out")
    if arguments.older_than is not None and not 0 <= arguments.older_than <= MOST_DAYS:
        raise UsageError(f"--older-than is {arguments.older_than:g}; give a number of days from 0 to {MOST_DAYS}")


def check_unused(arguments: argparse.Namespace) -> None:
    """Raises UsageError for what is done with a store where a model is tuned."""
    names = dict(zip(ACTIONS, ("list", "export", "import", "merge", "prune"), strict=True))
    for name, option in (*names.items(), ("older_than", "older-than"), ("device", "device")):
        if getattr(arguments, name) not in (None, False):
            raise UsageError(f"--{option} has no effect with MODEL; leave one of the two out")


def open_store(folder: str, *, new: bool = False) -> Store:
    """The store in this folder. Raises UsageError where there is none, unless it may be new."""
    from graphopt.backends.tuner.store import NAME, Store

    if not new and not os.path.exists(os.path.join(folder, NAME)):
        raise UsageError(f"there is no store in {folder}; name a folder that has a file {NAME}")
    return Store(folder)


def act(store: Store, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Do it; returns what --json says and what is printed."""
    if arguments.list:
        return describe(store)
    if arguments.export is not None:
        change = store.export(arguments.export)
        return told("written", change), f"wrote {counted(change)} to {arguments.export}"
    if arguments.prune:
        before = None if arguments.older_than is None else datetime.now(UTC) - timedelta(days=arguments.older_than)
        change = store.prune(before=before, devices=arguments.device or ())
        return told("removed", change), f"removed {counted(change)} from {store.path}"
    change = store.import_(arguments.imported) if arguments.merge is None else store.merge(open_store(arguments.merge))
    return told("added", change), f"added {counted(change)} to {store.path}"


def told(done: str, change: Change) -> dict[str, Any]:
    return {done: change.records, "damaged": change.damaged}


def counted(change: Change) -> str:
    """As "3 records (1 damaged line left out)"."""
    damage = f" ({plural(change.damaged, 'damaged line')} left out)" if change.damaged else ""
    return plural(change.records, "record") + damage


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def describe(store: Store) -> tuple[dict[str, Any], str]:
    """All records, the store's own first."""
    own, shipped = store.records(), store.shipped.records
    result = {
        "damaged": store.damaged,
        "records": [
            record.to_json() | {"shipped": is_shipped}
            for records, is_shipped in ((own, False), (shipped, True))
            for record in records
        ],
    }
    table = format_table([*(row(record, "here") for record in own), *(row(record, "graphopt") for record in shipped)])
    summary = f"{plural(len(own), 'record')} in {store.path}, {len(shipped)} ship with graphopt"
    damage = f"; {plural(store.damaged, 'damaged line')}, dropped by --prune" if store.damaged else ""
    return result, f"{table}\n\n{summary}{damage}"


def row(record: Record, origin: str) -> dict[str, Any]:
    return {
        "workload": str(record.workload),
        "configuration": " ".join(f"{name}={value}" for name, value in record.configuration.items()),
        "us": record.seconds * 1e6,
        "default us": record.default_seconds * 1e6,
        "target": record.hardware.target,
        "threads": record.hardware.threads,
        "device": record.provenance["device"],
        "date": record.date.date().isoformat(),
        "from": origin,
    }

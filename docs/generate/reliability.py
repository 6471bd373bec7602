"""Tables of interrupted runs, of the service, and of intervals, from the recorded results."""

from __future__ import annotations

from typing import Any

from generate.results import as_table, figures

_COPIES = ("first", "unchanged", "fetch")


def intervals() -> str:
    """Share of simulated runs in which each kind of 95 % interval holds the truth."""
    summary = figures("intervals")["summary"]
    methods = list(next(iter(summary.values())))
    rows = [
        [documents, *(f"{row[name]['mean']:.1%} ({row[name]['least']:.1%} in the worst case)" for name in methods)]
        for documents, row in summary.items()
    ]
    return as_table(["documents", *methods], rows)


def service() -> str:
    """Kills of the service at random moments, and answer times with many jobs in the table."""
    scale = figures("service-scale")
    kills = [
        _kills("Real runs, SQLite", figures("service-kills")),
        _kills("Runs without work, SQLite", figures("service-kills-sqlite")),
        _kills("Runs without work, PostgreSQL", figures("service-kills-postgresql")),
    ]
    asked = f"{scale['jobs_in_table']:,} jobs in the table, {scale['live_jobs']:,} of them live, {scale['users']} users"
    sqlite, postgresql = scale["sqlite"]["together"], scale["postgresql"]["together"]
    rows = [[name.replace("_", " "), _times(sqlite[name]), _times(postgresql[name])] for name in sqlite]
    rows.append(["all lists", _times(scale["sqlite"]["all_lists"]), _times(scale["postgresql"]["all_lists"])])
    table = as_table(["request", "SQLite", "PostgreSQL"], rows)
    how = " The service had real-time priority on a machine that was busy." if scale["real_time_priority"] else ""
    return "\n".join(kills) + f"\n\nMedian and 99th percentile with {asked}, all at once.{how}\n\n{table}"


def _kills(name: str, kills: dict[str, Any]) -> str:
    """Line of a list about one series of kills."""
    ended = ", ".join(f"{count} {state}" for state, count in kills["ended"].items())
    return (
        f"- {name}: {len(kills['kills'])} kills in {kills['seconds']} s, {kills['jobs']} jobs, {ended}; at most "
        f"{kills['most_keepers_of_a_job_at_once']} process group ran a job at a time."
    )


def _times(one: dict[str, float]) -> str:
    return f"{one['median_ms']:,} / {one['p99_ms']:,} ms"


def nodes() -> str:
    """The loss of a Ray node in the middle of a run, and what copies of a run folder cost."""
    found = figures("service-nodes")
    rows = [
        [
            way,
            f"{one['seconds_to_detection']} s",
            f"{one['seconds_to_continuation']} s",
            f"{one['killed_after_layers']}, {one['continued_after_layers']}",
            "identical" if one["identical"] else "different",
        ]
        for way, one in found["lost"].items()
    ]
    lost = as_table(["files in a", "death seen after", "continued after", "layers done before, after", "result"], rows)
    costs = [
        [
            name,
            f"{one['files']}",
            f"{one['bytes'] / 1e6:.1f} MB",
            *(f"{one[f'{step}_seconds']:.2f} s" for step in _COPIES),
        ]
        for name, one in found["artefacts"].items()
    ]
    copies = as_table(["copy to a", "files", "bytes", "first", "nothing changed", "back"], costs)
    return (
        f"Measured by killing a node of a local cluster in pass 2 of a tiny model of {found['layers']} layers, with "
        f"health checks every half second:\n\n{lost}\n\nCopies of its finished run folder:\n\n{copies}"
    )


def faults() -> str:
    """Kills of a run at random moments, and a full disk."""
    kills, disk = figures("faults-kill"), figures("faults-disk")
    equal = "all weights equal those of the uninterrupted run" if kills["all_equal"] else "the weights differ"
    return (
        f"- {len(kills['kills'])} kills at random moments, each followed by the same command: {equal}.\n"
        f"- A full disk: exit code {disk['exit_code']}, {'a' if disk['half_model'] else 'no'} half-written model; "
        f"continued after space was freed, with {'equal' if disk['equal'] else 'different'} weights."
    )

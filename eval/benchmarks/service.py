"""The service under kills, under load, with many jobs, and on several machines.

    python eval/benchmarks/service.py kills [--times 50] [--database sqlite|postgresql] [--fake] [--pause 24]
    python eval/benchmarks/service.py load
    python eval/benchmarks/service.py scale [--databases sqlite,postgresql] [--seconds 60] [--jobs 100000]
    python eval/benchmarks/service.py nodes      (needs ray and moto)

Each starts ``llmprune serve`` in processes of its own and writes what it saw, with the machine,
into eval/benchmarks/results/service-WHAT.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from service_kills import measure_kills  # after the path: both use the tests' helpers
from service_load import measure_load
from service_nodes import measure_nodes
from service_scale import IN_TABLE, measure_scale


def main() -> None:
    """Do one of them in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "load", "scale", "nodes"])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--fake", action="store_true", help="jobs that do no work")
    parser.add_argument("--pause", type=float, default=24.0, help="longest pause before a kill, in seconds")
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=IN_TABLE)
    arguments = parser.parse_args()
    measures = {"kills": measure_kills, "load": measure_load, "scale": measure_scale, "nodes": measure_nodes}
    with tempfile.TemporaryDirectory() as folder:
        measures[arguments.what](Path(folder), arguments)


if __name__ == "__main__":
    main()

"""The service under kills and under load.

    python eval/benchmarks/service.py kills [--times 20]
    python eval/benchmarks/service.py load

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


def main() -> None:
    """Do one of them in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "load"])
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    measures = {"kills": measure_kills, "load": measure_load}
    with tempfile.TemporaryDirectory() as folder:
        measures[arguments.what](Path(folder), arguments)


if __name__ == "__main__":
    main()

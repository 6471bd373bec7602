"""Parent process of one attempt: waits for the command and writes its exit code to a file.

    python -m llmprune.service.supervisor.job_runner EXIT_FILE LEASE_DESCRIPTOR COMMAND…

It outlives the service and the supervisor. It holds the lease, a lock that the kernel releases when this process ends,
however it ends. Signals to end reach the whole process group; this process ignores them until the command is done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from llmprune.service.memory import let_kernel_end_first


def main(arguments: list[str]) -> None:
    """Run the command, then write its exit code; on a full disk, as soon as there is space."""
    exit_file, _lease, *command = arguments
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN, not inherited by the command
    let_kernel_end_first()
    try:
        code = subprocess.call(command)
    except OSError as error:
        print(f"llmprune: {command[0]} cannot be started: {error}", file=sys.stderr)
        code = 1
    while not _write(exit_file, code):
        time.sleep(1)


def _write(path: str, code: int) -> bool:
    """Write the code; return False where the disk does not allow it."""
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="ascii") as file:
            file.write(f"{code}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])

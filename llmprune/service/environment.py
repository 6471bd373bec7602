"""Environment of jobs and of the planner: without the operator's credentials, with one hub cache for each token.

    python -m llmprune.service.environment --keep-hub|--drop-hub NAME=VALUE… -- COMMAND…

The hub's client reads a full commit hash from its cache without asking the hub. A job that can read a cache can
therefore read every private repository that was ever pulled into it. So each token has a cache of its own:

- A job without a token uses the service's ``hub-home``, for what anybody may pull.
- A job with a token of its own uses ``hub-home`` in the job's folder, which is deleted with the token.
- The operator's token and cache are used only with ``llmprune serve --lend-hub-token``.

The command applies the same rules on another machine, to the environment of that machine.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

_CREDENTIAL = re.compile(
    r"TOKEN(?!IZER)|SECRET|CREDENTIAL|PASSW|PASSPHRASE|PASSFILE|ASKPASS|APIKEY"
    r"|(?:^|_)(?:KEYS?|PASS|PAT|AUTH|OAUTH|OIDC|JWT|BEARER|COOKIES?|DSN)(?:_|$)|.(?<!OLD)PWD$"
    r"|^(?:AWS|AZURE|GOOGLE|GCP|GCLOUD|CLOUDSDK|OCI|FSSPEC|VAULT|GIT_CONFIG|KUBECONFIG|NETRC)(?:_|$)"
)
# With HUGGINGFACE_CO_STAGING the client ignores HF_HOME, so all variables of the family are checked.
_HUB = re.compile(r"^(?:HF|HUGGING_?FACE|TRANSFORMERS|PYTORCH_TRANSFORMERS|PYTORCH_PRETRAINED_BERT|LM_HARNESS)_")
_HUB_PLACE = re.compile(r"^HUGGING|CACHE|HOME|PATH|_DIR|LOG_DEST")
_SECRET_VALUE = re.compile(r"://[^/\s@]*@|\bhf_(?:[a-z]+_)?[A-Za-z0-9]{20,}")
_ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # may contain a user and password


def inherited(environment: Mapping[str, str], keep_hub: bool) -> dict[str, str]:
    """Return the variables that a job may have; with ``keep_hub`` also the tokens and caches of the hub."""
    return {name: value for name, value in environment.items() if _may_pass(name.upper(), value, keep_hub=keep_hub)}


def hub_variables(home: Path) -> dict[str, str]:
    """Return the variables that make ``home`` the only source of hub tokens and caches."""
    return {
        "HF_HOME": str(home.absolute()),
        "NETRC": os.devnull,
        "FSSPEC_CONFIG_DIR": str(home.absolute() / "fsspec"),
    }


def _may_pass(name: str, value: str, *, keep_hub: bool) -> bool:
    if _HUB.match(name) and name != "HF_ENDPOINT":
        secret = _CREDENTIAL.search(name) or _HUB_PLACE.search(name) or _SECRET_VALUE.search(value)
        return keep_hub or not secret
    return not _CREDENTIAL.search(name) and (name in _ADDRESSES or not _SECRET_VALUE.search(value))


def main(arguments: list[str]) -> None:
    """Replace this process by the command, with the variables that may pass and the given ones."""
    end = arguments.index("--")
    given = dict(assignment.split("=", 1) for assignment in arguments[1:end])
    command = arguments[end + 1 :]
    os.execvpe(command[0], command, inherited(os.environ, arguments[0] == "--keep-hub") | given)


if __name__ == "__main__":
    main(sys.argv[1:])

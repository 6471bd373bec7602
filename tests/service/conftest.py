"""Fixtures of the sign-in at an OpenID provider, whose libraries are imported only where a test asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.openid_provider import OpenIDProvider
    from helpers.sign_in import Door


@pytest.fixture(scope="module")
def idp() -> Iterator[OpenIDProvider]:
    """One provider for all tests of a file."""
    from helpers.openid_provider import openid_provider

    with openid_provider() as running:
        yield running


@pytest.fixture
def door(tmp_path: Path, idp: OpenIDProvider) -> Door:
    """A service with a user who has signed in before."""
    from helpers.sign_in import Door

    idp.person("ann-1", preferred_username="ann", email="ann@x.org", email_verified=True)
    return Door(tmp_path, idp)

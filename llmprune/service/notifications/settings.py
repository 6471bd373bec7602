"""Settings of notifications, which the operator gives when the service starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class NotificationSettings(BaseModel):
    """Settings of webhooks and e-mail; see the options of ``llmprune serve``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    webhooks: Literal["public", "listed", "off"] = "public"  # hosts that may be called
    webhook_hosts: tuple[str, ...] = ()  # that may be called although private, and by http
    smtp: str | None = None  # URL of the mail server; None: no e-mail
    smtp_password_file: Path | None = None
    mail_from: str | None = None
    mail_domains: tuple[str, ...] = ()  # of addresses that may be written to
    public_url: str | None = None  # of the service, for links

    def link_to(self, job: str) -> str | None:
        """Return the address of a job's page; None where the operator gave no public address."""
        return f"{self.public_url.rstrip('/')}/jobs/{job}" if self.public_url else None

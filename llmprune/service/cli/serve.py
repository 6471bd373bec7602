"""The command that starts a service. Its body imports late."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import RecipeError
from llmprune.service.cli import oidc_options as oidc
from llmprune.service.cli.database_option import database_url
from llmprune.service.cli.notification_options import notification_settings
from llmprune.service.cli.serve_options import ServeOptions

if TYPE_CHECKING:
    from llmprune.service.notifications.settings import NotificationSettings
    from llmprune.service.oidc.settings import OidcSettings
    from llmprune.service.settings import Settings


def serve(**given: Any) -> None:
    """Serve pruning jobs over HTTP and in the browser."""
    from llmprune.service import server

    options = ServeOptions(**given)
    settings = settings_of(options)
    if options.first_token_file is not None:
        server.write_first_token(settings, options.first_token_file)
    server.serve(settings)


serve.__signature__ = ServeOptions.signature()  # type: ignore[attr-defined]  # typer reads it
serve.__annotations__ = {one.name: one.annotation for one in ServeOptions.signature().parameters.values()}


def settings_of(options: ServeOptions) -> Settings:
    """Return the settings of a service. Raises RecipeError where an option is wrong."""
    from llmprune.service.settings import Settings
    from llmprune.service.supervisor import devices

    if options.ray and not options.ray.startswith(("http://", "https://")):
        raise RecipeError(f"--ray {options.ray}: give the URL of its job API, such as http://head:8265")
    same = (
        *("host", "port", "slots", "ray", "ray_node_gpus", "keep_days", "keep_jobs", "max_queued", "max_running"),
        *("max_gpus", "max_jobs", "jobs_per_day", "share_jobs", "lend_hub_token"),
    )
    gpus = devices.find_gpus() if options.gpus is None else devices.choose_gpus(options.gpus)
    return Settings(
        **{name: getattr(options, name) for name in same},
        data_dir=options.data_dir.absolute(),
        database_url=database_url(options.database),
        host_names=tuple(options.host_name or ()),
        trusted_proxies=tuple(map(_network, options.trusted_proxy or ())),
        gpus=gpus,
        allow_roots=_folders(options.allow_root),
        allow_tasks=_folders(options.allow_tasks),
        torchrun_options=_words(options.torchrun_options or ""),
        artifacts=_store(options.artifacts) if options.artifacts else None,
        time_limit=options.time_limit or None,
        disk_quota=_size("--disk-quota", options.disk_quota) if options.disk_quota else None,
        user_disk=_size("--user-disk", options.user_disk) if options.user_disk else None,
        upload_limit=_size("--upload-limit", options.upload_limit) or 0,
        oidc=_sign_in(options),
        notifications=_notifications(options),
        **({} if options.memory_limit is None else {"memory_limit": _size("--memory-limit", options.memory_limit)}),
    )


def _sign_in(options: ServeOptions) -> OidcSettings | None:
    return oidc.oidc_settings(
        options.oidc_issuer,
        options.oidc_client_id,
        secret_file=options.oidc_client_secret_file,
        roles=options.oidc_role or (),
        claims=(options.oidc_scopes, options.oidc_name_claim, options.oidc_groups_claim),
        access=(options.oidc_default_role, options.oidc_domain or ()),
    )


def _notifications(options: ServeOptions) -> NotificationSettings:
    same = ("webhooks", "smtp", "smtp_password_file", "mail_from", "public_url")
    lists = {"webhook_hosts": options.webhook_host, "mail_domains": options.mail_domain}
    return notification_settings(**{name: getattr(options, name) for name in same}, **lists)


def _folders(folders: Iterable[Path] | None) -> tuple[Path, ...]:
    """Resolve folders. Raises RecipeError where one does not exist."""
    found = tuple(folders or ())
    for folder in found:
        if not folder.is_dir():
            raise RecipeError(
                f"{folder} is not a folder (looked in {Path.cwd()}); give --allow-root and --allow-tasks folders"
            )
    return tuple(folder.resolve() for folder in found)


def _store(url: str) -> str:
    """Return the URL of a store that can be written and read. Raises RecipeError and StoreUnreachable."""
    from llmprune.service.artifacts.store import ArtifactStore, require_url

    ArtifactStore(require_url(url)).check()
    return require_url(url)


def _network(proxy: str) -> str:
    """Return a network in the form that uvicorn needs, which ignores 10.1.2.3/8. Raises RecipeError."""
    import ipaddress

    try:
        return str(ipaddress.ip_network(proxy, strict=False))
    except ValueError:
        raise RecipeError(f"--trusted-proxy {proxy!r}: give an address or a network, such as 10.0.0.0/8") from None


def _words(options: str) -> tuple[str, ...]:
    """Split options as a shell does. Raises RecipeError."""
    import shlex

    try:
        return tuple(shlex.split(options))
    except ValueError as error:
        raise RecipeError(f"--torchrun-options {options!r}: {error}; write them as for a shell") from None


def _size(option: str, text: str) -> int | None:
    """Return a size in bytes; None for 0, which means no limit. Raises RecipeError."""
    from llmprune.common.schema import parse_size

    try:
        return None if text.strip() == "0" else parse_size(text)
    except ValueError as error:
        raise RecipeError(f"{option} {text!r}: {error}") from None

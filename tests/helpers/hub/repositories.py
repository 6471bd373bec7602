"""Routes about users and repositories: tokens, creation, rights, branches, listings."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs

import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from helpers.hub.access import Refused, Routes, commit_of, unquoted


class RepositoryRoutes(Routes):
    """Users, and repositories with their branches and files."""

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        app.get("/api/whoami-v2")(self.whoami)
        app.post("/api/repos/create")(self.create)
        app.delete("/api/repos/delete")(self.delete)
        app.post("/api/validate-yaml")(self.validate)
        app.get("/api/{kind}/{namespace}/{name}/auth-check")(self.may_read)
        app.get("/api/{kind}/{namespace}/{name}/auth-check/write")(self.may_write)
        app.get("/api/{kind}/{namespace}/{name}/discussions")(self.discussions)
        app.get("/api/{kind}/{namespace}/{name}/refs")(self.refs)
        app.post("/api/{kind}/{namespace}/{name}/branch/{branch}")(self.branch)
        app.get("/api/{kind}/{namespace}/{name}/tree/{revision}")(self.tree)
        app.get("/api/{kind}/{namespace}/{name}/tree/{revision}/{folder:path}")(self.tree)
        app.post("/api/{kind}/{namespace}/{name}/paths-info/{revision}")(self.paths_info)
        app.get("/api/{kind}/{namespace}/{name}")(self.info)
        app.get("/api/{kind}/{namespace}/{name}/revision/{revision:path}")(self.info)

    async def whoami(self, request: Request) -> dict[str, Any]:
        """Return the user of the token and its rights."""
        asking = self.user(request)
        if asking is None:
            raise Refused(401, message="Invalid user token")
        token: dict[str, Any] = {"displayName": "test", "role": asking.role}
        if asking.scopes is not None:
            token["fineGrained"] = {"scoped": list(asking.scopes), "global": []}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in asking.orgs.items()]
        return {
            "type": "user",
            "name": asking.name,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }

    async def create(self, request: Request) -> Any:
        """Create a repository."""
        asked, asking = await request.json(), self.user(request)
        if asking is None:
            raise Refused(401, message="Invalid user token")
        namespace = asked.get("organization") or asking.name
        name, kind = f"{namespace}/{asked['name']}", asked.get("type") or "model"
        if not asking.may_write(namespace):
            raise Refused(
                403, message=f"You don't have the rights to create a {kind} under the namespace {namespace!r}"
            )
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repos:
            return JSONResponse({"error": "You already created this repo", "url": url, "name": name}, 409)
        self.hub.add_repo(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind, private=asked.get("visibility") == "private"
        )
        return {"url": url, "name": name, "id": "1"}

    async def delete(self, request: Request) -> dict[str, Any]:
        """Delete a repository."""
        asked = await request.json()
        kind, name = asked.get("type") or "model", f"{asked.get('organization')}/{asked['name']}"
        self.find(request, kind, *name.split("/"), write=True)
        del self.hub.repos[kind, name]
        return {}

    async def validate(self, request: Request) -> Any:
        """Check the metadata of a card."""
        content = (await request.json())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = wrong_metadata(yaml.safe_load(found[1]) if found else None)
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def may_read(self, request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        """Check that the user may read a repository."""
        self.find(request, kind, namespace, name)
        return {}

    async def may_write(self, request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        """Check that the user may write to a repository."""
        self.find(request, kind, namespace, name, write=True)
        return {}

    async def discussions(self, request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        """List the pull requests."""
        repo = self.find(request, kind, namespace, name)
        return {"count": len(repo.pulls), "start": 0, "discussions": repo.pulls}

    async def refs(self, request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        """List the branches."""
        repo = self.find(request, kind, namespace, name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if not ref.startswith("refs/")
        ]
        return {"branches": branches, "tags": [], "converts": []}

    async def branch(self, request: Request, kind: str, namespace: str, name: str, branch: str) -> Any:
        """Create a branch at the head of main."""
        repo = self.find(request, kind, namespace, name, write=True)
        if branch in repo.refs:
            raise Refused(409, message=f"Reference already exists: refs/heads/{branch}")
        repo.refs[branch] = repo.refs["main"]
        return {}

    async def tree(
        self,
        request: Request,
        kind: str,
        namespace: str,
        name: str,
        revision: str,
        folder: str = "",
        recursive: bool = False,
    ) -> list[dict[str, Any]]:
        """List files and folders of a revision."""
        repo = self.find(request, kind, namespace, name)
        files = repo.commits[commit_of(repo, unquoted(revision))]
        start = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: file for path, file in files.items() if path.startswith(start)}
        if start and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        deep = {path.removeprefix(start).split("/")[0] for path in inside if "/" in path.removeprefix(start)}
        folders = [{"type": "directory", "path": f"{start}{part}", "oid": "0" * 40, "size": 0} for part in sorted(deep)]
        return folders + [
            file.described(path) for path, file in inside.items() if recursive or "/" not in path.removeprefix(start)
        ]

    async def paths_info(
        self, request: Request, kind: str, namespace: str, name: str, revision: str
    ) -> list[dict[str, Any]]:
        """Describe the files and folders that are named."""
        repo = self.find(request, kind, namespace, name)
        files = repo.commits[commit_of(repo, unquoted(revision))]
        body = (await request.body()).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else _form_values(body, "paths")
        found = [files[path].described(path) for path in asked if path in files]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        return found + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]

    async def info(
        self, request: Request, kind: str, namespace: str, name: str, revision: str = "main"
    ) -> dict[str, Any]:
        """Describe a repository at a revision."""
        repo = self.find(request, kind, namespace, name)
        sha = commit_of(repo, unquoted(revision))
        return {
            "id": repo.name, "modelId": repo.name, "author": namespace, "sha": sha, "private": repo.private,
            "gated": "auto" if repo.gated else False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in repo.commits[sha]],
        }  # fmt: skip


def wrong_metadata(data: Any) -> list[dict[str, str]]:
    """Return the errors that the hub finds in the metadata of a model card."""
    if data is None:
        return []
    found = []
    for name, kind in (
        ("tags", list),
        ("license", str),
        ("library_name", str),
        ("pipeline_tag", str),
        ("model-index", list),
    ):
        if name in data and not isinstance(data[name], kind):
            found.append(f'"{name}" must be a {kind.__name__}')
    if data.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        found.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    for model in data.get("model-index") or ():
        if not model.get("name") or not all(
            result.get("metrics") and result.get("task") for result in model["results"]
        ):
            found.append('"model-index" needs a name, and a task and metrics for each result')
    return [{"message": message} for message in found]


def _form_values(body: str, name: str) -> list[str]:
    return parse_qs(body).get(name, [])

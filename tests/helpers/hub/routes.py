"""The requests that the hub's client libraries make, answered from a hub's state."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from helpers.hub.state import KINDS, SIGNATURE, File, Repo, User, blob_of, is_large, pointer

if TYPE_CHECKING:
    from helpers.hub.server import Hub

CHUNK = 1024 * 1024


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


def make_app(hub: Hub) -> FastAPI:
    """The routes."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:
        headers = {"X-Error-Code": refused.code} if refused.code else {}
        if refused.message:
            headers["X-Error-Message"] = refused.message
        body = None if request.method == "HEAD" else {"error": refused.message or refused.code}
        return JSONResponse(body, refused.status, headers)

    def user(request: Request) -> User | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if given and given not in hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return hub.users.get(given)

    def find(request: Request, kind: str, namespace: str, name: str, write: bool = False) -> Repo:
        asking = user(request)
        repo = hub.repos.get((KINDS.get(kind, kind), f"{namespace}/{name}"))
        if repo is None or (repo.private and not (asking and (asking.name == namespace or namespace in asking.orgs))):
            raise Refused(404 if asking else 401, "RepoNotFound", "Repository not found")
        if write and not (asking and asking.may_write(namespace)):
            raise Refused(403, message="You don't have the rights to do this")
        return repo

    def commit_of(repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    @app.get("/api/whoami-v2")
    async def whoami(request: Request) -> dict[str, Any]:
        asking = user(request)
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

    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        asked, asking = await request.json(), user(request)
        if asking is None:
            raise Refused(401, message="Invalid user token")
        namespace = asked.get("organization") or asking.name
        name, kind = f"{namespace}/{asked['name']}", asked.get("type") or "model"
        if not asking.may_write(namespace):
            raise Refused(
                403, message=f"You don't have the rights to create a {kind} under the namespace {namespace!r}"
            )
        url = f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in hub.repos:
            return JSONResponse({"error": "You already created this repo", "url": url, "name": name}, 409)
        hub.add_repo(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind, private=asked.get("visibility") == "private"
        )
        return {"url": url, "name": name, "id": "1"}

    @app.delete("/api/repos/delete")
    async def delete(request: Request) -> dict[str, Any]:
        asked = await request.json()
        kind, name = asked.get("type") or "model", f"{asked.get('organization')}/{asked['name']}"
        find(request, kind, *name.split("/"), write=True)
        del hub.repos[kind, name]
        return {}

    @app.post("/api/validate-yaml")
    async def validate(request: Request) -> Any:
        content = (await request.json())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = wrong_metadata(yaml.safe_load(found[1]) if found else None)
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    @app.get("/api/{kind}/{namespace}/{name}/auth-check")
    async def may_read(request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        find(request, kind, namespace, name)
        return {}

    @app.get("/api/{kind}/{namespace}/{name}/auth-check/write")
    async def may_write(request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        find(request, kind, namespace, name, write=True)
        return {}

    @app.get("/api/{kind}/{namespace}/{name}/discussions")
    async def discussions(request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        repo = find(request, kind, namespace, name)
        return {"count": len(repo.pulls), "start": 0, "discussions": repo.pulls}

    @app.get("/api/{kind}/{namespace}/{name}/refs")
    async def refs(request: Request, kind: str, namespace: str, name: str) -> dict[str, Any]:
        repo = find(request, kind, namespace, name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if not ref.startswith("refs/")
        ]
        return {"branches": branches, "tags": [], "converts": []}

    @app.post("/api/{kind}/{namespace}/{name}/branch/{branch}")
    async def branch(request: Request, kind: str, namespace: str, name: str, branch: str) -> Any:
        repo = find(request, kind, namespace, name, write=True)
        if branch in repo.refs:
            raise Refused(409, message=f"Reference already exists: refs/heads/{branch}")
        repo.refs[branch] = repo.refs["main"]
        return {}

    @app.get("/api/{kind}/{namespace}/{name}/tree/{revision}")
    @app.get("/api/{kind}/{namespace}/{name}/tree/{revision}/{folder:path}")
    async def tree(
        request: Request, kind: str, namespace: str, name: str, revision: str, folder: str = "", recursive: bool = False
    ) -> list[dict[str, Any]]:
        repo = find(request, kind, namespace, name)
        files = repo.commits[commit_of(repo, _unquoted(revision))]
        start = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: file for path, file in files.items() if path.startswith(start)}
        if start and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        deep = {path.removeprefix(start).split("/")[0] for path in inside if "/" in path.removeprefix(start)}
        folders = [{"type": "directory", "path": f"{start}{part}", "oid": "0" * 40, "size": 0} for part in sorted(deep)]
        return folders + [
            file.described(path) for path, file in inside.items() if recursive or "/" not in path.removeprefix(start)
        ]

    @app.post("/api/{kind}/{namespace}/{name}/paths-info/{revision}")
    async def paths_info(request: Request, kind: str, namespace: str, name: str, revision: str) -> list[dict[str, Any]]:
        repo = find(request, kind, namespace, name)
        files = repo.commits[commit_of(repo, _unquoted(revision))]
        body = (await request.body()).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else _form_values(body, "paths")
        found = [files[path].described(path) for path in asked if path in files]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        return found + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]

    @app.get("/api/{kind}/{namespace}/{name}")
    @app.get("/api/{kind}/{namespace}/{name}/revision/{revision:path}")
    async def info(request: Request, kind: str, namespace: str, name: str, revision: str = "main") -> dict[str, Any]:
        repo = find(request, kind, namespace, name)
        sha = commit_of(repo, _unquoted(revision))
        return {
            "id": repo.name, "modelId": repo.name, "author": namespace, "sha": sha, "private": repo.private,
            "gated": "auto" if repo.gated else False, "disabled": False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in repo.commits[sha]],
        }  # fmt: skip

    @app.post("/api/{kind}/{namespace}/{name}/preupload/{revision}")
    async def preupload(request: Request, kind: str, namespace: str, name: str, revision: str) -> dict[str, Any]:
        repo = find(request, kind, namespace, name, write="create_pr" not in request.query_params)
        there = repo.commits[commit_of(repo, _unquoted(revision))]
        answers = []
        for asked in (await request.json())["files"]:
            old = there.get(asked["path"])
            mode = "lfs" if is_large(asked["path"], asked["size"]) else "regular"
            known = {"oid": old.lfs or old.blob} if old else {}
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | known)
        return {"files": answers, "commitOid": repo.refs["main"]}

    async def batch(request: Request, kind: str, namespace: str, name: str) -> Any:
        find(request, kind, namespace, name)
        objects = []
        for asked in (await request.json())["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if not (hub.store / asked["oid"]).is_file():
                place = f"{hub.storage}/lfs/{asked['oid']}"
                upload: dict[str, Any] = {"href": f"{place}?{SIGNATURE}"}
                if hub.part_size and asked["size"] > hub.part_size:
                    parts = -(-asked["size"] // hub.part_size)
                    links = {str(n): f"{place}/{n}?{SIGNATURE}" for n in range(1, parts + 1)}
                    upload = {"href": f"{place}/complete", "header": {"chunk_size": str(hub.part_size)} | links}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify"}}
            objects.append(answer)
        return JSONResponse({"transfer": "multipart", "objects": objects}, media_type="application/vnd.git-lfs+json")

    @app.post("/datasets/{namespace}/{name}.git/info/lfs/objects/batch")
    async def dataset_batch(request: Request, namespace: str, name: str) -> Any:
        return await batch(request, "datasets", namespace, name)

    @app.post("/{namespace}/{name}.git/info/lfs/objects/batch")
    async def model_batch(request: Request, namespace: str, name: str) -> Any:
        return await batch(request, "models", namespace, name)

    @app.put("/lfs/{digest}")
    @app.put("/lfs/{digest}/{part}")
    async def put(request: Request, digest: str, part: str = "") -> Response:
        require_signed(request)
        found = hashlib.md5()
        with (hub.store / f"{digest}.{part or 'whole'}.partial").open("wb") as file:
            async for chunk in request.stream():
                found.update(chunk)
                file.write(chunk)
        return Response(headers={"ETag": f'"{found.hexdigest()}"'})

    @app.post("/lfs/{digest}/complete")
    async def complete(request: Request, digest: str) -> dict[str, Any]:
        parts = (await request.json())["parts"]
        with (hub.store / f"{digest}.whole.partial").open("wb") as file:
            for part in sorted(parts, key=lambda part: int(part["partNumber"])):
                piece = (hub.store / f"{digest}.{part['partNumber']}.partial").read_bytes()
                if part["etag"].strip('"') != hashlib.md5(piece).hexdigest():
                    raise Refused(400, message="InvalidPart")
                file.write(piece)
        return {}

    @app.post("/lfs/{digest}/verify")
    async def verify(request: Request, digest: str) -> dict[str, Any]:
        sent = hub.store / f"{digest}.whole.partial"
        with sent.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise Refused(422, message="The object that arrived does not have this SHA-256")
        sent.rename(hub.store / digest)
        return {}

    @app.post("/api/{kind}/{namespace}/{name}/commit/{revision}")
    async def commit(request: Request, kind: str, namespace: str, name: str, revision: str) -> dict[str, Any]:
        pull = "create_pr" in request.query_params
        repo = find(request, kind, namespace, name, write=not pull)
        if hub.before_commit:
            hub.before_commit(repo)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        head = commit_of(repo, _unquoted(revision))
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not pull and header.get("parentCommit") not in (None, head):
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(len(content), blob_of(content), content)
            elif line["key"] == "lfsFile":
                if not (hub.store / value["oid"]).is_file():
                    raise Refused(400, message=f"LFS object {value['oid']} is not there")
                files[value["path"]] = pointer(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        ref, opened = _unquoted(revision), None
        if pull:
            number = len(repo.pulls) + 1
            ref, opened = f"refs/pr/{number}", f"{hub.url}/{repo.name}/discussions/{number}"
            asking = user(request)
            repo.pulls.append({
                "title": header["summary"], "num": number, "status": "open", "isPullRequest": True,
                "author": {"name": asking.name if asking else ""}, "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": repo.name, "type": repo.kind},
            })  # fmt: skip
        sha = repo.commit(ref, files, header["summary"])
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{hub.url}/{repo.name}/commit/{sha}",
            "pullRequestUrl": opened,
        }

    def resolved(request: Request, kind: str, namespace: str, name: str, revision: str, path: str) -> Response:
        repo = find(request, kind, namespace, name)
        if repo.gated and user(request) is None:
            raise Refused(401, "GatedRepo", f"Access to model {repo.name} is restricted")
        sha = commit_of(repo, _unquoted(revision))
        file = repo.commits[sha].get(path)
        if file is None:
            answer = JSONResponse(None if request.method == "HEAD" else {"error": "Entry not found"}, 404)
            answer.headers.update({"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return answer
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.blob}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.lfs}"', "ETag": f'"{file.lfs}"'}
            return Response(
                status_code=302, headers=headers | {"Location": f"{hub.storage}/cdn/{file.lfs}?{SIGNATURE}"}
            )
        return _ranged(request, iter([file.content or b""]), file.size, headers)

    @app.api_route("/datasets/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def dataset_file(request: Request, namespace: str, name: str, revision: str, path: str) -> Response:
        return resolved(request, "datasets", namespace, name, revision, path)

    @app.api_route("/cdn/{digest}", methods=["GET", "HEAD"])
    async def large(request: Request, digest: str) -> Response:
        require_signed(request)
        path = hub.store / digest
        size = path.stat().st_size
        start = _range(request, size)[0]
        if hub.on_range and "range" in request.headers:
            hub.on_range(request.headers["range"])
        return _ranged(request, _read(path, start), size, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, start)

    @app.api_route("/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    async def model_file(request: Request, namespace: str, name: str, revision: str, path: str) -> Response:
        return resolved(request, "models", namespace, name, revision, path)

    return app


def require_signed(request: Request) -> None:
    """The storage takes signed addresses, and refuses a token beside them."""
    if SIGNATURE not in str(request.url) or "authorization" in request.headers:
        raise Refused(400, message="signed addresses alone, and no token")


def wrong_metadata(data: Any) -> list[dict[str, str]]:
    """What the hub would refuse in a card, as far as a pushed model can get it wrong."""
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


def _unquoted(revision: str) -> str:
    return revision.replace("%2F", "/")


def _form_values(body: str, name: str) -> list[str]:
    return parse_qs(body).get(name, [])


def _range(request: Request, size: int) -> tuple[int, int]:
    """First and last byte that are asked for."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not found or not (found[1] or found[2]):
        return 0, size - 1
    if not found[1]:
        return max(size - int(found[2]), 0), size - 1
    return int(found[1]), min(int(found[2]), size - 1) if found[2] else size - 1


def _ranged(request: Request, chunks: Iterator[bytes], size: int, headers: dict[str, str], start: int = 0) -> Response:
    """The whole, or the part that is asked for; ``chunks`` begin at ``start``."""
    first, last = _range(request, size)
    length = max(last - first + 1, 0)
    headers = headers | {"Content-Length": str(length)}
    status = 200
    if request.headers.get("range"):
        status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(_cut(chunks, first - start, length), status, headers, "application/octet-stream")


def _read(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            yield chunk


def _cut(chunks: Iterator[bytes], skip: int, length: int) -> Iterator[bytes]:
    for chunk in chunks:
        piece = chunk[skip : skip + length]
        skip = max(skip - len(chunk), 0)
        length -= len(piece)
        if piece:
            yield piece
        if length <= 0:
            return

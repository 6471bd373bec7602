"""Routes that upload: large files through git-LFS, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from helpers.hub.access import Refused, Routes, commit_of, require_signed, unquoted
from helpers.hub.state import SIGNATURE, File, Repo, blob_of, is_large, pointer


class UploadRoutes(Routes):
    """Uploads of large files, and commits."""

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        app.post("/api/{kind}/{namespace}/{name}/preupload/{revision}")(self.preupload)
        app.post("/datasets/{namespace}/{name}.git/info/lfs/objects/batch")(self.dataset_batch)
        app.post("/{namespace}/{name}.git/info/lfs/objects/batch")(self.model_batch)
        app.put("/lfs/{digest}")(self.put)
        app.put("/lfs/{digest}/{part}")(self.put)
        app.post("/lfs/{digest}/complete")(self.complete)
        app.post("/lfs/{digest}/verify")(self.verify)
        app.post("/api/{kind}/{namespace}/{name}/commit/{revision}")(self.commit)

    async def preupload(self, request: Request, kind: str, namespace: str, name: str, revision: str) -> dict[str, Any]:
        """Return for each file whether it is uploaded through git-LFS."""
        repo = self.find(request, kind, namespace, name, write="create_pr" not in request.query_params)
        there = repo.commits[commit_of(repo, unquoted(revision))]
        answers = []
        for asked in (await request.json())["files"]:
            old = there.get(asked["path"])
            mode = "lfs" if is_large(asked["path"], asked["size"]) else "regular"
            known = {"oid": old.lfs or old.blob} if old else {}
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False} | known)
        return {"files": answers, "commitOid": repo.refs["main"]}

    async def batch(self, request: Request, kind: str, namespace: str, name: str) -> Any:
        """Return upload links for large files."""
        self.find(request, kind, namespace, name)
        objects = []
        for asked in (await request.json())["objects"]:
            answer: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if not (self.hub.store / asked["oid"]).is_file():
                place = f"{self.hub.storage}/lfs/{asked['oid']}"
                upload: dict[str, Any] = {"href": f"{place}?{SIGNATURE}"}
                if self.hub.part_size and asked["size"] > self.hub.part_size:
                    parts = -(-asked["size"] // self.hub.part_size)
                    links = {str(n): f"{place}/{n}?{SIGNATURE}" for n in range(1, parts + 1)}
                    upload = {"href": f"{place}/complete", "header": {"chunk_size": str(self.hub.part_size)} | links}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify"}}
            objects.append(answer)
        return JSONResponse({"transfer": "multipart", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def dataset_batch(self, request: Request, namespace: str, name: str) -> Any:
        """Return upload links for large files of a data set."""
        return await self.batch(request, "datasets", namespace, name)

    async def model_batch(self, request: Request, namespace: str, name: str) -> Any:
        """Return upload links for large files of a model."""
        return await self.batch(request, "models", namespace, name)

    async def put(self, request: Request, digest: str, part: str = "") -> Response:
        """Store a large file, or a part of one."""
        require_signed(request)
        found = hashlib.md5()
        with (self.hub.store / f"{digest}.{part or 'whole'}.partial").open("wb") as file:
            async for chunk in request.stream():
                found.update(chunk)
                file.write(chunk)
        return Response(headers={"ETag": f'"{found.hexdigest()}"'})

    async def complete(self, request: Request, digest: str) -> dict[str, Any]:
        """Join the parts of a large file."""
        parts = (await request.json())["parts"]
        with (self.hub.store / f"{digest}.whole.partial").open("wb") as file:
            for part in sorted(parts, key=lambda part: int(part["partNumber"])):
                piece = (self.hub.store / f"{digest}.{part['partNumber']}.partial").read_bytes()
                if part["etag"].strip('"') != hashlib.md5(piece).hexdigest():
                    raise Refused(400, message="InvalidPart")
                file.write(piece)
        return {}

    async def verify(self, request: Request, digest: str) -> dict[str, Any]:
        """Check the SHA-256 of a large file that was uploaded."""
        sent = self.hub.store / f"{digest}.whole.partial"
        with sent.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise Refused(422, message="The object that arrived does not have this SHA-256")
        sent.rename(self.hub.store / digest)
        return {}

    async def commit(self, request: Request, kind: str, namespace: str, name: str, revision: str) -> dict[str, Any]:
        """Commit files, to a branch or as a pull request."""
        pull = "create_pr" in request.query_params
        repo = self.find(request, kind, namespace, name, write=not pull)
        if self.hub.before_commit:
            self.hub.before_commit(repo)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        head = commit_of(repo, unquoted(revision))
        header = next(line["value"] for line in lines if line["key"] == "header")
        if not pull and header.get("parentCommit") not in (None, head):
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = self._committed(repo.commits[head], lines)
        ref, opened = unquoted(revision), None
        if pull:
            ref, opened = self._open_pull_request(request, repo, header["summary"])
        sha = repo.commit(ref, files, header["summary"])
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.hub.url}/{repo.name}/commit/{sha}",
            "pullRequestUrl": opened,
        }

    def _committed(self, before: dict[str, File], lines: list[dict[str, Any]]) -> dict[str, File]:
        """Return the files after a commit. Raises Refused where a large file was not uploaded."""
        files = dict(before)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(len(content), blob_of(content), content)
            elif line["key"] == "lfsFile":
                if not (self.hub.store / value["oid"]).is_file():
                    raise Refused(400, message=f"LFS object {value['oid']} is not there")
                files[value["path"]] = pointer(value["oid"], value["size"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        return files

    def _open_pull_request(self, request: Request, repo: Repo, title: str) -> tuple[str, str]:
        """Open a pull request; return its ref and its address."""
        number, asking = len(repo.pulls) + 1, self.user(request)
        repo.pulls.append({
            "title": title, "num": number, "status": "open", "isPullRequest": True,
            "author": {"name": asking.name if asking else ""}, "createdAt": "2026-01-01T00:00:00.000Z",
            "repo": {"name": repo.name, "type": repo.kind},
        })  # fmt: skip
        return f"refs/pr/{number}", f"{self.hub.url}/{repo.name}/discussions/{number}"

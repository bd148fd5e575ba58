"""The admin API: what is served, and changing it while it is served."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError
from qaa_serve.registry import (
    NAME_PATTERN,
    CacheFullError,
    Catalogue,
    Entry,
    LoadTimeoutError,
    NotWrittenError,
    Revision,
    UnknownAdapterError,
)
from qaa_serve.server.audit import AuditLog
from qaa_serve.server.errors import RefusedError
from qaa_serve.server.monitor import EngineMonitor
from qaa_serve.server.turns import Turns


class TierBytes(BaseModel):
    """Where an adapter's weights are, in bytes."""

    store: int = Field(description="weights file in the revision store, on disk")
    host: int = Field(description="host memory of the engine's workers; 0 if it is not loaded")
    slot: int = Field(description="slots of the running batch, on the device, as of some seconds ago; 0: in none")


class RevisionInfo(BaseModel):
    """One content of an adapter."""

    revision: str = Field(description="name@digest, which can be asked for as a model while it is kept")
    state: Literal["current", "kept"]
    loaded: bool = Field(description="whether the engine holds it in memory")
    pinned: bool
    in_flight: int = Field(description="requests and engine calls that use it now")
    bytes: TierBytes


class RejectionInfo(BaseModel):
    """Why the newest content of an adapter's directory is not served."""

    reason: str
    since: float = Field(description="Unix time")


class AdapterInfo(BaseModel):
    """One adapter: served, rejected with the reason, or removed while its directory is still there."""

    id: str
    object: Literal["adapter"] = "adapter"
    state: Literal["served", "rejected", "removed"]
    revision: str | None = Field(None, description="what is served now")
    kind: Literal["QAA", "LORA"] | None = None
    rank: int | None = None
    details: dict[str, Any] | None = None
    source: Literal["directory", "api"] | None = None
    published: float | None = Field(None, description="Unix time at which the current revision was published")
    last_used: float | None = Field(None, description="Unix time of the last request")
    running: int = Field(0, description="sequences (prompts x n) that run")
    waiting: int = Field(0, description="sequences that wait for their turn")
    pinned: bool = Field(False, description="whether the current revision, whichever it is, stays in memory")
    bytes: TierBytes | None = Field(None, description="of the current revision")
    revisions: list[RevisionInfo] = []
    rejection: RejectionInfo | None = None
    reason: str | None = Field(None, description="of the rejection, if nothing is served")


class AdapterList(BaseModel):
    """All adapters."""

    object: Literal["list"] = "list"
    data: list[AdapterInfo]


class RemovedInfo(BaseModel):
    """An adapter that is served no more."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True


class PublishRequest(BaseModel):
    """Which directory to serve."""

    model_config = ConfigDict(extra="forbid")
    path: str = Field(description="adapter directory inside the adapters directory", min_length=1, max_length=4096)


class RevisionRequest(BaseModel):
    """Which revision is meant."""

    model_config = ConfigDict(extra="forbid")
    revision: str | None = Field(
        None,
        description="name@digest or digest, 12 digits of it or more; left out: see the route",
        max_length=256,
    )


class ErrorInfo(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """An error, as OpenAI's API writes it."""

    error: ErrorInfo


Name = Annotated[str, PathParameter(pattern=f"^{NAME_PATTERN.pattern}$", description="the adapter's public name")]

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request makes no sense."},
    401: {"model": ErrorBody, "description": "An admin key is needed."},
    403: {"model": ErrorBody, "description": "Not with this key, or outside the directory."},
    404: {"model": ErrorBody, "description": "There is no such adapter, revision or directory."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "Neither JSON nor a form."},
    422: {"model": ErrorBody, "description": "The adapter cannot be served; what was served goes on."},
    503: {"model": ErrorBody, "description": "Not now."},
}


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: _ERRORS[code] for code in (401, 403, 503, *codes)}


_PUT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": PublishRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["config", "weights"],
                    "properties": {
                        "config": {"type": "string", "format": "binary", "description": CONFIG_FILE},
                        "weights": {"type": "string", "format": "binary", "description": WEIGHTS_FILE},
                    },
                }
            },
        },
    }
}


def make_router(
    catalogue: Catalogue, monitor: EngineMonitor, turns: Turns, audit: AuditLog, adapters_directory: Path | None
) -> APIRouter:
    """The routes that list and change what is served.

    Args:
        catalogue: the adapters; tells the audit log of each change itself.
        monitor: what the engine said of its memory last; to ask it anew would take a turn between steps.
        turns: asked for running and waiting sequences.
        audit: told of changes that are refused.
        adapters_directory: where paths may lead; None allows none.
    """
    router = APIRouter(tags=["adapters"])
    changing = partial(_changing, catalogue, audit)

    def describe(entries: list[Entry]) -> list[AdapterInfo]:
        slots = {int_id: slot for int_id, (_, slot) in monitor.account.adapters.items()}
        return [_describe(entry, catalogue, turns, slots) for entry in entries]

    @router.get("/v1/adapters", responses=_errors())
    async def list_adapters() -> AdapterList:
        """All adapters: what is served with its revisions, memory and use, and what is not, with the reason."""
        return AdapterList(data=describe(sorted(catalogue.entries.values(), key=lambda entry: entry.name)))

    @router.get("/v1/adapters/{name}", responses=_errors(400, 404))
    async def get_adapter(name: Name) -> AdapterInfo:
        """One adapter."""
        if (entry := catalogue.entries.get(name)) is None:
            raise RefusedError(404, f"there is no adapter {name!r}")
        return describe([entry])[0]

    @router.put("/v1/adapters/{name}", responses=_errors(400, 404, 413, 415, 422), openapi_extra=_PUT_BODY)
    async def put_adapter(name: Name, request: Request) -> AdapterInfo:
        """Serve an adapter under a name, in place of what it stands for now.

        Either JSON, `{"path": ...}` of a directory inside the adapters directory, or a form with the files
        `config` (adapter_config.json) and `weights` (adapter_model.safetensors). Everything is checked before
        anything changes; running requests end on the revision they began with.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        with changing("put", name):
            if kind == "multipart/form-data":
                async with _uploaded(request, catalogue.store.directory) as directory:
                    await catalogue.publish(name, directory, "api")
            elif kind == "application/json":
                try:
                    asked = PublishRequest.model_validate_json(await request.body())
                except ValidationError as error:
                    raise RefusedError(
                        400, f'the body is not {{"path": ...}}: {error.errors()[0]["msg"]}'
                    ) from error
                await catalogue.publish(name, path_inside(adapters_directory, asked.path), "api")
            else:
                raise RefusedError(415, f"send application/json or multipart/form-data, not {kind or 'nothing'!r}")
        return describe([catalogue.entries[name]])[0]

    @router.delete("/v1/adapters/{name}", responses=_errors(400, 404))
    async def delete_adapter(name: Name) -> RemovedInfo:
        """Serve an adapter no more. Its running requests end; its directory comes back when it changes."""
        with changing("delete", name):
            await catalogue.remove(name)
        return RemovedInfo(id=name)

    @router.post("/v1/adapters/{name}/rollback", responses=_errors(400, 404, 422))
    async def roll_back(name: Name, asked: RevisionRequest | None = None) -> AdapterInfo:
        """Serve a kept revision again; left out, the one before the current."""
        with changing("rollback", name):
            await catalogue.roll_back(name, _digest_of(asked, name))
        return describe([catalogue.entries[name]])[0]

    @router.post("/v1/adapters/{name}/pin", responses=_errors(400, 404, 422))
    async def pin(name: Name, asked: RevisionRequest | None = None) -> AdapterInfo:
        """Keep an adapter in the engine's memory: one revision, or left out, whichever is current."""
        with changing("pin", name):
            await catalogue.pin(name, _digest_of(asked, name))
        return describe([catalogue.entries[name]])[0]

    @router.post("/v1/adapters/{name}/unpin", responses=_errors(400, 404))
    async def unpin(name: Name, asked: RevisionRequest | None = None) -> AdapterInfo:
        """Undo `pin`."""
        with changing("unpin", name):
            await catalogue.unpin(name, _digest_of(asked, name))
        return describe([catalogue.entries[name]])[0]

    @router.post("/v1/load_lora_adapter", responses=_errors(400, 404, 422))
    async def load_lora_adapter(request: LoadLoRAAdapterRequest) -> Response:
        """vLLM's way to say PUT /v1/adapters/{lora_name} with a path; load_inplace replaces one that is there."""
        if not NAME_PATTERN.fullmatch(request.lora_name):
            raise RefusedError(400, f"{request.lora_name!r} cannot be an adapter's name: {NAME_PATTERN.pattern}")
        entry = catalogue.entries.get(request.lora_name)
        if entry is not None and entry.current is not None and not request.load_inplace:
            raise RefusedError(
                400, f'the adapter {request.lora_name!r} is served already: say "load_inplace": true to replace it'
            )
        with changing("put", request.lora_name):
            directory = path_inside(adapters_directory, request.lora_path)
            await catalogue.publish(request.lora_name, directory, "api")
        return Response(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", responses=_errors(400, 404))
    async def unload_lora_adapter(request: UnloadLoRAAdapterRequest) -> Response:
        """vLLM's way to say DELETE /v1/adapters/{lora_name}."""
        with changing("delete", request.lora_name):
            await catalogue.remove(request.lora_name)
        return Response(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    return router


@contextmanager
def _changing(catalogue: Catalogue, audit: AuditLog, action: str, name: str) -> Iterator[None]:
    """Make a change; what the catalogue refuses becomes an answer, and every refusal a line of the audit log."""
    try:
        try:
            yield
        except UnknownAdapterError as error:
            raise RefusedError(404, str(error)) from error
        except AdapterError as error:
            if isinstance(error, (CacheFullError, LoadTimeoutError, NotWrittenError)):
                raise RefusedError(503, str(error), Retry_After="5") from error
            raise RefusedError(422, str(error)) from error
    except RefusedError as refusal:
        current = catalogue.resolve(name)
        served = None if current is None else current.revision
        audit.changed(action, name, served, served, f"{refusal.status}: {refusal.message}")
        raise


def path_inside(root: Path | None, text: str) -> Path:
    """The directory that a client's text names inside the adapters directory, links followed.

    Raises:
        RefusedError: if it is not inside, or there is none.
    """
    if root is None:
        raise RefusedError(403, "paths are taken inside the adapters directory, and the server has no --adapters")
    if "\0" in text:
        raise RefusedError(400, "a path cannot hold a NUL character")
    try:
        real, real_root = Path(os.path.realpath(root / text)), Path(os.path.realpath(root))
        inside = real.is_relative_to(real_root) and real != real_root
        is_directory = inside and real.is_dir()
    except (OSError, ValueError) as error:
        raise RefusedError(400, f"this is no path: {error}") from error
    if not inside:
        raise RefusedError(403, f"{text!r} is not inside the adapters directory")
    if not is_directory:
        raise RefusedError(404, f"there is no directory {text!r} in the adapters directory")
    return real


@asynccontextmanager
async def _uploaded(request: Request, beside: Path) -> AsyncIterator[Path]:
    """A directory with the pair of files of a form; it goes at the end."""
    async with request.form(max_files=2, max_fields=2) as form:
        files = []
        for part in ("config", "weights"):
            file = form.get(part)
            if not isinstance(file, UploadFile):
                raise RefusedError(400, f"the form needs the files config and weights; {part} is missing")
            files.append(file.file)
        directory = await asyncio.to_thread(_write_pair, files, beside)
    try:
        yield directory
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


def _write_pair(files: list[BinaryIO], beside: Path) -> Path:
    try:
        beside.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=".upload-", dir=beside))
        try:
            for file, name in zip(files, (CONFIG_FILE, WEIGHTS_FILE), strict=True):
                with (directory / name).open("wb") as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    except OSError as error:
        raise RefusedError(503, f"the upload cannot be kept: {error.strerror}", Retry_After="60") from error
    return directory


def _digest_of(asked: RevisionRequest | None, name: str) -> str | None:
    """The digest that a request names; None if it names none."""
    if asked is None or asked.revision is None:
        return None
    prefix, at, digest = asked.revision.rpartition("@")
    if at and prefix != name:
        raise RefusedError(400, f"{asked.revision!r} is no revision of {name!r}")
    return digest


def _describe(entry: Entry, catalogue: Catalogue, turns: Turns, slots: Mapping[int, int]) -> AdapterInfo:
    def tier_bytes(revision: Revision) -> TierBytes:
        resident = catalogue.cache.find(revision)
        host, slot = (0, 0) if resident is None else (resident.nbytes, slots.get(revision.int_id, 0))
        return TierBytes(store=revision.nbytes, host=host, slot=slot)

    def describe_revision(revision: Revision) -> RevisionInfo:
        resident = catalogue.cache.find(revision)
        return RevisionInfo(
            revision=revision.revision,
            state="current" if revision == entry.current else "kept",
            loaded=resident is not None,
            pinned=revision.int_id in catalogue.cache.pinned,
            in_flight=0 if resident is None else resident.holds,
            bytes=tier_bytes(revision),
        )

    current, rejection = entry.current, entry.rejection
    running, waiting = turns.counts(entry.name)
    return AdapterInfo(
        id=entry.name,
        state="served" if current is not None else "rejected" if rejection is not None else "removed",
        revision=current.revision if current else None,
        kind=current.kind if current else None,
        rank=current.rank if current else None,
        details=current.details if current else None,
        source=entry.source if current else None,
        published=entry.published,
        last_used=entry.last_used,
        running=running,
        waiting=waiting,
        pinned=entry.pinned,
        bytes=tier_bytes(current) if current else None,
        revisions=[describe_revision(revision) for revision in entry.revisions()],
        rejection=RejectionInfo(reason=rejection.reason, since=rejection.since) if rejection else None,
        reason=rejection.reason if rejection and not current else None,
    )

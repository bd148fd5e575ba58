"""The admin API: what is served, and changing it while it is served."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from qaa_serve.adapters import CONFIG_FILE, DIGEST_PATTERN, WEIGHTS_FILE, AdapterError
from qaa_serve.registry import (
    NAME_PATTERN,
    Catalogue,
    Condition,
    Entry,
    Fill,
    InUseError,
    NameRefusedError,
    Revision,
    UnavailableError,
    UnknownAdapterError,
    Verdict,
    check_name,
)
from qaa_serve.server.audit import AuditLog
from qaa_serve.server.errors import RefusedError
from qaa_serve.server.monitor import EngineMonitor
from qaa_serve.server.turns import Turns
from qaa_serve.sources import (
    ChangedMeanwhileError,
    DirectorySource,
    ReadOnlyError,
    RepositoryError,
    parse_repository,
)


class TierBytes(BaseModel):
    """Where an adapter's weights are, in bytes."""

    store: int = Field(description="its files in the source")
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
    """One adapter."""

    id: str
    object: Literal["adapter"] = "adapter"
    state: Literal["known", "served", "rejected"] = Field(
        description="served; rejected, with the reason; known: nobody has asked for it, and it is not checked"
    )
    revision: str | None = Field(None, description="what is served now")
    kind: Literal["QAA", "LORA"] | None = None
    rank: int | None = None
    details: dict[str, Any] | None = None
    published: float | None = Field(None, description="Unix time at which the content came into the source")
    last_used: float | None = Field(None, description="Unix time of the last request")
    running: int = Field(0, description="sequences (prompts x n) that run")
    waiting: int = Field(0, description="sequences that wait for their turn")
    pinned: bool = Field(False, description="whether the current revision, whichever it is, stays in memory")
    bytes: TierBytes | None = Field(None, description="of the current revision")
    revisions: list[RevisionInfo] = Field([], description="current and former ones, the newest first")
    rejection: RejectionInfo | None = Field(None, description="why the newest content is not served")
    reason: str | None = Field(None, description="of the rejection, if nothing is served")


class AdapterList(BaseModel):
    """Adapters in the order of their names."""

    object: Literal["list"] = "list"
    data: list[AdapterInfo]
    has_more: bool = Field(False, description="whether there are more after the last one")
    total: int = Field(description="adapters that there are, whatever was asked for")


class RemovedInfo(BaseModel):
    """An adapter that is served no more."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True


class AuditLine(BaseModel):
    """A change that was made or refused."""

    time: str = Field(description="ISO 8601, in UTC")
    key: str | None = Field(description="the admin key's name; null: nobody's request")
    address: str = Field(alias="from", description="the client's address, or what changed by itself")
    action: str
    adapter: str = Field(description="the name of the adapter or alias")
    before: str | None = Field(description="what the name stood for")
    after: str | None
    result: str = Field(description='"ok", or why not')


class AuditList(BaseModel):
    """Lines of the audit log, the newest first."""

    object: Literal["list"] = "list"
    data: list[AuditLine]


class PublishRequest(BaseModel):
    """Where to take an adapter from: one of the two."""

    model_config = ConfigDict(extra="forbid")
    path: str | None = Field(
        None, description="adapter directory inside the adapters directory", min_length=1, max_length=4096
    )
    source: str | None = Field(
        None, description="hf://ORG/REPO@REVISION of the Hugging Face hub", min_length=1, max_length=512
    )


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


def checked_name(name: str) -> str:
    """The name, if something may be served under it.

    Raises:
        RefusedError: with 400 if not, in words rather than as a pattern.
    """
    try:
        check_name(name)
    except NameRefusedError as error:
        raise RefusedError(400, str(error), param="name") from error
    return name


Name = Annotated[
    str,
    PathParameter(
        description="the public name of an adapter or alias",
        json_schema_extra={"pattern": f"^{NAME_PATTERN.pattern}$"},
    ),
    AfterValidator(checked_name),
]

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request makes no sense."},
    401: {"model": ErrorBody, "description": "An admin key is needed."},
    403: {"model": ErrorBody, "description": "Not with this key, or outside the directory."},
    404: {"model": ErrorBody, "description": "There is no such adapter, revision or directory."},
    409: {"model": ErrorBody, "description": "The source cannot be written, or something needs the adapter."},
    412: {"model": ErrorBody, "description": "What is there is not what If-Match or If-None-Match asks for."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    415: {"model": ErrorBody, "description": "Neither JSON nor a form."},
    422: {"model": ErrorBody, "description": "The adapter cannot be served; what was served goes on."},
    503: {"model": ErrorBody, "description": "Not now."},
}


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: _ERRORS[code] for code in (401, 403, 503, *codes)}


_CHANGE = (400, 404, 409, 412, 422)

#: What a route that changes something may answer besides its own answer.
ERRORS_OF_CHANGES = _errors(*_CHANGE)


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
    catalogue: Catalogue, monitor: EngineMonitor, turns: Turns, audit: AuditLog, adapter_repos: Sequence[str]
) -> APIRouter:
    """The routes that list and change what is served.

    Args:
        catalogue: the adapters; tells the audit log of each change itself.
        monitor: what the engine said of its memory last; to ask it anew would take a turn between steps.
        turns: asked for running and waiting sequences.
        audit: told of changes that are refused.
        adapter_repos: patterns of the hub's repositories that adapters may be taken from.
    """
    router = APIRouter(tags=["adapters"])
    changing = partial(make_change, catalogue, audit)
    source = catalogue.contents.source
    root = source.root if isinstance(source, DirectorySource) else None

    def describe(entries: Iterable[Entry]) -> list[AdapterInfo]:
        slots = {int_id: slot for int_id, (_, slot) in monitor.account.adapters.items()}
        return [_describe(entry, catalogue, turns, slots) for entry in entries]

    async def describe_one(name: str, response: Response) -> AdapterInfo:
        entry = catalogue.entries.get(name)
        if entry is None:
            raise RefusedError(404, f"there is no adapter {name!r}")
        info = describe([entry])[0]
        told = {revision.revision for revision in info.revisions}
        kept = {f"{name}@{digest[:12]}": digest for digest in reversed(await catalogue.history(entry))}

        def stored() -> list[RevisionInfo]:
            verdict = catalogue.contents.index.verdict
            return [
                _stored(revision, verdict(digest)) for revision, digest in kept.items() if revision not in told
            ]

        info.revisions += await asyncio.to_thread(stored)
        if entry.current is not None:
            response.headers["etag"] = f'"{entry.current.digest}"'
        return info

    @router.get("/v1/adapters", responses=_errors())
    async def list_adapters(
        q: Annotated[str | None, Query(description="part of the name", max_length=128)] = None,
        state: Annotated[Literal["known", "served", "rejected"] | None, Query(description="only these")] = None,
        limit: Annotated[int | None, Query(description="most that are answered; all, left out", ge=1)] = None,
        after: Annotated[str | None, Query(description="a name: those after it", max_length=128)] = None,
    ) -> AdapterList:
        """Adapters in the order of their names, with memory and use of what is served, and why others are not."""

        def choose() -> tuple[list[AdapterInfo], bool]:
            names = sorted(
                name
                for name, entry in list(catalogue.entries.items())
                if (q is None or q in name)
                and (state is None or entry.state == state)
                and (after is None or name > after)
            )
            page = names if limit is None else names[:limit]
            entries = (entry for name in page if (entry := catalogue.entries.get(name)) is not None)
            return describe(entries), len(page) < len(names)

        data, has_more = await asyncio.to_thread(choose)  # there may be a hundred thousand
        return AdapterList(data=data, has_more=has_more, total=len(catalogue.entries))

    @router.get("/v1/adapters/{name}", responses=_errors(400, 404))
    async def get_adapter(name: Name, response: Response) -> AdapterInfo:
        """One adapter, with its history; its ETag is what If-Match takes."""
        return await describe_one(name, response)

    @router.get("/v1/audit", responses=_errors())
    async def list_audit(
        adapter: Annotated[str | None, Query(description="of this name alone", max_length=128)] = None,
        limit: Annotated[int, Query(description="most that are answered", ge=1)] = 20,
    ) -> AuditList:
        """The last changes since this server's start, made or refused: lines of the audit log."""
        return AuditList.model_validate({"data": audit.last(adapter)[:limit]})

    @router.put("/v1/adapters/{name}", responses=_errors(413, 415, *_CHANGE), openapi_extra=_PUT_BODY)
    async def put_adapter(name: Name, request: Request, response: Response) -> AdapterInfo:
        """Put an adapter into the source, in place of what is there, and serve it.

        A form with the files `config` (adapter_config.json) and `weights` (adapter_model.safetensors), or JSON:
        `{"path": ...}` of a directory inside the adapters directory, or `{"source": "hf://ORG/REPO@REVISION"}`.
        Everything is checked before anything changes; running requests end on the revision they began with. The
        answer comes when the change is durable in the source, which other servers follow. If-Match takes the
        revision that must be served now, If-None-Match: * that none is.
        """
        condition = condition_of(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        with changing("put", name):
            if kind == "multipart/form-data":
                async with _uploaded(request) as fill:
                    await catalogue.publish(name, fill, condition)
            elif kind == "application/json":
                try:
                    asked = PublishRequest.model_validate_json(await request.body())
                except ValidationError as error:
                    raise RefusedError(
                        400, f'the body is not {{"path": ...}}: {error.errors()[0]["msg"]}'
                    ) from error
                if (asked.path is None) == (asked.source is None):
                    raise RefusedError(400, 'give either {"path": ...} or {"source": "hf://ORG/REPO@REVISION"}')
                if asked.path is not None:
                    await catalogue.publish(name, path_inside(root, asked.path), condition)
                else:
                    repository = parse_repository(str(asked.source), adapter_repos)
                    await catalogue.publish(name, repository.fetch, condition)
            else:
                raise RefusedError(415, f"send application/json or multipart/form-data, not {kind or 'nothing'!r}")
        return await describe_one(name, response)

    @router.delete("/v1/adapters/{name}", responses=ERRORS_OF_CHANGES)
    async def delete_adapter(
        name: Name,
        request: Request,
        purge: Annotated[bool, Query(description="delete its history too; then nothing brings it back")] = False,
    ) -> RemovedInfo:
        """Move an adapter to the source's history, and serve it no more; a rollback brings it back."""
        condition = condition_of(request)
        with changing("delete", name):
            await catalogue.remove(name, condition, purge=purge)
        return RemovedInfo(id=name)

    @router.post("/v1/adapters/{name}/rollback", responses=ERRORS_OF_CHANGES)
    async def roll_back(
        name: Name, request: Request, response: Response, asked: RevisionRequest | None = None
    ) -> AdapterInfo:
        """Go back to a former content: the one that is named, or left out, the one before the current."""
        condition = condition_of(request)
        with changing("rollback", name):
            await catalogue.roll_back(name, _digest_of(asked, name), condition)
        return await describe_one(name, response)

    @router.post("/v1/adapters/{name}/load", responses=ERRORS_OF_CHANGES)
    async def load(name: Name, response: Response, asked: RevisionRequest | None = None) -> AdapterInfo:
        """Bring an adapter into the engine's memory before anybody asks for it."""
        digest = _digest_of(asked, name)
        with changing("load", name):
            await catalogue.load(name if digest is None else f"{name}@{digest}")
        return await describe_one(name, response)

    @router.post("/v1/adapters/{name}/pin", responses=ERRORS_OF_CHANGES)
    async def pin(name: Name, response: Response, asked: RevisionRequest | None = None) -> AdapterInfo:
        """Keep an adapter in the memory of every server: one revision, or left out, whichever is current."""
        with changing("pin", name):
            await catalogue.pin(name, _digest_of(asked, name))
        return await describe_one(name, response)

    @router.post("/v1/adapters/{name}/unpin", responses=ERRORS_OF_CHANGES)
    async def unpin(name: Name, response: Response, asked: RevisionRequest | None = None) -> AdapterInfo:
        """Undo `pin`."""
        with changing("unpin", name):
            await catalogue.unpin(name, _digest_of(asked, name))
        return await describe_one(name, response)

    @router.post("/v1/load_lora_adapter", responses=ERRORS_OF_CHANGES)
    async def load_lora_adapter(request: LoadLoRAAdapterRequest) -> Response:
        """vLLM's way to say PUT /v1/adapters/{lora_name} with a path; load_inplace replaces one that is there."""
        checked_name(request.lora_name)
        entry = catalogue.entries.get(request.lora_name)
        if entry is not None and entry.state != "rejected" and not request.load_inplace:
            raise RefusedError(
                400, f'the adapter {request.lora_name!r} is served already: say "load_inplace": true to replace it'
            )
        with changing("put", request.lora_name):
            await catalogue.publish(request.lora_name, path_inside(root, request.lora_path))
        return Response(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", responses=ERRORS_OF_CHANGES)
    async def unload_lora_adapter(request: UnloadLoRAAdapterRequest) -> Response:
        """vLLM's way to say DELETE /v1/adapters/{lora_name}."""
        with changing("delete", request.lora_name):
            await catalogue.remove(request.lora_name)
        return Response(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    return router


def condition_of(request: Request) -> Condition:
    """What If-Match and If-None-Match ask for; a revision may be written with its name and a shorter digest.

    Raises:
        RefusedError: if they are not understood.
    """
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match is not None and (none_match.strip() != "*" or match is not None):
        raise RefusedError(400, "If-None-Match takes * alone, and no If-Match beside it")
    if none_match is not None:
        return Condition(exists=False)
    if match is None:
        return Condition()
    if match.strip() == "*":
        return Condition(exists=True)
    digests = [tag.strip().removeprefix("W/").strip('"').rpartition("@")[2] for tag in match.split(",")]
    if not all(DIGEST_PATTERN.fullmatch(digest) for digest in digests):
        raise RefusedError(400, f"If-Match takes revisions (12 to 64 hex digits) or *, not {match[:100]!r}")
    return Condition(frozenset(digests))


@contextmanager
def make_change(catalogue: Catalogue, audit: AuditLog, action: str, name: str) -> Iterator[None]:
    """Make a change; what the catalogue refuses becomes an answer, and every refusal a line of the audit log."""
    try:
        try:
            yield
        except UnknownAdapterError as error:
            raise RefusedError(404, str(error)) from error
        except ChangedMeanwhileError as error:
            raise RefusedError(412, str(error)) from error
        except (ReadOnlyError, InUseError) as error:
            raise RefusedError(409, str(error)) from error
        except RepositoryError as error:
            raise RefusedError(error.status, str(error)) from error
        except (AdapterError, UnavailableError) as error:
            if error.temporary or isinstance(error, UnavailableError):
                raise RefusedError(503, str(error), Retry_After="5") from error
            raise RefusedError(422, str(error)) from error
    except RefusedError as refusal:
        entry = catalogue.entries.get(name)
        served = None if entry is None or entry.current is None else entry.current.revision
        audit.changed(action, name, served, served, f"{refusal.status}: {refusal.message}")
        raise


def path_inside(root: Path | None, text: str) -> Path:
    """The directory that a client's text names inside the adapters directory, links followed.

    Raises:
        RefusedError: if it is not inside, or there is none.
    """
    if root is None:
        raise RefusedError(
            403, "paths are taken inside a directory of adapters, and --adapters is none: upload the files"
        )
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
async def _uploaded(request: Request) -> AsyncIterator[Fill]:
    """What writes the pair of files of a form into a directory; the form goes at the end."""
    async with AsyncExitStack() as stack:
        try:
            form = await stack.enter_async_context(request.form(max_files=2, max_fields=2))
        except OSError as error:
            where = f"the directory of temporary files, {tempfile.gettempdir()}"
            message = f"the upload cannot be kept in {where}: {error.strerror or error}"
            raise RefusedError(503, message, Retry_After="60") from error
        files: dict[str, BinaryIO] = {}
        for part, name in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE)):
            file = form.get(part)
            if not isinstance(file, UploadFile):
                raise RefusedError(400, f"the form needs the files config and weights; {part} is missing")
            files[name] = file.file

        def fill(directory: Path) -> None:
            for name, file in files.items():
                with (directory / name).open("wb") as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)

        yield fill


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
        state=entry.state,
        revision=current.revision if current else None,
        kind=current.kind if current else None,
        rank=current.rank if current else None,
        details=current.details if current else None,
        published=entry.published,
        last_used=entry.last_used,
        running=running,
        waiting=waiting,
        pinned="" in catalogue.settings.pins(entry.name),
        bytes=tier_bytes(current) if current else None,
        revisions=[describe_revision(revision) for revision in entry.revisions()],
        rejection=RejectionInfo(reason=rejection.reason, since=rejection.since) if rejection else None,
        reason=rejection.reason if rejection and not current else None,
    )


def _stored(revision: str, verdict: Verdict | None) -> RevisionInfo:
    """A former content that is in the source alone."""
    nbytes = 0 if verdict is None else verdict.nbytes
    return RevisionInfo(
        revision=revision, state="kept", loaded=False, pinned=False, in_flight=0,
        bytes=TierBytes(store=nbytes, host=0, slot=0),
    )  # fmt: skip

"""The API of aliases: names that stand for adapters, for revisions, or for several by their shares."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from qaa_serve.registry import Alias, Catalogue
from qaa_serve.server.admin import ERRORS_OF_CHANGES, Name, make_change
from qaa_serve.server.audit import AuditLog
from qaa_serve.server.errors import RefusedError

Target = Annotated[
    str | dict[str, int],
    Field(description="NAME or NAME@REVISION, or several of them with their shares, relative to their sum"),
]


class AliasRequest(BaseModel):
    """What an alias is to lead to."""

    model_config = ConfigDict(extra="forbid")
    to: Target


class AliasInfo(BaseModel):
    """An alias."""

    id: str
    object: Literal["alias"] = "alias"
    to: dict[str, int]


class AliasList(BaseModel):
    """All aliases, in the order of their names."""

    object: Literal["list"] = "list"
    data: list[AliasInfo]


class RemovedAlias(BaseModel):
    """An alias that is no more."""

    id: str
    object: Literal["alias"] = "alias"
    deleted: Literal[True] = True


def make_alias_router(catalogue: Catalogue, audit: AuditLog) -> APIRouter:
    """The routes that list and change aliases.

    Args:
        catalogue: whose; tells the audit log of each change itself.
        audit: told of changes that are refused.
    """
    router = APIRouter(tags=["aliases"], responses=ERRORS_OF_CHANGES)

    def describe(name: str) -> AliasInfo:
        if (alias := catalogue.settings.aliases.get(name)) is None:
            raise RefusedError(404, f"there is no alias {name!r}")
        return AliasInfo(id=name, to=dict(alias.shares))

    @router.get("/v1/aliases")
    async def list_aliases() -> AliasList:
        """All aliases."""
        return AliasList(data=[describe(name) for name in sorted(catalogue.settings.aliases)])

    @router.get("/v1/aliases/{name}")
    async def get_alias(name: Name) -> AliasInfo:
        """One alias."""
        return describe(name)

    @router.put("/v1/aliases/{name}")
    async def put_alias(name: Name, asked: AliasRequest) -> AliasInfo:
        """Let a name stand for an adapter, a revision, or several by their shares: `{"to": {"a": 95, "b": 5}}`.

        Requests of one `user`, or with one `x-qaa-user` header, always have the same target while the shares stay.
        Which revision answered is in the header `x-qaa-revision`, the request log and qaa_alias_requests_total. It
        lies in the source, so every server that follows that has it.
        """
        with make_change(catalogue, audit, "alias", name):
            await catalogue.set_alias(name, Alias.parse(asked.to))
        return describe(name)

    @router.delete("/v1/aliases/{name}")
    async def delete_alias(name: Name) -> RemovedAlias:
        """End an alias; what it led to stays."""
        with make_change(catalogue, audit, "alias", name):
            await catalogue.set_alias(name, None)
        return RemovedAlias(id=name)

    return router

"""The routes that are ours, on vLLM's FastAPI app."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel


class AdapterInfo(BaseModel):
    """One adapter: served, or rejected with the reason."""

    id: str
    object: Literal["adapter"]
    state: Literal["served", "rejected"]
    revision: str | None = None
    kind: Literal["QAA", "LORA"] | None = None
    rank: int | None = None
    bytes: int | None = None
    details: dict[str, Any] | None = None
    reason: str | None = None


class AdapterList(BaseModel):
    """All adapters of the adapters directory."""

    object: Literal["list"]
    data: list[AdapterInfo]


router = APIRouter(tags=["adapters"])


@router.get("/v1/adapters", response_model=AdapterList)
async def list_adapters(request: Request) -> Any:
    """The served adapters with revision, kind, rank and size, and the rejected ones with the reason."""
    return request.app.state.openai_serving_models.describe()

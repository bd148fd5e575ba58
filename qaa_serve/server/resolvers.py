"""vLLM's LoRAResolver plugins: adapters that are found by their names when somebody first asks for them."""

from __future__ import annotations

import asyncio
from logging import Logger
from pathlib import Path
from weakref import WeakValueDictionary

from vllm.lora.resolver import LoRAResolver

from qaa_serve.adapters import AdapterError
from qaa_serve.registry import Catalogue, UnknownAdapterError, check_name
from qaa_serve.registry.failures import Failures


class Resolvers:
    """Asks each plugin in turn. What one finds is served by this server alone, until it ends or it is deleted."""

    def __init__(self, resolvers: list[LoRAResolver], catalogue: Catalogue, base_name: str, logger: Logger):
        """Ask these.

        Args:
            resolvers: vLLM's.
            catalogue: where what they find is served.
            base_name: the base model's name, which they are told.
            logger: where to say what happens.
        """
        self._resolvers = resolvers
        self._catalogue = catalogue
        self._base_name = base_name
        self._failures: Failures[str] = (
            Failures()
        )  # whoever asks for what is nowhere asks the plugins now and then
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._log = logger

    async def resolve(self, name: str) -> bool:
        """Whether there is an adapter of this name now."""
        if not self._resolvers or self._failures.pause_s(name):
            return False
        async with self._locks.setdefault(name, asyncio.Lock()):
            if self._catalogue.knows(name):
                return True
            if self._failures.pause_s(name):
                return False
            try:
                check_name(name)
                for resolver in self._resolvers:
                    found = await resolver.resolve_lora(self._base_name, name)
                    if found is not None:
                        await self._catalogue.adopt(name, Path(found.lora_path))
                        return True
                raise UnknownAdapterError(f"no plugin finds {name!r}")
            except AdapterError as error:
                self._failures.note(name, error)
                if not isinstance(error, UnknownAdapterError):
                    self._log.error("The adapter %r that a plugin found is not served: %s", name, error)
            except Exception as error:
                self._failures.note(name, AdapterError(str(error)))
                self._log.exception("A plugin that looks for adapters failed for %r", name)
            return False

"""Single adapters of the Hugging Face hub: hf://ORG/REPO@REVISION, fetched once and put into the source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qaa_serve.adapters import CONFIG_FILE, MAX_ADAPTER_BYTES, WEIGHTS_FILE, AdapterError, copy_adapter

_URL = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class RepositoryError(AdapterError):
    """An adapter cannot be had from the hub.

    Attributes:
        status: the HTTP status that says so.
    """

    kind = "source"

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one revision.

    Attributes:
        repo: ORG/REPO.
        revision: a branch, tag or commit.
    """

    repo: str
    revision: str

    def fetch(self, target: Path) -> None:
        """Copy its adapter into a directory, by way of the hub's own cache.

        Raises:
            RepositoryError: if it cannot be had.
            AdapterError: if there is no adapter in it.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            found = snapshot_download(
                self.repo, revision=self.revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], max_workers=2
            )
            copy_adapter(Path(found), target, max_bytes=MAX_ADAPTER_BYTES)
        except AdapterError:
            raise
        except HFValidationError as error:
            raise RepositoryError(400, f"{self.repo} cannot be the name of a repository: {error}") from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise RepositoryError(
                404, f"the hub has no {self.repo} at {self.revision}, or not for this token"
            ) from error
        except Exception as error:  # the disk's, the network's, or what the hub's HTTP client makes of it
            raise RepositoryError(503, f"{self.repo} cannot be fetched from the hub now: {error}") from error


def parse_repository(url: str, allowed: Sequence[str]) -> Repository:
    """The repository that a client names.

    Args:
        url: hf://ORG/REPO, with @REVISION or at its main branch.
        allowed: patterns of repositories that may be taken, as a shell writes them.

    Raises:
        RepositoryError: if it names none, or one that may not be taken.
    """
    match = _URL.fullmatch(url)
    if match is None or ".." in (match["revision"] or ""):  # which could lead out of the hub's cache
        raise RepositoryError(400, f"{url[:200]!r} is not hf://ORG/REPO@REVISION")
    repo = match["repo"]
    if not any(fnmatchcase(repo, pattern) for pattern in allowed):
        raise RepositoryError(
            403, f"{repo} is not among the repositories of --adapter-repos: start the server with it"
        )
    return Repository(repo, match["revision"] or "main")

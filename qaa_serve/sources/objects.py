"""An object store as a source of adapters.

PREFIX/NAME/adapter_config.json                   as people put them, with any tool: two objects, so no change of
PREFIX/NAME/adapter_model.safetensors             them comes in one step
PREFIX/.revisions/NAME/DIGEST-TOKEN/              a content: the same two files, never changed; each TOKEN is new
PREFIX/.revisions/NAME/head.json                  which content the name stands for, and which ones are its history
PREFIX/.qaa-serve.json                            settings

A change uploads what it needs and then replaces head.json, on the condition that nobody else has since: that one
request makes the change. Deleting what is not needed any more comes last, and if it is cut short the next change
of that name does it. No place is used twice, so what a change finds
and deletes cannot be what another one uploads.

Adapters that people put beside the head are newer than it, unless they are those that the head says it replaced
("over"): these are deleted, but may be there a little longer.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from logging import getLogger
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterError, digest_of
from qaa_serve.sources.base import (
    HISTORY,
    SETTINGS_FILE,
    ChangedMeanwhileError,
    Listed,
    Listing,
    NoSuchRevisionError,
    ReadOnlyError,
    SourceError,
)
from qaa_serve.sources.heads import (
    CONTENT,
    EMPTY,
    FILES,
    INCOMPLETE,
    PLACE,
    Found,
    Head,
    State,
    StoredObject,
    bare,
    digest_of_place,
    head_version,
    listed_head,
    listed_plain,
    merged,
)

T = TypeVar("T")

#: Within the class, `list` is a method.
Strings: TypeAlias = list[str]

_HEAD_FILE = "head.json"
_MAX_CONFIG_BYTES = 1 << 20
_ATTEMPTS = 5
_AT_ONCE = 8
_S3 = ("s3", "s3a")

#: For stores without conditional requests: of this process at least, one change at a time.
_checking = threading.Lock()

#: A condition did not hold, or another request with one was under way.
_CONFLICTS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "NoSuchKey", "404"}

_log = getLogger(__name__)


class _DamagedError(SourceError):
    """A head cannot be read."""


class ObjectSource:
    """Adapters under a prefix of an object store: s3://bucket/prefix, or whatever else fsspec has a package for.

    For S3 and what speaks its protocol, s3fs reads what every AWS tool does: AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, AWS_PROFILE and ~/.aws, a pod's or machine's role, AWS_REGION, AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL, AWS_CA_BUNDLE, HTTPS_PROXY. Any argument of a file system of fsspec can be set as
    FSSPEC_<PROTOCOL>_<ARGUMENT>, such as FSSPEC_S3_ENDPOINT_URL, FSSPEC_S3_KEY, FSSPEC_S3_SECRET and
    FSSPEC_S3_ANON, or all in one as FSSPEC_S3='{"anon": true}'; these are read once, when fsspec is imported.

    S3 itself makes sure that of two servers that change one adapter at once only one does. Its If-Match on writes
    is needed for that; where If-Match on deletions is not known, an upload by hand in the very moment in which a
    change deletes what it replaced can be lost. For other stores this is sure within one process alone: let one
    server at a time take changes.

    A server that is killed while it sends a large file to S3 leaves parts that only a lifecycle rule
    (AbortIncompleteMultipartUpload) of the bucket clears away.
    """

    def __init__(self, url: str, *, poll_s: float = 10.0, storage_options: Mapping[str, Any] | None = None):
        """Prepare to ask the store; nothing is asked yet.

        Args:
            url: PROTOCOL://BUCKET/PREFIX.
            poll_s: how often everything is looked at, in seconds.
            storage_options: arguments of fsspec's file system, in the place of the environment's.

        Raises:
            AdapterError: if the URL is none, or a package is missing.
        """
        self.url = url.rstrip("/")
        self._poll_s = poll_s
        self._protocol, _, path = url.partition("://")
        if not path.strip("/"):
            raise AdapterError(f"{url!r} names no bucket: write it as s3://bucket/prefix")
        try:
            self._fs = _file_system(self._protocol, dict(storage_options or {}))
        except ImportError as error:
            raise AdapterError(
                f"{url} needs a package that is not installed ({error}): pip install 'qaa-serve[s3]' for s3://, "
                "or the one that is named"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise AdapterError(f"{url} cannot be used ({error}): check it and the storage options") from error
        self._root = str(self._fs._strip_protocol(self.url))
        self._heads: dict[str, tuple[str, Head]] = {}  # name -> etag and what was read
        self._known: set[str] = set()

    # Looking

    def list(self) -> Listing:
        """All adapters that are there now; see `Source.list`."""
        found, settings, root_config = self._sorted(self._find(""))
        adapters, unread = {}, set()
        for name, one in found.items():
            kind = one.head.nbytes % 3 if one.head else EMPTY
            etag, head = self._heads.get(name, ("", None))
            if one.head is None or etag != one.head.etag:
                head = None
            if one.plain and kind != EMPTY and head is None:
                unread.add(name)
            elif one.plain and (head is None or one.live(head)):
                adapters[name] = listed_plain(one.plain)
            elif kind == CONTENT:
                adapters[name] = listed_head(one, head.content if head else None)
        if root_config and not adapters and not unread:
            raise SourceError(f"{self.url} is itself an adapter: give the prefix above it")
        # A listing takes a while and comes to heads first: what changed from plain objects to a head meanwhile
        # would be in neither. So nothing is gone before it was looked for.
        unsure = sorted(unread | (self._known - adapters.keys()))
        for name, listed in zip(unsure, self._each(self._look_if_sound, unsure), strict=True):
            if listed is not None:
                adapters[name] = listed
        self._known = set(adapters)
        for name in list(self._heads):  # a copy, since other threads add to it
            if name not in found:
                self._heads.pop(name, None)
        return Listing(adapters, self.url, settings.etag if settings else None)

    def look(self, name: str) -> Listed | None:
        """One of them; see `Source.look`."""
        return self._state(name).listed

    def _look_if_sound(self, name: str) -> Listed | None:
        """For a listing: of one that is damaged what shows without reading; fetching it says what is wrong."""
        try:
            return self.look(name)
        except _DamagedError:
            found = self._look_at(name)
            if found.plain:
                return listed_plain(found.plain)
            return listed_head(found, None) if found.head else None

    def _each(self, what: Callable[[str], T], names: Strings) -> Sequence[T]:
        if not names:
            return []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(what, names))

    async def changes(self) -> AsyncIterator[Mapping[str, bool] | None]:
        """That everything is to be looked at, now and then: an object store does not tell."""
        while True:
            yield None
            await asyncio.sleep(self._poll_s)

    def _find(self, prefix: str) -> Sequence[StoredObject]:
        with self._asking("listing it"):
            infos = self._fs.find(self._root, detail=True, **({"prefix": prefix} if prefix else {}))
        start = f"{self._root}/{prefix}"
        return [StoredObject.of(info) for path, info in infos.items() if path.startswith(start)]

    def _sorted(self, objects: Iterable[StoredObject]) -> tuple[dict[str, Found], StoredObject | None, bool]:
        """Objects by name, the settings, and whether an adapter's config lies where names should."""
        found: dict[str, Found] = {}
        settings, root_config = None, False
        for item in objects:
            match item.path[len(self._root) + 1 :].split("/"):
                case [name, file] if file in FILES and not name.startswith("."):
                    found.setdefault(name, Found()).plain[file] = item
                case [top, name, file] if top == HISTORY and file == _HEAD_FILE:
                    found.setdefault(name, Found()).head = item
                case [top, name, place, file] if top == HISTORY and file in FILES and PLACE.fullmatch(place):
                    found.setdefault(name, Found()).places.setdefault(place, {})[file] = item
                case [file] if file == SETTINGS_FILE:
                    settings = item
                case [file] if file == CONFIG_FILE:
                    root_config = True
        return found, settings, root_config

    def _state(self, name: str) -> State:
        for _ in range(_ATTEMPTS):
            found = self._look_at(name)
            with suppress(ChangedMeanwhileError):
                return State(found, self._head(name, found.head) if found.head else Head())
        raise SourceError(f"{name!r} in {self.url} is being replaced in this moment: try again")

    def _look_at(self, name: str) -> Found:
        # Plain objects first: they are deleted after the head was written that stands in their place.
        objects = (*self._find(f"{name}/"), *self._find(f"{HISTORY}/{name}/"))
        return self._sorted(objects)[0].get(name, Found())

    def _head(self, name: str, item: StoredObject) -> Head:
        etag, head = self._heads.get(name, ("", Head()))
        if etag == item.etag:
            return head
        raw = self._read(item)
        try:
            head = Head.decode(raw)
        except ValueError as error:
            raise _DamagedError(
                f"{HISTORY}/{name}/{_HEAD_FILE} in {self.url} is damaged ({error}): put back an older version of "
                "it, or delete it and put the adapter again"
            ) from error
        self._heads[name] = item.etag, head
        return head

    def _read(self, item: StoredObject) -> bytes:
        """A small object's content, if it is still the one that was seen."""
        with self._asking(f"reading {item.path}"):
            try:
                raw: bytes = self._fs.cat_file(item.path)
            except FileNotFoundError:
                raw = b""
        now = self._at(item.path)
        if now is None or now.etag != item.etag:
            raise ChangedMeanwhileError(f"{item.path} changed while it was read: try again")
        return raw

    def _at(self, path: str) -> StoredObject | None:
        with self._asking(f"looking at {path}"):
            try:
                info = self._fs.info(path)
            except FileNotFoundError:
                return None
        return None if info["type"] == "directory" else StoredObject.of(info)

    # Reading

    def fetch(self, name: str, version: str, target: Path, *, max_bytes: int) -> None:
        """Copy an adapter's two files; see `Source.fetch`."""
        state = self._state(name)
        self._check_version(name, state, version)
        if not state.live:
            assert state.head.content is not None
            files = state.found.places.get(state.head.content, {})
        else:
            files = state.live
        missing = [file for file in FILES if file not in files]
        if missing:
            raise SourceError(f"{name!r} in {self.url} has no {missing[0]}: upload the adapter again")
        self._download(files, target, max_bytes)
        if state.live:  # a content's place never changes
            self._check_version(name, self._state(name), version)

    def _check_version(self, name: str, state: State, expected: str) -> None:
        if state.version != expected:
            raise ChangedMeanwhileError(
                f"{name!r} in {self.url} changed meanwhile (it is {state.version or 'not there'}, expected was "
                f"{expected or 'nothing'}): look at it again"
            )

    def _download(self, files: Mapping[str, StoredObject], target: Path, max_bytes: int | None) -> None:
        for file, limit in ((CONFIG_FILE, _MAX_CONFIG_BYTES), (WEIGHTS_FILE, max_bytes)):
            if file in files and limit is not None and files[file].nbytes > limit:
                raise AdapterError(f"{file} has {files[file].nbytes:,} bytes; at most {limit:,} are allowed")
        for file, item in files.items():
            with self._asking(f"copying {item.path}"):
                try:
                    self._fs.get_file(item.path, str(target / file))
                except FileNotFoundError as error:
                    raise ChangedMeanwhileError(f"{item.path} is not there any more: look again") from error
            if (target / file).stat().st_size != item.nbytes:
                raise ChangedMeanwhileError(f"{item.path} changed while it was copied: look again")

    def revisions(self, name: str) -> Strings:
        """Digests of what is kept of a name; see `History.revisions`."""
        return [digest_of_place(place) for place in self._state(name).history]

    def fetch_revision(self, name: str, digest: str, target: Path, *, max_bytes: int) -> None:
        """Copy a former content's two files; see `History.fetch_revision`."""
        state = self._state(name)
        unknown = f"{name!r} in {self.url} has no revision {digest:.12} any more"
        place = next((place for place in state.history if digest_of_place(place) == digest), None)
        if place is None:
            raise NoSuchRevisionError(unknown)
        try:
            self._download(state.found.places[place], target, max_bytes)
        except ChangedMeanwhileError as error:
            raise NoSuchRevisionError(unknown) from error

    # Changing

    def put(
        self, name: str, directory: Path, digest: str, *, expected: str | None = None, again: bool = False
    ) -> Listed:
        """Put a content in the place of what is there; see `Source.put`."""

        def change(state: State) -> Listed:
            history = merged(state.history, self._replaced(name, state), again=again, new=digest)
            place = self._upload(name, digest, {file: directory / file for file in FILES})
            head = Head(place, history, state.marks)
            etag = self._commit(name, state, head)
            self._clear(name, state, head)
            return Listed(head_version(etag), time.time(), (directory / WEIGHTS_FILE).stat().st_size, settled=True)

        return self._changed(name, expected, change)

    def remove(self, name: str, *, expected: str | None = None, purge: bool = False) -> None:
        """Move an adapter to its history, or delete both; see `Source.remove`."""

        def change(state: State) -> None:
            if state.listed is None and not (purge and state.found.head):
                return
            history = () if purge else merged(state.history, self._replaced(name, state))
            head = Head(None, history, state.marks)
            seen = self._find(f"{HISTORY}/{name}/") if purge else []  # what comes later is another change's
            etag = self._commit(name, state, head)
            self._clear(name, state, head)
            if purge:
                own_head = self._head_path(name)
                self._delete(item for item in seen if item.path != own_head)
                self._delete([StoredObject(own_head, etag, 0, 0)], conditional=True)
                self._heads.pop(name, None)

        self._changed(name, expected, change, begin=lambda state: state.listed is not None)

    def keep(self, name: str, digest: str, directory: Path) -> None:
        """Add a content that was replaced by hand; see `History.keep`.

        A head that newer plain objects stand in the place of is ended: it does not come back when they go.
        """

        def change(state: State) -> None:
            content = state.head.content
            ended = content is not None and len(state.live) == len(FILES)
            history = state.history
            if ended and content is not None:
                history = [*merged(history, [content], again=True)]
            there = {digest_of_place(place) for place in history} | (
                {digest_of_place(content)} if content else set()
            )
            uploaded = []
            if digest not in there:
                uploaded = [self._upload(name, digest, {file: directory / file for file in FILES})]
            if ended or uploaded:
                over = (None, None) if ended else state.head.over
                head = Head(None if ended else content, (*history, *uploaded), over)
                self._commit(name, state, head)
                self._clear(name, state, head, plain=False)

        self._changed(name, None, change)

    def prune(self, name: str, keep: int, protected: Collection[str] = ()) -> None:
        """Delete the oldest contents beyond a number; see `History.prune`.

        The head stays as it is, and with it the version: what is listed in it and not there does not count.
        """
        state = self._state(name)
        places = [place for place in state.history if digest_of_place(place) not in protected]
        for place in places[: max(0, len(places) - keep)]:
            self._delete(state.found.places[place].values())

    def _changed(
        self,
        name: str,
        expected: str | None,
        change: Callable[[State], T],
        begin: Callable[[State], bool] = lambda state: True,
    ) -> T:
        """Make a change, again if somebody else's came first and is no reason not to."""
        last: ChangedMeanwhileError | None = None
        for _ in range(_ATTEMPTS):
            state = self._state(name)
            if expected is not None:
                self._check_version(name, state, expected)
            try:
                if state.found.head is None and begin(state):
                    state = self._begun(name, state)
                return change(state)
            except ChangedMeanwhileError as error:
                last = error
        assert last is not None
        raise last

    def _begun(self, name: str, state: State) -> State:
        """With a head, if an empty one: what a change is conditional on must be a head that never comes again."""
        head = Head()
        etag = self._write(self._head_path(name), head.encode(), None)
        found = Found(
            state.found.plain, StoredObject(self._head_path(name), etag, time.time(), 0), state.found.places
        )
        return State(found, head)

    def _head_path(self, name: str) -> str:
        return f"{self._root}/{HISTORY}/{name}/{_HEAD_FILE}"

    def _replaced(self, name: str, state: State) -> Strings:
        """The places of what a change replaces, as it goes to the history; an upload is copied to one first."""
        content = state.head.content
        places = [content] if content is not None and state.found.is_whole(content) else []
        if not state.live:
            return places
        with tempfile.TemporaryDirectory(prefix="qaa-serve-") as name_of_copy:
            copy = Path(name_of_copy)
            self._download(state.live, copy, None)
            self._check_version(name, self._state(name), state.version)
            files = {file: copy / file for file in state.live}
            if len(files) < len(FILES):  # no content, but somebody's file
                self._upload(name, INCOMPLETE, files)
                return places
            digest = digest_of(copy)
            known = [place for place in (*state.history, *places) if digest_of_place(place) == digest]
            return [*places, known[0] if known else self._upload(name, digest, files)]

    def _upload(self, name: str, digest: str, files: Mapping[str, Path]) -> str:
        place = f"{digest}-{secrets.token_hex(8)}"
        for file, path in files.items():
            with self._asking(f"uploading {file} of {name!r}", writes=True):
                self._fs.put_file(str(path), f"{self._root}/{HISTORY}/{name}/{place}/{file}")
        return place

    def _commit(self, name: str, state: State, head: Head) -> str:
        """Replace the head, which makes the change; returns the new one's etag.

        Raises:
            ChangedMeanwhileError: if somebody else did first; the next change clears away what was uploaded.
        """
        assert state.found.head is not None
        try:
            etag = self._write(self._head_path(name), head.encode(), state.found.head.etag)
        except ChangedMeanwhileError:
            # A request that is repeated, since its answer was lost, meets what itself wrote.
            now = self._state(name)
            if now.found.head is None or now.head.token != head.token:
                raise
            etag = now.found.head.etag
        self._heads[name] = etag, head
        return etag

    def _clear(self, name: str, state: State, head: Head, plain: bool = True) -> None:
        """Delete what a head that was written has no use for; what cannot be deleted does no harm."""
        used = {head.content, *head.history}
        try:
            if plain and state.found.plain:
                now = self._sorted(self._find(f"{name}/"))[0].get(name, Found()).plain
                same = [item for file, item in now.items() if item == state.found.plain.get(file)]
                self._delete(same, conditional=True)
            unused = (files for place, files in state.found.places.items() if place not in used)
            self._delete(item for files in unused for item in files.values())
        except AdapterError as error:
            _log.warning("What %r in %s does not need any more stays there for now: %s", name, self.url, error)

    def _delete(self, items: Iterable[StoredObject], *, conditional: bool = False) -> None:
        """Delete objects; what is gone already, or is another one now if that matters, is passed over."""
        for item in items:
            with self._asking(f"deleting {item.path}", writes=True), suppress(FileNotFoundError):
                if not conditional:
                    self._fs.rm_file(item.path)
                elif self._protocol in _S3:
                    bucket, _, key = item.path.partition("/")
                    try:
                        self._fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=f'"{item.etag}"')
                    except OSError as error:
                        if _code(error) not in _CONFLICTS:
                            raise
                else:
                    with _checking:
                        now = self._at(item.path)
                        if now is not None and now.etag == item.etag:
                            self._fs.rm_file(item.path)

    # Settings

    def read_settings(self) -> tuple[bytes, str | None]:
        """SETTINGS_FILE's content and version; see `Source.read_settings`."""
        for _ in range(_ATTEMPTS):
            item = self._at(f"{self._root}/{SETTINGS_FILE}")
            if item is None:
                return b"", None
            with suppress(ChangedMeanwhileError):
                return self._read(item), item.etag
        raise SourceError(f"{SETTINGS_FILE} in {self.url} is being replaced in this moment: try again")

    def write_settings(self, content: bytes, expected: str | None) -> str:
        """Replace SETTINGS_FILE in one step; see `Source.write_settings`."""
        try:
            return self._write(f"{self._root}/{SETTINGS_FILE}", content, expected)
        except ChangedMeanwhileError:
            raw, version = self.read_settings()
            if version is not None and raw == content:  # a request that was repeated met what itself wrote
                return version
            raise

    def _write(self, path: str, content: bytes, expected: str | None) -> str:
        """Write a small object if the one with this etag, or none, is there; returns its etag."""
        changed = ChangedMeanwhileError(f"{path} changed meanwhile: look at it again")
        with self._asking(f"writing {path}", writes=True):
            if self._protocol in _S3:
                condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": f'"{expected}"'}
                try:
                    answer = self._fs.pipe_file(path, content, **condition)
                except OSError as error:
                    if _code(error) in _CONFLICTS:
                        raise changed from error
                    raise
                return bare(answer["ETag"])
            with _checking:
                now = self._at(path)
                if (now and now.etag) != expected:
                    raise changed
                self._fs.pipe_file(path, content)
                written = self._at(path)
            if written is None:
                raise changed
            return written.etag

    @contextmanager
    def _asking(self, what: str, *, writes: bool = False) -> Iterator[None]:
        """Say what went wrong in our own terms."""
        try:
            yield
        except AdapterError:
            raise
        except PermissionError as error:
            refused = f"{self._where()} refuses {what} ({error}): check its credentials and their rights"
            raise (ReadOnlyError if writes else SourceError)(refused) from error
        except FileNotFoundError as error:
            raise SourceError(
                f"{self._where()} is not there, found when {what} ({error}): check the name of the bucket"
            ) from error
        except Exception as error:  # the libraries below have many, not all of them OSErrors
            found = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise SourceError(
                f"{self._where()} cannot be used, {what} failed ({found}): check that it can be reached from "
                "here, and its credentials"
            ) from error

    def _where(self) -> str:
        endpoint = getattr(getattr(getattr(self._fs, "_s3", None), "meta", None), "endpoint_url", None)
        return f"{self.url} (at {endpoint})" if endpoint else self.url


def _file_system(protocol: str, options: dict[str, Any]) -> Any:
    """A file system of its own, without caches of listings; an S3 that is not there is found out in seconds."""
    import fsspec

    options = {"use_listings_cache": False, "skip_instance_cache": True, **options}
    if protocol in _S3:
        ours = {"connect_timeout": 3, "read_timeout": 20, "retries": {"total_max_attempts": 2}}
        given = options.get("config_kwargs") or fsspec.config.conf.get(protocol, {}).get("config_kwargs") or {}
        options["config_kwargs"] = {**ours, **given}
        options.setdefault("max_concurrency", 4)  # parts of 50 MiB in memory
    file_system = fsspec.filesystem(protocol, **options)
    if protocol in _S3:
        file_system.retries = 2
    return file_system


def _code(error: BaseException) -> str:
    """S3's name of what went wrong."""
    response = getattr(error.__cause__ or error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))

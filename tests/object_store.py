"""A real S3 server in this process, and a process that is killed on its way through a change."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import s3fs  # noqa: F401  # here, so that the process that is killed need not: fsspec would import it there
from aiobotocore.session import AioSession

from qaa_serve.adapters import CONFIG_FILE, WEIGHTS_FILE, digest_of
from qaa_serve.sources.objects import ObjectSource

KEY = {"key": "testing", "secret": "testing"}

#: Has read botocore's descriptions once, which takes longer than most tests; never used for anything else.
SESSION = AioSession()


class Server:
    """moto's S3, one request at a time, as its check of a condition and the write are two steps.

    Attributes:
        denied: methods that are answered with AccessDenied.
        lose: asked of a method and path; if true, the request is done and its answer is lost.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import create_backend_app
        from werkzeug.serving import make_server

        self.denied: set[str] = set()
        self.lose: Callable[[str, str], bool] = lambda method, path: False
        self.requests: list[tuple[str, str]] = []
        self._app = create_backend_app("s3")
        self._one = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.options = {"endpoint_url": f"http://127.0.0.1:{self._server.server_port}", **KEY}

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if method in self.denied:
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        with self._one:
            if not self.lose(method, path):
                return list(self._app(environ, start))
            list(self._app(environ, lambda *_: None))
        start("500 Internal Server Error", [("Content-Type", "application/xml")])
        return [b"<Error><Code>InternalError</Code><Message>lost</Message></Error>"]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        # An engine that vLLM starts in this process looks through all modules, and flask's stand that badly.
        for name in list(sys.modules):
            if name.partition(".")[0] in ("flask", "flask_cors", "moto", "werkzeug"):
                del sys.modules[name]


class Store:
    """A prefix of a store: sources of it, and what a person can do with it by hand."""

    def __init__(self, url: str, options: dict[str, Any]):
        self.url, self.options = url, options
        self.fs = fsspec.filesystem(
            url.partition("://")[0], skip_instance_cache=True, use_listings_cache=False, **with_session(options)
        )

    def source(self, **more: Any) -> ObjectSource:
        return ObjectSource(self.url, storage_options={**with_session(self.options), **more})

    def upload(self, directory: Path, name: str, files: tuple[str, ...] = (CONFIG_FILE, WEIGHTS_FILE)) -> None:
        for file in files:
            self.fs.pipe_file(f"{self.url}/{name}/{file}", (directory / file).read_bytes())

    def delete(self, name: str) -> None:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            self.fs.rm_file(f"{self.url}/{name}/{file}")

    def everything(self) -> set[str]:
        root = self.fs._strip_protocol(self.url)
        return {path[len(root) + 1 :] for path in self.fs.find(root)}


def with_session(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "session": SESSION} if options else {}


def new_store(kind: str, server: Server) -> Store:
    bucket = f"bucket-{uuid.uuid4().hex}"
    if kind == "memory":
        return Store(f"memory://{bucket}/some/prefix", {})
    store = Store(f"s3://{bucket}/some/prefix", server.options)
    store.fs.mkdir(bucket)
    return store


def make_files(directory: Path, number: int) -> tuple[Path, str]:
    """Two files that are no adapter, which a source need not know, and their digest."""
    directory = directory / str(number)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps({"number": number}))
    (directory / WEIGHTS_FILE).write_bytes(b"weights" * (number + 1))
    return directory, digest_of(directory)


# The process that is killed: forks for each change, so that the imports are paid once.


def run_changes() -> None:
    """Read one change a line as JSON: [url, options, n, method, arguments]; answer whether it was killed."""
    asyncio.run(_read_descriptions())
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            url, options, n, method, args, kwargs = json.loads(line)
            source = ObjectSource(url, storage_options=with_session(options))
            _kill_at(source._fs, n)
            args = [Path(arg) if str(arg).startswith("/") else arg for arg in args]
            getattr(source, method)(*args, **kwargs)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


async def _read_descriptions() -> None:
    """Have the session read what a client needs, which every fork then has."""
    async with SESSION.create_client(
        "s3", region_name="us-east-1", aws_access_key_id="", aws_secret_access_key=""
    ):
        pass


def _kill_at(fs: Any, n: int) -> None:
    left = [n]

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return call(*args, **kwargs)

        return counted

    for method in ("pipe_file", "put_file", "rm_file", "call_s3"):  # all that writes or deletes
        setattr(fs, method, wrap(getattr(fs, method)))


@contextmanager
def killable(tests: Path) -> Iterator[Callable[..., bool]]:
    """A function that makes a change in a process that dies before its n-th request that writes or deletes."""
    import subprocess

    process = subprocess.Popen(
        [sys.executable, "-c", "import object_store; object_store.run_changes()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def change(store: Store, n: int, method: str, *args: Any, **kwargs: Any) -> bool:
        args = tuple(str(arg) if isinstance(arg, Path) else arg for arg in args)
        print(json.dumps([store.url, store.options, n, method, args, kwargs]), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        assert code in (0, 9), f"{method} ended with {code}"
        return code == 9

    try:
        yield change
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()

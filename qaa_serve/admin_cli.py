"""`qaa-serve adapters`: what a running server serves, and changing it."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qaa_serve.server.runfile import RunningServer, find_server, list_servers

DESCRIPTION = """\
Look at and change what a running server serves. Changes are made in the server's source of adapters, so every
server that follows it has them.

  qaa-serve adapters list                      all adapters
  qaa-serve adapters show NAME                 one, with its revisions, memory and use
  qaa-serve adapters put NAME DIR              upload an adapter directory and serve it under a name
  qaa-serve adapters put NAME hf://ORG/REPO    the same from the Hugging Face hub (--adapter-repos of the server)
  qaa-serve adapters delete NAME               serve it no more; --purge deletes its history too
  qaa-serve adapters rollback NAME [REVISION]  serve a former revision again (left out: the one before)
  qaa-serve adapters load NAME [REVISION]      bring it into the engine's memory before it is asked for
  qaa-serve adapters pin NAME [REVISION]       keep it in the engine's memory
  qaa-serve adapters unpin NAME [REVISION]     undo that
  qaa-serve adapters aliases                   names that stand for others
  qaa-serve adapters alias NAME TARGET...      have one: `alias chat support`, or with shares
                                               `alias chat support@3850363cda0c=95 support@77a5ab3934d1=5`
  qaa-serve adapters unalias NAME              end one
  qaa-serve adapters move-state STATE SOURCE   what an older version kept in its state directory, into a source

The admin key is taken from --admin-key-file, else from QAA_SERVE_ADMIN_KEY, else, for a server on this machine,
from the file that the server names when it is ready."""

_FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}

#: An upload of the largest adapter is checked, copied and loaded before it is answered.
_TIMEOUT_S = 600.0


class _FailedError(Exception):
    """What went wrong, for people."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 if the server refuses or is not there, 2 for a wrong command."""
    args = _make_parser().parse_args(list(arguments))
    try:
        if args.command == "move-state":
            return _move_state(args)
        answer = _ask(args)
    except _FailedError as error:
        print(f"qaa-serve adapters: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(answer, indent=1))
    elif args.command == "list":
        _print_list(answer["data"])
    elif args.command == "aliases":
        for alias in answer["data"] or [{"id": "no aliases", "to": {}}]:
            _print_alias(alias)
    elif args.command == "alias":
        _print_alias(answer)
    elif args.command in ("delete", "unalias"):
        print(f"{args.name} is served no more")
    else:
        _print_one(answer)
    return 0


def _make_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="where the server is, or unix:PATH (default: http://127.0.0.1:8000)",
    )
    common.add_argument("--admin-key-file", metavar="FILE", type=Path, help="file with the admin key")
    common.add_argument("--json", action="store_true", help="print what the server answers")
    parser = argparse.ArgumentParser(
        prog="qaa-serve adapters", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", parents=[common], help="all adapters")
    commands.add_parser("aliases", parents=[common], help="names that stand for others")
    for name, about in (
        ("show", "one adapter"),
        ("put", "upload and serve"),
        ("delete", "serve no more"),
        ("alias", "have a name stand for others"),
        ("unalias", "end an alias"),
    ):
        commands.add_parser(name, parents=[common], help=about).add_argument("name")
    commands.choices["put"].add_argument("directory", help="an adapter directory, or hf://ORG/REPO@REVISION")
    commands.choices["delete"].add_argument("--purge", action="store_true", help="delete its history too")
    commands.choices["alias"].add_argument(
        "to", nargs="+", metavar="TARGET[=SHARE]", help="NAME or NAME@REVISION; shares are relative to their sum"
    )
    for name, about in (
        ("rollback", "serve an earlier revision"),
        ("load", "bring into memory"),
        ("pin", "keep in memory"),
        ("unpin", "undo pin"),
    ):
        command = commands.add_parser(name, parents=[common], help=about)
        command.add_argument("name")
        command.add_argument("revision", nargs="?", help="name@digest or digest")
    for name in ("put", "delete", "rollback"):
        commands.choices[name].add_argument(
            "--if-match", metavar="REVISION", help="only if this revision is served now (`show` has it)"
        )
    move = commands.add_parser("move-state", help="from an older version's state directory into a source")
    move.add_argument("state", type=Path)
    move.add_argument("source", help="a directory, or s3://BUCKET/PREFIX: what --adapters names")
    return parser


def _ask(args: argparse.Namespace) -> Any:
    """The server's answer.

    Raises:
        _FailedError: if there is none, or it is an error.
    """
    import httpx

    found = find_server(args.url)
    url = args.url if found is None else found.admin_url
    unix = url.startswith("unix:")
    kind = "aliases" if "alias" in args.command else "adapters"
    path = f"/v1/{kind}" + (f"/{quote(args.name, safe='')}" if hasattr(args, "name") else "")
    method, request = "GET", {}  # type: str, dict[str, Any]
    if args.command == "put":
        method, request = "PUT", {"files": _files(Path(args.directory))} if "://" not in args.directory else {
            "json": {"source": args.directory}
        }  # fmt: skip
    elif args.command == "alias":
        method, request = "PUT", {"json": {"to": _shares(args.to)}}
    elif args.command in ("delete", "unalias"):
        method, request = "DELETE", {"params": {"purge": "true"}} if getattr(args, "purge", False) else {}
    elif args.command not in ("list", "show", "aliases"):
        method, path = "POST", f"{path}/{args.command}"
        request = {"json": {"revision": args.revision}}
    if getattr(args, "if_match", None) is not None:
        request["headers"] = {"If-Match": f'"{args.if_match}"'}
    try:
        with httpx.Client(
            base_url="http://localhost" if unix else url if "://" in url else f"http://{url}",
            transport=httpx.HTTPTransport(uds=url.removeprefix("unix:")) if unix else None,
            headers={"Authorization": f"Bearer {_key(args, found)}"},
            timeout=_TIMEOUT_S,
        ) as client:
            response = client.request(method, path, **request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _FailedError(f"no server answers at {url} ({error}): start one, or give its --url") from error
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_success and isinstance(answer, dict):
        return answer
    told = answer.get("error") if isinstance(answer, dict) else None
    message = told.get("message") if isinstance(told, dict) else " ".join(response.text[:200].split())
    raise _FailedError(f"{message or 'no reason was given'} (status {response.status_code})")


def _key(args: argparse.Namespace, found: RunningServer | None) -> str:
    file = args.admin_key_file
    if file is None:
        if key := os.environ.get("QAA_SERVE_ADMIN_KEY", "").strip():
            if not re.fullmatch("[!-~]+", key):  # an error of the HTTP client would show it
                raise _FailedError("QAA_SERVE_ADMIN_KEY holds what no header can carry: it is no key")
            return key
        if found is None or found.admin_key_file is None:
            if found:
                why = "its keys were given by hand:"
            elif others := ", ".join(server.url for server in list_servers()):
                why = f"no server on this machine says it is there, but at {others}: give --url, or"
            else:
                why = "no server on this machine says it is there: start one, or"
            raise _FailedError(
                f"no admin key for {args.url}: {why} give --admin-key-file FILE or set QAA_SERVE_ADMIN_KEY"
            )
        file = Path(found.admin_key_file)
    from qaa_serve.server.keys import first_key

    try:
        return first_key(file)
    except ValueError as error:
        raise _FailedError(str(error)) from error


def _files(directory: Path) -> dict[str, tuple[str, bytes]]:
    try:
        return {part: (name, (directory / name).read_bytes()) for part, name in _FILES.items()}
    except OSError as error:
        raise _FailedError(f"{directory} is no adapter directory: {error.strerror}: {error.filename}") from error


def _shares(targets: Sequence[str]) -> str | dict[str, int]:
    """What an alias leads to, as the server takes it."""
    if len(targets) == 1 and "=" not in targets[0]:
        return targets[0]
    shares: dict[str, int] = {}
    for target in targets:
        name, _, share = target.partition("=")
        if not share.isdecimal():
            raise _FailedError(
                f"{target!r} has no share: write TARGET=SHARE with a whole number for each of several"
            )
        if name in shares:
            raise _FailedError(f"{name!r} is given twice: give each target once, with its share")
        shares[name] = int(share)
    return shares


def _move_state(args: argparse.Namespace) -> int:
    """Put what an older version kept in its state directory into a source, and say what was done."""
    from qaa_serve.adapters import AdapterError
    from qaa_serve.older_state import move_state
    from qaa_serve.sources import open_source

    try:
        for line in move_state(args.state, open_source(args.source)):
            print(line)
    except (AdapterError, OSError, ValueError) as error:
        raise _FailedError(str(error)) from error
    return 0


def _print_alias(alias: dict[str, Any]) -> None:
    names = ((*target.partition("@"), share) for target, share in alias["to"].items())
    shown = "  ".join(f"{name}{at}{digest[:12]}={share}" for name, at, digest, share in names)
    print(f"{alias['id']}  {shown}".rstrip())


def _print_list(adapters: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "state", "kind", "revision", "bytes", "running", "waiting", "reason", box=None)
    for adapter in adapters:
        size = (adapter["bytes"] or {}).get("store", 0)
        rejection = adapter["rejection"] or {}
        table.add_row(
            adapter["id"], adapter["state"], adapter["kind"] or "", (adapter["revision"] or "").partition("@")[2],
            f"{size:,}", str(adapter["running"]), str(adapter["waiting"]), rejection.get("reason", ""),
        )  # fmt: skip
    Console(highlight=False, markup=False, emoji=False).print(table)
    if not adapters:
        print("no adapters")


def _print_one(adapter: dict[str, Any]) -> None:
    print(f"{adapter['id']}: {adapter['state']}" + (f", {adapter['revision']}" if adapter["revision"] else ""))
    for revision in adapter["revisions"]:
        marks = [revision["state"], *(mark for mark in ("loaded", "pinned") if revision[mark])]
        print(f"  {revision['revision']}  {', '.join(marks)}, {revision['bytes']['store']:,} bytes")
    if adapter["rejection"]:
        print(f"  not served: {adapter['rejection']['reason']}")

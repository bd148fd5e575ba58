"""What a server says when it is ready: where it is, what it serves, how to try it, and its admin key."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from rich.console import Console

from qaa_serve.registry import Catalogue
from qaa_serve.server.runfile import RunningServer


def announce(catalogue: Catalogue, args: argparse.Namespace, server: RunningServer) -> Path | None:
    """Say that the server is ready, and how to try it.

    Returns:
        the file in which programs on this machine find the server; None if it cannot be written.
    """
    base = (args.served_model_name or [args.model])[0]
    names = sorted(islice(catalogue.entries, 20))
    kinds = {name: f" ({r.kind})" for name in names if (r := catalogue.entries[name].current) is not None}
    shown = ", ".join(f"{name}{kinds.get(name, '')}" for name in names) or "none"
    if (more := len(catalogue.entries) - len(names)) > 0:
        shown += f", and {more:,} more"
    example = names[0] if names else base
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": example, "temperature": 0, "messages": [question]}
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"\n[bold green]Ready[/bold green] on {server.url}   base: {base}   adapters: {shown}   "
        f"of {catalogue.contents.source.url}"
    )
    url = f"--unix-socket {args.uds} http://localhost" if args.uds else server.url
    key = "-H 'Authorization: Bearer <your key>' " if args.clients_need_a_key else ""
    console.print(
        f"Try:  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'",
        markup=False,
    )
    run_file = None
    try:
        run_file = server.write()
    except OSError as error:
        console.print(f"[yellow]Warning:[/yellow] `qaa-serve adapters` does not find this server: {error}")
    where = "" if server.url.endswith(":8000") else f" --url {server.url}"
    if server.admin_key_file is not None:
        console.print(
            f"Admin key: {server.admin_key_file}   Change what is served: qaa-serve adapters list{where}\n"
        )
    else:
        console.print(f"Change what is served: qaa-serve adapters list{where} --admin-key-file FILE\n")
    return run_file

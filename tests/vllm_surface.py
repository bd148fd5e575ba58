"""What qaa-serve uses of vLLM, read from vLLM's sources without importing them.

    python tests/vllm_surface.py VERSION [SOURCES]   writes tests/vllm_surface/VERSION.json

SOURCES is a directory that has `vllm`, such as an unpacked wheel or site-packages; without it the wheel of that
version is fetched by pip (336 MB for 0.33.0), and its Python files alone are unpacked. The questions come from our
own code: its imports, vLLM's settings in the environment, the options it looks at, and the patch table of port.py.
tests/test_vllm_versions.py holds the answers of every version to what we expect.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).with_suffix("")
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from vllm_qaa import port

from qaa_serve.server.options import add_options

#: What we call or override beside the patch table, as (module, "name" or "Class.method"); parameters that we name.
CALLED: dict[tuple[str, str], tuple[str, ...]] = {
    ("vllm.engine.arg_utils", "AsyncEngineArgs.from_cli_args"): ("args",),
    ("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config"): ("usage_context",),
    ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state"): ("engine_client", "state", "args"),
    ("vllm.entrypoints.launchers.app", "build_app"): ("args",),
    ("vllm.entrypoints.launchers.launcher", "setup_server"): ("args", "reuse_port"),
    ("vllm.entrypoints.launchers.utils.server_utils", "get_uvicorn_log_config"): ("args",),
    ("vllm.entrypoints.launchers.utils.ssl", "SSLCertRefresher"): (
        "ssl_context",
        "key_path",
        "cert_path",
        "ca_path",
    ),
    ("vllm.lora.lora_model", "LoRAModel"): ("lora_model_id", "rank", "loras"),
    ("vllm.lora.lora_weights", "LoRALayerWeights"): (
        "module_name",
        "rank",
        "lora_alpha",
        "lora_a",
        "lora_b",
        "scaling",
    ),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.deactivate_adapter"): ("adapter_id",),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.get_adapter"): ("adapter_id",),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.list_adapters"): (),
    ("vllm.lora.peft_helper", "PEFTHelper.from_local_dir"): ("lora_path", "max_position_embeddings"),
    ("vllm.lora.peft_helper", "PEFTHelper.validate_legal"): ("lora_config",),
    ("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_expand"): (
        "y",
        "x",
        "lora_b_stacked",
        "output_slices",
        "offset_start",
        "add_inputs",
    ),
    ("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_shrink"): ("y", "x", "lora_a_stacked", "scale"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.from_vllm_config"): (
        "vllm_config",
        "usage_context",
        "enable_log_requests",
        "aggregate_engine_logging",
        "stat_loggers",
        "disable_log_stats",
    ),
    ("vllm.v1.engine.async_llm", "AsyncLLM.generate"): ("self", "prompt", "sampling_params", "lora_request"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.encode"): ("self", "lora_request"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc"): ("method", "args"),
    ("vllm.v1.engine.async_llm", "AsyncLLM.remove_lora"): ("lora_id",),
    ("vllm.v1.engine.async_llm", "AsyncLLM.reset_mm_cache"): (),
    ("vllm.v1.engine.async_llm", "AsyncLLM.shutdown"): ("timeout",),
    ("vllm.v1.engine.output_processor", "OutputProcessor.has_unfinished_requests"): (),
}

#: What stands in a record where our code asks for something that the version does not have.
ABSENT = None


class Sources:
    """vLLM's Python files under a directory."""

    def __init__(self, root: Path):
        self._root = root

    @cache  # noqa: B019 - a Sources lives as long as the script
    def tree(self, module: str) -> ast.Module | None:
        path = self._root.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def is_package(self, module: str) -> bool:
        return self._root.joinpath(*module.split("."), "__init__.py").is_file()

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """(module, definition) of a module's global, through imports; the module itself for a submodule."""
        tree = self.tree(module)
        if tree is None:
            return None
        for statement in statements(tree.body):
            if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if statement.name == name:
                    return module, statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return module, statement
            elif isinstance(statement, ast.ImportFrom):
                place = self._absolute(module, statement)
                for alias in statement.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        # What another package has is not looked at.
                        inside = place.partition(".")[0] == "vllm"
                        found = self.find(place, name if alias.name == "*" else alias.name) if inside else None
                        if found is not None or (not inside and alias.name != "*"):
                            return found or (place, statement)
        whole = self.tree(f"{module}.{name}")
        return None if whole is None else (f"{module}.{name}", whole)

    def _absolute(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        parts = module.split(".")
        kept = parts[: len(parts) - statement.level + self.is_package(module)]
        return ".".join([*kept, *([statement.module] if statement.module else [])])

    def follow(self, module: str, path: str) -> tuple[str, ast.AST] | None:
        """The definition of "name", "Class.method" or "Class.attribute.method", through base classes."""
        first, *rest = path.split(".")
        found = self.find(module, first)
        for part in rest:
            if found is None:
                return None
            found = self._member(*found, part)
        return found

    def _member(self, module: str, node: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        if not isinstance(node, ast.ClassDef):
            return None
        for statement in statements(node.body):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and statement.name == name:
                return module, statement
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    # A class that is kept in an attribute; other attributes are what they are.
                    value = (
                        self.find(module, statement.value.id) if isinstance(statement.value, ast.Name) else None
                    )
                    return value or (module, statement)
        for base in node.bases:
            above = self._class(module, base)
            found = None if above is None else self._member(*above, name)
            if found is not None:
                return found
        return None

    def _class(self, module: str, base: ast.expr) -> tuple[str, ast.AST] | None:
        if isinstance(base, ast.Subscript):  # Generic[...]
            base = base.value
        return self.find(module, base.id) if isinstance(base, ast.Name) else None

    def describe(self, module: str, path: str) -> Any:
        """Parameter names of a function or of a class's making, else what kind of thing it is; ABSENT."""
        found = self.follow(module, path)
        if found is None:
            return ABSENT
        module, node = found
        if isinstance(node, ast.ClassDef):
            made = self._member(module, node, "__init__")
            fields = self._fields(module, node)
            return {"class": parameters(made[1])[1:] if made else fields}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            bound = any(isinstance(mark, ast.Name) and mark.id == "classmethod" for mark in node.decorator_list)
            return {"function": parameters(node)[bound:]}
        return "module" if isinstance(node, ast.Module) else "value"

    def _fields(self, module: str, node: ast.ClassDef) -> list[str]:
        """Of a dataclass, a structure of msgspec or a model of pydantic, those of its bases first."""
        names: list[str] = []
        for base in node.bases:
            above = self._class(module, base)
            if above is not None and isinstance(above[1], ast.ClassDef):
                names += self._fields(above[0], above[1])
        names += [
            statement.target.id
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ]
        return list(dict.fromkeys(names))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or class, those under `if` and `try` too; the last of a name first, as at run time."""
    for statement in reversed(body):
        for part in ("orelse", "finalbody", "body"):
            if isinstance(statement, ast.If | ast.Try):
                yield from statements(getattr(statement, part, []))
        yield statement


def parameters(node: ast.AST) -> list[str]:
    """As inspect.signature has them."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    names += [given.vararg.arg] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    return names + ([given.kwarg.arg] if given.kwarg else [])


@cache
def our_code() -> dict[Path, list[ast.AST]]:
    """Our files with everything that stands in each."""
    files = sorted(path for folder in ("qaa_serve", "plugins") for path in (ROOT / folder).rglob("*.py"))
    return {path: [*ast.walk(ast.parse(path.read_text()))] for path in files}


def imports() -> Iterator[tuple[str, str]]:
    """(module, name) of everything that our code imports from vLLM; the name is empty for a whole module."""
    for nodes in our_code().values():
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from ((node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "vllm")


def attributes_of(name: str, folder: str = "") -> set[str]:
    """What our code asks of a variable or module of that name, in the files whose path has the folder."""
    return {
        node.attr
        for path, nodes in our_code().items()
        if folder in path.parts or not folder
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def asked_options() -> set[str]:
    """Options of vLLM that our server looks at."""
    ours = argparse.ArgumentParser()
    add_options(ours)
    # The last is put among the options by settings.resolve, for other modules of the server.
    return attributes_of("args", "server") - {action.dest for action in ours._actions} - {"clients_need_a_key"}


def questions() -> list[tuple[str, str]]:
    asked = {*imports(), *CALLED}
    asked |= {(place, name) for name, places in port.MOVED.items() for place in places}
    for seam in (*port.SEAMS, *port.SERVER_SEAMS):
        asked |= {(seam.module, path) for path in (seam.attribute, *seam.methods)}
    return sorted(asked)


def read(root: Path) -> dict[str, Any]:
    """The record of the vLLM under a directory."""
    sources = Sources(root)
    names = sources.find("vllm.envs", "environment_variables")
    assert names is not None
    known = {node.value for node in ast.walk(names[1]) if isinstance(node, ast.Constant)}
    known_options = options(sources)
    answers: dict[str, Any] = {}
    for module, name in questions():
        if name:
            answers[f"{module}:{name}"] = sources.describe(module, name)
        else:
            answers[module] = ABSENT if sources.tree(module) is None else "module"
    return {
        "names": answers,
        "environment": {name: name in known for name in sorted(attributes_of("envs"))},
        "options": {name: name in known_options for name in sorted(asked_options())},
    }


def options(sources: Sources) -> set[str]:
    """vLLM's options of a server, as its parser's results have them."""
    place = next(place for place in port.MOVED["make_arg_parser"] if sources.tree(place) is not None)
    tree = sources.tree(place)
    assert tree is not None
    texts = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    found = {
        text.removeprefix("--").replace("-", "_") for text in texts if text.isidentifier() or text[:2] == "--"
    }
    for module, name in ((place, "FrontendArgs"), ("vllm.engine.arg_utils", "AsyncEngineArgs")):
        found |= set(sources.describe(module, name)["class"])
    return found


def fetch(version: str, folder: Path) -> Path:
    """Unpack the Python files of the CUDA build's wheel, which pip fetches from its index."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), f"vllm=={version}"], check=True)
    with zipfile.ZipFile(next(folder.glob("vllm-*.whl"))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    parser.add_argument("sources", type=Path, nargs="?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        record = read(args.sources or fetch(args.version, Path(temporary)))
    RECORDS.mkdir(exist_ok=True)
    parts = [
        f"{json.dumps(part)}: {{\n"
        + ",\n".join(f" {json.dumps(key)}: {json.dumps(answers[key])}" for key in answers)
        + "}"
        for part, answers in record.items()
    ]
    (RECORDS / f"{args.version}.json").write_text("{" + ",\n".join(parts) + "}\n")


if __name__ == "__main__":
    main()

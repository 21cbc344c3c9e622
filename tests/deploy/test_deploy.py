"""What `deploy/` says is true of the code: keys, commands, metrics, users, folders, sizes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from kvfabric_router.metrics import RouterMetrics

from kvfabric import cli
from kvfabric.config import NodeConfig, RouterConfig, load
from kvfabric.errors import ConfigError
from kvfabric.metrics import NODE_METRICS
from kvfabric.pki import CA_FILE, CERT_FILE, KEY_FILE
from kvfabric.registry.redis.store import ACL_RULES

TOP = Path(__file__).parents[2]
DEPLOY = TOP / "deploy"
CONFIGURATIONS = sorted(DEPLOY.rglob("*.toml"))
YAML_FILES = sorted(DEPLOY.rglob("*.yaml"))
README = (DEPLOY / "README.md").read_text()
FROM_PROMETHEUS = {"up": {"job", "instance"}}


def test_nothing_was_forgotten() -> None:
    """The parametrised tests below have something to look at."""
    assert len(CONFIGURATIONS) == 3
    assert len(YAML_FILES) >= 8


# --- configurations, variables, commands ---


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.parent.name)
def test_configurations_load_and_want_handles(file: Path) -> None:
    """By the loader that the processes use; nobody's engines use the cache without a router's word."""
    node = load(NodeConfig, file=file, flags={})
    assert node.require_handle
    load(RouterConfig, file=file, flags={})


def test_a_key_that_does_not_exist_is_found(tmp_path: Path) -> None:
    """Twin: the loader refuses what nobody reads."""
    file = tmp_path / "kvfabric.toml"
    file.write_text(CONFIGURATIONS[0].read_text() + "\nno_such_key = 1\n")
    with pytest.raises(ConfigError, match="no_such_key"):
        load(RouterConfig, file=file, flags={})


def test_the_fleet_that_the_systemd_configuration_sketches(tmp_path: Path) -> None:
    """What is commented out there is right too."""
    text = (DEPLOY / "systemd" / "kvfabric.toml").read_text()
    sketch = re.sub(r"^# ?", "", text[text.index("# [fabric]") :], flags=re.MULTILINE)
    file = tmp_path / "kvfabric.toml"
    file.write_text(sketch)
    node = load(NodeConfig, file=file, flags={})
    assert node.directory.startswith("rediss://")
    assert node.listen
    assert node.ucx_net_devices


def _documents(file: Path) -> list[Any]:
    return [one for one in yaml.safe_load_all(file.read_text()) if one is not None]


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: file.name)
def test_yaml_reads(file: Path) -> None:
    assert _documents(file)


def test_every_variable_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVFABRIC_* in manifests and README are what the loader reads; the engine's is the connector's."""
    text = "".join(file.read_text() for file in [*YAML_FILES, DEPLOY / "README.md"])
    found = set(re.findall(r"KVFABRIC_(?:NODE|ROUTER|ENGINE)_\w+", text))
    assert {"KVFABRIC_NODE_DIRECTORY", "KVFABRIC_ENGINE_NODE_SOCKET"} <= found
    for name in found - {"KVFABRIC_ENGINE_NODE_SOCKET"}:
        monkeypatch.setenv(name, "x")
    node = load(NodeConfig, file=None, flags={})
    assert (node.node_id, node.directory, node.advertise) == ("x", "x", "x")
    assert load(RouterConfig, file=None, flags={}).directory == "x"


def _commands() -> Iterator[str]:
    """Every `kvfabric ...` that is run: in units, manifests, image and README."""
    for unit in sorted(DEPLOY.rglob("*.service")):
        for command in re.findall(r"/bin/kvfabric ([^'&\n]*)", unit.read_text()):
            yield command
    for block in re.findall(r"```\n(.*?)```", README, flags=re.DOTALL):
        for command in re.findall(r"^(?:.*-- )?kvfabric (.*)$", block, flags=re.MULTILINE):
            yield command
    for command in re.findall(r"exec node kvfabric ([^`\n]*)", README):
        yield command
    for pod in _pods():
        for container in pod["containers"]:
            if container["image"] == "kvfabric":
                yield shlex.join(container["args"])
    compose = _compose()
    for name in ("node", "router"):
        yield shlex.join(compose["services"][name]["command"])


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parsers of the commands themselves; nothing is run."""
    ran: list[str] = []

    def note(name: str, command: cli.Command, args: Any) -> int:
        ran.append(name)
        return 0

    monkeypatch.setattr(cli, "_run", note)
    commands = list(_commands())
    for command in commands:
        assert cli.main(shlex.split(command)) == 0, command
    assert len(ran) == len(commands) >= 12
    assert {"node", "router", "pki", "tenant"} <= set(ran)
    assert "--takeover" in " ".join(commands)


def test_a_command_that_does_not_exist_is_found() -> None:
    """Twin."""
    with pytest.raises(SystemExit):
        cli.main(["tenant", "creat", "acme"])


# --- units ---


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("unit", sorted(DEPLOY.rglob("*.service")), ids=lambda unit: unit.stem)
def test_systemd_reads_the_units(unit: Path, tmp_path: Path) -> None:
    """Without a word, and finds a misspelt directive."""

    def verify(text: str) -> str:
        file = tmp_path / unit.name
        file.write_text(text.replace("/opt/kvfabric/bin/kvfabric", sys.executable))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr + ("" if done.returncode == 0 else f"exit code {done.returncode}")

    text = unit.read_text()
    assert verify(text) == ""
    assert "LimitNOFIL" in verify(text.replace("LimitNOFILE", "LimitNOFIL"))


# --- the image and compose ---


def _compose() -> Any:
    return _documents(DEPLOY / "docker" / "compose.yaml")[0]


def test_the_image_is_built_of_what_is_there() -> None:
    """Sources that its context lets through, extras and a console script that the project has."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    let_in = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, flags=re.MULTILINE)
    for source in " ".join(copied).split():
        assert (TOP / source).exists(), source
        assert f"!{source}" in let_in
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = re.search(r"ARG EXTRAS=(\S+)", text)
    assert extras
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert re.findall(r'ENTRYPOINT \["(\w+)"\]', text) == ["kvfabric"]
    assert "kvfabric" in project["scripts"]
    needed = {project["readme"], *project["license-files"]} - {"benchmarks/traces/LICENSE"}
    assert needed <= set(" ".join(copied).split())


def test_compose_names_what_it_has() -> None:
    """Volumes, and the folders in which sockets and state are."""
    compose = _compose()
    node = load(NodeConfig, file=DEPLOY / "docker" / "kvfabric.toml", flags={})
    for service in compose["services"].values():
        names = {volume.split(":")[0] for volume in service["volumes"]}
        assert {name for name in names if not name.startswith(".")} <= set(compose["volumes"])
        assert all((DEPLOY / "docker" / name).is_file() for name in names if name.startswith("."))
    targets = {volume.split(":")[1] for volume in compose["services"]["node"]["volumes"]}
    assert {str(node.state_dir), str(node.socket_path.parent)} <= targets
    assert str(Path(node.directory.removeprefix("unix://")).parent) in targets
    assert compose["services"]["node"]["pid"] == "host"


# --- Kubernetes ---


def _objects() -> list[Any]:
    folder = DEPLOY / "kubernetes"
    files = [one for one in folder.glob("*.yaml") if one.name != "kustomization.yaml"]
    return [document for file in sorted(files) for document in _documents(file)]


def _pods() -> list[Any]:
    return [workload["spec"]["template"]["spec"] for workload in _workloads().values()]


def _workloads() -> dict[str, Any]:
    kinds = ("DaemonSet", "Deployment", "StatefulSet")
    return {one["metadata"]["name"]: one for one in _objects() if one["kind"] in kinds}


def test_the_kustomization_names_every_file() -> None:
    """Monitoring is an option, which is said there."""
    text = (DEPLOY / "kubernetes" / "kustomization.yaml").read_text()
    named = set(yaml.safe_load(text)["resources"])
    there = {file.name for file in (DEPLOY / "kubernetes").glob("*.yaml")}
    assert there == named | {"kustomization.yaml", "monitoring.yaml"}
    assert "# - monitoring.yaml" in text
    if shutil.which("kubectl"):
        folder = str(DEPLOY / "kubernetes")
        subprocess.run(["kubectl", "kustomize", folder], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", sorted(_workloads()))
def test_a_workload_fits_together(name: str) -> None:
    """Mounts have volumes, probes have ports, selectors select, and nothing runs as root but who must."""
    spec = _workloads()[name]["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    volumes = {one["name"] for one in pod["volumes"]}
    volumes |= {one["metadata"]["name"] for one in spec.get("volumeClaimTemplates", ())}
    for container in [*pod["containers"], *pod.get("initContainers", ())]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
    for container in pod["containers"]:
        ports = {port["name"] for port in container["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            check = container[probe].get("httpGet") or container[probe]["tcpSocket"]
            assert check["port"] in ports
    assert pod["securityContext"]["runAsNonRoot"]
    services = [one for one in _objects() if one["kind"] == "Service"]
    for service in services:
        if service["metadata"]["name"] == name:
            labels = spec["template"]["metadata"]["labels"]
            assert service["spec"]["selector"].items() <= labels.items()


def test_nodes_have_their_folders_ports_and_memory() -> None:
    """As the configuration that they are given says."""
    config = load(NodeConfig, file=DEPLOY / "kubernetes" / "kvfabric.toml", flags={})
    pod = _workloads()["kvfabric-node"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert config.http == f"0.0.0.0:{ports['metrics']}"
    assert config.listen == f"0.0.0.0:{ports['grpc']}"
    variables = {one["name"]: one.get("value", "") for one in container["env"]}
    assert variables["KVFABRIC_NODE_ADVERTISE"] == f"$(POD_IP):{ports['grpc']}"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(config.state_dir), str(config.socket_path.parent), config.tls_dir} <= mounts
    limit = container["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Gi")) << 30 >= config.host_bytes + (4 << 30)
    assert pod["hostPID"]


def test_users_are_one() -> None:
    """Engines, nodes and routers share sockets and files by user id."""
    (user,) = re.findall(r"ARG UID=(\d+)", (DEPLOY / "docker" / "Dockerfile").read_text())
    for name in ("kvfabric-node", "kvfabric-router"):
        security = _workloads()[name]["spec"]["template"]["spec"]["securityContext"]
        assert security["runAsUser"] == security["fsGroup"] == int(user)
    assert f"runAsUser: {user}" in README


def test_the_readme_makes_the_secrets_that_are_mounted() -> None:
    """Every Secret, and Redis's user has the rights that a directory needs."""
    used = set()
    for workload in _workloads().values():
        text = json.dumps(workload)
        used |= set(re.findall(r'"secretName": "([\w-]+)"', text))
        used |= set(re.findall(r'"secretKeyRef": {"name": "([\w-]+)"', text))
    made = {f"kvfabric-{role}-tls" for role in ("node", "router", "redis")} | {"kvfabric-redis"}
    assert used == made
    assert f"~kvfabric:* &kvfabric:* {ACL_RULES}\n" in README
    redis = "".join(
        _workloads()["kvfabric-redis"]["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    assert all(f"/etc/redis/tls/{name}" in redis for name in (CA_FILE, CERT_FILE, KEY_FILE))


# --- metrics ---


def _exposed() -> dict[str, set[str]]:
    """Names of samples as Prometheus stores them, and their labels."""
    found = {name: set(labels) for name, labels in FROM_PROMETHEUS.items()}
    families = [(m.name, m.kind, m.labels) for m in NODE_METRICS]
    families += [
        (collector._name, collector._type, collector._labelnames)  # type: ignore[attr-defined]
        for collector in set(RouterMetrics().collectors._collector_to_names)
    ]
    for name, kind, labels in families:
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
        for ending in endings[kind]:
            extra = {"le"} if ending == "_bucket" else set()
            found[name + ending] = {*labels, "instance", "job", *extra}
    return found


def unknown_in(expression: str) -> list[str]:
    """Metrics that nobody exposes, and labels that they do not have."""
    exposed, problems = _exposed(), []
    for name, matchers in re.findall(r"\b(up|kvfabric_\w+)\b(?:\{([^}]*)\})?", expression):
        if name not in exposed:
            return [name]
        matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
        problems += [f"{name}{{{label}}}" for label in matched if label not in exposed[name]]
    labels = set().union(
        *(exposed[n] for n in exposed if re.search(rf"\b{n}\b", expression)), set()
    )
    for group in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        problems += [one for one in re.split(r"[,\s]+", group) if one and one not in labels]
    return problems


def _alerts() -> list[Any]:
    groups = _documents(DEPLOY / "prometheus" / "rules.yaml")[0]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _panels() -> list[Any]:
    board = json.loads((DEPLOY / "grafana" / "kvfabric.json").read_text())
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_alerts_ask_for_what_is_exposed() -> None:
    alerts = _alerts()
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 15
    for rule in alerts:
        assert unknown_in(rule["expr"]) == [], rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_panels_show_what_is_exposed() -> None:
    assert len(_panels()) > 15
    for panel in _panels():
        for target in panel["targets"]:
            assert unknown_in(target["expr"]) == [], panel["title"]


def test_what_is_not_exposed_is_found() -> None:
    """Twin: another name, another label, another grouping."""
    good = 'sum by (reason) (rate(kvfabric_node_misses_total{instance=~"a"}[5m]))'
    assert unknown_in(good) == []
    assert unknown_in(good.replace("misses_total", "misses")) == ["kvfabric_node_misses"]
    assert unknown_in(good.replace("instance=", "tier=")) == ["kvfabric_node_misses_total{tier}"]
    assert unknown_in(good.replace("by (reason)", "by (tier)")) == ["tier"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_reads_the_rules() -> None:
    file = str(DEPLOY / "prometheus" / "rules.yaml")
    subprocess.run(["promtool", "check", "rules", file], check=True, capture_output=True)


def test_the_console_script_has_every_command_that_is_run() -> None:
    names = {point.name for point in entry_points(group=cli.GROUP)}
    assert {command.split()[0] for command in _commands()} <= names

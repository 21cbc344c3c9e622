"""Redis as compose and Kubernetes start it: a real one, and a node that joins it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis
from redis import exceptions as failures

from kvfabric.demo.processes import free_addresses
from kvfabric.pki import Identity, init, issue
from kvfabric.testing.processes import NodeProcess

pytestmark = [pytest.mark.fleet, pytest.mark.slow]

DEPLOY = Path(__file__).parents[2] / "deploy"
READY_S = 10.0
LEASE_S = 0.5
"""A node waits for two of them when it first sees a directory."""


@contextlib.contextmanager
def _running(
    arguments: Sequence[str], folders: Mapping[str, Path], client: Redis
) -> Iterator[Redis]:
    """`arguments` as the container gets them, with its folders where this machine has them."""
    text = "\n".join(arguments)
    for inside, here in folders.items():
        text = text.replace(inside, str(here))
    process = subprocess.Popen(text.split("\n"), stdout=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + READY_S
        while not _answers(client):
            assert process.poll() is None
            assert time.monotonic() < ends, "Redis does not answer"
            time.sleep(0.01)
        yield client
    finally:
        client.close()
        process.kill()
        process.wait()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except (failures.ConnectionError, OSError):
        return False


def test_compose(tmp_path: Path) -> None:
    """A node joins over the socket, and what it wrote was synced before it was told so."""
    services = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]
    arguments = [*services["redis"]["command"], f"--dir {tmp_path}"]  # the image starts it in /data
    client = Redis(unix_socket_path=str(tmp_path / "redis.sock"))
    with _running(arguments, {"/run/redis": tmp_path}, client):
        assert client.config_get("append*") | {"appenddirname": ""} == {
            "appendonly": "yes",
            "appendfsync": "always",
            "appendfilename": "appendonly.aof",
            "appenddirname": "",
        }
        url = f"unix://{tmp_path}/redis.sock"
        with NodeProcess(tmp_path / "node", directory=url, epoch_lease_s=LEASE_S):
            assert client.keys("kvfabric:*")


def test_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS with a certificate of `kvfabric pki`, and a user who has just the rights that are needed."""
    (args,) = [
        document["spec"]["template"]["spec"]["containers"][0]["args"]
        for document in yaml.safe_load_all((DEPLOY / "kubernetes" / "redis.yaml").read_text())
        if document["kind"] == "StatefulSet"
    ]
    init(tmp_path / "pki")
    tls = issue(tmp_path / "pki", Identity("redis", "cluster"))
    readme = (DEPLOY / "README.md").read_text()
    found = re.search(r"<<EOF\n(.*?)EOF", readme, flags=re.DOTALL)
    assert found
    (tmp_path / "users.acl").write_text(found[1].replace("$password", "secret"))
    host, _, port = free_addresses(1)[0].rpartition(":")
    arguments = [one.replace("--tls-port 6379", f"--tls-port {port}") for one in args]
    folders = {"/etc/redis/tls": tls, "/etc/redis/acl": tmp_path, "/data": tmp_path}
    options: dict[str, Any] = {"host": host, "port": int(port)}
    options |= {"ssl": True, "ssl_ca_certs": str(tls / "ca.crt"), "ssl_check_hostname": False}
    client = Redis(username="kvfabric", password="secret", **options)
    with _running(arguments, folders, client):
        url = f"rediss://kvfabric:secret@localhost:{port}/?ca={tls}/ca.crt"
        monkeypatch.setenv("KVFABRIC_NODE_DIRECTORY", url)
        with NodeProcess(tmp_path / "node", epoch_lease_s=LEASE_S):
            assert client.smembers("kvfabric:default:holders")
        with pytest.raises(failures.NoPermissionError):
            client.flushall()
        with Redis(**options) as nobody, pytest.raises(failures.AuthenticationError):
            nobody.ping()

"""Hosts as network namespaces, each with its own launcher and, where nothing is shared, its own disk."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from support.running import gist

from gist_train.run_folder import Run
from gist_train.training.interface import SETTING, interface_to_others

LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]


def ip(*words):
    return subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=True)


class Hosts:
    """Namespaces of this process' own, on one bridge; host n has the address 10.77.0.(n + 1)."""

    def __init__(self, count):
        self.names = [f"gist-{os.getpid()}-{host}" for host in ("bridge", *range(count))]

    def __enter__(self):
        bridge, *hosts = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        ip("-n", bridge, "link", "set", "br0", "up")
        for number, name in enumerate(hosts):
            ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", f"v{number}", "netns", bridge, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", bridge, "link", "set", f"v{number}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut_off(self, host):
        ip("-n", self.names[1 + host], "link", "set", "eth0", "down")

    def start(self, folder, *words, port, disks=None):
        """`gist-train WORDS` under a launcher on each host; `disks`: one each, in place of the folder "runs"."""
        count = len(self.names) - 1
        for number, name in enumerate(self.names[1:]):
            mount = "" if disks is None else f"mount --bind '{disks[number]}' '{folder / 'runs'}' && "
            where = ["--num_machines", count, "--num_processes", count, "--machine_rank", number]
            where += ["--main_process_ip", "10.77.0.1", "--main_process_port", port]
            command = [sys.executable, *LAUNCH, *map(str, where), "-m", "gist_train", *map(str, words)]
            inside = ["unshare", "-m", "sh", "-c", f'{mount}exec "$@"', "sh", *command]
            with (folder / f"host-{number}.log").open("w") as log:
                yield subprocess.Popen(["ip", "netns", "exec", name, *inside], stderr=log, stdout=log, env=environment())


def environment():
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    return {**kept, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def can_make_hosts():
    if sys.platform != "linux" or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    try:
        with Hosts(1):
            pass
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


needs_hosts = pytest.mark.skipif(
    not can_make_hosts(), reason="network namespaces can't be made here: that needs root and iproute2"
)


def codes(processes, within=120):
    ends = time.monotonic() + within
    try:
        return [process.wait(max(1, ends - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for_rows(metrics, count):
    ends = time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert time.monotonic() < ends
        time.sleep(0.1)


def write(write_config, make_model, steps):
    return write_config(
        model={"name": str(make_model(dropout=0.0))},
        training={"batch_size": 8, "max_steps": steps, "precision": "float32"},
        optimizer={"lr": 1e-3, "eps": 1e-3},
        schedule={"type": "constant"},
    )


@needs_hosts
@pytest.mark.slow
def test_two_hosts_without_a_shared_disk(write_config, make_model, tmp_path):
    """Each builds its own corpus and store; the first alone writes the run, and sends the others what it resumes from."""
    path, disks = write(write_config, make_model, 100_000), [tmp_path / "disk-0", tmp_path / "disk-1"]
    for folder in (tmp_path / "runs", *disks):
        folder.mkdir()
    run = Run(disks[0] / "run")
    with Hosts(2) as hosts:
        stopping = hosts.start(tmp_path, "train", path, "--set", "training.stop_at_step=6", port=29711, disks=disks)
        assert codes(list(stopping)) == [0, 0], (tmp_path / "host-1.log").read_text()
        assert run.saved_steps() == [4, 6]
        assert not (disks[1] / "run").exists()

        resumed = list(hosts.start(tmp_path, "train", path, "--timeout", 5, port=29712, disks=disks))
        wait_for_rows(run.metrics, 12)
        time.sleep(2)  # what a rank says of itself is a second old
        hosts.cut_off(1)
        began = time.monotonic()
        assert codes(resumed, 60) == [1, 1]
        assert time.monotonic() - began < 40
    first, second = ((tmp_path / f"host-{host}.log").read_text() for host in range(2))
    assert re.search(r"hung: rank 1 \(host \S+, process \d+\) at step \d+, training: no progress for 5 s", first)
    assert re.search(r"hung: rank 0 \(host \S+, process \d+\) at step \d+, training", second)
    assert "resuming from step 6" in first
    (tmp_path / "alone").mkdir()
    assert gist("train", path, "--set", f"output_dir={tmp_path / 'alone'}", "--set", "training.stop_at_step=12").code == 0
    assert losses(run.folder)[:12] == pytest.approx(losses(tmp_path / "alone" / "run"), rel=1e-4, abs=1e-4)


@needs_hosts
@pytest.mark.slow
def test_three_hosts_are_one(write_config, make_model, tmp_path):
    """On a shared disk: the guide's pass is shared, and rows that do not divide are, too."""
    path = write(write_config, make_model, 8)
    (tmp_path / "runs").mkdir()
    with Hosts(3) as hosts:
        assert codes(list(hosts.start(tmp_path, "train", path, port=29713)), 200) == [0, 0, 0]
    (tmp_path / "alone").mkdir()
    assert gist("train", path, "--set", f"output_dir={tmp_path / 'alone'}").code == 0
    assert losses(tmp_path / "runs" / "run") == pytest.approx(losses(tmp_path / "alone" / "run"), rel=1e-4, abs=1e-4)


HOST = {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("environment", [{"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, {**HOST, SETTING: "eth3"}, {}])
def test_one_host_and_a_users_own_choice_are_left_alone(environment):
    assert interface_to_others(environment) is None


def test_a_host_that_knows_itself_as_loopback_alone_is_told(monkeypatch):
    """Gloo would have the others connect to themselves: an error of connections that were refused, from its C++."""
    monkeypatch.setattr("socket.gethostbyname", lambda _: "127.0.1.1")
    with pytest.raises(Exception, match="GLOO_SOCKET_IFNAME") as told:
        interface_to_others(HOST)
    assert "NCCL_SOCKET_IFNAME" in str(told.value)

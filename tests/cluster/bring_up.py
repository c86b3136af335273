"""``deploy/cluster.yaml`` brought up on machines of our own: three hosts on this machine, a teacher, a
student on two of them, a host that dies.

Each host is a set of namespaces (network, processes, mounts, name, shared memory) with its own sshd, home and
/tmp, on a bridge without a way out. All of it lives inside one more such set, so that it ends with this
command, however that ends. Run it as root: ``python tests/cluster/bring_up.py``. Exit status 77: it cannot
run here, and says why.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
CANNOT = 77
NAMESPACES = ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ip": "iproute2",
    "rsync": "rsync",
    "openssl": "openssl",
    "ps": "procps",
}
WORLD = Path("/mnt")
"""A file system in memory, inside of the namespaces only."""
SHARED, HOME = WORLD / "shared", WORLD / "home"
"""What every host sees, as of an NFS server; and the home of whoever is on a host."""
ADDRESSES = {"head": "10.77.0.10", "one": "10.77.0.11", "two": "10.77.0.12"}
STEPS = 60


def say(sentence: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {sentence}", flush=True)


def sh(*command: object, **options) -> str:
    """What a command prints. Raises where it fails, with all that it said."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout[-6000:]}"
        )
    return done.stdout


def wait_for(what: str, condition: Callable[[], bool], longest_s: float) -> None:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > longest_s:
            raise RuntimeError(f"{what}: not after {longest_s:.0f} s")
        time.sleep(0.5)
    say(f"{what}: after {time.monotonic() - started:.0f} s")


class Host:
    """A machine: what it has on disk outlives it."""

    def __init__(self, name: str) -> None:
        self.name, self.address = name, ADDRESSES[name]
        self.disk = WORLD / "disks" / name
        home = self.disk / "home"
        (home / ".ssh").mkdir(parents=True)
        (home / "salt").mkdir()
        (home / "salt" / ".venv").symlink_to(
            sys.prefix
        )  # so that deploy/node.sh finds an environment, and downloads nothing
        (home / ".bashrc").write_text(
            "export PYTHONPATH=$HOME/salt\n"
        )  # the environment's own project is another copy
        shutil.copy(HOME / ".ssh" / "id_ed25519.pub", home / ".ssh" / "authorized_keys")
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.disk / "host_key")
        (self.disk / "sshd_config").write_text(
            f"HostKey {self.disk}/host_key\nPermitRootLogin yes\nUsePAM no\nStrictModes no\nPidFile"
            " none\nMaxStartups 100\n"
        )

    def start(self) -> None:
        script = f"""set -e
            mount --bind {self.disk}/home {HOME}
            for folder in /tmp /run /dev/shm; do mount -t tmpfs -o size=2g none $folder; done
            hostname {self.name}
            mkdir /run/sshd
            ip link set lo up
            read -r  # until the network is there
            exec {shutil.which("sshd")} -D -e -f {self.disk}/sshd_config"""
        log = (self.disk / "sshd.log").open("a")
        self.process = subprocess.Popen(
            ["unshare", *NAMESPACES, "bash", "-c", script], stdin=subprocess.PIPE, stdout=log, stderr=log
        )
        ours = os.readlink("/proc/self/ns/net")
        wait_for(
            f"{self.name} has a network", lambda: os.readlink(f"/proc/{self.process.pid}/ns/net") != ours, 10
        )
        inside = ["nsenter", "-t", self.process.pid, "-n", "ip"]
        sh(
            "ip",
            "link",
            "add",
            f"to-{self.name}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.process.pid,
        )
        sh("ip", "link", "set", f"to-{self.name}", "master", "bridge", "up")
        sh(*inside, "address", "add", f"{self.address}/24", "dev", "eth0")
        sh(*inside, "link", "set", "eth0", "up")
        sh(*inside, "route", "add", "default", "via", "10.77.0.1")
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.close()

    def kill(self) -> None:
        """As if the power failed: every process of it, at once."""
        self.process.kill()
        self.process.wait()

    def processes(self) -> list[str]:
        """Command lines of what runs there."""
        listed = sh("ps", "-ww", "--no-headers", "-eo", "pidns,args").splitlines()
        children = (
            sh("ps", "--no-headers", "-o", "pidns", "--ppid", self.process.pid).split()
            if self.process.poll() is None
            else []
        )
        return [
            line.split(maxsplit=1)[1]
            for line in listed
            if children and line.split(maxsplit=1)[0] == children[0]
        ]

    def runs(self, part: str) -> bool:
        return any(part in line for line in self.processes())

    def command(self, command: str) -> list[str]:
        options = [
            "-i",
            f"{HOME}/.ssh/id_ed25519",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ]
        return ["ssh", *options, f"root@{self.address}", f"bash -ic {json.dumps(command)} 2>&1"]

    def ssh(self, command: str) -> str:
        return sh(*self.command(command))


def configuration() -> Path:
    """``deploy/cluster.yaml`` with the addresses, user and key of these hosts, and with little memory."""
    values = yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text())
    values["provider"].update(head_ip=ADDRESSES["head"], worker_ips=[ADDRESSES["one"], ADDRESSES["two"]])
    values["auth"].update(ssh_user="root", ssh_private_key=f"{HOME}/.ssh/id_ed25519")
    for name, flags in (("head_start_ray_commands", ""), ("worker_start_ray_commands", " --num-cpus=2")):
        values[name][-1] += f" --object-store-memory=100000000{flags}"
    path = HOME / "cluster.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def inside() -> None:
    """The whole story, in namespaces of its own."""
    sh("mount", "--make-rprivate", "/")
    sh("mount", "-t", "tmpfs", "none", WORLD)
    for folder in (SHARED, HOME / ".ssh"):
        folder.mkdir(parents=True)
    passwd = Path("/etc/passwd").read_text().splitlines()
    (WORLD / "passwd").write_text(
        "".join(
            (f"root:x:0:0:root:{HOME}:/bin/bash" if line.startswith("root:") else line) + "\n"
            for line in passwd
        )
    )
    (WORLD / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    )
    (HOME / ".bashrc").touch()
    for name in ("passwd", "hosts"):
        sh("mount", "--bind", WORLD / name, f"/etc/{name}")
    for folder in ("/tmp", "/dev/shm"):
        sh("mount", "-t", "tmpfs", "none", folder)
    os.environ.update(HOME=str(HOME), PYTHONPATH=str(ROOT), PATH=f"{sys.prefix}/bin:{os.environ['PATH']}")
    os.chdir(ROOT)
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "add", "bridge", "type", "bridge")
    sh("ip", "address", "add", "10.77.0.1/24", "dev", "bridge")
    sh("ip", "link", "set", "bridge", "up")
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", HOME / ".ssh" / "id_ed25519")
    hosts = {name: Host(name) for name in ADDRESSES}
    for host in hosts.values():
        host.start()
    head, workers = hosts["head"], [hosts["one"], hosts["two"]]
    sh("deploy/secrets.sh")
    config = configuration()
    try:
        tell(head, workers, config)
    except BaseException:
        for host in hosts.values():
            print(
                f"--- {host.name}", (host.disk / "sshd.log").read_text()[-500:], *host.processes(), sep="\n"
            )
        monitor = subprocess.run(
            head.command("tail -n 60 /tmp/ray/session_latest/logs/monitor.log"),
            capture_output=True,
            text=True,
            check=False,
        )
        print(monitor.stdout[-5000:])
        raise


def tell(head: Host, workers: list[Host], config: Path) -> None:
    """Up, a teacher, a student, a host that dies and comes back, down."""
    started = time.monotonic()
    sh("ray", "up", "-y", "--no-config-cache", config)
    say(f"ray up took {time.monotonic() - started:.0f} s")
    wait_for("both workers have joined", lambda: all(host.runs("raylet/raylet") for host in workers), 240)

    small = f"--preset nano --data {SHARED}/shards --batch-size 48 --set optim.warmup_steps=5"
    head.ssh(
        f"cd {SHARED} && salt-data synth videos --num-train 48 --num-test 8 && salt-data pack videos shards"
    )
    head.ssh(f"cd {SHARED} && salt-train teacher {small} --out teacher --steps 10 --workers 0")
    say("data and a teacher are there")
    address = f"--address {head.address}:6379"
    serve = (
        f"cd {SHARED} && exec salt-serve teacher --ckpt {SHARED}/teacher {address} --host 0.0.0.0 --tokens"
        f" {HOME}/.salt/tokens.yaml --cpus 0.5"
    )
    serving = subprocess.Popen(head.command(serve), stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    said = [serving.stdout.readline()]
    while said[-1] and not said[-1].startswith("http://"):
        said.append(serving.stdout.readline())
    assert said[-1], "".join(said)
    [of_teacher] = [host for host in (head, *workers) if host.runs("ray::ServeReplica")]
    [other] = [host for host in workers if host is not of_teacher]
    assert of_teacher is not head, "the head is to have no work"
    say(f"the teacher is ready on {of_teacher.name}")

    train = (
        f"cd {SHARED} && salt-train student {small} --out {SHARED}/student --steps {STEPS} --keep-every 5"
        f" --log-every 1 {address} --workers 2 --cpus-per-worker 1.2 --teacher-url http://{head.address}:8000"
        f" --teacher-token-file {HOME}/.salt/teacher-token"
    )
    student = SHARED / "student"
    training = subprocess.Popen(head.command(train), stdout=subprocess.PIPE, text=True)
    wait_for(
        "the student has a checkpoint",
        lambda: (student / "checkpoint").exists() or training.poll() is not None,
        180,
    )
    assert training.poll() is None, training.communicate()[0]
    assert all(host.runs("ray::RayTrainWorker") for host in workers), "a worker of the student on each host"
    assert not head.runs("ray::RayTrainWorker")
    before = len(metrics(student))
    other.kill()
    say(f"{other.name} is dead, after step {before} of {STEPS}")
    output, _ = training.communicate(timeout=300)
    say(f"salt-train ended with status {training.returncode}: {' '.join(output.split())[-300:]}")
    other.start()
    wait_for(f"{other.name} is back, and Ray on it", lambda: other.runs("raylet/raylet"), 300)
    if training.returncode:
        wait_for(
            "the student has gone on",
            lambda: subprocess.run(head.command(f"{train} --resume"), check=False).returncode == 0,
            400,
        )
    lines = metrics(student)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), [line["step"] for line in lines]
    say(f"the student is done, loss {lines[0]['loss']:.4f} to {lines[-1]['loss']:.4f}")
    head.ssh(
        f"cd {SHARED} && salt-train student {small} --out alone --steps {STEPS} --log-every 1 --workers 0"
        " --teacher-ckpt teacher"
    )
    alone = metrics(SHARED / "alone")
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(lines, alone, strict=True))
    assert worst < 1e-4, f"the losses differ from those of one process by {worst:g}"
    say(f"its losses are those of one process without a cluster, to {worst:.1e}")

    head.ssh(f"salt-serve stop --url http://{head.address}:8000 --token-file {HOME}/.salt/teacher-token")
    assert serving.wait(timeout=120) == 0
    sh("deploy/down.sh", config)
    wait_for(
        "nothing of Ray is left",
        lambda: not any("ray" in line for host in (head, *workers) for line in host.processes()),
        180,
    )
    say(
        "what runs on the hosts: "
        + ", ".join(sorted({line.split()[0] for host in (head, *workers) for line in host.processes()}))
    )


def main() -> int:
    if os.geteuid() != 0:
        print("it needs root, for namespaces")
        return CANNOT
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing and shutil.which("apt-get") is None:
        print(f"it needs {', '.join(missing)}, and there is no apt-get to install them")
        return CANNOT
    if missing:
        sh("apt-get", "update")
        sh(
            "apt-get",
            "install",
            "-y",
            "--no-install-recommends",
            *missing,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        )
    allowed = subprocess.run(
        ["unshare", *NAMESPACES, "mount", "-t", "tmpfs", "none", WORLD],
        capture_output=True,
        text=True,
        check=False,
    )
    if allowed.returncode:
        print(f"namespaces are not allowed here: {allowed.stderr.strip()}")
        return CANNOT
    before = set(os.listdir("/tmp"))
    status = subprocess.run(
        ["unshare", *NAMESPACES, sys.executable, __file__, "inside"], check=False
    ).returncode
    left = [name for name in set(os.listdir("/tmp")) - before if name.startswith("ray")]
    print(f"left in /tmp: {left or 'nothing'}; status {status}")
    return status


if __name__ == "__main__":
    if sys.argv[1:] == ["inside"]:
        inside()
    else:
        sys.exit(main())

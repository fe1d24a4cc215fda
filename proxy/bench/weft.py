"""Weft in the peer benchmark: two sidecars of a mesh, beside a client and a server. README.md says what that is."""
import glob
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time

from ctx import listening

HERE = os.path.dirname(os.path.realpath(__file__))
BIN = os.path.abspath(os.environ.get("WEFT_BIN_DIR") or os.path.join(HERE, "..", "..", "target", "release"))
PROGRAMS = ("weft-proxy", "weft-controller", "weft")
# What turns off the reuse of tunnels, so that each connection has a handshake of its own.
NO_REUSE = ("--tunnels-idle-max", "0")
# Whether the client's sidecar has nothing but a token when it is started to be measured.
JOINS = os.environ.get("WEFT_BENCH_JOIN") == "1"
# The service's port in the mesh; where the app really is, only its own sidecar knows.
PORT = 8080
# Fixed, below the ports that clients get and above those that the benchmark gives away: the network namespace is its own.
POSTGRES, CONTROLLER, CONTROLLER_ADMIN, SERVER_ADMIN, CLIENT_ADMIN, CLIENT_INBOUND = range(9100, 9106)
# How long a sidecar may take to join and to be ready. It is within half a second; a loaded machine may be far slower.
READY_SECONDS = 30
# How long a sidecar may take to end: its default drain deadline, and room.
END_SECONDS = 15
POLL_SECONDS = 0.02
# How long a server that takes a single connection may take to notice that it had it.
GONE_SECONDS = 0.2


def program(name):
    return os.path.join(BIN, name)


def modes():
    try:
        told = subprocess.run([program("weft-proxy"), "--help"], stdout=subprocess.PIPE, text=True).stdout
    except OSError:
        told = ""
    return ("mtls", "mtls-pq") if NO_REUSE[0] in told else ("mtls",)


MODES = modes()


def available(ctx):
    for name in PROGRAMS:
        if not os.access(program(name), os.X_OK):
            return f"no {name} in {BIN} (cargo build --release, or set WEFT_BIN_DIR)"
    return None if postgres() else "no PostgreSQL server (apt-get install postgresql, or set WEFT_POSTGRES_DIR)"


def version(ctx):
    notes = [os.environ.get("WEFT_BENCH_REVISION"), "joins at its start" if JOINS else None]
    return "; ".join([ctx.output([program("weft-proxy"), "--version"]), *filter(None, notes)])


def postgres():
    """The folder with the server's programs: the one that is named, the one in the path, or the newest of a distribution."""
    named = os.environ.get("WEFT_POSTGRES_DIR")
    in_path = shutil.which("initdb")
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda d: [int(w) for w in d.split("/") if w.isdigit()])
    for d in [named, in_path and os.path.dirname(os.path.realpath(in_path)), *reversed(found)]:
        if d and os.path.exists(os.path.join(d, "initdb")) and os.path.exists(os.path.join(d, "postgres")):
            return d
    return None


def start(ctx, mode):
    outlive_probes(ctx)
    mesh = os.path.join(ctx.dir, "mesh")
    shutil.rmtree(mesh, ignore_errors=True)  # of an earlier round
    os.mkdir(mesh)
    ctx.helper([sys.executable, os.path.join(HERE, "mesh.py"), mesh, "--template", os.path.join(ctx.root, "weft-postgres"),
                "--bin", BIN, "--postgres", postgres(), "--ports", f"{POSTGRES},{CONTROLLER},{CONTROLLER_ADMIN}"])

    def sidecar(service, inbound, admin, *more):
        instance = service + "-1"
        argv = [program("weft-proxy"), "--controller", f"127.0.0.1:{CONTROLLER}", "--instance", f"default/{service}/{instance}",
                "--state-dir", os.path.join(mesh, instance), "--inbound-listen", inbound,
                "--admin-listen", f"127.0.0.1:{admin}", "--connection-log", os.path.join(mesh, instance + ".connections.jsonl"),
                "--threads", str(ctx.threads), *more, *(NO_REUSE if mode == "mtls-pq" else ())]
        return argv, ["--join-token-file", os.path.join(mesh, instance + ".token")]

    server, token = sidecar("server", ctx.at(ctx.mid), SERVER_ADMIN, "--app", f"{PORT}={ctx.at(ctx.upstream)}")
    process = ctx.spawn(server + token, ready=ctx.mid)
    wait_until("the server's sidecar", lambda: page(SERVER_ADMIN, "/ready") is not None, process)

    client, token = sidecar("client", f"127.0.0.1:{CLIENT_INBOUND}", CLIENT_ADMIN,
                            "--upstream", f"default/server:{PORT}={ctx.at(ctx.listen)}")
    if JOINS:
        wait_until("the server", lambda: healthy(mesh), process)
        ctx.spawn(client + token)
        return
    join_once(ctx, client + token)
    ctx.spawn(client)


def join_once(ctx, argv):
    """Runs the client's sidecar until it has joined and its snapshot says where the server is: what it then has on its disk is
    what every restart finds. It ends as any stopped sidecar does."""
    with open(os.path.join(ctx.dir, "log-join.txt"), "wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ctx.dir)
    try:
        wait_until("the client's sidecar", lambda: page(CLIENT_ADMIN, "/ready") and sees_server(), process)
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def sees_server():
    config = json.loads(page(CLIENT_ADMIN, "/config") or "{}")
    return any(e["health"] == "healthy" for service in config.get("endpoints", []) for e in service["endpoints"])


def healthy(mesh):
    """Whether the mesh knows that the server is well."""
    r = subprocess.run([program("weft"), "--context", os.path.join(mesh, "context.json"), "get", "instances", "-o", "json"],
                       stdout=subprocess.PIPE, text=True, check=True)
    return any(instance["status"]["health"] == "healthy" for instance in json.loads(r.stdout))


def page(port, path):
    """What a sidecar's admin page says; None if there is nobody, or not yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def wait_until(what, condition, process):
    end = time.monotonic() + READY_SECONDS
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"{what} ended ({process.returncode}); see the logs (--keep)")
        if time.monotonic() > end:
            raise RuntimeError(f"{what} was not ready within {READY_SECONDS} s; see the logs (--keep)")
        time.sleep(POLL_SECONDS)


def outlive_probes(ctx):
    """A sidecar connects to its app to see how it is. The bulk workloads' server, `iperf3 -s -1`, takes that for its only client
    and ends; then one without -1 takes its place."""
    socket.create_connection(ctx.upstream).close()
    end = time.monotonic() + GONE_SECONDS
    while time.monotonic() < end:
        if not listening(ctx.upstream):
            log = os.path.join(ctx.dir, "iperf3.txt")
            script = 'echo; exec iperf3 -s -p "$1" >"$2" 2>&1'
            ctx.helper(["sh", "-c", script, "sh", str(ctx.upstream[1]), log])
            ctx.wait_listening([ctx.upstream])
            return
        time.sleep(POLL_SECONDS)

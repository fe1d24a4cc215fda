#!/usr/bin/env python3
"""The control plane of one measurement: a private PostgreSQL and a controller, set up as an operator would, with the
resources of mesh.yaml and a join token for each of the two sidecars.

    mesh.py DIR --template DIR --bin DIR --postgres DIR --ports POSTGRES,CONTROLLER,ADMIN

Prints one line when all of it stands. Ends on SIGTERM, or with its parent, and ends what it started; its data, which
nobody wants any more, goes with it. In DIR stay the logs, the operator's context and credential, and NAME.token.
"""
import argparse
import ctypes
import http.client
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.realpath(__file__))
# Service and instance of each sidecar.
SIDECARS = (("default/server", "server-1"), ("default/client", "client-1"))
# How long each step may take. All of them are within a second; a loaded machine may be far slower.
STEP_SECONDS = 60
# How often a condition is looked at.
POLL_SECONDS = 0.02
# How long a process may take to end before it is killed: less than whoever stops us waits for us.
END_SECONDS = 2
PR_SET_PDEATHSIG = 1
# What compose/initdb.sh makes, too: the controller's role, the duties it takes on, and a database of its own.
DATABASE = """\
create role weft_reader nologin;
create role weft_appender nologin;
create role weft_projector nologin;
create role weft_controller login password '{password}' in role weft_appender, weft_projector, weft_reader;
create database weft owner weft_controller template template0;
revoke all on database weft from public;
"""


def die_with_parent(how):
    """Gets the calling process a signal when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, how)


def server_account():
    """Whom PostgreSQL runs as, since it refuses to be root: the account of its packages, else the one that every system has."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    sys.exit("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def wait_until(what, condition, process):
    end = time.monotonic() + STEP_SECONDS
    while not condition():
        if process.poll() is not None:
            sys.exit(f"{what} ended ({process.returncode}) instead of starting; see its log")
        if time.monotonic() > end:
            sys.exit(f"{what} was not ready within {STEP_SECONDS} s")
        time.sleep(POLL_SECONDS)


def ready(port):
    """Whether http://127.0.0.1:PORT/ready answers 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Mesh:
    def __init__(self, args):
        self.dir, self.template, self.bin, self.postgres = args.dir, args.template, args.bin, args.postgres
        self.postgres_port, self.controller_port, self.admin_port = map(int, args.ports.split(","))
        self.account = server_account()
        self.children = []  # with the signal that ends each
        # Programs get their settings from their arguments alone.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("WEFT_", "PG"))}
        self.env.update(LC_ALL="C", NO_COLOR="1")

    def start(self):
        if not os.path.isdir(self.template):
            self.make_template()
        self.start_postgres()
        self.start_controller()
        self.weft("apply", "--reason", "the peer benchmark", "-f", os.path.join(HERE, "mesh.yaml"))
        for service, instance in SIDECARS:
            self.weft("token", "create", "--service", service, "--instance", instance, "--ttl", "10m",
                      "--out", os.path.join(self.dir, instance + ".token"))

    def stop(self):
        for child, how in reversed(self.children):
            if child.poll() is None:
                child.send_signal(how)
        end = time.monotonic() + END_SECONDS
        for child, _ in self.children:
            try:
                child.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(self.data(self.dir), ignore_errors=True)

    @staticmethod
    def data(parent):
        return os.path.join(parent, "postgres")

    def make_template(self):
        """Initialises a cluster, once for all measurements of a run. Made beside and renamed: half of one is never used."""
        unfinished = self.template + ".unfinished"
        data = self.data(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
        os.mkdir(unfinished, 0o711)
        os.mkdir(data, 0o700)
        if self.account:
            os.chown(data, self.account["user"], self.account["group"])
        password = secrets.token_hex(24)
        # The socket is closed to everybody, so its superuser needs no password.
        self.setup("initdb", "-D", data, "-U", "weft", "--encoding=UTF8", "--locale=C", "--data-checksums", "--no-sync",
                   "--auth-local=reject", "--auth-host=scram-sha-256", "--no-instructions")
        self.setup("postgres", "--single", "-D", data, "-c", "exit_on_error=on", "postgres",
                   input=DATABASE.format(password=password))
        url = f"postgres://weft_controller:{password}@127.0.0.1:{self.postgres_port}/weft\n"
        with open(os.open(os.path.join(unfinished, "controller.url"), os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(url)
        os.rename(unfinished, self.template)

    def setup(self, program, *args, **more):
        ended = subprocess.run([os.path.join(self.postgres, program), *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, cwd="/", env=self.env, **self.account, **more)
        if ended.returncode != 0:
            # What it was told may hold a password, and what it says may quote it; initdb is told none.
            said = ended.stderr.strip() if program == "initdb" else ""
            sys.exit(f"{program} failed ({ended.returncode}) {said}")

    def start_postgres(self):
        subprocess.run(["cp", "-a", self.data(self.template), self.dir], check=True)
        data = self.data(self.dir)
        settings = {"listen_addresses": "127.0.0.1", "port": self.postgres_port, "unix_socket_directories": "",
                    # As for a mesh on one machine (crates/pgserver).
                    "shared_buffers": "64MB", "max_wal_size": "512MB"}
        argv = [os.path.join(self.postgres, "postgres"), "-D", data]
        for name, value in settings.items():
            argv += ["-c", f"{name}={value}"]
        server = self.child("postgres", argv, signal.SIGQUIT, **self.account)

        def is_ready():  # as pg_ctl finds out
            try:
                with open(os.path.join(data, "postmaster.pid")) as file:
                    return file.read().splitlines()[7].strip() == "ready"
            except (OSError, IndexError):
                return False

        wait_until("PostgreSQL", is_ready, server)

    def start_controller(self):
        with open(os.path.join(self.dir, "context.json"), "w") as file:
            json.dump({"controllers": [f"127.0.0.1:{self.controller_port}"], "credential_dir": "controller/operator/admin"}, file)
        state = os.path.join(self.dir, "controller")
        argv = [os.path.join(self.bin, "weft-controller"), "--database-url-file", os.path.join(self.template, "controller.url"),
                "--listen", f"127.0.0.1:{self.controller_port}", "--admin-listen", f"127.0.0.1:{self.admin_port}",
                "--state-dir", state]
        controller = self.child("controller", argv, signal.SIGTERM)
        wait_until("the controller", lambda: ready(self.admin_port), controller)

    def child(self, name, argv, end_by, **more):
        with open(os.path.join(self.dir, name + ".log"), "wb") as log:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=self.env,
                                     preexec_fn=lambda: die_with_parent(end_by), **more)
        self.children.append((child, end_by))
        return child

    def weft(self, *args):
        argv = [os.path.join(self.bin, "weft"), "--context", os.path.join(self.dir, "context.json"), *args]
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=self.env, check=True, timeout=STEP_SECONDS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="where this measurement's files go; must exist")
    parser.add_argument("--template", required=True, help="where the initialised cluster is kept; made if missing")
    parser.add_argument("--bin", required=True, help="where weft-controller and weft are")
    parser.add_argument("--postgres", required=True, help="where initdb and postgres are")
    parser.add_argument("--ports", required=True, help="of PostgreSQL, the controller, and its admin pages")
    mesh = Mesh(parser.parse_args())

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    die_with_parent(signal.SIGTERM)
    try:
        mesh.start()
        print("ready", flush=True)
        os.wait()
        sys.exit("PostgreSQL or the controller ended by itself")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mesh.stop()


if __name__ == "__main__":
    main()

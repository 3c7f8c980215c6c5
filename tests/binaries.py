"""Binaries of `experiments` in processes of their own, as a user starts them.

Most of a short command's time goes into imports. So `command` forks a process that has made them,
the fork server, one for each process of the tests; `process` starts Python itself.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.lowering import share_the_context

ROOT = Path(__file__).parents[1]

# Compilation is most of the time, and commands after the first find what it compiled.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# What the binaries import, at once or where they use it. Binaries that define flags when they are
# imported are not among them: a second definition, that of the binary which runs, is an error.
IMPORTED = (
    *("experiments.train", "experiments.records", "meta_jax.training.learned_rules"),
    *("orbax.checkpoint", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.Image"),
)
_SERVER = "import sys; from tests.binaries import serve; serve(sys.stdin.buffer, sys.stdout.buffer)"


def environment() -> dict[str, str]:
    """The environment of a binary: that of the tests, with quick compilation."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **QUICK}


def process(module, *arguments, cwd=ROOT):
    """Runs `python -m experiments.MODULE` to its end."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def command(module, *arguments, cwd=ROOT):
    """As `process`, by a fork of a process that has imported what the binary needs."""
    arguments = [f"experiments.{module}", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        job = {
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": environment(),
            "output": str(output),
            "errors": str(errors),
        }
        server = _server()
        server.stdin.write(json.dumps(job).encode() + b"\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the fork server ended with status {server.wait()}"
        return subprocess.CompletedProcess(
            arguments, json.loads(answer), output.read_text(), errors.read_text()
        )


@functools.cache
def _server() -> subprocess.Popen:
    """The fork server of this process; it ends when its input does, as with this process."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(server.communicate)
    return server


def serve(jobs, answers) -> None:
    """Forks a process for each job and answers with its exit status; the child returns from here.

    So a child ends as any program does, with what is registered for its exit, the traceback of an
    exception that nobody caught and its status.

    Args:
      jobs: Binary file with a job in each line; it ends the server.
      answers: Binary file for a status in each line.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    share_the_context()
    gc.freeze()  # else a child looks through all that is imported when it ends: half a second
    while line := jobs.readline():
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        answers.write(b"%d\n" % os.waitstatus_to_exitcode(status))
        answers.flush()


def _run(arguments, cwd, environment, output, errors) -> None:
    """Runs a module as the program of this process."""
    created = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    opened = (os.open(os.devnull, os.O_RDONLY), os.open(output, created), os.open(errors, created))
    for standard, descriptor in enumerate(opened):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0] = str(cwd)
    module, *_ = sys.argv = arguments
    sys.modules.pop(module, None)  # the program is no import of it
    runpy.run_module(module, run_name="__main__", alter_sys=True)

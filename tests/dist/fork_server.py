"""A process that has imported everything and forks the ranks of tests: an import costs six seconds, a fork a hundredth.

It reads a line of JSON for each start, ``{"module", "arguments", "environments", "prints"}``, forks a rank for each
environment, which runs ``python -m module`` as far as it can tell, and answers with a line of the ranks' process
numbers, and one of their exit codes once all have ended. It has one thread and no process group, so nothing is lost in
a fork.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from typing import Any, NoReturn


def main() -> None:
    """Serves until its input ends."""
    import minillm.api  # noqa: F401 (what every rank needs)
    import tests.tiny  # noqa: F401
    from minillm.ranks import prepare_deepspeed

    prepare_deepspeed()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        asked = json.loads(line)
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in the ranks"
        pids = [
            os.fork() or rank(asked, environment, prints)
            for environment, prints in zip(asked["environments"], asked["prints"], strict=True)
        ]
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), file=answers, flush=True)


def rank(asked: dict[str, Any], environment: dict[str, str], prints: str) -> NoReturn:
    """What a forked process does, as if it had been started for this alone."""
    code = 1
    try:
        os.setsid()
        into = os.open(prints, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (into, 1), (into, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [asked["module"], *asked["arguments"]]
        code = 0
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

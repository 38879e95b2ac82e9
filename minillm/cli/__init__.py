"""The command line: thin commands over the Python API, with errors told in a few lines and no traceback.

``runs``, ``kept``, ``comparisons``, ``merging`` and ``builtin`` hold the commands as functions, from which typer reads
arguments, options and help; here they become one command line. ``minillm bench`` is put together in ``bench/``.

Exit codes stand in ``exits``.
In help texts, ``\\b`` keeps a paragraph's lines as they are, so that an example can be copied.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer

from minillm import exits, phases
from minillm.bench import (  # noqa: F401 (each adds its benchmarks)
    commands,
    commands_evaluate,
    commands_plan,
    commands_rollout,
    commands_scale,
)
from minillm.bench.options import app as bench_app
from minillm.cli import builtin, checking, comparisons, kept, launching, merging, models, planning, runs
from minillm.errors import MinillmError, Stopped, visible
from minillm.lost import as_rank_lost, leave
from minillm.stops import SIGNALS
from minillm.terminal import lasting_output

FIRST_RANK_SPEAKS_S = 10.0
"""How long the other ranks leave rank 0 to tell an error that all of them have; the launcher ends them once it did."""
EXAMPLES = """
\b
Examples:
  minillm doctor --config recipes/quickstart/teacher.yaml
  minillm sft --config recipes/quickstart/teacher.yaml threads=2
  minillm distill --config recipes/quickstart/minillm.yaml name=mine seed=3
  minillm evaluate runs/mine/student --out runs/mine/again \\
    --config recipes/quickstart/minillm.yaml
  minillm prefers runs/mine/student --reference runs/sft/student \\
    --pairs held-out.jsonl --config recipes/preference/dpo.yaml
  minillm report a=runs/a b=runs/b --difference a,b --out runs/a-and-b
  minillm generate runs/quickstart/teacher/student --out taught.jsonl \\
    --config recipes/quickstart/minillm.yaml
  minillm pairs --config recipes/quickstart/minillm.yaml \\
    --teacher runs/quickstart/teacher/student --out pairs.jsonl
  minillm cache runs/quickstart/teacher/student --top-k 16 --out cached \\
    --config recipes/quickstart/minillm.yaml
  minillm compare a=runs/a b=runs/b --out runs/a-or-b
  minillm cards students/gpt2
  minillm plan --teacher llama-13b --student llama-7b --gpus 8 \\
    --gpu-memory 80
  minillm world --out world
  minillm diagnose --config recipes/quickstart/minillm.yaml \\
    student=runs/mine/student --prompts 128
  minillm study --config docs/results/long-horizon.yaml --show
  minillm judge runs/a runs/b --url http://localhost:8000/v1 --model NAME
  minillm win-rate runs/a runs/b --by teachers/gpt2-xl
  minillm runs verify runs/mine
  minillm merge runs/sft/student runs/a/student runs/b/student --out merged
  minillm merge-adapter BASE runs/mine/student/adapter --out merged
  minillm selftest --json selftest.json
  minillm bench loss --json bench.json

\b
On several processes or GPUs:
  minillm launch --ranks 2 distill \\
    --config recipes/quickstart/minillm.yaml
  minillm launch --hostfile hosts distill --config my-run.yaml

More on a command: minillm COMMAND --help
"""
COMMANDS = (
    runs.sft,
    runs.distill,
    runs.evaluate,
    runs.prefers,
    runs.generate,
    runs.pairs,
    runs.cache,
    checking.doctor,
    comparisons.report,
    comparisons.compare,
    models.cards,
    planning.plan,
    builtin.world,
    runs.diagnose,
    comparisons.study,
    comparisons.judge,
    comparisons.win_rate,
    kept.runs,
    merging.merge,
    builtin.merge_adapter,
    builtin.selftest,
)
"""In the order in which the help lists them."""

app = typer.Typer(
    name="minillm",
    help="Distil a large language model into a small one, on the small one's own text, and prove what it is worth.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"minillm {version('minillm')}")
        raise typer.Exit


@app.callback()
def _common(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    # DeepSpeed's launcher puts --local_rank before the command; the environment says the same, and libraries read it
    # there.
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


for _command in COMMANDS:
    app.command()(_command)
# Whatever follows the command's name is its own.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(launching.launch)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of ``minillm`` and ``python -m minillm``."""
    phases.show()
    with lasting_output():
        code = _guarded(app)
    leave(code)


def _guarded(command: Callable[..., object]) -> int:
    """Runs a command; its exit code, with an error of the user's told in a few lines."""
    try:
        result = command(standalone_mode=False)
    except Stopped as error:  # all ranks have it, and the time to end in may be short
        for number in SIGNALS:  # it is saved: a signal more must not take the place of the code that says so
            signal.signal(number, signal.SIG_IGN)
        if os.environ.get("RANK", "0") == "0":
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except MinillmError as error:
        _tell(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        result = exits.INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _tell(f"{type(error).__name__}: {where}\n  look at that path: what it is, its rights, the room on its disk")
        return MinillmError.exit_code
    except Exception as error:
        if lost := as_rank_lost(error):
            _tell(f"{type(lost).__name__}: {lost}")
            return lost.exit_code
        if not _is_usage_error(error):
            raise
        error.show()  # type: ignore[attr-defined]
        return MinillmError.exit_code
    # typer turns an interruption that reaches it into this code.
    if result == exits.INTERRUPTED:
        print(
            "interrupted; the same command goes on from what is saved "
            "(a run its checkpoints, a study its finished cells, an evaluation and generate their answers, "
            "a judge its answers)",
            file=sys.stderr,
        )
    return result if isinstance(result, int) else 0


def _tell(text: str) -> None:
    """Prints an error once, although all ranks have it, and also where only one of them has it."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # The launcher ends all ranks as soon as one has ended, which must not be before rank 0 has spoken.
        time.sleep(FIRST_RANK_SPEAKS_S)
        text = f"rank {rank}: {text}"
    print(visible(text), file=sys.stderr, flush=True)


def _is_usage_error(error: Exception) -> bool:
    """Whether the command line itself was wrong: an unknown option, a missing argument."""
    return hasattr(error, "show") and hasattr(error, "exit_code")

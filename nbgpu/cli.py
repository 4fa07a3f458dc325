"""The command ``nbgpu``: options and help only; each command's work is in a module of its own, imported when it is called."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="A fraction of a GPU for every Jupyter notebook, and for any other program.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
REST: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
AS_JSON = typer.Option("--json", help="Print one JSON object for programs.")


def _version(wanted: bool) -> None:
    if wanted:
        from nbgpu import __version__

        typer.echo(f"nbgpu {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """A fraction of a GPU for every Jupyter notebook, and for any other program."""


@app.command()
def status(
    as_json: Annotated[bool, AS_JSON] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second, until Ctrl-C.")] = False,
    node: Annotated[bool, typer.Option("--node", help="Inside a slice: show the whole machine, not only this slice.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", "-k", help="As admin: the Kubernetes cluster of KUBECONFIG.")] = False,
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="URL", help="As admin: what the pool there says; its token in NBGPU_POOL_TOKEN.")
    ] = None,
) -> None:
    """Show devices, slices, their owners and what they use; inside a notebook server, its own slice."""
    if cluster or pool:
        from .cli_cluster import show_cluster, show_pool

        if pool:
            show_pool(pool, as_json=as_json)
        else:
            show_cluster(as_json=as_json)
        return
    from .cli_status import show

    show(as_json=as_json, watch=watch, whole_node=node)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments.", metavar="-- PROGRAM [ARGUMENT]...")],
    gpu: Annotated[str | None, typer.Option("--gpu", "-g", help="Fraction of a GPU: 1/4, 0.25 or 25%.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", "-m", help="GPU memory instead of that fraction of it, such as 20GiB.")] = None,
    compute: Annotated[str | None, typer.Option("--compute", "-c", help="Fraction of the GPU's time instead, such as 1/2.")] = None,
    count: Annotated[int, typer.Option("--count", help="Take that part of so many GPUs of one machine.")] = 1,
    model: Annotated[str | None, typer.Option("--model", help="Only a GPU of this model.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="strict: never more than its time. burst: more while others are idle.")] = "burst",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Fail when nothing is free now, instead of waiting in the queue.")] = False,
) -> None:
    """Run any program in a slice of a GPU, without a hub.

    It waits in the queue when nothing is free (Ctrl-C leaves). The program takes this command's place, so its exit status, its
    signals and its terminal are its own; the slice is free again when its last process has ended.
    """
    from .cli_run import run_program, wanted

    run_program(wanted(gpu=gpu, memory=memory, compute=compute, count=count, model=model, mode=mode), command, wait=not no_wait)


@app.command()
def limit(
    kernel: Annotated[
        str | None, typer.Argument(help="The kernel: its notebook's name or path, or the start of its id. Without it, kernels are listed.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", "-m", help="Most GPU memory that it may hold: 5GiB, or a part of the slice, 1/2 or 50%.")
    ] = None,
    compute: Annotated[
        str | None, typer.Option("--compute", "-c", help="Most of the slice's GPU time that it may take, such as 1/2 or 25%.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Take its limits away: only the slice's own hold.")] = False,
    slice_id: Annotated[
        str | None, typer.Option("--slice", "-s", help="As admin: the slice, or the start of its id. Without a kernel: all of it.")
    ] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """List the kernels of a slice (as admin: of all) with their limits, or limit one of them.

    As admin, with --slice and no kernel, --memory and --compute give the whole slice another size, in amounts and parts of the GPU, as far
    as the pool's quotas and room allow: nbgpu limit --slice 3f2a --memory 20GiB --compute 1/2. So what `nbgpu run` started is limited too.
    """
    from .cli_limit import list_kernels, set_limit

    if kernel is None:
        if slice_id and (memory or compute) and not clear:
            from .cli_slice import resize_slice

            resize_slice(slice_id, memory=memory, compute=compute, as_json=as_json)
            return
        if memory or compute or clear:
            which = "which kernel? Name it by its notebook or its id; `nbgpu limit` lists them"
            raise typer.BadParameter(f"{which}. With --slice, --memory and --compute are for the whole slice.", param_hint="KERNEL")
        list_kernels(slice_id, as_json=as_json)
    else:
        set_limit(kernel, slice_id, memory=memory, compute=compute, clear=clear, as_json=as_json)


@app.command()
def suspend(
    kernel: Annotated[str, typer.Argument(help="The kernel: its notebook's name or path, or the start of its id.")],
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """Move a kernel's GPU memory to the host's, where the administrator offers it: in a terminal of its server."""
    from .cli_suspend import suspend as move

    move(kernel, as_json=as_json)


@app.command()
def resume(
    what: Annotated[
        str | None,
        typer.Argument(
            help="The process by its number, or its kernel: by its notebook, or the start of its id. Without it, they are listed."
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of one slice.")] = False,
    slice_id: Annotated[str | None, typer.Option("--slice", "-s", help="As admin: the slice, or the start of its id.")] = None,
    as_json: Annotated[bool, AS_JSON] = False,
) -> None:
    """List what the watchdog has suspended in a slice (as admin: in all), or let it go on: it is left alone until it ends.

    A kernel of this server that `nbgpu suspend` has moved gets its GPU memory back.
    """
    from . import cli_resume
    from .errors import NbgpuError

    if everything and what is not None:
        raise NbgpuError("--all or one process, not both: nothing was resumed.", code="invalid", status=400, field="--all")
    if everything:
        cli_resume.resume_all(slice_id, as_json=as_json)
    elif what is None:
        cli_resume.list_suspended(slice_id, as_json=as_json)
    else:
        cli_resume.resume(what, slice_id, as_json=as_json)


@app.command()
def doctor(
    as_json: Annotated[bool, AS_JSON] = False,
    probe: Annotated[bool, typer.Option(help="Also start a tiny program in a slice and look at it from inside.")] = True,
    cluster: Annotated[bool, typer.Option("--cluster", "-k", help="As admin: check the Kubernetes cluster of KUBECONFIG instead.")] = False,
) -> None:
    """Check this installation and say what is wrong and what to do. Exit status 1 when there is an error."""
    from .cli_doctor import examine

    raise typer.Exit(examine(as_json=as_json, probe=probe, cluster=cluster))


@app.command()
def serve(
    idle_exit: Annotated[float, typer.Option("--idle-exit", help="End when no slice was held for so many seconds; 0: never.")] = 0,
) -> None:
    """Run the agent and the pool in the foreground, without a hub."""
    from .cli_serve import serve_both

    raise typer.Exit(serve_both(idle_exit))


@app.command(context_settings=REST)
def agent(context: typer.Context) -> None:
    """Run the node agent alone (`nbgpu agent --help` lists its options)."""
    become("nbgpu_agent", "agent", context.args)


@app.command(context_settings=REST)
def pool(context: typer.Context) -> None:
    """Run the pool allocator alone (`nbgpu pool --help` lists its options)."""
    become("nbgpu_pool", "pool", context.args)


def become(module: str, extra: str, arguments: list[str]) -> NoReturn:
    """Replace this process by ``python -m module``."""
    from .cli_serve import command_of

    os.execv(sys.executable, [*command_of(module, extra), *arguments])


def main() -> None:
    """Entry point: runs a command; errors become one line and an exit status."""
    from .errors import NbgpuError

    try:
        app()
    except NbgpuError as error:
        complain(error.message, error)
    except BrokenPipeError:  # the reader of `nbgpu status | head` has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        complain(f"{type(error).__name__}: {error}. This is a fault of nbgpu; NBGPU_DEBUG=1 shows where.", error)


def complain(message: str, error: BaseException) -> NoReturn:
    """Print one line on stderr and exit with 1; with NBGPU_DEBUG=1 raise, so that the stack trace shows."""
    if os.environ.get("NBGPU_DEBUG") == "1":
        raise error
    from .logs import one_line

    print(f"nbgpu: {one_line(message)}", file=sys.stderr)
    sys.exit(1)

"""`batchnorm bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from batchnorm.cli.terminal import in_one_line, keep_file, print_error, print_status, progress, usage_error
from batchnorm.runs.run import RunError


def bench(
    networks: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="With --memory: these networks, as 'U-Net 3-d'; all by default."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A dozen cases, in under a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every shape, layout, type, variant and mode.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Training and inference of nine networks, each in its layouts.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Memory of training steps in place of times; each in a fresh process.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="With --memory: the size of the batch; by default each network's own.")
    ] = None,
    only: Annotated[
        str, typer.Option("--filter", metavar="TEXT", help="Only cases with these words, as 'channels_last bn+relu'.")
    ] = "",
    with_compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile in every case, or in none; by default one case for each shape and layout has it, and "
            "every network (a minute each), but none with --quick or on a GPU. Needs a C++ compiler.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: a GPU, with cases of its size.")] = "cpu",
    called: Annotated[
        bool, typer.Option("--called", help="On a GPU: time calls from Python, not replays of CUDA graphs.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="PyTorch's threads; by default PyTorch's own number.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds per case; by default until the time is stable.")] = None,
    allocator: Annotated[
        str | None,
        typer.Option(
            help="tuned (freed memory stays with the process) or default (as the system has it); not with --memory.",
            show_default="tuned",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file for the result; by default a new one, in benchmarks/ or here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the result that --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    machine: Annotated[
        bool, typer.Option("--machine", help="Time no layers: print what the CPU kernels know about this machine.")
    ] = False,
    render: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure nothing: print a stored result as Markdown.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="With --memory or --render: also write the memory as a page.")
    ] = None,
) -> None:
    """Time the layers against PyTorch, JAX and the memory bound.

    Each call takes other tensors than the last one, so that the caches do not hold them; smaller cases are timed with
    the same ones, too.

    Cases with wrong results are not timed; the exit status is then 1.
    """
    from batchnorm.bench import record as records
    from batchnorm.bench.record import POLICIES, restart_with_policy

    if memory and allocator is not None:
        raise usage_error("--allocator is for times: a measurement of memory has its own")
    allocator = allocator or ("default" if memory else "tuned")
    if allocator not in POLICIES:
        raise usage_error(f"unknown --allocator {allocator!r}: use {' or '.join(POLICIES)}")
    if quick and full:
        raise usage_error("--quick and --full exclude each other")
    if memory and models:
        raise usage_error("--memory and --models exclude each other")
    if not memory and (networks or batch is not None):
        raise usage_error(f"{'MODEL' if networks else '--batch'} is for --memory")
    if html is not None:
        if not memory and render is None:
            raise usage_error("--html is for --memory, and for --render of such a result")
        keep_file(html, force)
    with in_one_line(records.BenchError):
        if render is not None:
            from batchnorm.bench.table import markdown

            record = records.load(render)
            print(markdown(record))
            if html is not None:
                _write_page(record, html)
            return
        from batchnorm.bench import conduct, table
        from batchnorm.report.terminal import json_text

        if machine:
            from batchnorm.bench import machine as machines

            with in_one_line((), usage=(records.BenchError, ValueError)):
                described = machines.describe(threads)
            print(json_text(described, indent=1)) if as_json else machines.show(described)
            return
        scope = "quick" if quick else "full" if full else "default"
        settings = conduct.Settings(
            scope,
            models,
            only,
            with_compile,
            threads,
            repeats,
            device=device,
            called=called,
            memory=memory,
            networks=tuple(networks or ()),
            batch=batch,
        )
        with in_one_line((), usage=records.BenchError):
            conduct.check(settings)
        if out is not None:
            records.check_vacant(out, force=force)
        restart_with_policy(allocator)
        with progress("measuring") as update:
            record, path = conduct.conduct(
                settings,
                out,
                force=force,
                arguments=sys.argv[1:],
                progress=update,
                print_line=print_status,
                announce=print_error,
            )
    if html is not None and record["memory"]:
        _write_page(record, html)
    if as_json:
        print(json_text(record, indent=1))
    else:
        table.show(record)
        print(f"\nresult  {path}" + (f"\nreport  {html}" if html is not None and record["memory"] else ""))
    if record["status"] == "interrupted":
        raise typer.Exit(130)
    if table.red(record):
        raise typer.Exit(1)


def _write_page(record: dict[str, Any], html: Path) -> None:
    """Write the memory of a record as a page."""
    from batchnorm.report import Report

    with in_one_line((ValueError, RunError)):
        Report.of(record).write(html)

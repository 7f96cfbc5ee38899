"""`baton init` and `baton schema`: what a person who writes a graph file begins with.

The example is a graph that runs as it stands, on any cluster that has a POSIX shell; each comment says what else could stand there.
"""

from __future__ import annotations

from pathlib import Path

import click

from baton import graphfile, graphschema
from baton.cli import render, session

EXAMPLE = """\
# A task graph. Judge it: baton validate FILE    Run it: baton run FILE --wait
# In editors: `baton schema > baton.schema.json`, and this line (without the first #):
## yaml-language-server: $schema=baton.schema.json
apiVersion: baton/v1
kind: Graph

metadata:
  # name: nightly                 # the run's id; made by the server if left out
  labels: {team: data} #          runs are listed by them

spec:
  deadline: 10m #                 when all is final: from the start, or a moment (2026-11-30T18:00:00Z)
  priority: 0 #                   -1000 to 1000

  defaults: #                     of every task that does not set them
    resources: {cpu: 500m, memory: 128Mi}
    retry: {attempts: 3, backoff: 1s}

  tasks:
    # A program: argv, never a shell line. Its result is what it writes to the file $BATON_RESULT names (at most 16 KiB).
    - id: split
      argv: [sh, -c, 'echo 3 > "$BATON_RESULT"']

    # Results of the parents are in the JSON file that $BATON_INPUTS names: {"split": "3\\n"}
    - id: left
      after: [split]
      argv: [sh, -c, 'cat "$BATON_INPUTS" > "$BATON_RESULT"']
      timeout: 1m #               longest run time of one attempt
      expected: 1s #              declared run time: which tasks are urgent

    - id: right
      after: [split]
      argv: [sh, -c, 'echo right > "$BATON_RESULT"']
      env: {GREETING: hello}
      # clusters: [eu, us]        # only there
      # selector: {zone: cold}    # only where the cluster carries these labels
      # on_cluster_lost: wait     # default: a copy elsewhere once this one must be dead
      # hedge: true               # a second copy as soon as its cluster is suspect; for work that may run twice

    - id: join
      after: [left, right]
      argv: [sh, -c, 'cat "$BATON_INPUTS"']

    # Runs whatever became of the others: clean up, tell somebody.
    - id: tidy
      after: [join]
      trigger: all_done #         or all_succeeded (default), any_failed, none_failed
      argv: [sh, -c, 'echo done']

    # A Python function instead of a program; its packages are installed on the cluster:
    # - id: report
    #   after: [join]
    #   python: {function: "steps.report:make", args: [{result: join}], requirements: [my-steps==1.0]}
"""


@click.command()
@click.argument("file", default="graph.yaml", type=click.Path(dir_okay=False, allow_dash=True))
def init(file: str) -> None:
    """Write a commented example graph to FILE (graph.yaml; `-`: standard output). Never overwrites.

    \b
    Example:
      baton init nightly.yaml
      baton run nightly.yaml --wait
    """
    if not file:
        raise click.UsageError("FILE is empty: name the file to write, or `-` for standard output")
    if file == "-":
        click.echo(EXAMPLE, nl=False)
        return
    try:
        new = Path(file).open("x", encoding="utf-8")  # noqa: SIM115 - closed below, where a failure is the disk's
    except FileExistsError:
        raise click.UsageError(f"{file} is there already: choose another name") from None
    except OSError as error:
        raise click.UsageError(f"{file} cannot be written: {error.strerror}") from None
    try:
        with new:
            new.write(EXAMPLE)
    except OSError as error:
        Path(file).unlink(missing_ok=True)  # an empty file would be in the way of the next try
        raise click.UsageError(f"{file} cannot be written: {error.strerror}") from None
    click.echo(f"{file}: written; try `{session.invoked()} run {file} --wait`")


@click.command()
def schema() -> None:
    """Print the JSON Schema of graph files, for editors.

    With the YAML extension of VS Code, or any editor that uses yaml-language-server, put this at the top of a graph:
    # yaml-language-server: $schema=baton.schema.json

    \b
    Example:
      baton schema > baton.schema.json
    """
    render.echo_data(graphschema.schema(), "json")


@click.command()
@click.argument("file")
@session.json_output
def validate(file: str, as_json: bool) -> None:
    """Judge the graph in FILE (`-`: standard input) without a federation; faults are told with their lines.

    \b
    Example:
      baton validate graph.yaml
      baton validate graph.yaml -o json
    """
    if not as_json:
        graph = graphfile.load(file)
        click.echo(f"{file}: good, {len(graph.spec.tasks)} tasks")
        return
    try:
        tasks, problems = len(graphfile.load(file).spec.tasks), []
    except graphfile.GraphFileError as error:
        tasks, problems = 0, error.problems
    told = [{"file": p.file, "line": p.line or None, "field": p.field, "what": p.what, "fix": p.fix} for p in problems]
    render.echo_data({"good": not problems, "tasks": tasks, "problems": told}, "json")
    if problems:
        raise click.exceptions.Exit(session.BAD_INPUT)

"""`slmops cloud check | plan | run | submit`: the pipeline judged, priced, run here or sent to Azure."""

import argparse
import sys
from pathlib import Path

from slmops_course.errors import CourseError

PIPELINE = Path("deploy/azure/pipeline.yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all four actions. Nothing heavy is imported for `--help`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, what in (
        ("check", "say what is wrong with the pipeline's files"),
        ("plan", "print the steps, their machines and what they would cost"),
        ("run", "execute the pipeline's file on this machine"),
        ("submit", "send it to the workspace that the environment names, after asking"),
    ):
        command = actions.add_parser(action, help=what)
        command.add_argument("--pipeline", type=Path, default=PIPELINE, help=f"the pipeline's file (default: {PIPELINE})")
        if action != "check":
            command.add_argument(
                "--set", nargs=2, action="append", default=[], metavar=("INPUT", "VALUE"), help="set an input of the pipeline"
            )
        if action in ("plan", "submit"):
            command.add_argument("--prices", type=Path, help="a price table (default: prices.json beside the pipeline)")
            command.add_argument("--yes", action="store_true", help="do not ask; for CI")
        if action == "submit":
            command.add_argument("--again", action="store_true", help="a further run of a job that is there already")
        command.set_defaults(run=run)


def run(options, *, ask=input, connect=None) -> int:
    """Carry out an action; returns the exit code. `ask` and `connect` are replaced in rehearsals."""
    from slmops_course.cloud.checks import check_file
    from slmops_course.cloud.definition import load_pipeline

    if options.action == "check":
        problems = check_file(options.pipeline)
        print("\n".join(problems) or f"{options.pipeline}: nothing is wrong that can be seen from here.")
        return int(bool(problems))
    pipeline, inputs = load_pipeline(options.pipeline), dict(options.set)
    if options.action == "run":
        from slmops_course.cloud.local import run_pipeline

        ran = run_pipeline(pipeline, options.build, inputs=inputs)
        for name, trials in ran.trials.items():
            print(*(f"{name}: {trial}" for trial in trials), sep="\n")
        print(*(f"{v.name} {v.number} is registered\n\n{v.report}" for v in ran.registered.values()), sep="\n")
        return 0
    return _plan_or_submit(options, pipeline, inputs, ask, connect)


def _plan_or_submit(options, pipeline, inputs, ask, connect) -> int:
    from slmops_course.cloud import cost, submit
    from slmops_course.cloud.local import with_inputs

    local = {name: value for name, value in inputs.items() if not submit.is_remote(value)}
    changed = with_inputs(pipeline, local)
    prices = cost.read_prices(options.prices or options.pipeline.parent / "prices.json")
    print(cost.format_plan(changed, cost.estimate(changed, prices), prices))
    workspace = submit.read_workspace()
    if workspace is None:
        names = ", ".join(submit.VARIABLES.values())
        print(f"No workspace is named, so nothing is sent: set {names} and sign in with `az login` to submit this.")
        return int(options.action == "submit")
    print(f"It would go to the workspace {workspace.workspace} in {workspace.resource_group}.")
    if options.action == "plan":
        return 0
    if not options.yes and not _agreed(ask):
        print("Nothing was sent.")
        return 1
    client = (connect or submit.connect)(workspace)
    sent = submit.submit(client, submit.build_job(pipeline, inputs=inputs), again=options.again)
    state = "was sent" if sent.created else "is there already, so nothing was sent (--again for a further run)"
    print(f"{sent.name} {state}: {sent.status}, {sent.url}")
    return 0


def _agreed(ask) -> bool:
    """Whether a person says yes. Where nobody can be asked, nobody did."""
    if ask is input and not sys.stdin.isatty():
        raise CourseError("Nobody can be asked here: expected a terminal, or --yes to spend without asking.")
    return ask("Spend this? Type yes: ").strip().lower() == "yes"

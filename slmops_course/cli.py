"""The command line: `slmops doctor | run | chapters | experiment | report | registry | serve | cloud | site | translate`."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from slmops_course import __version__
from slmops_course.cloud.commands import add_arguments as add_cloud
from slmops_course.errors import CourseError
from slmops_course.language import VARIABLE, use

BUILD = Path("build")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. It imports nothing heavy, so that `--help` answers at once."""
    parser = argparse.ArgumentParser(prog="slmops", description="Small Language Model Operations, hands on.")
    parser.add_argument("--version", action="version", version=f"slmops {__version__}")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder for artifacts and reports (default: build)")
    parser.add_argument("--lang", metavar="CODE", help=f"language of what is printed, such as hi (default: ${VARIABLE}, or en)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="look at this machine and say what to do about what is missing")
    doctor.set_defaults(run=_doctor)

    run = commands.add_parser("run", help="take a task through the whole path and print the scoreboard")
    _add_course_options(run)
    run.set_defaults(run=_run)

    chapters = commands.add_parser("chapters", help="execute the notebooks from clean kernels")
    chapters.add_argument("names", nargs="*", metavar="CHAPTER", help="such as 02_distillation (default: all four)")
    chapters.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
        help="set a parameter of the notebooks' parameters cell",
    )  # fmt: skip
    chapters.add_argument("--save", action="store_true", help="write the outputs into notebooks/ (for authors)")
    chapters.set_defaults(run=_chapters)

    experiment = commands.add_parser("experiment", help="carry out a side experiment, or list them")
    experiment.add_argument("names", nargs="*", metavar="NAME", help="such as losses (default: list all)")
    experiment.add_argument("--save", action="store_true", help="keep the figures with the course (for authors)")
    _add_course_options(experiment)
    experiment.set_defaults(run=_experiment)

    report = commands.add_parser("report", help="print the scoreboard and write build/report.html")
    _add_course_options(report)
    report.set_defaults(run=_report)

    _add_registry(commands.add_parser("registry", help="register, list, show, promote and roll back versions of the model"))

    serve = commands.add_parser("serve", help="serve the course's model by Foundry Local behind a gateway, on loopback")
    _add_course_options(serve)
    serve.add_argument("--port", type=int, default=0, help="loopback port (default: any free one)")
    serve.set_defaults(run=_serve)

    add_cloud(commands.add_parser("cloud", help="the steps as an Azure ML pipeline: check, plan, run here, submit"))
    site = commands.add_parser("site", help="write the course as pages to read, in every language, to build/site")
    site.set_defaults(run=_site)
    _add_translate(commands.add_parser("translate", help="keep the translations in step with the English (for authors)"))
    return parser


def _add_translate(translate: argparse.ArgumentParser) -> None:
    actions = translate.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, what in (
        ("extract", "bring the catalogues up to the English of now"), ("status", "how far each catalogue is"),
        ("render", "write the translated documents"), ("check", "say what is wrong, and change nothing"),
    ):  # fmt: skip
        parser = actions.add_parser(action, help=what)
        parser.add_argument("codes", nargs="*", metavar="LANGUAGE", help="such as hi (default: all)")
        if action == "render":
            parser.add_argument("--executed", type=Path, help="folder with notebooks as they ran in each language")
    actions.add_parser("new", help="begin a language").add_argument("code", metavar="LANGUAGE", help="ISO 639-1, such as ta")
    for parser in actions.choices.values():
        parser.set_defaults(run=_translate)


def _add_registry(registry: argparse.ArgumentParser) -> None:
    """The actions on the registry; those that measure a model take the course's options, the others a model's name."""
    actions = registry.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="judge a model of the course at the release gate and register it")
    _add_course_options(add)
    add.add_argument("--recipe", default="int4-rtn", help="how the student is made an ONNX model (default: int4-rtn)")
    add.add_argument("--device", default="laptop", help="whose limits it has to keep: laptop (default), phone or board")
    for action, what in (
        ("list", "all versions of all models"), ("show", "one version: files, lineage, gate report"),
        ("promote", "put a version that passed its gate into production"), ("rollback", "go back to the version before"),
    ):  # fmt: skip
        parser = actions.add_parser(action, help=what)
        if action != "list":
            parser.add_argument("--name", default="support_desk", help="the model (default: support_desk)")
        if action == "show":
            parser.add_argument("version", nargs="?", default="production", help="a number or an alias (default: production)")
        if action == "promote":
            parser.add_argument("version", type=int, metavar="NUMBER")
    for parser in actions.choices.values():
        parser.set_defaults(run=_registry)


def _add_course_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", default="support_desk", help="a task folder, a folder of CSV files, or hub:OWNER/NAME")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m, a hub id, or a folder")
    parser.add_argument("--profile", default="fast", help="fast (default) or full")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors a user can mend are one sentence and code 1."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("slmops_course").setLevel(logging.INFO)
    try:
        if options.lang:
            use(options.lang)
            # Kernels and other processes that this one starts speak it too.
            os.environ[VARIABLE] = options.lang
        return options.run(options) or 0
    except CourseError as error:
        print(f"slmops: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("slmops: stopped; finished steps are kept: run the same command again to go on.", file=sys.stderr)
        return 130


def _course(options):
    from slmops_course.pipeline import open_course

    build = options.build.absolute()
    course = open_course(build / "artifacts", task=options.task, model=options.model, profile=options.profile)
    for rejected in course.task.rejected:
        print(f"not used: {rejected.where}: {rejected.reason}", file=sys.stderr)
    return course


def _doctor(options) -> int:
    from slmops_course.doctor import diagnose, format_findings

    findings = diagnose()
    print(format_findings(findings))
    return int(any(finding.status == "problem" for finding in findings))


def _run(options) -> None:
    from slmops_course.report import format_scoreboard, write_report

    course = _course(options)
    rows = []
    for name in course.contenders():
        rows += course.scoreboard([name])
        print(format_scoreboard(rows[-1:], header=len(rows) == 1), flush=True)
    print(f"\n{write_report(options.build, course, rows)}")


def _chapters(options) -> None:
    from slmops_course.authoring.execute import execute_chapters

    execute_chapters(options.names, options.build, parameters=dict(options.parameters), save=options.save)


def _experiment(options) -> None:
    from slmops_course import experiments

    for name in options.names:
        experiments.find(name)
    for name in options.names or experiments.EXPERIMENTS:
        if not options.names:
            print(f"{name:14} {experiments.find(name).__doc__.splitlines()[0]}")
            continue
        record = experiments.run(_course(options), name)
        print(json.dumps(record.rows, indent=1), f"{record}", sep="\n", flush=True)
        if options.save:
            print(experiments.keep(record))


def _report(options) -> None:
    from slmops_course.report import format_scoreboard, write_report

    course = _course(options)
    rows = course.scoreboard()
    print(format_scoreboard(rows))
    print(f"\n{write_report(options.build, course, rows)}")


def _registry(options) -> int:
    from slmops_course.operations.registry import Registry
    from slmops_course.operations.versions import describe, table

    registry, passed = Registry(options.build / "registry"), True
    if options.action == "list":
        versions = [version for name in registry.names() for version in registry.versions(name)]
        print(table(versions) or "No version is registered yet; `slmops registry add` makes the first.")
    elif options.action == "show":
        print(describe(registry.get(options.name, options.version)))
    elif options.action == "promote":
        version = registry.promote(options.name, options.version)
        print(f"{version.name} {version.number} is in production.")
    elif options.action == "rollback":
        version = registry.rollback(options.name)
        print(f"{version.name} {version.number} is in production again.")
    else:
        from slmops_course.operations.release import release

        course = _course(options)
        version = release(course, registry, course.onnx(options.recipe).path, device=options.device)
        print(f"{version.name} {version.number}", version.report, sep="\n\n")
        passed = version.report.passed
    return int(not passed)


def _serve(options) -> None:
    import threading

    from slmops_course.operations.served import serve_model
    from slmops_course.serving import check_port_free

    if options.port:
        check_port_free(options.port)
    course = _course(options)
    folder = course.onnx(course.served_recipe).path
    with serve_model(folder, course.task, data_folder=options.build / "foundry", port=options.port) as served:
        print(f"{served.model} answers at {served.gateway}/chat/completions; Ctrl-C stops it.")
        print(f"Its metrics are at {served.metrics}.", flush=True)
        threading.Event().wait()


def _site(options) -> None:
    from slmops_course.authoring.site import write_site

    pages = write_site(Path("."), options.build / "site")
    print(f"{len(pages)} pages; begin with {pages[0]}")


def _translate(options) -> int:
    from slmops_course.authoring.translate import commands

    root, problems = Path("."), []
    if options.action == "new":
        print(*commands.new(root, options.code), sep="\n")
    elif options.action == "extract":
        print(*commands.extract(root, options.codes) or ["Nothing has changed."], sep="\n")
    elif options.action == "render":
        print(*commands.render(root, options.codes, executed=options.executed) or ["Nothing has changed."], sep="\n")
    elif options.action == "status":
        print(commands.format_status(list(commands.status(root, options.codes))))
    else:
        problems = commands.check(root, options.codes)
        print(*problems or ["Nothing is wrong."], sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

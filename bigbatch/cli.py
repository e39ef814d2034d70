"""The command `bigbatch VERB --config=FILE.py:EXPERIMENT --workdir=DIR [--config.field=value]`.

Exit status: 0 done, 1 the run could not go on, 2 a mistake that the user can mend, 3 at --until,
130 stopped by the keyboard, 129 by SIGHUP, 143 by SIGTERM, where a run is trained with the state
saved. Nothing heavy is imported before a verb needs it.
"""

import argparse
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import bigbatch
from bigbatch.commands import check_log, interrupts, plan_verb, tables
from bigbatch.commands.data import add_data
from bigbatch.errors import Problem, RunError, StoppedError, UserError, among
from bigbatch.places.paths import file_to_write

if TYPE_CHECKING:
    from bigbatch.commands.report import Report

# What a shell reports of a program that SIGPIPE has ended.
_BROKEN_PIPE = 141
_COLUMNS = 80
_OVERRIDE = re.compile(r"--config\.([A-Za-z_][\w.]*)=(.*)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    if arguments is None:
        interrupts.heed()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the terminal's encoding lacks is shown by its number.
        sys.stdout.reconfigure(errors="backslashreplace")
    overrides = [m.groups() for m in map(_OVERRIDE.fullmatch, arguments) if m]
    arguments = [a for a in arguments if not _OVERRIDE.fullmatch(a)]
    try:
        if arguments == ["--version"]:
            print("bigbatch", bigbatch.__version__)
        else:
            parser = _parser()
            _expect_known(parser, arguments)
            options = parser.parse_args(arguments)
            options.overrides = overrides
            if "workdir" in options and sys.stderr.isatty():
                # JAX takes a second or more to import.
                _say(f"bigbatch {arguments[0]}: {options.workdir}; starting JAX ...")
            options.verb(options)
        print(end="", flush=True)
    except (UserError, RunError, StoppedError) as error:
        return _tell(error)
    except (OSError, RuntimeError, AssertionError) as error:
        if not (_is_of_stdout(error) or _is_of_platforms(error)):
            raise
        return _tell(error)
    return 0


def _is_of_stdout(error: BaseException) -> bool:
    """Whether what was said could not be written: a file would have a name."""
    return isinstance(error, OSError) and error.filename is None


def _is_of_platforms(error: BaseException) -> bool:
    """Whether JAX has found no devices; some of its errors have no words."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith("xla_bridge.py")


def _tell(error: BaseException) -> int:
    """Says on standard error what has ended a command, and gives its exit status."""
    if _is_of_platforms(error):
        words = f" ({str(error).splitlines()[0]})" if str(error) else ""
        allowed = f"platforms whose devices JAX finds here{words}"
        error = UserError(Problem("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS"), allowed))
    if isinstance(error, OSError) and _is_of_stdout(error):
        # What is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE
        error = RunError(f"what was to be said cannot be written ({error.strerror})")
    if isinstance(error, UserError):
        count = len(error.problems)
        print(f"bigbatch: {count} mistake{'s' * (count > 1)}", file=sys.stderr)
        for problem in error.problems:
            text, last = f"  {problem}", "; allowed: "
            if problem.nearest is not None and len(text) > _COLUMNS:
                # What to type stands in a short line.
                text = text.replace(last, f"\n    {last[2:]}", 1)
            print(text, file=sys.stderr)
        return 2
    if isinstance(error, RunError | StoppedError):
        print(f"bigbatch: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, StoppedError) else 1
    traceback.print_exception(error)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bigbatch",
        description="Train with batch sizes that grow.",
        epilog="Fields of the config are changed by --config.FIELD=VALUE, for example "
        "--config.policy.learning_rate=0.2.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], None], text: str) -> Any:
        sub = verbs.add_parser(name, help=text, description=text, epilog=parser.epilog)
        sub.set_defaults(verb=function)
        return sub

    config = {"metavar": "FILE.py[:EXPERIMENT]", "help": "the config file"}
    workdir = {"metavar": "DIR", "help": "where the run is kept", "required": True}
    plan = verb("plan", plan_verb.run, "Show every stage of a run before it is made.")
    plan.add_argument("--config", required=True, **config)
    plan_verb.add_arguments(plan)
    text = "Check the log of a run that another trainer made against a plan."
    check_log.add_arguments(verb("check-log", check_log.run, text))
    bench = verb("bench", _bench, "Measure the speeds of one device here, for `plan --bench`.")
    bench.add_argument("--config", required=True, **config)
    bench.add_argument("--out", metavar="FILE", default="bench.json", help="(default bench.json)")
    train = verb("train", _train, "Train, or continue a run that was stopped.")
    train.add_argument("--config", required=True, **config)
    train.add_argument("--workdir", **workdir)
    _add_processes(train)
    _add_cache(train)
    train.add_argument(
        "--change-future",
        action="store_true",
        help="let the plan differ from the begun run's after its newest checkpoint",
    )
    train.add_argument("--from-update", type=int, metavar="N", help="go back to that checkpoint")
    train.add_argument(
        "--until",
        metavar="STAGE|TIME",
        help="end there, state saved, with status 3: after a stage of the plan, from 1, or at "
        "30_epochs, 2M_examples, 500_updates or 4B_tokens",
    )
    evaluate = verb("evaluate", _evaluate, "Evaluate the newest checkpoint of a run.")
    evaluate.add_argument("--config", **config)
    evaluate.add_argument("--workdir", **workdir)
    export = verb("export", _export, "Write the newest checkpoint's network as plain arrays.")
    for each in (evaluate, export):
        each.add_argument("--update", type=int, metavar="N", help="of that checkpoint")
    export.add_argument("--config", **config)
    export.add_argument("--workdir", **workdir)
    export.add_argument("--out", metavar="FILE.npz", required=True, help="for numpy.load")
    compare = verb("compare", _compare, "Train several experiments and seeds, then report them.")
    compare.add_argument("--config", required=True, **config)
    compare.add_argument("--workdir", **workdir)
    compare.add_argument(
        "--experiments", metavar="A,B,...", help="default: the file's COMPARED or all"
    )
    _add_cache(compare)
    compare.add_argument("--seeds", type=int, default=5, help="how many, from 0 on (default 5)")
    critical = verb("critical", _critical, "Measure the critical batch size along a run.")
    critical.add_argument("--config", **config)
    critical.add_argument("--workdir", **workdir)
    numbers = {"type": _numbers, "metavar": "A,B,..."}
    critical.add_argument(
        "--at-updates", **numbers, help="checkpoints (default: all but one at the end)"
    )
    critical.add_argument(
        "--sizes", **numbers, help="batch sizes (default: 6 about the noise scale)"
    )
    for name, value, text in (
        ("branches", 4, "runs at each batch size"),
        ("loss-share", 0.8, "by which the training loss is to fall"),
        ("most-epochs", 40.0, "of a branch"),
    ):
        critical.add_argument(
            f"--{name}", type=type(value), default=value, help=f"{text} (default {value:g})"
        )
    critical.add_argument(
        "--target", type=_target, metavar="METRIC=VALUE", help="in place of a share of the loss"
    )
    critical.add_argument(
        "--lr-factors", **numbers, default=(1.0,), help="of the rule's lr; the best counts"
    )
    _add_cache(critical)
    report = verb("report", _report, "Write figures, a page and a table.")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    report.add_argument("--out", required=True, metavar="DIR")
    add_data(verbs)
    return parser


def _expect_known(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Makes sure that a verb and its flags are spelled as they are known, or as a beginning."""
    verbs = next((a.choices for a in parser._actions if isinstance(a.choices, dict)), None)
    if verbs is None:
        for text in arguments:
            flag, known = text.partition("=")[0], parser._option_string_actions
            if flag.startswith("--config."):
                raise UserError(Problem("flag", text, "one with its value behind =", f"{flag}=3"))
            if flag.startswith("--") and not any(name.startswith(flag) for name in known):
                names = [name for name in known if name.startswith("--")]
                raise UserError(Problem("flag", flag, *among(flag, names)))
    elif arguments and arguments[0] in verbs:
        _expect_known(verbs[arguments[0]], arguments[1:])
    elif arguments and not arguments[0].startswith("-"):
        raise UserError(Problem("verb", arguments[0], *among(arguments[0], verbs)))


def _add_processes(verb: Any) -> None:
    """The flags that join the processes of one run, where nothing tells of them."""
    verb.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, for many processes")
    verb.add_argument("--num-processes", metavar="N", type=int, help="how many processes")
    verb.add_argument("--process", metavar="I", type=int, help="which one this is, from 0")


def _add_cache(verb: Any) -> None:
    verb.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keeps compiled programs for later starts (default: the user's cache directory); "
        "off for none",
    )


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas; whole ones as int."""
    parts = text.split(",")
    try:
        return tuple(int(part) if part.strip().isdecimal() else float(part) for part in parts)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"given {text!r}; allowed: numbers with commas between"
        ) from error


def _target(text: str) -> tuple[str, float]:
    """A metric and what it is to be."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        allowed = "loss or a metric, =, and a number, as in perplexity=20"
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: {allowed}") from error


def _config(options: argparse.Namespace) -> Any:
    from bigbatch.config.file import load_config

    return load_config(options.config, options.overrides)


def _workdir(text: str) -> Any:
    from bigbatch.workdir.files import Workdir

    if not text:
        raise UserError(Problem("workdir", text, "the path of a directory"))
    return Workdir.at(text)


def _no_overrides(options: argparse.Namespace, instead: str) -> None:
    if options.overrides:
        fields = [Problem(f"config.{name}", text, instead) for name, text in options.overrides]
        raise UserError(fields)


def _bench(options: argparse.Namespace) -> None:
    from bigbatch.commands.bench import bench, table

    config, out = _config(options), file_to_write(options.out, "out")
    result = bench(config)
    from bigbatch.workdir.files import write_json

    write_json(out, result)
    print(table(result))
    print(options.out)


def _train(options: argparse.Namespace) -> None:
    from bigbatch import distributed
    from bigbatch.training import compilation_cache
    from bigbatch.workdir import starts

    starts.with_process()
    compilation_cache.use(options.compilation_cache)
    processes = options.coordinator, options.num_processes, options.process
    with distributed.joined(*processes, tell=_tell):
        from bigbatch.config.assemble import load_data, train
        from bigbatch.training.progress import result_line

        config, files = distributed.together(lambda: (_config(options), _workdir(options.workdir)))
        # Before the directory is claimed: a run without data leaves nothing behind.
        data = distributed.together(lambda: load_data(config, show_progress=sys.stderr.isatty()))
        asked = {n: getattr(options, n) for n in ("change_future", "from_update", "until")}
        result, is_old = train(config, files, data=data, show_progress=True, **asked)
        if is_old:
            updates = result["updates"]
            distributed.say(f"This run is finished ({updates} updates); nothing was trained.")
    if not is_old and (line := starts.goodput_line(starts.before(files.starts))):
        distributed.say(line)
    distributed.say(f"{result_line(result)}; {files.result}")


def _own_config(options: argparse.Namespace) -> Any:
    """The config that is named; None for the workdir's own."""
    if options.config:
        return _config(options)
    _no_overrides(options, "nothing without --config: the workdir's own config is used")
    return None


def _evaluate(options: argparse.Namespace) -> None:
    files = _workdir(options.workdir)
    files.expect_run()
    config = _own_config(options)
    from bigbatch.commands.saved import evaluate_run

    print(json.dumps(evaluate_run(files, config, options.update)))


def _export(options: argparse.Namespace) -> None:
    files = _workdir(options.workdir)
    files.expect_run()
    out = file_to_write(options.out, "out")
    config = _own_config(options)
    from bigbatch.commands.saved import export, run_of

    run = run_of(files, config)()
    print(json.dumps(export(run, files.path, out, options.update)))


def _compare(options: argparse.Namespace) -> None:
    from bigbatch.commands.compare import compare
    from bigbatch.training import compilation_cache

    compilation_cache.use(options.compilation_cache)
    names = options.experiments.split(",") if options.experiments else None
    reports = compare(
        options.config,
        _workdir(options.workdir).path,
        experiments=names,
        seeds=options.seeds,
        overrides=options.overrides,
    )
    for report in reports:
        _show(report)


def _critical(options: argparse.Namespace) -> None:
    files = _workdir(options.workdir)
    files.expect_run()
    from bigbatch.training import compilation_cache

    compilation_cache.use(options.compilation_cache)
    config = _own_config(options)
    from bigbatch.commands.critical.measure import Asked, measure
    from bigbatch.commands.critical.table import along, write
    from bigbatch.commands.saved import run_of

    names = ("sizes", "branches", "loss_share", "target", "most_epochs", "lr_factors")
    asked = Asked(**{name: getattr(options, name) for name in names})
    points = []
    run = run_of(files, config)
    for point in measure(run, files, asked, options.at_updates, _say):
        points.append(point)
        tables.show(write(points, files.critical) + "\n")
    tables.show(along(points))
    print(files.critical / "critical.md")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(options: argparse.Namespace) -> None:
    _no_overrides(options, "nothing: a report only reads")
    from bigbatch.commands.report import write_report

    _show(write_report(options.run_dirs, options.out))


def _show(report: "Report") -> None:
    for warning in report.warnings:
        print(f"bigbatch: {warning}", file=sys.stderr)
    print(report.page)
    tables.show(report.table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())

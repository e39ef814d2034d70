"""The verb `bigbatch check-log`: a run that another trainer made, against a plan."""

import argparse

from bigbatch.errors import Problem, RunError, UserError


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Adds the verb's flags to its parser."""
    verb.add_argument("log", metavar="LOG", help="CSV, JSON lines, or Megatron's own lines")
    verb.add_argument("--config", metavar="FILE.py[:EXPERIMENT]", help="whose plan it should be")
    verb.add_argument("--plan", metavar="plan.json", help="the plan, in place of a config")
    verb.add_argument("--preset", default="table", help="the trainer that wrote it (default table)")
    verb.add_argument("--columns", default="", metavar="OURS=THEIRS,...", help="names of columns")
    verb.add_argument("--first-update", type=int, help="its number of the first update")
    verb.add_argument("--sequence-length", type=int, default=1, help="tokens of an example")


def run(options: argparse.Namespace) -> None:
    """Prints what differs.

    Raises:
      UserError: the log or the plan cannot be read.
      RunError: the run is not the plan's.
    """
    from bigbatch.checks import text_of
    from bigbatch.config.file import load_config
    from bigbatch.schedule.plan import Plan
    from bigbatch.schedule.trainers.faults import findings
    from bigbatch.schedule.trainers.log import PRESETS, read_log

    if bool(options.config) == bool(options.plan):
        given = {"config": options.config, "plan": options.plan}
        raise UserError(Problem("plan", given, "one of --plan and --config"))
    pairs = [pair.partition("=")[::2] for pair in options.columns.split(",") if pair]
    texts = {}
    for name in ("log", "plan"):
        path = getattr(options, name)
        try:
            texts[name] = text_of(path) if path else ""
        except (OSError, ValueError) as error:
            raise UserError(Problem(name, path, f"a file of text ({error})")) from error
    if options.plan:
        plan = Plan.from_json(texts["plan"])
    else:
        plan = load_config(options.config, options.overrides).plan
    log = read_log(texts["log"], options.preset, dict(pairs), options.sequence_length)
    first = options.first_update
    if first is None:
        first = PRESETS[options.preset].first_update
    found = findings(plan, log, options.preset, first)
    count, columns = len(log["update"].values), " and ".join(sorted(log.keys() - {"update"}))
    print(f"{count:,} updates of {plan.num_updates:,} compared, by {columns}")
    for words in found:
        print(words)
    if found:
        raise RunError(f"{options.log} is not the plan's run")

"""What a config gives in tokens, in the examples and epochs that the arithmetic counts in."""

from collections.abc import Mapping
from typing import Any

from bigbatch.checks import Checks, is_number, parsed, text_of
from bigbatch.data import sets
from bigbatch.errors import Problem
from bigbatch.schedule.durations import NO_TOKENS, size_in_examples

# Batch sizes that may be given in tokens.
_SIZES = ("batch_size", "max_batch_size", "initial_batch_size", "increment_examples")


def facts_of(data: Any) -> Any:
    """What is known of a config's data: of those by name without their files."""
    return data.info if isinstance(data, sets.Named) else data


def tokens_per_example(data: Any) -> int | None:
    """Of a config's data; None where it does not say."""
    return getattr(facts_of(data), "tokens_per_example", None)


def in_examples(tree: Mapping[str, Any], data: Any, problems: list[Problem]) -> Mapping[str, Any]:
    """The fields with the length of the run in epochs and batch sizes in examples, not in tokens.

    What cannot be converted is a problem.
    """
    checks = Checks()
    # Data that is wrong is a problem of its own.
    per_example = 1 if data is None else tokens_per_example(data)

    def converted(prefix: str, fields: Any) -> Any:
        if not isinstance(fields, Mapping) or fields.get("name") in ("stages", "batch_stages"):
            return fields
        texts = {n: v for n, v in fields.items() if n in _SIZES and isinstance(v, str) and "_" in v}
        prefix = prefix or f"transformations.{fields.get('name')}"
        sizes = {
            name: size_in_examples(checks, f"{prefix}.{name}", text, per_example) or 1
            for name, text in texts.items()
        }
        return {**fields, **sizes}

    tree = {name: converted(name, group) for name, group in tree.items()}
    steps = tree.get("transformations")
    if isinstance(steps, list | tuple):
        tree["transformations"] = [converted("", step) for step in steps]
    if "tokens" in tree:
        tokens, allowed = tree.pop("tokens"), "a number of tokens above 0, in place of epochs"
        good = checks.number("tokens", tokens, allowed, above=0)
        good &= checks.require("epochs" not in tree, "tokens", tokens, allowed)
        none = NO_TOKENS.replace("another unit", "epochs in its place")
        if good and checks.require(bool(per_example), "tokens", tokens, none) and data is not None:
            tree["epochs"] = tokens / (facts_of(data).train_examples * (per_example or 1))
        tree.setdefault("epochs", 1.0)
    policy = tree["policy"] if isinstance(tree.get("policy"), Mapping) else {}
    if policy.get("name") == "fastest":
        _run_fastest(checks, tree, policy.get("path"))
    problems += checks.problems
    return tree


def _run_fastest(checks: Checks, tree: dict[str, Any], path: Any) -> None:
    """Gives a run the length of its fastest plan, where it has that of the plan's recipe."""
    try:
        plan = parsed(text_of(str(path)), dict)
    except (OSError, ValueError):
        # The policy says so itself.
        return
    own, recipes = plan.get("epochs"), plan.get("recipe_epochs")
    allowed = "the file that `bigbatch plan --fastest --json` has printed"
    if not checks.require(is_number(own) and is_number(recipes), "policy.path", path, allowed):
        return
    steps, epochs = tree.get("transformations"), tree.get("epochs", recipes)
    allowed = "none with policy.name = 'fastest', whose plan holds what they did"
    checks.require(not steps, "transformations", steps, allowed, [])
    allowed = f"{recipes:g}, those of the recipe whose progress the plan makes"
    # Tokens are epochs but for rounding.
    fits = is_number(epochs) and abs(epochs - recipes) <= 1e-9 * recipes
    checks.require(fits, "epochs", epochs, allowed, recipes)
    tree["epochs"] = own

"""Small changes of the package's code, one at a time: does a test notice each?

    python -m tests.mutants map FOLDER TEST_FILE...
    python -m tests.mutants run FOLDER [COUNT [SEED [ROOM...]]]
    python -m tests.mutants control FOLDER [COUNT [SEED]]
    python -m tests.mutants try FOLDER NUMBER TEST_FILE...

`map` runs test files once and keeps which lines every test was at, by the library coverage, and the
processor seconds that it took: FOLDER/map.jsonl gets a line for every file. `run` draws changes, as
many from every room, and runs the tests that were at the changed statement: those named after the
module first, then the fastest, until one fails. FOLDER/mutants.jsonl gets a line for every change;
what is in it is not run again. With `control` nothing is changed, and nothing may fail. `try` runs
whole test files on one of the changes, for what tests do in other processes.

Changes are comparisons, arithmetic, boolean operators, conditions, constants, minimum and maximum,
filters, returned values and calls whose value is not used; in words, types, decorators and what is
raised there are none. Each is made in FOLDER/tree, a copy of the project, and judged by a forked
process in which the large libraries are imported already. The limits are of processor time, so that
a busy machine kills nothing. Run it in a clone that nobody edits meanwhile.
"""

import ast
import collections
import contextlib
import functools
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("engine", "training", "workdir", "schedule", "noise", "data")
LIBRARIES = (
    *("jax", "flax.linen", "flax.nnx", "optax", "orbax.checkpoint", "scipy.stats", "PIL.Image"),
    *("hypothesis.strategies", "matplotlib.figure", "ml_collections", "tensorboardX", "pytest"),
)
# Seconds of the processor, as the map knows them, that a change's tests may take together, and one
# of the tests; a process may take so many times that, and those seconds more.
MOST_S, MOST_TEST_S, SLOWER, START_S = 25, 45, 8, 120
# Seconds of the clock that are a deadlock, and bytes of address space.
STILL_S, MOST_BYTES = 1_200, 24 * 2**30
# Draws of a property's test: with more a change can only be noticed more often.
MOST_DRAWN = 10
# What takes an operator's place.
OTHERS = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.LShift: (ast.RShift,), ast.RShift: (ast.LShift,), ast.BitAnd: (ast.BitOr,),
    ast.BitXor: (ast.BitOr,),
}  # fmt: skip
NAMES = {"min": "max", "any": "all", "floor": "ceil", "minimum": "maximum"}
NAMES |= {other: name for name, other in NAMES.items()}
# Parts of the syntax that hold no values.
NO_VALUES = ("annotation", "returns", "decorator_list", "op", "ops", "ctx", "type_params")
# Calls that make messages.
WORDS = ("Problem", "Error", "warn", "print")


def _inner(node):
    """The nodes below one that are neither words, types nor decorators."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(WORDS):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        # No caller gives other lengths: it is an assertion.
        return
    for field, value in ast.iter_fields(node):
        if field not in NO_VALUES:
            yield from (n for n in (value if isinstance(value, list) else [value])
                        if isinstance(n, ast.AST))  # fmt: skip


def _changes(node):
    """The changes of one node: each in words, with the function that makes it."""

    def setting(field, value, index=None):
        def change():
            if index is None:
                setattr(node, field, value)
            else:
                getattr(node, field)[index] = value

        return change

    def to(other, field="op", index=None):
        before = getattr(node, field) if index is None else getattr(node, field)[index]
        words = f"{type(before).__name__} -> {other.__name__}"
        return words, setting(field, other(), index)

    match node:
        case ast.Compare():
            for index, op in enumerate(node.ops):
                yield from (to(other, "ops", index) for other in OTHERS[type(op)])
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            yield from (to(other) for other in OTHERS.get(type(node.op), ()))
        case ast.UnaryOp(op=ast.USub()):
            yield to(ast.UAdd)
        case ast.Constant(value=bool()):
            yield f"{node.value} -> {not node.value}", setting("value", not node.value)
        case ast.Constant(value=int()):
            for other in (node.value + 1, node.value - 1):
                yield f"{node.value} -> {other}", setting("value", other)
        case ast.Constant(value=float()):
            yield f"{node.value} -> twice", setting("value", 2 * node.value or 1.0)
        case ast.Return(value=ast.AST() as value) if ast.unparse(value) != "None":
            yield "return None", setting("value", ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield "call removed", setting("value", ast.Constant(None))
        case ast.If() | ast.While() | ast.IfExp():
            yield "condition inverted", setting("test", ast.UnaryOp(ast.Not(), node.test))
        case ast.Name(id=name) if name in NAMES:
            yield f"{name} -> {NAMES[name]}", setting("id", NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield f"{name} -> {NAMES[name]}", setting("attr", NAMES[name])
        case ast.comprehension(ifs=[_, *_]):
            yield "filter removed", setting("ifs", [])


def changes(path):
    """All changes of a file: the statement's line, 0 outside functions; in words; how; its text."""
    tree = ast.parse((ROOT / path).read_text())
    found = []

    def walk(node, statement, line):
        if isinstance(node, ast.stmt):
            statement, line = node, line and node.lineno
        # Text between statements is a docstring.
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            found.extend((line, words, how, statement) for words, how in _changes(node))
            function = isinstance(node, ast.FunctionDef)
            for child in _inner(node):
                # A function's defaults are computed where it is defined.
                inside = function and not isinstance(child, ast.arguments)
                walk(child, statement, line or inside)

    walk(tree, tree, 0)
    return tree, found


def drawn(count, seed):
    """So many changes, as many of every room: (number, room, path, which of the file's)."""
    rooms = []
    for room in ROOMS:
        paths = sorted(p.relative_to(ROOT) for p in (ROOT / "bigbatch" / room).rglob("*.py"))
        there = [(room, str(p), n) for p in paths for n in range(len(changes(p)[1]))]
        random.Random(f"{seed} {room}").shuffle(there)
        rooms.append(there)
    picked = [one for turn in zip(*rooms, strict=False) for one in turn]
    return [(number, *one) for number, one in enumerate(picked[:count])]


def changed(path, which):
    """The file's tree with the change; the statement's lines, and the change in words."""
    tree, found = changes(path)
    line, words, how, statement = found[which]
    end = statement.body[0].lineno if getattr(statement, "body", None) else 0
    lines = range(
        line, max(line + 1, end or getattr(statement, "end_lineno", 0) + 1) if line else 0
    )
    before = ast.unparse(statement).splitlines()
    how()
    after = ast.unparse(ast.fix_missing_locations(statement)).splitlines()
    differ = [
        f"{a.strip()}  =>  {b.strip()}" for a, b in zip(before, after, strict=False) if a != b
    ]
    place = statement.lineno if hasattr(statement, "lineno") else 0
    told = {"line": place, "what": words, "code": differ[0] if differ else "removed"}
    return tree, lines, told


def forked(act, log, seconds):
    """The status of what a forked process does, or why it was ended."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            # A group, no session: that would have a priority of its own.
            os.setpgid(0, 0)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
            status = int(act())
            sys.stdout.flush()
        finally:
            os._exit(status)
    ended, status, end = 0, 0, time.monotonic() + STILL_S
    while not ended and time.monotonic() < end:
        time.sleep(0.05)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
        return "deadlock"
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def pytest_in(folder, tree, tests, *plugins):
    """Runs tests of a tree to the first failure, all where there are plugins."""
    import hypothesis
    import pytest

    usual = hypothesis.settings.__init__

    def fewer(self, *arguments, **options):
        usual(self, *arguments, **options)
        self._max_examples = min(self._max_examples, MOST_DRAWN)

    hypothesis.settings.__init__ = fewer
    os.chdir(tree)
    os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
    # This file is one of the project's own tests.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}", "--no-header"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return pytest.main([*options, *([] if plugins else ["-x"]), *tests], plugins=plugins)


class Mapping:
    """Keeps what every test that passed was at, and the processor seconds that it took."""

    def __init__(self, coverage):
        self.coverage, self.seconds, self.failed = coverage, {}, set()

    def pytest_runtest_logstart(self, nodeid):
        self.coverage.switch_context(nodeid)
        self.begun = sum(os.times()[:4])
        # What takes longer than a change's tests may is left out.
        signal.setitimer(signal.ITIMER_PROF, MOST_TEST_S)

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.seconds[nodeid] = round(sum(os.times()[:4]) - self.begun, 3)


def too_long(*_):
    raise RuntimeError("this test takes too long for the map")


def map_files(folder, files):
    import coverage

    def one():
        measured = coverage.Coverage(data_file=None, include=[str(ROOT / "bigbatch" / "*")])
        signal.signal(signal.SIGPROF, too_long)
        measured.start()
        mapping = Mapping(measured)
        status = pytest_in(folder, ROOT, [file], mapping)
        measured.stop()
        at, data = collections.defaultdict(list), measured.get_data()
        for path in data.measured_files():
            for line, tests in data.contexts_by_lineno(path).items():
                for test in filter(None, tests):
                    at[test].append(f"{Path(path).relative_to(ROOT)}:{line}")
        found = {
            test: {"s": seconds, "at": at[test]}
            for test, seconds in mapping.seconds.items()
            if test not in mapping.failed and seconds < MOST_TEST_S
        }
        with open(folder / "map.jsonl", "a") as kept:
            kept.write(json.dumps({"file": file, "tests": found}) + "\n")
        return status

    kept = folder / "map.jsonl"
    done = {json.loads(line)["file"] for line in kept.open()} if kept.exists() else set()
    for file in (file for file in files if file not in done):
        begun = time.monotonic()
        status = forked(one, folder / f"map_{Path(file).stem}.log", 3_600)
        print(file, status, round(time.monotonic() - begun), flush=True)


def tests_for(known, path, lines):
    """The tests that were at a statement, or else in its file, as many as there is time for.

    Those named after the module come first, then the file with the fastest tests.
    """
    at = {f"{path}:{line}" for line in lines}
    there = {test: e["s"] for test, e in known.items() if at & e["at"]}
    there = there or {test: e["s"] for test, e in known.items() if path in e["files"]}
    files = collections.defaultdict(dict)
    for test, seconds in there.items():
        files[test.partition("::")[0]][test] = seconds

    def order(file):
        stem, names = Path(file).stem, (Path(path).stem, Path(path).parent.name)
        tests = files[file]
        return not any(name in stem for name in names), sum(tests.values()) / len(tests)

    picked, spent = [], 0
    for file in sorted(files, key=order):
        for test in sorted(files[file], key=files[file].get):
            if spent + files[file][test] < MOST_S:
                spent += files[file][test]
                picked.append(test)
    return picked, spent


def judged(folder, path, which, tests_of, control=False):
    """What becomes of a change: a record, with the test that noticed it."""
    tree, lines, told = changed(path, which)
    tests, spent = tests_of(lines)
    place, begun = folder / "tree" / path, time.monotonic()
    before = (ROOT / path).read_text()
    # What is compiled of a file is kept by its time and size, which may be the same.
    shutil.rmtree(place.parent / "__pycache__", ignore_errors=True)
    if not control:
        place.write_text(ast.unparse(tree))

    def act():
        return pytest_in(folder, folder / "tree", tests)

    try:
        log = folder / "last.log"
        status = forked(act, log, spent * SLOWER + START_S) if tests else "no test"
    finally:
        place.write_text(before)
        shutil.rmtree(place.parent / "__pycache__", ignore_errors=True)
    result = {0: "survived", 5: "lost its tests", "no test": "no test"}.get(status, "killed")
    by = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.M)
    return {
        **{"path": path, "which": which, **told, "result": result, "tests": len(tests)},
        **{"by": by[0] if by and result == "killed" else str(status)},
        "s": round(time.monotonic() - begun),
    }


def run(folder, count="300", seed="0", *only, control=False):
    known = {}
    for line in (folder / "map.jsonl").read_text().splitlines():
        known |= json.loads(line)["tests"]
    for entry in known.values():
        entry["at"] = set(entry["at"])
        entry["files"] = {at.partition(":")[0] for at in entry["at"]}
    kept = folder / ("controls.jsonl" if control else "mutants.jsonl")
    done = {json.loads(one)["number"] for one in kept.open()} if kept.exists() else set()
    for number, room, path, which in drawn(int(count), int(seed)):
        if number not in done and (not only or room in only):
            tests_of = functools.partial(tests_for, known, path)
            record = judged(folder, path, which, tests_of, control)
            with kept.open("a") as file:
                file.write(json.dumps({"number": number, "room": room, **record}) + "\n")


def attempt(folder, number, *files):
    records = map(json.loads, (folder / "mutants.jsonl").open())
    record = next(r for r in records if r["number"] == int(number))
    print(judged(folder, record["path"], record["which"], lambda _: (files, STILL_S)))


def main(what, folder, *arguments):
    folder = Path(folder).absolute()
    folder.mkdir(exist_ok=True)
    os.environ |= {"CI": "1", "OPENBLAS_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    for name in LIBRARIES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    assert not any(name.startswith("bigbatch") for name in sys.modules)
    if what == "map":
        return map_files(folder, arguments)
    # What was killed may have left a change in it.
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored, dirs_exist_ok=True)
    if what == "try":
        return attempt(folder, *arguments)
    return run(folder, *arguments, control=what == "control")


if __name__ == "__main__":
    main(*sys.argv[1:])

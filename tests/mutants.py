"""Small changes of the package's code, one at a time: does a test notice each?

    python -m tests.mutants map  FOLDER TEST_FILE...
    python -m tests.mutants run  FOLDER [COUNT [SEED [control | ROOM...]]]
    python -m tests.mutants try  FOLDER NUMBER TEST_FILE...
    python -m tests.mutants show FOLDER NUMBER

`map` runs test files once and keeps which test was at which statement: a call is put before every
statement of a function. FOLDER/map.jsonl gets a line for every test file. `run` draws changes, as
many from every room, and runs the tests that were at the changed statement: those named after the
module first, the fastest first, until one fails. FOLDER/mutants.jsonl gets a line for every change;
what is in it is not run again. With `control` nothing is changed, and nothing may fail. `try` runs
whole test files on one of the changes, in a copy of the tree, for what subprocesses cover.

Changes are comparisons, arithmetic, boolean operators, conditions, constants, minimum and maximum,
filters, returned values and calls whose value is not used; in words, types, decorators and what is
raised there are none. All tests are collected once. Each change is made in a forked process, in
what has been imported: functions get the code that the changed file would have given them. The
limits are of processor time, so that a busy machine kills nothing.
"""

import ast
import builtins
import collections
import contextlib
import functools
import gc
import importlib
import importlib.machinery
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("engine", "training", "workdir", "schedule", "noise", "data")
LIBRARIES = (
    *("jax", "flax.linen", "flax.nnx", "optax", "orbax.checkpoint", "scipy.stats", "PIL.Image"),
    *("hypothesis.strategies", "matplotlib.figure", "ml_collections", "tensorboardX", "pytest"),
)
# Seconds of the processor, as the map knows them, that a change's tests may take together; a
# process may take so many times that, and those seconds more.
MOST_S, MOST_TEST_S, SLOWER, START_S, FILE_S = 20, 12, 6, 60, 0.1
# Parts of the names of tests that take minutes and are at no statement that others are not at.
SLOW = (
    *("storm", "digits_over_a_change", "bfloat16", "mean_over_all_tokens", "[lamb]", "inception"),
    *("auto_is_one_unit", "killed_run_of_ones_own", "processes", "tensorboard"),
)
# Files of tests that import what starts threads.
THREADED = ("tests/test_tokens.py",)
# Seconds without progress that are a deadlock, and bytes of address space.
STILL_S, MOST_BYTES = 90, 24 * 2**30
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
        if field not in (
            "annotation",
            "returns",
            "decorator_list",
            "op",
            "ops",
            "ctx",
            "type_params",
        ):
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
        case ast.Return(value=ast.AST()):
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
    """The file's tree with the change; its line, and the change in words."""
    tree, found = changes(path)
    line, words, how, statement = found[which]
    before = ast.unparse(statement).splitlines()
    how()
    after = ast.unparse(ast.fix_missing_locations(statement)).splitlines()
    differ = [
        f"{a.strip()}  =>  {b.strip()}" for a, b in zip(before, after, strict=False) if a != b
    ]
    place = statement.lineno if hasattr(statement, "lineno") else 0
    told = {"line": place, "what": words, "code": differ[0] if differ else "removed"}
    return tree, line, told


class Counted(ast.NodeTransformer):
    """Puts a call before every statement of a function."""

    def __init__(self, path):
        self.path, self.depth = path, 0

    def visit_FunctionDef(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1
        return node

    def generic_visit(self, node):
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody") if self.depth else ():
            block = getattr(node, field, None)
            if isinstance(block, list) and not isinstance(node, ast.ClassDef):
                setattr(node, field, [part for s in block for part in self._pair(s)])
        return node

    def _pair(self, statement):
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        call = ast.parse(f"__hit__({f'{self.path}:{statement.lineno}'!r})").body[0]
        for part in ast.walk(call):
            if hasattr(part, "lineno"):
                ast.copy_location(part, statement)
        return [statement] if text else [call, statement]


def importing(sources):
    """From now on modules are compiled from what a function makes of their path, if anything."""
    usual = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        path = Path(loader.get_filename(name))
        made = sources(str(path.relative_to(ROOT))) if path.is_relative_to(ROOT) else None
        return usual(loader, name) if made is None else compile(made, path, "exec")

    importlib.machinery.SourceFileLoader.get_code = get_code


def forked(act, log, seconds):
    """What `act` gives, run in a forked process: a status, or why it was ended."""
    pid = os.fork()
    if not pid:
        # A group, no session: that would have a priority of its own.
        os.setpgid(0, 0)
        if log:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        status = 99
        try:
            status = int(act())
        finally:
            os._exit(status)
    ended, status, turn, still, used = 0, 0, 0, 0, -1
    while not ended and still < STILL_S:
        time.sleep(0.1)
        ended, status = os.waitpid(pid, os.WNOHANG)
        turn += 1
        if turn % 100 == 0:
            now = _used(pid)
            still, used = (still + 10 if now == used else 0), now
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
        return "deadlock"
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _used(group):
    """The processor's ticks that a group of processes has used."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == str(group):
            ticks += sum(map(int, fields[11:15]))
    return ticks


def pytest_in(folder, plugin, files):
    import hypothesis
    import pytest

    usual = hypothesis.settings.__init__

    def fewer(self, *arguments, **options):
        usual(self, *arguments, **options)
        self._max_examples = min(self._max_examples, MOST_DRAWN)

    hypothesis.settings.__init__ = fewer
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}", "--no-header"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return pytest.main([*options, *files], plugins=[plugin])


class Mapping:
    """Keeps what every test that passed was at, and the processor seconds that it took."""

    def __init__(self, hits):
        self.hits, self.found, self.failed = hits, {}, set()

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if not any(part in item.nodeid for part in SLOW)]

    def pytest_runtest_logstart(self, nodeid):
        self.hits.clear()
        self.begun = sum(os.times()[:4])

        # What takes longer than a change's tests may is left out.
        signal.setitimer(signal.ITIMER_PROF, MOST_TEST_S)

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        signal.setitimer(signal.ITIMER_PROF, 0)
        if nodeid not in self.failed and self.hits:
            spent = round(sum(os.times()[:4]) - self.begun, 3)
            self.found[nodeid] = {"s": spent, "at": sorted(self.hits)}


def too_long(*_):
    raise RuntimeError("this test takes too long for the map")


def map_files(folder, files):
    def counted(path):
        if path.startswith(tuple(f"bigbatch/{room}/" for room in ROOMS)):
            return ast.fix_missing_locations(
                Counted(path).visit(ast.parse((ROOT / path).read_text()))
            )
        return None

    def one():
        hits = set()
        builtins.__hit__ = hits.add
        importing(counted)
        signal.signal(signal.SIGPROF, too_long)
        mapping = Mapping(hits)
        status = pytest_in(folder, mapping, [file])
        with open(folder / "map.jsonl", "a") as kept:
            kept.write(json.dumps({"file": file, "tests": mapping.found}) + "\n")
        return status

    for file in files:
        begun = time.monotonic()
        status = forked(one, folder / f"map_{Path(file).stem}.log", 1800)
        print(file, status, round(time.monotonic() - begun), flush=True)


def place_of(code):
    """Where a function's code is in its module: several lambdas of a line by their columns."""
    column = 0
    if code.co_name == "<lambda>":
        column = next(itertools.islice(code.co_positions(), 1, None))[2]
    return code.co_qualname, code.co_firstlineno, column


def patch(path, tree):
    """Makes what is imported of a module that of a tree whose nodes are at the same places.

    Functions, wherever they are held, get their new code and defaults. Other values of the module
    take the place of the old ones in every module that has them under their name.

    Returns:
      How much is another now.
    """
    file, name = str(ROOT / path), path.removesuffix(".py").removesuffix("/__init__")
    module = sys.modules[name.replace("/", ".")]
    fresh = types.ModuleType(module.__name__)
    fresh.__dict__.update(__file__=file, __package__=module.__package__)
    code, new = compile(tree, file, "exec"), {}
    exec(code, fresh.__dict__)
    within = [code]
    for part in within:
        new.setdefault(place_of(part), part)
        within += [c for c in part.co_consts if isinstance(c, types.CodeType)]
    changed = 0
    for function in [f for f in gc.get_objects() if isinstance(f, types.FunctionType)]:
        if function.__code__.co_filename == file and function.__globals__ is vars(module):
            with contextlib.suppress(ValueError):
                code = new.get(place_of(function.__code__), function.__code__)
                changed += code != function.__code__
                function.__code__ = code
    known = [m for n, m in sys.modules.items() if n.startswith(("bigbatch", "tests"))]
    for key, value in vars(fresh).items():
        old = vars(module).get(key)
        if isinstance(value, type | types.FunctionType):
            changed += _take(old, value, module.__name__)
        elif not key.startswith("__") and type(old) is type(value) and repr(old) != repr(value):
            for other in known:
                if vars(other).get(key) is old:
                    setattr(other, key, value)
                    changed += 1
    return changed


def _take(old, new, name):
    """Defaults of a function; of a class those of its methods, and its plain values."""
    changed = 0
    if isinstance(new, types.FunctionType) and isinstance(old, types.FunctionType):
        changed = repr(new.__defaults__) != repr(old.__defaults__)
        changed += repr(new.__kwdefaults__) != repr(old.__kwdefaults__)
        if changed:
            old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    elif isinstance(new, type) and isinstance(old, type) and new.__module__ == name:
        for key, value in list(vars(new).items()):
            before = vars(old).get(key)
            if isinstance(value, types.FunctionType):
                changed += _take(before, value, name)
            elif isinstance(value, bool | int | float | tuple) and value != before:
                with contextlib.suppress(TypeError, AttributeError):
                    setattr(old, key, value)
                    changed += 1
    return changed


class Serving:
    """Has collected all tests, and runs some of them in forked processes, to the first failure."""

    def __init__(self, act, control):
        self.act, self.control = act, control

    def pytest_runtestloop(self, session):
        self.items, self.config = {i.nodeid: i for i in session.items}, session.config
        assert not jax_is_used(), "a backend is in use before the fork"
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
        self.act(self)
        return True

    def run(self, tests, path, tree, at):
        self.config.pluginmanager.register(self.First())
        if not patch(path, tree) and not self.control:
            return 6
        items = [self.items[test] for test in tests if test in self.items]
        for item, after in zip(items, [*items[1:], None], strict=True):
            at.write_text(item.nodeid)
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return 0 if items else 5

    class First:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                os._exit(1)


def jax_is_used():
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def tests_for(known, path, line):
    """The tests that were at a statement, or else in its file: two groups, and their seconds.

    Those named after the module come first.
    """
    there = {test: e["s"] for test, e in known.items() if f"{path}:{line}" in e["at"]}
    there = there or {test: e["s"] for test, e in known.items() if path in e["files"]}
    names = {Path(path).stem, Path(path).parent.name}
    files = collections.defaultdict(dict)
    for test, seconds in there.items():
        files[test.partition("::")[0]][test] = seconds
    groups, spent = ([], []), 0
    order = sorted(files, key=lambda f: sum(files[f].values()) / len(files[f]))
    for named in (True, False):
        for file in order:
            stem = Path(file).stem.removeprefix("test_")
            if (stem in names or any(n in stem for n in names)) != named:
                continue
            spent += FILE_S
            for test in sorted(files[file], key=files[file].get):
                if spent + files[file][test] < MOST_S:
                    spent += files[file][test]
                    groups[not named].append(test)
    return groups, spent


def run(folder, count, seed, only):
    known, files = {}, []
    for line in (folder / "map.jsonl").read_text().splitlines():
        if (file := json.loads(line)["file"]) not in THREADED:
            known |= json.loads(line)["tests"]
            files.append(file)
    for entry in known.values():
        entry["at"] = set(entry["at"])
        entry["files"] = {at.partition(":")[0] for at in entry["at"]}
    control = only == ["control"]
    kept, at = folder / ("controls.jsonl" if control else "mutants.jsonl"), folder / "at.txt"
    done = {json.loads(one)["number"] for one in kept.open()} if kept.exists() else set()

    def one(server, number, room, path, which):
        begun = time.monotonic()
        tree, line, told = changed(path, which)
        if control:
            tree = ast.parse((ROOT / path).read_text())
        groups, spent = tests_for(known, path, line)
        result, by = "survived" if any(groups) else "no test", ""
        for tests in filter(None, groups):
            at.write_text("start")
            act = functools.partial(server.run, tests, path, tree, at)
            status = forked(act, None, spent * SLOWER + START_S)
            if status != 0:
                result, by = "killed", f"{at.read_text()} ({status})"
                result = {5: "lost its tests", 6: "not applied"}.get(status, result)
                break
        record = {"number": number, "room": room, "path": path, "which": which, **told}
        record |= {"result": result, "by": by, "tests": sum(map(len, groups))}
        with kept.open("a") as file:
            file.write(json.dumps(record | {"s": round(time.monotonic() - begun)}) + "\n")

    def all_of(server):
        for number, room, path, which in drawn(count, seed):
            if number not in done and (control or not only or room in only):
                one(server, number, room, path, which)

    # Modules that no test imports are there, too.
    for path in sorted((ROOT / "bigbatch").rglob("*.py")):
        if path.relative_to(ROOT).parts[1] in ROOMS and path.stem != "__init__":
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return pytest_in(folder, Serving(all_of, control), dict.fromkeys(files))


def attempt(folder, number, files):
    """Whole test files on one change, in a copy of the tree."""
    records = map(json.loads, (folder / "mutants.jsonl").open())
    record = next(r for r in records if r["number"] == number)
    tree, _, told = changed(record["path"], record["which"])
    print(record["path"], told)
    if not files:
        return
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(ROOT, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git"))
        Path(root, record["path"]).write_text(ast.unparse(tree))
        environment = os.environ | {"PYTHONPATH": root}
        command = [sys.executable, "-m", "pytest", "-x", "-q", *files]
        print(subprocess.run(command, cwd=root, env=environment, check=False).returncode)


def main(what, folder, *arguments):
    folder = Path(folder).absolute()
    folder.mkdir(exist_ok=True)
    os.environ |= {"CI": "1", "OPENBLAS_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    if what in ("try", "show"):
        return attempt(folder, int(arguments[0]), arguments[1:])
    for name in LIBRARIES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    assert not any(name.startswith("bigbatch") for name in sys.modules)
    if what == "map":
        return map_files(folder, arguments)
    count, seed, *only = (*arguments, *("300", "0")[len(arguments) :])
    return run(folder, int(count), int(seed), only)


if __name__ == "__main__":
    main(*sys.argv[1:])

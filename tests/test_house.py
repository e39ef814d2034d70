"""The house: which files there are, and which of them know of each other."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "bigbatch").rglob("*.py"))
ROOMS = sorted({path.parent for path in MODULES})
MAX_LINES = 400


def test_every_room_knows_only_those_below_it():
    """The contracts of pyproject.toml; what breaks one is told with both files."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in MODULES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_file_is_for_what_fits_nowhere():
    names = {path.stem for path in MODULES} | {room.name for room in ROOMS}
    assert not names & {"util", "utils", "helper", "helpers", "common", "misc", "tools"}


def test_only_the_ground_lies_flat():
    flat = {path.stem for path in MODULES if path.parent == ROOT / "bigbatch"}
    ground = {"bars", "distributed", "checks", "errors"}
    assert flat == {"__init__", "__main__", "cli"} | ground


def test_a_room_says_what_it_is():
    faces = [(room / "__init__.py").read_text("utf-8") for room in ROOMS]
    assert all(ast.get_docstring(ast.parse(face)) for face in faces)


def test_the_faces_of_the_rooms_import_nothing_heavy():
    rooms = [".".join(room.relative_to(ROOT).parts) for room in ROOMS]
    code = f"import sys, {', '.join(rooms)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax", "flax", "optax", "orbax", "matplotlib", "tensorflow", "scipy", "PIL"}
    assert not heavy & set(done.stdout.split())

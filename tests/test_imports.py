"""Imports run one way, and what must be quick to start does not load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from running import without_torch

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "schemas": {"schemas"},
    "stages": {"schemas", "stages"},
    "pipeline": {"schemas", "stages", "pipeline"},
}
STAGES = {"extract", "regenerate", "train", "export", "evaluate", "eval_served", "export_card", "diagnose"}
LOOSE = {"bounds", "cores", "progress", "stop"}
"""Files of `stages/` that belong to no room and import none."""
ROOMS = "buckets store target conversations draft capture trainer training answers cluster serving evaluation".split()
"""From the ground up: a room imports those before it, never one behind it."""


def imported(path: Path) -> list[str]:
    """Return the full names of what a module imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_run_from_pipeline_to_stages_to_schemas(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            if name.startswith("dflash_offline."):
                assert name.split(".")[1] in MAY_IMPORT[package], f"{path} imports {name}"


def test_schemas_need_neither_torch_nor_zarr() -> None:
    for path in (ROOT / "schemas").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "zarr", "transformers"}, path


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downward_only(room: str) -> None:
    below = {*ROOMS[: ROOMS.index(room) + 1], *LOOSE}
    paths = [ROOT / "stages" / f"{room}.py"] if room == "trainer" else (ROOT / "stages" / room).glob("*.py")
    for path in paths:
        taken = {name.split(".")[2] for name in imported(path) if name.startswith("dflash_offline.stages.")}
        assert taken <= below, f"{path} imports {sorted(taken - below)}"


def test_every_file_of_stages_is_a_stage_or_stands_in_a_room() -> None:
    names = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert names == {*STAGES, *LOOSE, "trainer"}
    assert {path.name for path in (ROOT / "stages").iterdir() if path.is_dir()} - {"__pycache__"} == {*ROOMS} - {
        "trainer"
    }


def test_the_store_needs_no_torch() -> None:
    for path in (ROOT / "stages" / "store").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers"}, path


def folders() -> list[Path]:
    """Return every folder of Python files."""
    return sorted({path.parent for top in (*MAY_IMPORT, "tests") for path in (ROOT / top).rglob("*.py")})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_has_fourteen_files_at_most_and_its_purpose_in_a_line(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= 14
    if folder.relative_to(ROOT).parts[0] != "tests":
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_help_loads_neither_torch_nor_what_else_takes_long() -> None:
    commands = [[], ["regenerate"], ["extract"], ["train"], ["eval"], ["diagnose"], ["doctor"]]
    slow = "torch transformers numpy pyarrow zarr numcodecs matplotlib rich"
    helped = without_torch(*([*command, "--help"] for command in commands), missing=slow)
    assert all("Usage:" in printed for printed in helped)


def test_a_process_that_tokenizes_does_not_load_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import dflash_offline.stages.conversations.tokenize"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_does_not_load_torch(cache: Path, run: Path, tmp_path: Path) -> None:
    views = (["--sample", "0"], ["--json"], ["--shard", "0"], ["--layers", "--features", "2"], ["--top", "rare"])
    commands = [["inspect", str(cache), *view] for view in ([], *views)]
    commands += [["inspect", str(run)], ["inspect", str(run), str(run), "--html", str(tmp_path / "runs.html")]]
    assert all(without_torch(*commands))


def test_verify_does_not_load_torch_unless_a_target_is_named(cache: Path) -> None:
    assert all(without_torch(["verify", str(cache)], ["verify", str(cache), "--repair", "--json"]))


def test_the_doctor_leaves_torch_to_a_process_of_its_own() -> None:
    program = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from dflash_offline.pipeline.doctor.examine import find_packages, try_store
print(try_store().open_shards, not any(package.fault for package in find_packages()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.endswith("True\n"), run.stderr


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_no_function_is_over_60_lines_and_no_file_over_400(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno + 1 <= 60, f"{path}: {node.name}"

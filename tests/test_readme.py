"""What the documents say exists, exists."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from dflash_offline.pipeline.app import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CLUSTERS.md", ROOT / "schemas/FORMAT.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def commands() -> list[list[str]]:
    """Return the arguments of every `dflash` command line in the documents, numbers in the place of variables."""
    lines = [line for path in DOCUMENTS for line in re.findall(r"^ *dflash .*$", path.read_text(), re.MULTILINE)]
    return [shlex.split(re.sub(r"\$\w+", "1", line), comments=True)[1:] for line in lines]


@pytest.mark.parametrize("arguments", commands(), ids=lambda arguments: " ".join(arguments))
def test_every_command_of_a_document_is_understood(arguments: list[str]) -> None:
    command = typer.main.get_command(app).commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])  # raises on an unknown or a missing option


def test_every_make_target_that_is_named_exists() -> None:
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        assert set(re.findall(r"\bmake ([a-z-]+)", document.read_text())) - {"it"} <= made


def test_the_readme_has_a_line_for_every_room_and_no_other() -> None:
    listed, top = set(), ""
    for line in (ROOT / "README.md").read_text().split("## The rooms")[1].split("```")[1].splitlines():
        if folder := re.match(r"( *)([\w/]+)/ ", line):
            top = top if folder[1] else folder[2]
            listed.add(f"{top}/{folder[2]}" if folder[1] else top)
    rooms = {
        path.parent.relative_to(ROOT)
        for top in "schemas stages pipeline".split()
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert listed == {*map(str, rooms), "pipeline/embedded", "tests"}

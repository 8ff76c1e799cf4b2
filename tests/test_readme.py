"""README.md and docs/ hold: their commands parse, their configs load, their paths, links and keys exist."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from ling.activations.table import ACTIVATIONS
from ling.cli import COMMANDS, main
from ling.config import check_config, load_config
from ling.config.keys import ACTIVATION_KEYS, all_keys, branches

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_SUFFIXES = (".bin", ".idx", ".json", ".jsonl", ".md", ".model", ".py", ".sh", ".txt", ".yaml", ".yml")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for found, text in FENCE.findall(document.read_text()) if found == language]


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", document.read_text())


def inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(document))


def ling_commands(document: Path) -> list[list[str]]:
    """Arguments of every `ling ...` line in the document's shell blocks."""
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ling ")]


def written_configs(document: Path) -> dict[str, str]:
    """The document's YAML blocks by the file name in their first line."""
    configs = {}
    for block in blocks(document, "yaml"):
        first = re.match(r"# (\S+\.yaml)\n", block)
        assert first, f"the YAML block {block[:40]!r} does not begin with `# NAME.yaml`"
        configs[first[1]] = block
    return configs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the shipped configs and those that a document writes."""

    def make(document: Path) -> dict[str, str]:
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
        monkeypatch.chdir(tmp_path)
        configs = written_configs(ROOT / "docs" / "config.md") | written_configs(document)
        for name, text in configs.items():
            Path(name).write_text(text)
        return written_configs(document)

    return make


with_commands = pytest.mark.parametrize("document", [path for path in DOCUMENTS if ling_commands(path)], ids=name_of)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


@with_commands
def test_commands_parse(document, folder, monkeypatch):
    folder(document)
    for argv in ling_commands(document):
        parsed = []
        assert argv[0] in COMMANDS, f"ling {shlex.join(argv)}"
        module = importlib.import_module(COMMANDS[argv[0]][0])
        with monkeypatch.context() as context:
            context.setattr(module, "run", lambda args, parsed=parsed: parsed.append(args) or 0)
            assert main(argv) == 0, f"ling {shlex.join(argv)}"
        (args,) = parsed
        if hasattr(args, "overrides"):
            world_size = getattr(args, "nproc", getattr(args, "world", None))
            check_config(load_config(args.config, args.overrides), world_size)


@with_commands
def test_config_commands_run(document, folder, capsys):
    folder(document)
    for argv in ling_commands(document):
        if argv[0] == "config":
            assert main(argv) == 0, capsys.readouterr().err
            out = capsys.readouterr().out
            if argv[1] == "check":
                shown = [text for text in blocks(document, "text") if text.startswith(argv[2])]
                assert shown in ([], [out]), "the document shows another output"


@every_document
def test_written_configs_load(document, folder):
    for name in folder(document):
        if re.search(r"^(base|data):", Path(name).read_text(), re.MULTILINE):  # else a model, which is no run by itself
            check_config(load_config(name))


@every_document
def test_named_commands_and_keys_exist(document):
    known = set(all_keys()) | set(branches())
    for code in inline_code(document):
        command = re.match(r"ling (\w[\w-]*)", code)
        assert command is None or command[1] in COMMANDS, code
        key = re.fullmatch(r"([a-z_]+(?:\.\w+)+)(=.*)?", code)
        if key is None or key[1].split(".")[0] not in branches() or key[1].endswith(FILE_SUFFIXES):
            continue
        branch, leaf, *rest = key[1].split(".")
        assert f"{branch}.{leaf}" in known, f"{code} is no key of a config"
        assert not rest or leaf in (*ACTIVATION_KEYS, "mcore"), f"{code} is no key of a config"


@every_document
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), f"{target} does not exist"
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", linked.read_text()), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{target} has no such heading"


@every_document
def test_named_files_exist(document):
    written = written_configs(document)
    for code in inline_code(document):
        path = re.fullmatch(r"(?:\./)?((?:ling|configs|scripts|tools|tests|docs|\.ci)/[\w./-]*)", code)
        assert path is None or path[1] in written or (ROOT / path[1]).exists(), f"{code} does not exist"


def tree() -> dict[str, str]:
    """Path and comment of every entry of the README's tree."""
    (block,) = [text for text in blocks(ROOT / "README.md", "text") if text.startswith("ling/")]
    entries, parents = {}, [""]
    for line in block.splitlines():
        indent, name, comment = re.fullmatch(r"( *)(\S+)(?: {2,}(\S.*))?", line).groups(default="")
        depth = len(indent) // 2
        parents[depth + 1 :] = [parents[depth] + name]
        entries[parents[depth] + name] = comment
    return entries


def test_the_tree_is_there():
    for entry in tree():
        path = ROOT / entry
        assert path.is_dir() if entry.endswith("/") else path.is_file(), f"{entry} does not exist"


def test_the_tree_names_every_part():
    top = [*ROOT.glob("scripts/*"), *ROOT.glob("tools/*.py"), *ROOT.glob("ling/*.py"), *ROOT.glob("ling/commands/*.py")]
    folders = [path for path in ROOT.glob("ling/*/") if path.name != "__pycache__"]
    expected = {name_of(path) for path in top if path.name != "__init__.py" and path.is_file()}
    expected |= {f"{name_of(path)}/" for path in folders}
    assert expected - set(tree()) == set()


def test_every_command_and_document_is_named():
    readme = (ROOT / "README.md").read_text()
    shown = {argv[0] for argv in ling_commands(ROOT / "README.md")}
    assert shown == set(COMMANDS)
    for path in (ROOT / "docs").glob("*.md"):
        assert f"({name_of(path)})" in readme, f"the README does not name {name_of(path)}"


def test_the_activations_are_those_of_the_registry():
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \|", (ROOT / "docs" / "activations.md").read_text(), re.MULTILINE)
    assert dict(rows) == {name: "yes" if row.gated else "no" for name, row in ACTIVATIONS.items()}


def test_the_metrics_table_is_that_of_a_step():
    from ling.observe.throughput import Throughput

    section = (ROOT / "README.md").read_text().split("### What the numbers mean")[1].split("## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert set(Throughput(1, 1).measure(1, 1.0)) <= named
    trainer = (ROOT / "ling" / "trainer.py").read_text()
    assert all(f'"{key}"' in trainer for key in named - set(Throughput(1, 1).measure(1, 1.0)) - {"attempt"})

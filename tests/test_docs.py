"""The pages say what the code says: generated tables are fresh, links lead somewhere, every command shown exists."""

import itertools
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rlaif import docs
from rlaif.cli import app
from rlaif.config import Job, apply_override, load_job, parse_job, sections_in
from rlaif.constitutions.constitution import Constitution, Example, Paraphrase, Principle, parse_constitution
from rlaif.errors import UserError
from rlaif.records import DropReason
from rlaif.rundir.stages import NAMES

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "prompts" / "README.md"]
GENERATED = [p for p in PAGES if "<!-- generated:" in p.read_text()]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every `rlaif …` in a code span or a shell block, as words; comments and `…` are cut off."""
    text = page.read_text()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    shown = [*spans, *(line for block in fences(page, "sh") for line in block.splitlines())]
    calls = (re.match(r"(?:\.venv/bin/)?rlaif\s+(.*)", s) for s in shown)
    return [shlex.split(m[1], comments=True) for m in calls if m and not m[1].startswith(("…", "--help"))]


def problem(words: list[str]) -> str | None:
    """What is wrong with a command line, as far as the CLI's own declarations say; None when nothing is."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if rest and rest[0] not in command.commands and any(p.param_type_name == "argument" for p in command.params):
            rest.pop(0)  # `rlaif audit RUN verify`
        names = rest.pop(0).split("|") if rest else []
        while rest and rest[0] == "|":  # `rlaif constitution list | show | check`
            names.append(rest[1])
            del rest[:2]
        unknown = [n for n in names if n not in command.commands]
        if not names:
            return None  # the name of a group alone
        if unknown:
            return f"no command {unknown} in {sorted(command.commands)}"
        command = command.commands[names[0]]
    known = {o for p in command.params for o in p.opts}
    wrong = [w for w in rest if w.startswith("-") and w not in known]
    return f"no option {wrong} in {sorted(known)}" if wrong else None


@pytest.mark.slow
@pytest.mark.parametrize("page", GENERATED, ids=lambda p: p.name)
def test_generated_blocks_are_fresh(page: Path) -> None:
    assert docs.render(page.read_text()) == page.read_text(), "run `python -m rlaif.docs`"


def test_the_pages_that_are_made_from_docstrings() -> None:
    assert {p.name for p in GENERATED} >= {"job.md", "constitution.md", "run-directory.md"}


def test_a_stale_block_is_made_anew_and_the_rest_stays() -> None:
    page = "before\n<!-- generated: table Check -->\nstale\n<!-- /generated -->\nafter\n"
    out = docs.render(page)
    assert "stale" not in out
    assert "| `max_words` | whole number or null, ≥ 0 | `null` | At most this many words. |" in out
    assert out.startswith("before\n")
    assert out.endswith("\nafter\n")
    assert docs.render(out) == out


def test_a_block_that_names_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no class `Nothing`"):
        docs.render("<!-- generated: table Nothing -->\n<!-- /generated -->")


def test_every_setting_is_in_the_job_page_with_a_meaning() -> None:
    rows = re.findall(r"^\| `\w+` \|.*\|$", (ROOT / "docs" / "job.md").read_text(), re.MULTILINE)
    empty = [r for r in rows if re.search(r"\|\s*\|$", r)]
    assert not empty
    assert len(rows) > len(Job.model_fields)


def test_every_key_of_a_constitution_is_explained() -> None:
    page = (ROOT / "docs" / "constitution.md").read_text()
    keys = {k for m in (Principle, Paraphrase, Example, Constitution) for k in m.model_fields} - {"name", "version"}
    assert [k for k in sorted(keys) if f"`{k}`" not in page] == []


def test_every_drop_reason_is_explained() -> None:
    page = (ROOT / "docs" / "run-directory.md").read_text()
    assert [r for r in DropReason.__args__ if f"| `{r}` |" not in page] == []  # type: ignore[attr-defined]


@pages
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [x for x in links if not x.startswith(("http://", "https://")) and not (page.parent / x).exists()]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What a link to a heading may end in, as GitHub names it."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pages
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text())
    wrong = [(to, name) for to, name in links if name not in anchors(page.parent / to if to else page)]
    assert wrong == []


@pytest.mark.slow
@pages
def test_commands_exist(page: Path) -> None:
    assert {" ".join(words): p for words in commands(page) if (p := problem(words))} == {}


def test_the_command_test_sees_mistakes() -> None:
    assert commands(ROOT / "README.md")
    assert problem(["run", "jobs/quickstart.yaml", "--dry-run"]) is None
    assert problem(["constitution", "list", "|", "show"]) is None
    assert problem(["constitution", "list", "|", "shew"])
    assert problem(["audit", "RUN", "agreement", "--json"]) is None
    assert problem(["audit", "RUN", "agrement"])
    assert problem(["rum", "jobs/quickstart.yaml"])
    assert problem(["run", "--dry-rum"])


@pages
def test_settings_in_commands_are_settings(page: Path) -> None:
    calls = commands(page)
    overrides = [value for words in calls for flag, value in itertools.pairwise(words) if flag == "--set"]
    for override in overrides:
        tree = {"constitution": "assistant"}
        apply_override(tree, override)
        parse_job(tree, f"{page.name}: --set {override}")


@pages
def test_make_targets_job_files_and_modules_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets
    files = set(re.findall(r"\b(?:jobs|rlaif|benchmarks|scripts)/[\w/]+\.(?:yaml|py|sh)", text))
    assert [f for f in sorted(files) if not (ROOT / f).exists()] == []


@pages
def test_yaml_examples_are_valid(page: Path) -> None:
    for block in fences(page, "yaml"):
        tree = yaml.safe_load(block)
        if "principles" in tree:
            parse_constitution(block, "example", 1, page.name)
        elif set(tree) <= set(Job.model_fields):
            whole = tree if {"constitution", "schedule"} & set(tree) else {"constitution": "assistant", **tree}
            parse_job(whole, page.name)


LONGEST = 35
"""Words of a sentence. A longer one wants a second reading."""


def prose(text: str) -> list[str]:
    """What is written to be read: paragraphs, items of lists, cells of tables, and what a generated block says of a
    record's fields (its comments)."""
    said = re.sub(
        r"<!-- generated: record .*?<!-- /generated -->",
        lambda block: "\n\n".join(re.findall(r"^# .*(?:\n# .*)*", block[0], re.MULTILINE)).replace("# ", ""),
        text,
        flags=re.DOTALL,
    )
    said = re.sub(r"^```.*?^```|<!--.*?-->|^#+ [^\n]*|^!\[[^\n]*", "\n", said, flags=re.DOTALL | re.MULTILINE)
    lines = (re.split(r"(?<!\\)\|", x) if x.startswith("|") else [x] for x in said.splitlines())
    parts = "\n".join("\n\n".join(["", *cells, ""]) if len(cells) > 1 else cells[0] for cells in lines)
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", parts) if p.strip()]


def long_sentences(text: str) -> list[str]:
    """Sentences of a page with more words than `LONGEST`. A code span is one word, an address none."""
    plain = (re.sub(r"`[^`]*`", "`x`", re.sub(r"\]\([^)]*\)", "]", part)) for part in prose(text))
    sentences = (s for part in plain for s in re.split(r"(?<=[.!?])[*\"”)]*\s+(?=[A-Z*`\[\"“(0-9])|\s·\s", part))
    return [s for s in sentences if sum(bool(re.search(r"\w", word)) for word in s.split()) > LONGEST]


@pages
def test_no_sentence_is_long(page: Path) -> None:
    assert long_sentences(page.read_text()) == []


def test_the_test_of_sentences_counts() -> None:
    words = "word " * LONGEST
    assert long_sentences(f"A {words}.") == [f"A {words}."]
    assert long_sentences(f"{words.strip()}. And {words[5:].strip()}.\n\n- {words.strip()}\n- {words.strip()}") == []
    assert (
        long_sentences(f"`{words}` [{words[10:].strip()}](https://example.org/a b)\n```sh\n{words}{words}\n```") == []
    )
    assert len(long_sentences(f"| a | {words}more | c |\n|---|---|---|\n| {words} | {words} | c |")) == 1
    record = f"<!-- generated: record R -->\n```text\n# {words}\n# more\n\nkey: text\n# short\n```\n<!-- /generated -->"
    assert len(long_sentences(record)) == 1


def code_of(page: Path) -> list[str]:
    """What a page shows as code: spans and blocks."""
    text = page.read_text()
    blocks = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
    return [*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))]


def missing_paths(code: list[str]) -> list[str]:
    """Files and folders of the repository that are named and not there; a `*` stands for any name."""
    named = {
        m
        for c in code
        for m in re.findall(r"(?<![\w./~-])(?:rlaif|tests|docs|examples|benchmarks|scripts)/[\w./*-]*", c)
    }
    return sorted(n for n in named if not any(ROOT.glob(n.rstrip("./"))))


def missing_names(code: list[str]) -> list[str]:
    """Modules, classes and functions that are named (`rlaif.…`, `python -m …`) and not there."""
    dotted = {m for c in code for m in re.findall(r"(?<![\w./-])rlaif(?:\.[A-Za-z_]\w*)+", c)}
    run = {m for c in code for m in re.findall(r"python -m ((?:rlaif|benchmarks)[\w.]*)", c)}

    def absent(name: str) -> bool:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return True
        return False

    return sorted(n for n in dotted | run if absent(n))


@pages
def test_paths_and_names_exist(page: Path) -> None:
    assert missing_paths(code_of(page)) == []
    assert missing_names(code_of(page)) == []


def test_the_test_of_names_sees_mistakes() -> None:
    assert (
        missing_paths(["rlaif/loop/loop.py", "see tests/test_layers.py.", "rlaif/*/__init__.py", "docs/", "a/docs/b"])
        == []
    )
    assert missing_paths(["rlaif/lop/loop.py", "tests/*.pyx"]) == ["rlaif/lop/loop.py", "tests/*.pyx"]
    assert missing_names(["rlaif.loop.loop.Loop", "rlaif.Run", "python -m rlaif.docs", "import rlaif"]) == []
    assert missing_names(["rlaif.loop.lop", "python -m benchmarks.nothing"]) == ["benchmarks.nothing", "rlaif.loop.lop"]


def test_every_folder_and_stage_is_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = {p.parent.name for p in (ROOT / "rlaif").glob("*/__init__.py")}
    assert {f for f in folders if f"`rlaif/{f}/`" not in page} == set()
    picture = (ROOT / "docs" / "images" / "iteration.svg").read_text()
    assert "images/iteration.svg" in page
    files = set(re.findall(r"(\w+)\.jsonl", picture))
    assert files - {"events", "heads", "labels"} == set(NAMES) - {"scores"}, "scores share a box with pairs"


def test_what_may_change_in_a_run_is_marked() -> None:
    page = (ROOT / "docs" / "job.md").read_text()
    for section, key, marked in (
        ("learner", "learning_rate", True),
        ("learner", "beta", False),
        ("sampling", "precision", True),
        ("sampling", "temperature", False),
    ):
        table = page.partition(f"## `{section}`")[2].partition("\n## ")[0]
        row = next(line for line in table.splitlines() if line.startswith(f"| `{key}` "))
        assert row.endswith("*May change.* |") == marked
    assert "*May change.*" in page.partition("## `monitors`")[2].partition("|")[0]


def test_the_following_job_follows() -> None:
    job = load_job(ROOT / "jobs" / "follow.yaml")
    assert job.schedule is None
    assert job.constitution == "assistant"


def test_the_way_in_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    rows = re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \| (.*?) \|$", index.read_text(), re.MULTILINE)
    assert all(name == link and says for name, link, says in rows)
    listed = [(index.parent / link).resolve() for _, link, _ in rows]
    assert len(set(listed)) == len(listed)
    assert set(PAGES) - {index, ROOT / "README.md"} == set(listed)
    assert "docs/index.md" in (ROOT / "README.md").read_text()


def test_the_glossary_names_what_is_there() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if re.match(r"\| (?!word)\w", line)]
    assert len({row[0] for row in rows}) == len(rows) > 40  # one meaning for a word
    for word, where, *meaning in rows:
        assert meaning, word
        names = re.findall(r"`([^`]+)`", where)
        assert names, word
        for name in names:
            if name.startswith("rlaif."):
                pkgutil.resolve_name(name)
            elif words := re.fullmatch(r"rlaif (.*)", name):
                assert problem(words[1].split()) is None, name
            elif "." in name:
                section, key = name.split(".")
                assert any(key in s.model_fields for s in sections_in(Job.model_fields[section].annotation)), name
            else:
                assert name in Job.model_fields or name in Principle.model_fields, name


def test_the_page_for_assistants_is_short() -> None:
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) < 60


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 75


@pytest.mark.slow
@pytest.mark.parametrize("page", GENERATED, ids=lambda p: p.name)
def test_generated_types_are_words(page: Path) -> None:
    made = "".join(re.findall(r"<!-- generated: .*?<!-- /generated -->", docs.render(page.read_text()), re.DOTALL))
    assert not re.search(r"typing\.|Annotated|Strict\(|<class|\bNoneType\b|\bdict\[|\btuple\[", made)


@pytest.mark.slow
def test_a_type_within_a_type_is_told_in_words() -> None:
    row = next(
        line for line in docs.render((ROOT / "docs" / "job.md").read_text()).splitlines() if "| `stop` |" in line
    )
    assert "| list of text or whole numbers |" in row

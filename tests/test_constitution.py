"""Constitutions: identity, errors that name the line, loading, voices, and every shipped text."""

from __future__ import annotations

import pytest

from rlaif.constitutions.constitution import (
    Constitution,
    constitution_files,
    diff,
    list_constitutions,
    load_constitution,
    misnamed_files,
    parse_constitution,
)
from rlaif.errors import UserError
from tests.conftest import ROOT, shipped

SHIPPED = ROOT / "constitutions"
TEXTS = [f"{p.parent.name}@{p.stem[1:]}" for p in shipped() if p.parts[0] == "constitutions"]
TEXT = """\
summary: Brief.
principles:
  - id: answers
    rule: Answer the question.
    guard: true
  - id: brief
    rule: Be brief.
    prefer: Be brief.
    avoid: Be long.
    paraphrases:
      - {prefer: Few words., avoid: Many words., use: evaluate}
    examples:
      - {prompt: How?, better: So., worse: In a great many ways.}
      - {prompt: Who?, better: She., worse: A certain person.}
      - {prompt: When?, better: Now., worse: At a certain time.}
"""


def parse(text=TEXT, version=1):
    return parse_constitution(text.replace("How?", '"How?"').replace("Who?", '"Who?"').replace("When?", '"When?"'),
                              "test", version, "v1.yaml")  # fmt: skip


def test_comments_layout_defaults_and_version_do_not_count():
    same = "# note\n" + TEXT.replace("rule: Be brief.", 'rule:   "Be brief."\n    weight: 1.0  # the default')
    assert parse(same, version=7).hash == parse().hash
    assert str(parse(same, version=7).ref) == "test@7"


@pytest.mark.parametrize(
    ("old", "new"),
    [("Be long", "Be very long"), ("guard: true", "guard: false\n    prefer: a\n    avoid: b"), ("Many", "more"),
     ("summary: Brief", "summary: Short"), ("use: evaluate", "use: select")],
)  # fmt: skip
def test_content_counts(old, new):
    assert parse(TEXT.replace(old, new)).hash != parse().hash


def test_hash_is_stable_between_versions_of_this_code():
    # A changed hash makes every stored vote and replayed pair of a run look as if it came from another text.
    assert parse().hash == "9496481f08625479"


def test_voices_keep_their_uses_and_take_examples_two_by_two():
    assert [(v.id, v.use) for v in parse().voices()] == [
        ("brief/main", "decide"),
        ("brief/paraphrase1", "evaluate"),
        ("brief/examples-decide1", "decide"),
        ("brief/examples-decide2", "decide"),
    ]
    voice = parse().voice("brief/examples-decide1")
    assert [m.content for m in voice.prefer] == ["How?", "So.", "Who?", "She."]
    assert [m.content for m in voice.avoid] == ["How?", "In a great many ways.", "Who?", "A certain person."]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    prefer: Be", "    prefers: Be", "v1.yaml:8: unknown key `principles.1.prefers`; did you mean `prefer`?"),
        ("use: evaluate", "use: evaluating", "v1.yaml:11: principles.1.paraphrases.0.use"),
        ("summary: Brief.", "sumary: Brief.", "`summary`"),
        ("    rule: Be brief.\n", "", "v1.yaml:6: `principles.1.rule` is missing"),
        ("    avoid: Be long.\n", "", "v1.yaml:6: principles.1: give `prefer` and `avoid` together"),
        ("id: brief", "id: answers", "two principles are called `answers`"),
        ("    guard: true", "    guard: true\n    guard: false", "v1.yaml:6: `guard` is given twice"),
        ("summary: Brief.", "summary: [Brief", "not valid YAML"),
        ("summary: Brief.", "name: x\nsummary: Brief.", "v1.yaml:1: `name` comes from the file's place"),
        ("worse: At a certain time.", "worse: Now.", "v1.yaml:15: principles.1.examples.2: `better` and `worse` are"),
        ("    guard: true", "    guard: true\n    check: {max_word: 3}", "did you mean `max_words`?"),
        ("    guard: true", "    guard: true\n    weight: .inf", "v1.yaml:6: principles.0.weight: a weight is"),
        ("avoid: Be long.", "avoid: 'Be brief. '", "v1.yaml:9: principles.1.avoid: `prefer` and `avoid` are the same"),
        ("Many words.", "Few words.", "v1.yaml:11: principles.1.paraphrases.0: `prefer` and `avoid` are the same"),
        ("    guard: true", "    guard: true\n    check: {max_words: 5, min_words: 10}",
         "v1.yaml:6: principles.0.check: no answer can meet min_words 10 and max_words 5"),
    ],
)  # fmt: skip
def test_errors_name_file_line_and_the_near_key(old, new, message):
    with pytest.raises(UserError) as error:
        parse(TEXT.replace(old, new, 1))
    assert message in str(error.value)


def test_an_error_in_the_only_principle_is_one_error():
    with pytest.raises(UserError) as error:
        parse("summary: x\nprinciples:\n  - {id: a, rule: r, prefer: p, avoid: q, wieght: 2}\n")
    assert str(error.value) == "v1.yaml:3: unknown key `principles.0.wieght`; did you mean `weight`?"
    with pytest.raises(UserError, match="at least 1 item"):
        parse("summary: x\nprinciples: []\n")


def test_a_stored_text_is_read_as_it_is():
    stored = parse().model_dump(mode="json")
    stored["principles"][1]["avoid"] = stored["principles"][1]["prefer"]
    assert Constitution.model_validate(stored).principle("brief").avoid == "Be brief."


def test_yaml_that_is_no_version_is_named(tmp_path):
    write(tmp_path, "test", 1)
    for name in ("v2.yml", "v2 copy.yaml", "notes.md"):
        (tmp_path / "test" / name).write_text(TEXT)
    assert [p.name for p in misnamed_files(tmp_path)] == ["v2 copy.yaml", "v2.yml"]


@pytest.mark.parametrize("text", ["", "- a", "just words"])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(UserError, match="a constitution is a mapping"):
        parse(text)


def test_a_text_of_guards_only_is_refused():
    with pytest.raises(UserError, match="guards only veto"):
        parse(TEXT[: TEXT.index("  - id: brief")])


def test_diff_is_empty_iff_hashes_agree():
    changed = parse(TEXT.replace("Be long.", "Be longer.").replace("id: answers", "id: replies"))
    assert diff(parse(), parse(version=9)) == []
    changes = {(c.principle, c.kind, c.field) for c in diff(parse(), changed)}
    assert changes == {("answers", "removed", None), ("brief", "changed", "avoid"), ("replies", "added", None)}


def write(root, name, version, text=TEXT):
    path = root / name / f"v{version}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace("How?", '"How?"').replace("Who?", '"Who?"').replace("When?", '"When?"'))


def test_load_newest_or_pinned(tmp_path):
    write(tmp_path, "test", 2)
    write(tmp_path, "test", 10, TEXT.replace("Be long", "Be longer"))
    assert load_constitution(tmp_path, "test").version == 10
    assert load_constitution(tmp_path, "test@2").hash == parse().hash
    assert [str(c.ref) for c in list_constitutions(tmp_path)] == ["test@2", "test@10"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [("tset", "did you mean `test`?"), ("test@3", "there is test@2"), ("test@", "expected NAME"), ("", "expected NAME"),
     ("../test@2", "expected NAME")],
)  # fmt: skip
def test_load_says_what_there_is(tmp_path, reference, message):
    write(tmp_path, "test", 2)
    with pytest.raises(UserError) as error:
        load_constitution(tmp_path, reference)
    assert message in str(error.value)


@pytest.mark.parametrize("reference", TEXTS)
def test_shipped_texts_guard_first_and_have_voices_for_every_use(reference):
    constitution = load_constitution(SHIPPED, reference)
    first, *others = constitution.principles
    assert first.guard
    assert "answers the question" in first.rule
    for principle in others:
        uses = [v.use for v in principle.voices]
        assert uses.count("decide") >= 2
        assert uses.count("select") >= 1
        assert uses.count("evaluate") >= 1
        texts = [v.hash for v in principle.voices]
        assert len(set(texts)) == len(texts), "two voices ask the same"


def test_shipped_examples_are_not_shared_between_uses():
    for reference in TEXTS:
        for p in load_constitution(SHIPPED, reference).principles:
            prompts = [e.prompt for e in p.examples]
            assert len(set(prompts)) == len(prompts)


def test_the_shipped_names():
    assert {"assistant", "harmless", "plain_language"} <= set(constitution_files(SHIPPED))
    assert set(constitution_files(SHIPPED)["assistant"]) >= {1, 2}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("summary: &x [*x]", r"a\.yaml:1: an anchor that holds itself"),
        ("summary: " + "[" * 3000, r"a\.yaml: nested too deeply"),
        ("summary: a\x00b", r"a\.yaml: not valid YAML"),
    ],
)
def test_yaml_that_python_chokes_on_is_the_users_mistake(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        parse_constitution(source, "a", 1, source="a.yaml")
    assert "\n" not in str(e.value)

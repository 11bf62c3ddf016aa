"""Generated worlds: the same twice, disjoint splits, answers where the example says they are."""

import itertools
import re
from random import Random

import pytest

from blocktune.data.worlds import (
    MARKER,
    QUESTION_KINDS,
    WorldConfig,
    candidates,
    generate_examples,
)
from blocktune.data.worlds.vocabulary import ROOT, SPLITS, names
from blocktune.data.worlds.world import DEFAULT_KINDS, draw_world


def draw(**kwargs):
    return list(generate_examples(WorldConfig(**({"num_examples": 60, "seed": 3} | kwargs))))


def text(example, index):
    chunk = example.chunks[index]
    return f"{chunk.title or ''}\n{chunk.text}"


@pytest.fixture(scope="module")
def examples():
    return [e for kind in QUESTION_KINDS for e in draw(kinds={kind: 1.0}, num_examples=40)]


def test_the_same_configuration_draws_the_same_examples():
    assert draw() == draw()
    assert draw() != draw(seed=4)


def test_an_example_does_not_depend_on_how_many_are_drawn():
    assert draw(num_examples=5) == draw(num_examples=20)[:5]


@pytest.mark.parametrize("kind", ["woman", "man", "city", "film", "book", "company"])
def test_splits_share_no_name(kind):
    owned = {split: set(itertools.chain(*names(kind, split))) for split in SPLITS}
    assert all(owned.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not owned[one] & owned[other]


def test_examples_of_two_splits_share_no_entity():
    titles = {split: {c.title for e in draw(split=split) for c in e.chunks} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert titles[one] & titles[other] <= {None}


@pytest.mark.parametrize("size", [2, 10])
def test_contexts_have_the_number_of_chunks_asked_for(size):
    assert {len(e.chunks) for e in draw(num_passages=size, kinds={"cross-chunk": 1})} == {size}


def test_a_range_of_chunks_is_used_in_full():
    assert {len(e.chunks) for e in draw(num_passages=(2, 4))} == {2, 3, 4}


def test_two_examples_never_share_a_context_unless_asked():
    assert len({e.chunks for e in draw()}) == 60
    assert len({e.chunks for e in draw(questions_per_world=4)}) <= 20


def test_every_kind_is_drawn_and_the_response_ends_in_the_answer(examples):
    assert {e.kind for e in examples} == set(QUESTION_KINDS)
    for example in examples:
        assert example.response.split(MARKER)[-1] == example.answers[0]


def test_one_hop_answers_begin_with_the_value(examples):
    for example in (e for e in examples if e.kind in ("self-contained", "cross-chunk")):
        assert example.response == example.answers[0]


def test_no_two_titles_of_a_world_share_a_root():
    for example in draw(num_passages=10):
        roots = [r for c in example.chunks if c.title for r in ROOT if r in c.title.split()]
        assert len(roots) == len(set(roots))


def test_a_world_larger_than_its_names_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"too few names of kind .* fewer passages"):
        draw(num_passages=4000, num_examples=1, split="dev")


def test_names_of_documents_have_no_word_in_common():
    for example in draw(num_passages=10):
        titles = [c.title for c in example.chunks if c.title]
        words = [w for title in titles for w in set(title.split()) - {"The", "of"}]
        assert len(words) == len(set(words))


def test_a_world_with_more_documents_than_roots_is_written():
    assert len(draw(num_passages=80, num_examples=1)[0].chunks) == 80


def test_the_answer_stands_in_the_chunk_of_the_last_fact_and_that_is_supporting(examples):
    for example in examples:
        facts = example.meta["fact_chunks"]
        assert set(facts) <= set(example.supporting)
        if example.kind != "comparison":
            assert example.answers[0] in text(example, facts[-1])


def test_bridges_stand_in_the_chunks_before_and_are_said_first(examples):
    chains = [e for e in examples if e.kind in ("2-hop", "3-hop")]
    assert chains
    for example in chains:
        bridges = example.meta["bridges"]
        assert example.response.startswith(", ".join(bridges) + ". ")
        for bridge, chunk in zip(bridges, example.meta["fact_chunks"], strict=False):
            assert bridge in text(example, chunk)
            assert bridge not in example.question


def test_cross_chunk_facts_stand_in_an_untitled_chunk_that_does_not_name_its_entity():
    cross = draw(kinds={"cross-chunk": 1.0}, num_examples=150)
    assert {m for e in cross for m in e.meta["mentions"]} == {
        "pronoun", "description", "alias", "list",
    }  # fmt: skip
    for example in cross:
        first, chunk = example.supporting
        title = example.chunks[first].title
        assert title in example.question
        assert all(example.chunks[i].title is None for i in range(first + 1, chunk + 1))
        assert title not in example.chunks[chunk].text


def test_self_contained_facts_stand_in_a_titled_chunk(examples):
    for example in (e for e in examples if e.kind == "self-contained"):
        (chunk,) = example.supporting
        assert example.chunks[chunk].title in example.question


ALIAS = re.compile(r"(^|\. )(?P<name>[^.]+) is (known as|often called) (?P<words>the [^.]+)\.")


def test_an_alias_is_explained_by_the_first_chunk():
    told = 0
    for example in draw(kinds={"cross-chunk": 1.0}, num_examples=150):
        first, chunk = example.supporting
        opening = ALIAS.search(example.chunks[first].text)
        assert (opening is not None) == (example.meta["mentions"] == ["alias"])
        if opening:
            told += 1
            assert opening["name"] == example.chunks[first].title
            assert opening["words"][1:] in example.chunks[chunk].text  # "the" may begin a sentence
            assert not set(opening["words"].split()) & set(opening["name"].split())
    assert told > 10


def test_a_question_by_reference_names_no_title_and_has_one_answer():
    for example in draw(kinds={"referred": 1.0}):
        assert not any(c.title and c.title in example.question for c in example.chunks)
        assert example.answers[0] in example.chunks[example.meta["fact_chunks"][0]].text


def test_what_is_asked_by_reference_is_true_of_one_thing_only():
    asked, left_out = 0, 0
    for seed in range(100):
        world = draw_world(Random(seed), WorldConfig("test", aliased=0.2))
        found = {fact for (fact,) in candidates(world).get("referred", [])}
        for fact in world.facts.values():
            mention = world.places[fact.subject.name, fact.relation.name].mention
            if mention in ("name", "list"):
                assert fact not in found
                continue
            called = {"pronoun": "pronoun", "description": "noun", "alias": "root"}[mention]
            alike = [
                other
                for other in world.facts.values()
                if other.relation == fact.relation
                and getattr(other.subject, called) == getattr(fact.subject, called)
            ]
            assert (fact in found) == (alike == [fact])
            asked, left_out = asked + (fact in found), left_out + (fact not in found)
    assert asked > 50
    assert left_out > 50


def test_without_the_bridge_chunk_nothing_says_the_last_fact(examples):
    for example in (e for e in examples if e.kind == "2-hop"):
        chunk = example.meta["fact_chunks"][-1]
        title = next(
            example.chunks[i].title for i in range(chunk, -1, -1) if example.chunks[i].title
        )
        assert title == example.meta["bridges"][-1]
        own = [c for c in example.chunks if c.title == title]
        assert len(own) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "val"}, "split must be one of train, dev, test, got 'val'"),
        ({"kinds": {"4-hop": 1}}, "kind must be one of self-contained, .*, got '4-hop'"),
        ({"kinds": {}}, "positive weights"),
        ({"num_passages": 0}, "at least 1"),
        ({"num_passages": (4, 2)}, "ascending"),
        ({"questions_per_world": 0}, "at least 1"),
        ({"num_examples": -1}, "at least 1"),
        ({"aliased": 1.5}, r"share in \[0, 1\], got 1.5"),
        ({"kinds": {"cross-chunk": 1}, "num_passages": 1}, "needs two passages"),
    ],
)
def test_bad_configurations_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**kwargs)


def test_a_question_that_no_world_of_the_size_holds_is_refused():
    config = WorldConfig(num_passages=1, kinds={"3-hop": 1.0}, plain=True, num_examples=1)
    with pytest.raises(ValueError, match="no '3-hop' question in 5000 worlds"):
        list(generate_examples(config))


WORDS = {
    "She": "person", "He": "person", "The woman": "person", "The man": "person", "It": "it",
    "The film": "film", "The cast goes": "film", "The book": "book", "The company": "company",
    "The city": "city",
}  # fmt: skip


def test_general_words_stand_for_one_document_of_a_world():
    seen = set()
    for example in draw(kinds=DEFAULT_KINDS, num_examples=200):
        owners: dict[str, set[str]] = {}
        title = None
        for chunk in example.chunks:
            title = chunk.title or title
            for words, kind in WORDS.items():
                if chunk.title is None and re.search(rf"(^|\. ){words}\b", chunk.text):
                    owners.setdefault(kind, set()).add(title)
                    seen.add(words)
        assert all(len(titles) == 1 for titles in owners.values())
    assert seen == set(WORDS)


def continued(seed: int, crowded: bool) -> list[str]:
    """The relations of the facts that a chunk states without naming its subject."""
    world = draw_world(Random(seed), WorldConfig("test", aliased=0.5, crowded=crowded))
    places = world.places
    return [relation for (_, relation), place in places.items() if place.mention != "name"]


def test_the_only_continued_chunk_that_states_the_relation_is_right_unless_crowded():
    """What a reader of single chunks can go by: README and docs say so beside the results."""
    for crowded in (False, True):
        relations = [continued(seed, crowded) for seed in range(100)]
        assert sum(map(len, relations)) > 100
        assert all(len(set(names)) == len(names) for names in relations) is not crowded


def test_one_document_of_a_kind_at_most_goes_on_in_other_chunks():
    going_on = 0
    for seed in range(100):
        documents = draw_world(Random(seed), WorldConfig("test", aliased=0.5)).documents
        kinds = [d.entity.kind for d in documents if len(d.parts) > 1]
        assert len(kinds) == len(set(kinds))
        going_on += len(kinds)
    assert going_on > 100


def test_aliased_is_the_share_of_documents_that_go_on_by_an_alias():
    for aliased, low, high in ((0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)):
        spoken = [
            document.mention
            for seed in range(300)
            for document in draw_world(Random(seed), WorldConfig("test", aliased=aliased)).documents
            if len(document.parts) > 1 and document.mention != "list"
        ]
        assert low <= spoken.count("alias") / len(spoken) <= high


def test_first_chunks_name_their_entity_in_every_sentence():
    for example in draw(kinds=DEFAULT_KINDS, num_examples=100):
        for chunk in example.chunks:
            assert chunk.title is None or not re.search(r"(^|\. )(She|He|It)\b", chunk.text)

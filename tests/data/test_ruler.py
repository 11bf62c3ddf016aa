"""RULER's tasks: of the length asked for, the same for a seed, and solvable from their text."""

import json
import re
from collections import Counter

import pytest

from blocktune.data import load_examples
from blocktune.data.ruler import RULER_TASKS, RulerConfig, generate_ruler
from blocktune.data.ruler.fit import count_tokens, largest, shrunk
from blocktune.prompt import chunk_ids

LENGTH = 2600
GENERATED = [name for name in RULER_TASKS if not name.startswith("qa_")]
NIAH = [name for name in GENERATED if name.startswith("niah")]
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Article {a}, paragraph {p}: the code of {a}{p} is {100 * a + p}.",
                    "qas": [
                        {
                            "question": f"What is the code of {a}{p}?",
                            "answers": [{"text": str(100 * a + p), "answer_start": 0}] * 2,
                        },
                        {"question": "?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(4)
            ]
        }
        for a in range(1, 51)
    ]
}
HOTPOT = [
    {
        "_id": str(i),
        "question": f"Who {i}?",
        "answer": f"name {i}",
        "context": [[f"T{i}", [f"It was name {i}."]], [f"D{i}", ["Nothing here."]]],
        "supporting_facts": [[f"T{i}", 0]],
        "type": "bridge",
    }
    for i in range(300)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "hotpot.json").write_text(json.dumps(HOTPOT))
    return {"qa_1": str(folder / "squad.json"), "qa_2": str(folder / "hotpot.json")}


@pytest.fixture(scope="module")
def make(tokenizer, files):
    """Examples of a task, made once for each set of options."""
    made = {}

    def examples(task, **options):
        options = {"length": LENGTH, "n": 3, "chunk": 200} | options
        key = (task, *sorted(options.items()))
        if key not in made:
            config = RulerConfig(task, file=files.get(task), **options)
            made[key] = list(generate_ruler(config, tokenizer))
        return made[key]

    return examples


def text_of(example):
    return "\n".join(chunk.text for chunk in example.chunks)


@pytest.mark.parametrize("task", RULER_TASKS)
def test_length_is_filled_and_kept(make, tokenizer, task):
    for example in make(task):
        fmt, budget = RULER_TASKS[task].format, RULER_TASKS[task].max_new_tokens
        tokens = count_tokens(tokenizer, fmt, example.chunks, example.question) + budget
        assert tokens == example.meta["length"] <= LENGTH
        assert tokens > 0.9 * LENGTH


@pytest.mark.parametrize("task", RULER_TASKS)
def test_seed_alone_decides(make, task):
    assert make(task, n=2) == make(task)[:2]
    assert make(task, seed=1)[0] != make(task)[0]


@pytest.mark.parametrize("task", RULER_TASKS)
def test_example_says_how_it_is_scored(make, task):
    for example in make(task):
        assert example.kind == task
        scorer = "ruler_any" if task.startswith("qa_") else "ruler_recall"
        assert example.meta["scorer"] == scorer
        assert example.meta["max_new_tokens"] == RULER_TASKS[task].max_new_tokens
        assert example.meta["instruction"] == RULER_TASKS[task].instruction
        assert example.meta["lead"]
        assert all(answer in example.target for answer in example.answers[:1])


@pytest.mark.parametrize("task", [name for name in GENERATED if name not in ("cwe", "vt")])
def test_chunks_are_packed_up_to_their_size(make, tokenizer, task):
    fmt = RULER_TASKS[task].format
    for example in make(task):
        sizes = [len(chunk_ids(tokenizer, fmt, chunk)) for chunk in example.chunks]
        assert max(sizes) <= 200 + 5  # the newline after a chunk, and merges across units
        assert len(sizes) <= 2.5 * sum(sizes) / 200


@pytest.mark.parametrize("task", NIAH)
def test_needles_stand_in_the_supporting_chunks(make, task):
    variant = RULER_TASKS[task].niah
    for example in make(task):
        kind = variant.values
        found = dict.fromkeys(
            match
            for index in example.supporting
            for match in re.findall(
                rf"One of the special magic {kind} for (\S+) is: (\S+)\.",
                example.chunks[index].text,
            )
        )
        values = [value for key, value in found if key in example.question]
        assert sorted(values) == sorted(example.answers)
        assert len(example.answers) == variant.num_values * variant.num_queries
        total = text_of(example).count("One of the special magic")
        if variant.haystack == "needle":
            assert total > 10
        else:
            assert total == max(variant.num_keys, variant.num_queries) * variant.num_values


def test_needles_stand_in_no_order_of_their_own(make):
    orders = []
    for example in make("niah_multivalue"):
        text = text_of(example)
        orders.append(sorted(range(4), key=[text.index(a) for a in example.answers].__getitem__))
    assert any(order != [0, 1, 2, 3] for order in orders)


def test_wording_is_singular_for_one_and_plural_for_several(make):
    one, several = make("niah_single_1")[0], make("niah_multiquery")[0]
    assert re.fullmatch(
        r"What is the special magic number for \S+ mentioned in the provided text\?", one.question
    )
    assert one.meta["instruction"].startswith("A special magic number is hidden within")
    assert one.meta["lead"].endswith("mentioned in the provided text is")
    assert re.fullmatch(
        r"What are all the special magic numbers for (\S+, ){3}and \S+ mentioned in the provided "
        r"text\?",
        several.question,
    )
    assert several.meta["instruction"].startswith("Some special magic numbers are hidden within")


def test_formats_word_prompts_as_ruler_does():
    niah, qa = RULER_TASKS["niah_multivalue"].format, RULER_TASKS["qa_2"].format
    assert niah.render_question("What are all?") == "What are all?"
    asked = "Answer the question based on the given documents. Only give me the answer and do not "
    asked += "output any other words."
    assert qa.instruction == f"{asked}\n\nThe following are given documents."
    assert qa.render_question("Who?") == f"{asked}\n\nQuestion: Who?"
    assert RULER_TASKS["vt"].format.render_question("Find.") == "Question: Find."


def test_keys_and_values_are_of_their_kind(make):
    assert re.fullmatch(r"\d{7}", make("niah_single_2")[0].answers[0])
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(uuid, make("niah_single_3")[0].answers[0])
    assert re.search(f"for {uuid} mentioned", make("niah_multikey_3")[0].question)


def test_chain_can_be_followed(make):
    for example in make("vt"):
        solved, *rest = (chunk.text for chunk in example.chunks)
        value = re.search(r"value (\d{5}) in", example.question)[1]
        names = [re.search(rf"VAR (\w+) = {value}", "\n".join(rest))[1]]
        while step := re.search(rf"VAR (\w+) = VAR {names[-1]}\b", "\n".join(rest)):
            names.append(step[1])
        assert tuple(names) == example.answers
        assert len(names) == 5
        assert "VAR" in example.chunks[example.supporting[0]].text
        assert re.search(r"they are: [A-Z]{3}( [A-Z]{3}){4}$", solved)


def test_common_words_are_the_most_common(make):
    example = make("cwe")[0]
    listed = [e for chunk in example.chunks[1:] for e in re.findall(r"\d+\. (\S+)", chunk.text)]
    counts = Counter(listed).most_common()
    assert {word for word, _ in counts[:10]} == set(example.answers)
    assert [count for _, count in counts[:11]] == [6] * 10 + [1]
    long = make("cwe", length=9000, n=1)[0]
    listed = [e for chunk in long.chunks[1:] for e in re.findall(r"\d+\. (\S+)", chunk.text)]
    assert sorted(set(Counter(listed).values())) == [3, 30]


def test_frequent_words_follow_their_rank(make):
    for example in make("fwe"):
        words = [word for chunk in example.chunks for word in chunk.text.split()]
        counts = Counter(words).most_common(5)
        assert [word for word, _ in counts[:4]] == ["...", *example.answers]
        assert counts[3][1] > counts[4][1]
        assert counts[0][1] == pytest.approx(4 * counts[1][1], abs=4)


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_gold_documents_are_among_others(make, task):
    examples = make(task, n=6)
    assert len({example.question for example in examples}) == 6
    for example in examples:
        texts = [chunk.text for chunk in example.chunks]
        assert len(set(texts)) == len(texts) > 5
        assert [example.answers[0] in texts[i] for i in example.supporting] == [True]
    assert len({example.supporting for example in examples}) > 1


def test_a_file_too_small_for_the_length_is_refused(tokenizer, files):
    source = f"ruler:qa_2?file={files['qa_2']}&length=90000&n=1"
    with pytest.raises(ValueError, match="601 or more documents are needed to fill the length"):
        load_examples(source, tokenizer=tokenizer)


def test_own_haystack(tokenizer, tmp_path):
    (tmp_path / "essay.json").write_text(json.dumps({"text": "I like tea. You like it too. "}))
    source = f"ruler:niah_single_2?length=900&n=1&haystack={tmp_path / 'essay.json'}"
    (example,) = load_examples(source, tokenizer=tokenizer)
    assert text_of(example).count("I like tea.") > 5


def test_tokenizer_can_be_named(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    source = "ruler:niah_single_1?length=700&n=1"
    named = load_examples(f"{source}&tokenizer={tmp_path}")
    assert named == load_examples(source, tokenizer=tokenizer)


def test_largest_and_shrunk():
    assert largest(lambda size: size <= 77, 1) == 77
    assert largest(lambda size: size <= 1, 1) == 1
    assert largest(lambda size: False, 1) is None

    def raises(size):
        if size > 20:
            raise ValueError
        return True

    assert largest(raises, 1) == 20
    assert list(shrunk(4, 1)) == [4, 3, 2, 1]
    assert list(shrunk(200, 195)) == [200, 196, 195]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ruler:niah", "unknown task 'niah' of RULER; available: niah_single_1, niah_single_2"),
        ("ruler:vt?lenght=3", "unknown option 'lenght' of 'ruler:vt'; known: task, length, n"),
        ("ruler:vt?length=x", "ruler:vt: 'length' must be a whole number, got 'x'"),
        ("ruler:vt?n=0", "ruler:vt: 'n' must be at least 1, got 0"),
        ("ruler:vt?length=90", r"ruler: the smallest 'vt' has \d+ tokens with its answer, length"),
        ("ruler:qa_1", "ruler:qa_1: 'qa_1' needs file=PATH, questions in SQuAD's format"),
        ("ruler:vt?haystack=x", "'haystack' is prose for the essay tasks, 'vt' has none"),
        ("ruler:vt?file=x", "'file' belongs to qa_1 and qa_2, not to 'vt'"),
        ("ruler:qa_1?file=none.json", "'none.json' is not a file; give a JSON file"),
        ("ruler:niah_single_2?haystack=none.txt", "no haystack at 'none.txt'; give a text file"),
        ("ruler:vt?tokenizer=no/where", "cannot load a tokenizer from 'no/where'"),
    ],
)
def test_bad_options_are_one_line(tokenizer, source, message):
    with pytest.raises(ValueError, match=message) as error:
        load_examples(source, tokenizer=tokenizer)
    assert "\n" not in str(error.value)


def test_files_of_another_shape_are_named(tokenizer, files, tmp_path):
    with pytest.raises(ValueError, match=r"hotpot\.json is not in SQuAD's format"):
        load_examples(f"ruler:qa_1?file={files['qa_2']}", tokenizer=tokenizer)
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps([HOTPOT[0], {"question": "q", "context": [["A"]]}]))
    with pytest.raises(ValueError, match=r'wrong\.json, record 2: field "context\[0\]" must be'):
        load_examples(f"ruler:qa_2?file={wrong}", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="n=301 questions are wanted, the file has 300"):
        load_examples(f"ruler:qa_2?file={files['qa_2']}&n=301", tokenizer=tokenizer)


def test_lengths_need_a_tokenizer():
    with pytest.raises(ValueError, match="ruler: lengths are in tokens; say whose: tokenizer=MO"):
        load_examples("ruler:vt")

"""Task files: every one loads with all its variants, and mistakes are one line."""

from pathlib import Path

import pytest
import yaml

from blocktune.evaluation.suite import TaskSpec, parse_task
from blocktune.parsing import load_yaml
from blocktune.prompt import PromptFormat

TASKS = sorted(Path("eval/tasks").glob("*.yaml"))
NAMED = {"musique", "2wikimultihopqa", "hotpotqa", "nq-open", "triviaqa", "samsum", "multi-news"}


def variants_of(path) -> list[str]:
    return list(load_yaml(path, "task", "").get("variants", {}))


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_every_task_file_loads_with_its_variants(path):
    plain = parse_task({"task": str(path)})
    assert plain.name == path.stem
    assert plain.version >= 1
    for variant in variants_of(path):
        task = parse_task({"task": str(path), "variant": variant})
        assert task.name == f"{path.stem}-{variant}"
        assert task.prompt is not None


def test_the_fields_tasks_are_all_there():
    stems = {path.stem for path in TASKS}
    assert stems >= NAMED | {"needle", "chat", "code", "jsonl"}
    for name in ("musique", "2wikimultihopqa", "hotpotqa"):
        assert variants_of(f"eval/tasks/{name}.yaml") == ["cacheblend", "kvlink", "block-attention"]


def test_cacheblends_wording_is_its_codes():
    task = parse_task({"task": "eval/tasks/musique.yaml", "variant": "cacheblend"})
    words = task.worded(PromptFormat())
    assert words.instruction.endswith("The answer should be within 5 words..\nPassages:")
    assert words.render_question("who?") == (
        "\n\nAnswer the question directly based on the given passages. Do NOT repeat the question. "
        "The answer should be within 5 words. \nQuestion:who?\nAnswer:"
    )
    assert (task.metric, task.max_new_tokens, task.stop) == ("token_f1", 32, ("\n",))


def test_an_entry_replaces_keys_of_the_file():
    task = parse_task({"task": "eval/tasks/musique.yaml", "name": "mine", "limit": 3})
    assert (task.name, task.limit, task.metric) == ("mine", 3, "f1")
    cut = parse_task({"name": "x", "source": "a.json?as=document", "chunking": {"size": 9}})
    assert cut.full_source() == "a.json?as=document&size=9"
    longer = parse_task({"name": "x", "source": "needle:?n=2", "chunking": {"n": 8, "seed": None}})
    assert longer.full_source() == "needle:?n=8"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.json?as", "has options that are not key=value"),
        ("a.json?seed=1&seed=2", "'seed' is given 2 times"),
    ],
)
def test_a_wrong_option_is_not_lost_by_adding_chunking(source, message):
    task = parse_task({"name": "x", "source": source, "chunking": {"size": 9}})
    with pytest.raises(ValueError, match=message):
        task.full_source()


def test_outputs_are_cut_before_they_are_scored():
    task = TaskSpec("x", "y", stop=("\n", "Question:"), answer_marker="Answer:")
    assert task.cut("so. Answer: Kirby Question: who\nmore") == " Kirby "
    assert task.cut("Answer: no. Answer:  yes ") == "  yes "
    assert task.cut("Kirby") == "Kirby"
    assert task.cut("Anna Belt. Answer:") == ""
    assert TaskSpec("x", "y").cut("all\nof it. ") == "all\nof it. "


def test_a_line_break_before_the_answer_does_not_end_it():
    task = TaskSpec("x", "y", stop=("\n",), metric="token_f1")
    assert task.cut("\n\n Kirby\nQuestion: who") == "\n\n Kirby"
    assert task.cut("\n") == "\n"
    assert TaskSpec("x", "y", stop=("\nQuestion:",)).cut("\nQuestion: Who?\nAnswer: Bob") == ""


def test_what_decides_a_row_is_all_but_where_questions_come_from():
    task = TaskSpec("x", "y", prompt={"instruction": "Be brief."})
    assert task.decides().keys() >= {"prompt", "metric", "version", "stop", "max_new_tokens"}
    assert not task.decides().keys() & {"source", "limit", "by_kind", "cite", "chunking"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "none.yaml"}, "no task at 'none.yaml'; see eval/tasks/"),
        ({"task": {"name": "a"}}, "task: 'task' must be text, got {'name': 'a'}"),
        (
            {"task": "eval/tasks/musique.yaml", "variant": ["x"]},
            "'variant' must be text, got ['x']",
        ),
        ({"variant": "x", "name": "a", "source": "b"}, "'variant' needs 'task'"),
        ({"task": "eval/tasks/musique.yaml", "variant": "x"}, "unknown variant 'x'; it has: cache"),
        ({"task": "eval/tasks/musique.yaml", "metrc": "f1"}, "unknown key 'metrc'"),
        ({"name": "a", "source": "b", "metric": "bleu"}, "metric must be one of em, f1,"),
        ({"name": "a", "source": "b", "metrics": "f1"}, "'metrics' must be a list of texts"),
        ({"name": "a", "source": "b", "stop": [""]}, "'stop' has an empty text"),
        ({"name": "a", "source": "b", "stop": [1]}, "'stop' must be a list of texts"),
        ({"name": "a", "source": "b", "prompt": {"x": ""}}, "prompt format: unknown key 'x'"),
        ({"name": "a", "source": "b", "version": 0}, "version must be a whole number, at least 1"),
    ],
)
def test_mistakes_are_one_clear_line(entry, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parse_task(entry)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_keeps_its_variants_to_itself(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "source": "s", "variants": {"v": {"limit": 2}}}))
    assert parse_task({"task": str(path)}) == TaskSpec("t", "s")
    assert parse_task({"task": str(path), "variant": "v"}) == TaskSpec("t-v", "s", limit=2)

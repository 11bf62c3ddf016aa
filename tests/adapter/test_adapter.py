"""An adapter's metadata, and whose base it takes."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training.toy import toy_config, toy_model, toy_tokenizer

from blocktune.adapter import AdapterInfo, load_adapter
from blocktune.links import installed_links, new_links, save_links
from blocktune.models.identity import QUANTISED, base_fingerprint, same_base, tokenizer_hash
from blocktune.prompt import LayoutSpec, PromptFormat


def info_for(model, tokenizer, **fields):
    values = {
        "base_model": "org/base",
        "base_fingerprint": base_fingerprint(model),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "layout": LayoutSpec(num_links=2, link_side="before"),
        "format": PromptFormat(system="Be brief."),
        "training": {"commit": "abc", "seed": 3},
    }
    return AdapterInfo(**values | fields)


@pytest.fixture
def links_adapter(tmp_path):
    model = toy_model()
    save_links(new_links(model, 2), tmp_path)
    info_for(model, toy_tokenizer()).save(tmp_path)
    return tmp_path


def test_info_survives_its_file(tmp_path):
    info = info_for(toy_model(), toy_tokenizer())
    info.save(tmp_path)
    assert AdapterInfo.load(tmp_path) == info
    assert [path.name for path in tmp_path.iterdir()] == ["blocktune.json"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"colour": "red"}, "blocktune.json: unknown key 'colour'"),
        ({"layout": {"num_link": 1}}, "layout: unknown key 'num_link'"),
        ({"format": {"style": 1}}, "prompt format: unknown key 'style'"),
        ({"format_version": 9}, "reads adapter format 1, got 9"),
        ({"format_version": 2, "colour": "red"}, "reads adapter format 1, got 2; update"),
        ({"base_model": None}, "blocktune.json: 'base_model' must be text, got None"),
        ({"training": []}, r"'training' must be a mapping, got \[\]"),
        ({"link_mode": "magic"}, "link_mode must be one of table, added_tokens, got 'magic'"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(links_adapter, change, line):
    path = links_adapter / "blocktune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=line):
        AdapterInfo.load(links_adapter)


def test_a_missing_field_is_named(links_adapter):
    path = links_adapter / "blocktune.json"
    values = json.loads(path.read_text())
    del values["tokenizer_hash"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"blocktune\.json: 'tokenizer_hash' is missing"):
        AdapterInfo.load(links_adapter)


def test_a_folder_without_metadata_is_no_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"is not a blocktune adapter: it has no blocktune\.json"):
        load_adapter(toy_model(), toy_tokenizer(), tmp_path)


def test_an_unknown_name_is_one_line():
    with pytest.raises(
        ValueError, match=r"no adapter 'nobody/nothing': it is not a local"
    ) as caught:
        load_adapter(toy_model(), toy_tokenizer(), "nobody/nothing")
    assert "\n" not in str(caught.value)


def test_links_alone_are_an_adapter(links_adapter):
    model, info = load_adapter(toy_model(), toy_tokenizer(), links_adapter)
    assert info.num_learned == len(installed_links(model).weight) == 2
    assert info.link_base(model, toy_tokenizer()) == len(toy_tokenizer())


def test_links_survive_the_merge_of_an_embedding_that_peft_trained(links_adapter):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    get_peft_model(toy_model(), config).save_pretrained(links_adapter)
    model, info = load_adapter(toy_model(), toy_tokenizer(), links_adapter, merge=True)
    first = info.link_base(model, toy_tokenizer())
    rows = model.get_input_embeddings()(torch.tensor([[1, first, first + 1]]))
    assert torch.equal(rows[0, 1:], installed_links(model).weight)


def test_links_take_the_dtype_of_the_base(links_adapter):
    base = toy_model().to(torch.bfloat16)
    model, _ = load_adapter(base, toy_tokenizer(), links_adapter)
    assert installed_links(model).weight.dtype == torch.bfloat16


def test_an_adapter_for_another_base_is_refused_in_one_line(links_adapter):
    other = toy_model(seed=1)
    names = set(other.state_dict())
    with pytest.raises(ValueError, match="was made for base 'org/base'") as caught:
        load_adapter(other, toy_tokenizer(), links_adapter)
    line = str(caught.value)
    assert "got 'LlamaForCausalLM'" in line
    assert "load 'org/base', or train" in line
    assert "\n" not in line
    assert set(other.state_dict()) == names


def test_an_adapter_for_another_template_is_refused(links_adapter):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    with pytest.raises(ValueError, match="trained with the tokenizer and chat template"):
        load_adapter(toy_model(), tokenizer, links_adapter)


def test_fingerprint_ignores_dtype_adapters_and_links():
    from peft import LoraConfig, get_peft_model

    from blocktune.links import install_links

    plain = base_fingerprint(toy_model())
    assert base_fingerprint(toy_model().to(torch.bfloat16)) == plain
    lora = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[3])
    model = get_peft_model(toy_model(), lora)
    install_links(model, new_links(model, 1))
    assert base_fingerprint(model) == plain


def test_fingerprint_tells_bases_apart():
    plain = base_fingerprint(toy_model())
    scaled = toy_model()
    scaled.model.layers[1].mlp.up_proj.weight.data *= 1.5
    assert not same_base(plain, base_fingerprint(scaled))
    assert not same_base(plain, base_fingerprint(toy_model(seed=1)))
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert not same_base(
        plain, base_fingerprint(toy_model(config=toy_config(rope_parameters=rope)))
    )


def test_a_quantised_base_is_compared_by_what_stays_plain():
    shape, plain, _ = base_fingerprint(toy_model()).split("-")
    quantised = f"{shape}-{plain}-{QUANTISED}"
    assert same_base(quantised, base_fingerprint(toy_model()))
    assert not same_base(quantised, base_fingerprint(toy_model(seed=1)))


def test_tokenizer_hash_ignores_what_a_call_leaves_behind():
    tokenizer = toy_tokenizer()
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(toy_tokenizer())


def test_tokenizer_hash_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    toy_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(
        toy_tokenizer()
    )

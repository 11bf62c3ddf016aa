"""Link tokens: looked up, trained, saved and reloaded without touching the vocabulary."""

import pytest
import torch
from torch.nn import Embedding
from training.toy import toy_config, toy_model, toy_tokenizer
from transformers import Gemma2Config, Gemma3TextConfig, Gemma4TextConfig, GraniteConfig

from blocktune.links import (
    add_link_tokens,
    install_links,
    link_base,
    load_links,
    new_links,
    save_links,
)

FAMILIES = {"gemma2": Gemma2Config, "gemma3": Gemma3TextConfig, "granite": GraniteConfig}


def family(name, **overrides):
    keys = toy_config().to_dict()
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    wanted += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    config = FAMILIES.get(name, Gemma4TextConfig)
    return config(**{k: keys[k] for k in wanted} | {"head_dim": 8} | overrides)


def test_link_rows_match_the_same_rows_in_the_vocabulary():
    model, table = toy_model(), Embedding(2, 32)
    base = link_base(model)
    table.weight.data.copy_(model.get_input_embeddings().weight[[7, 9]])
    plain = torch.tensor([[3, 7, 9, 4], [9, 3, 3, 7]])
    expected = model(plain).logits
    linked = plain.clone()
    linked[plain == 7], linked[plain == 9] = base, base + 1
    install_links(model, table)
    assert torch.equal(model(linked).logits, expected)
    assert torch.equal(model(plain).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_link_rows_are_scaled_as_the_embeddings_are(name):
    model = toy_model(config=family(name))
    table = Embedding(1, 32)
    embedding = model.get_input_embeddings()
    table.weight.data.copy_(embedding(torch.tensor([7])))
    ids = torch.tensor([[3, 7, 4]])
    expected = model(ids).logits
    install_links(model, table)
    ids[0, 1] = link_base(model)
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_new_links_lie_near_the_mean_of_what_the_lookup_puts_out(name):
    model = toy_model(config=family(name))
    rows = model.get_input_embeddings()(torch.arange(link_base(model)))
    table = new_links(model, 3, seed=1)
    spread = (table.weight - rows.mean(0)).std() / rows.std()
    assert 0.05 < spread < 0.2
    assert torch.equal(table.weight, new_links(model, 3, seed=1).weight)
    assert not torch.equal(table.weight, new_links(model, 3, seed=2).weight)


def test_links_get_gradients_and_the_vocabulary_does_not_through_them():
    model = toy_model()
    model.requires_grad_(False)
    table = new_links(model, 2)
    install_links(model, table)
    base = link_base(model)
    model(torch.tensor([[3, base, 4]])).logits.square().sum().backward()
    assert table.weight.grad[0].abs().sum() > 0
    assert table.weight.grad[1].abs().sum() == 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "blocktune_links.weight"
    ]


def test_a_batch_without_links_gives_the_table_a_zero_gradient():
    model, table = toy_model(), Embedding(2, 32)
    install_links(model, table)
    model(torch.tensor([[3, 4]])).logits.sum().backward()
    assert torch.equal(table.weight.grad, torch.zeros(2, 32))


def test_saved_links_are_the_loaded_ones(tmp_path):
    table = new_links(toy_model(), 3)
    save_links(table, tmp_path)
    assert torch.equal(load_links(tmp_path).weight, table.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["links.safetensors"]


def test_missing_links_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no links\.safetensors in .*trained with link tokens"):
        load_links(tmp_path)


def test_damaged_links_are_named(tmp_path):
    whole = save_links(Embedding(2, 8), tmp_path).read_bytes()
    for size in (0, 40, len(whole) - 1):
        (tmp_path / "links.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"links\.safetensors' is damaged or incomplete"):
            load_links(tmp_path)


def test_links_of_another_width_are_refused():
    with pytest.raises(ValueError, match="48 wide, this model's embeddings 32"):
        install_links(toy_model(), Embedding(1, 48))


def test_links_are_installed_once():
    model = toy_model()
    install_links(model, Embedding(1, 32))
    with pytest.raises(ValueError, match="already"):
        install_links(model, Embedding(1, 32))


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_start_as_a_table_would(tied):
    config = toy_config(tie_word_embeddings=tied)
    model, tokenizer = toy_model(config=config), toy_tokenizer()
    size = link_base(model)
    rows = new_links(model, 2, seed=5).weight
    ids = add_link_tokens(model, tokenizer, 2, seed=5)
    assert list(ids) == [size, size + 1]
    assert torch.equal(model.get_input_embeddings().weight[size:], rows)
    assert model.get_output_embeddings().weight.shape[0] == size + 2
    assert tokenizer.convert_tokens_to_ids("<|link_1|>") == size + 1


def test_added_tokens_of_a_scaling_embedding_read_as_a_table_would():
    model = toy_model(config=family("gemma3"))
    tokenizer = toy_tokenizer()
    rows = new_links(model, 2).weight
    ids = add_link_tokens(model, tokenizer, 2)
    torch.testing.assert_close(model.get_input_embeddings()(torch.tensor(list(ids))), rows)


def test_added_tokens_are_the_same_at_each_load_in_every_table():
    """Gemma 4 has a second embedding for each layer, whose rows are not saved with an adapter."""
    keys = {"vocab_size_per_layer_input": len(toy_tokenizer()), "hidden_size_per_layer_input": 8}
    keys |= {"num_kv_shared_layers": 0, "global_head_dim": 8}
    one, other = (toy_model(config=family("gemma4", **keys)) for _ in range(2))
    for model in (one, other):
        ids = add_link_tokens(model, toy_tokenizer(), 2)
    assert torch.equal(one(torch.tensor([ids])).logits, other(torch.tensor([ids])).logits)

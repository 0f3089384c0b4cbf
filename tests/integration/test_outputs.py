"""Arguments and outputs of the five heads: what is recorded, kept, resized, dropped, checkpointed."""

import copy

import pytest
import torch
from stacks import STACKS, build, config_of, greedy, left_padded, prompt, shared
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex_integration

from hybridlm import (
    HybridLMForCausalLM,
    HybridLMForQuestionAnswering,
    HybridLMForSequenceClassification,
    HybridLMForTokenClassification,
    HybridLMModel,
)

stacks = pytest.mark.parametrize("stack", STACKS)


def padded():
    """Three rows of 9, 4 and 6 tokens, pads on the left, on the right and in both places."""
    rows = [prompt(length=n, seed=n)[0] for n in (9, 4, 6)]
    batch = left_padded(rows)
    batch["input_ids"][2] = torch.cat([rows[2].new_zeros(2), rows[2], rows[2].new_zeros(1)])
    batch["attention_mask"][2] = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0])
    return rows, batch


@stacks
def test_recorded_outputs_stand_where_the_tokens_stand(stack):
    model = shared(stack)
    rows, batch = padded()
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    with torch.no_grad():
        out = model(**batch, **wanted)
        alone = [model(row[None], **wanted) for row in rows]
        plain = model(**batch)
    torch.testing.assert_close(out.logits, plain.logits)
    depth, attending = len(STACKS[stack]), sum(mixer in ("attention", "window") for mixer, _ in STACKS[stack])
    assert len(out.hidden_states) == depth + 1
    assert len(out.attentions or ()) == attending
    assert len(out.router_logits or ()) == sum(str(channel).count("'moe'") for _, channel in STACKS[stack])
    for b, one in enumerate(alone):
        real = batch["attention_mask"][b].bool()
        for mine, single in zip(out.hidden_states, one.hidden_states, strict=True):
            assert mine.shape == (3, 9, 32)
            torch.testing.assert_close(mine[b, real], single[0])
            assert not mine[b, ~real].any()
        for mine, single in zip(out.router_logits or (), one.router_logits or (), strict=True):
            assert mine.shape == (3, 9, 4)
            torch.testing.assert_close(mine[b, real], single[0])
        for mine, single in zip(out.attentions or (), one.attentions or (), strict=True):
            assert mine.shape == (3, 4, 9, 9)
            torch.testing.assert_close(mine[b][:, real][:, :, real], single[0])
            assert not mine[b][:, :, ~real].any()


def test_the_last_hidden_state_is_the_normalised_one():
    model = shared("hybrid").model
    with torch.no_grad():
        out = model(prompt(2), output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state)
    torch.testing.assert_close(out.hidden_states[0], model.embed_tokens(prompt(2)))


def test_recorded_outputs_of_a_decoding_step_and_in_generate():
    model, ids = shared("hybrid"), prompt(2)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        full = model(ids, **wanted)
        cache = model.new_cache()
        model(ids[:, :8], past_key_values=cache)
        step = model(ids[:, 8:], past_key_values=cache, **wanted)
    for mine, single in zip(full.hidden_states, step.hidden_states, strict=True):
        torch.testing.assert_close(mine[:, 8:], single)
    torch.testing.assert_close(step.attentions[0], full.attentions[0][:, :, 8:])
    out = greedy(model, ids, 3, return_dict_in_generate=True, output_scores=True, **wanted)
    assert len(out.hidden_states) == len(out.attentions) == len(out.scores) == 3
    assert [layers[0].shape[1] for layers in out.hidden_states] == [9, 1, 1]


def test_the_config_can_ask_for_outputs():
    model = build("hybrid", output_router_logits=True)
    model.config.output_hidden_states = True
    with torch.no_grad():
        out = model(prompt())
    assert len(out.router_logits) == 2
    assert len(out.hidden_states) == 5
    with torch.no_grad():
        assert model(prompt(), output_router_logits=False).router_logits is None


def test_a_tuple_instead_of_a_dictionary():
    model, ids = shared("hybrid"), prompt()
    with torch.no_grad():
        tuples = model(ids, return_dict=False)
    assert isinstance(tuples, tuple)
    torch.testing.assert_close(tuples[0], model(ids).logits.detach())


@stacks
def test_embeddings_instead_of_ids(stack):
    model = shared(stack)
    _, batch = padded()
    ids = batch.pop("input_ids")
    with torch.no_grad():
        expected = model(ids, **batch).logits
        given = model(inputs_embeds=model.get_input_embeddings()(ids), **batch).logits
    torch.testing.assert_close(given, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_logits_of_some_tokens_only():
    model, ids = shared("hybrid"), prompt(2)
    with torch.no_grad():
        full = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, full[:, -1:])
        torch.testing.assert_close(model(ids, logits_to_keep=4).logits, full[:, -4:])
        columns = torch.tensor([0, 3, 8])
        torch.testing.assert_close(model(ids, logits_to_keep=columns).logits, full[:, columns])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_vocabulary_can_grow_and_shrink(tied, tmp_path):
    model, ids = build("hybrid", tie_word_embeddings=tied), prompt()
    before = model(ids).logits.detach()
    model.resize_token_embeddings(56)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 56
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    after = model(ids).logits
    assert after.shape == (1, 9, 56)
    torch.testing.assert_close(after[..., :48], before)
    model(torch.full((1, 3), 55), labels=torch.full((1, 3), 55)).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = HybridLMForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, after)
    model.resize_token_embeddings(50)
    torch.testing.assert_close(model(ids).logits[..., :48], before)
    with pytest.raises(ValueError, match="input_ids: 50 is out of range, expected 0 to 49"):
        model(torch.full((1, 3), 50))


def dropout_config(where):
    config = config_of("hybrid")
    if where == "embedding":
        config.embedding_dropout = 0.5
    elif where == "residual":
        config.residual = {"name": "add", "dropout": 0.5}
    else:
        half = "mixer" if where == "attention" else "channel_mixer"
        for spec in config.layer_specs.values():
            if spec[half] and (where == "channel" or spec[half]["name"] == "attention"):
                spec[half] = spec[half] | {"dropout": 0.5}
    return config


@pytest.mark.parametrize("where", ["embedding", "residual", "attention", "channel"])
def test_dropout_acts_in_training_only(where):
    torch.manual_seed(0)
    model, ids = HybridLMForCausalLM(copy.deepcopy(dropout_config(where))), prompt()
    plain = HybridLMForCausalLM(config_of("hybrid"))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits)
        model.train()
        assert (model(ids).logits - model(ids).logits).abs().max() > 1e-3
        plain.train()
        torch.testing.assert_close(plain(ids).logits, plain(ids).logits)


def plain_flex_attention(*args, training=False, **kwargs):
    return flex_attention(*args, **kwargs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("stack", ["attention", "window", "hybrid"])
def test_attention_backends_agree(stack, implementation, monkeypatch):
    if implementation == "flex_attention":  # without the compiler, which takes a minute a shape on a CPU
        monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", plain_flex_attention)
    model = build(stack)
    rows, batch = padded()
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]

    def outputs():
        with torch.no_grad():
            cache = model.new_cache()
            chunks = [model(batch["input_ids"][:1, :5], past_key_values=cache)]
            chunks += [model(batch["input_ids"][:1, i : i + 1], past_key_values=cache) for i in range(5, 9)]
            return [
                model(**batch).logits,
                model(packed, position_ids=positions).logits,
                torch.cat([chunk.logits for chunk in chunks], dim=1),
            ]

    model.set_attn_implementation("eager")
    expected = outputs()
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    for mine, other in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_implementation_is_chosen_on_loading_and_sdpa_is_the_default(tmp_path):
    build("attention", torch.float32).save_pretrained(tmp_path)
    assert HybridLMForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    eager = HybridLMForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert eager.model.config._attn_implementation == "eager"
    with pytest.raises((ValueError, ImportError), match="nonsense"):
        HybridLMForCausalLM.from_pretrained(tmp_path, attn_implementation="nonsense")


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    torch.manual_seed(5)  # dropout, and what a layer that runs again must repeat
    out = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100), **options)
    out.loss.backward()
    return out.loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@stacks
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(stack, reentrant):
    config = config_of(stack, residual={"name": "add", "dropout": 0.1})
    for spec in config.layer_specs.values():
        channel = spec["channel_mixer"]
        if channel and channel["name"] == "moe" and reentrant:  # router losses need the other kind
            spec["channel_mixer"] = channel | {"load_balancing_coef": 0.0, "z_loss_coef": 0.0}
    torch.manual_seed(0)
    model = HybridLMForCausalLM(config).double().train()
    _, batch = padded()
    loss, gradients = loss_and_gradients(model, batch)
    assert all(gradient is not None for gradient in gradients.values())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, checkpointed = loss_and_gradients(model, batch)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    recorded = loss_and_gradients(model, batch, output_hidden_states=True, use_cache=True)[0]
    torch.testing.assert_close(recorded, loss)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(loss_and_gradients(model, batch)[0], loss)


def test_gradient_checkpointing_leaves_generation_alone():
    model, ids = build("hybrid"), prompt()
    expected = greedy(model, ids, 6)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(greedy(model, ids, 6), expected)


def test_the_language_model_loss_is_cross_entropy_of_the_next_token():
    model = build("mamba")
    rows, batch = padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = model(**batch, labels=labels)
        sums = [
            torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:], reduction="sum")
            for row in rows
        ]
    torch.testing.assert_close(out.loss, (sum(sums) / (8 + 3 + 5)).to(out.loss.dtype))
    with torch.no_grad():
        whole = model(**batch, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(whole, (sum(sums) / 40).to(whole.dtype))


def test_sequence_classification_reads_the_last_real_token():
    rows, batch = padded()
    model = build("hybrid", torch.float64, HybridLMForSequenceClassification, num_labels=5, pad_token_id=0)
    with torch.no_grad():
        out = model(**batch, labels=torch.tensor([1, 4, 0]))
        for b, row in enumerate(rows):
            torch.testing.assert_close(out.logits[b], model(row[None]).logits[0])
        right = torch.stack([torch.cat([row, row.new_zeros(9 - len(row))]) for row in rows])
        torch.testing.assert_close(model(right).logits, out.logits)  # pads told by pad_token_id
        expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([1, 4, 0]))
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(("labels", "kind"), [(1, "regression"), (3, "multi_label_classification")])
def test_sequence_classification_losses(labels, kind):
    model = build("mamba", torch.float64, HybridLMForSequenceClassification, num_labels=labels)
    model.config.problem_type = kind
    target = torch.rand(2, labels, dtype=torch.float64)
    target = target[:, 0] if labels == 1 else (target > 0.5).double()
    out = model(prompt(2), labels=target)
    if labels == 1:
        expected = torch.nn.functional.mse_loss(out.logits[:, 0], target)
    else:
        expected = torch.nn.functional.binary_cross_entropy_with_logits(out.logits, target)
    torch.testing.assert_close(out.loss, expected)


def test_token_classification_ignores_pads():
    rows, batch = padded()
    model = build("hybrid", torch.float64, HybridLMForTokenClassification, num_labels=4)
    labels = (batch["input_ids"] % 4).masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        out = model(**batch, labels=labels)
        for b, row in enumerate(rows):
            torch.testing.assert_close(out.logits[b][batch["attention_mask"][b].bool()], model(row[None]).logits[0])
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected.to(out.loss.dtype))


def test_question_answering_scores_starts_and_ends():
    rows, batch = padded()
    model = build("hybrid", torch.float64, HybridLMForQuestionAnswering)
    start, end = torch.tensor([2, 5, 3]), torch.tensor([4, 8, 6])
    with torch.no_grad():
        out = model(**batch, start_positions=start, end_positions=end)
        for b, row in enumerate(rows):
            real = batch["attention_mask"][b].bool()
            torch.testing.assert_close(out.start_logits[b][real], model(row[None]).start_logits[0])
    entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(out.loss, (entropy(out.start_logits, start) + entropy(out.end_logits, end)) / 2)


@pytest.mark.parametrize(
    "head", [HybridLMForSequenceClassification, HybridLMForTokenClassification, HybridLMForQuestionAnswering]
)
def test_heads_hand_on_what_is_recorded(head):
    model = build("hybrid", torch.float64, head)
    with torch.no_grad():
        out = model(prompt(2), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5
    assert len(out.attentions) == 2


def test_the_parts_that_transformers_looks_for_are_there():
    model = shared("hybrid")
    assert model.supports_gradient_checkpointing
    assert set(model._no_split_modules) == {"HybridLMLayer"}
    assert model.get_decoder() is model.model
    assert model.can_generate()
    assert not model._is_stateful
    assert HybridLMModel(config_of("mamba")).get_input_embeddings().weight.shape == (48, 32)
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert model.get_memory_footprint() > 0


@pytest.mark.parametrize("stack", ["attention", "hybrid"])
def test_a_compiled_model_computes_and_trains_the_same(stack):
    model = build(stack, torch.float32).train()
    _, batch = padded()
    loss, gradients = loss_and_gradients(model, batch)
    gradients = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    again = compiled(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    again.backward()
    torch.testing.assert_close(again.detach(), loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)

"""Parameter groups, baselines, bits per byte, run files, checkpoints and what is written about a run."""

import errno
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from torch.utils.data import default_collate
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from hybridlm.data import PackedRows, build_byte_tokenizer
from hybridlm.presets import data_path
from hybridlm.training import (
    CheckpointError,
    HybridTrainer,
    WittenBell,
    build_model,
    evaluate_bits_per_byte,
    load_run_file,
    parameter_groups,
)
from hybridlm.training.curve import plot_loss_curve
from hybridlm.training.ngram import NUM_BYTES, START
from hybridlm.training.run_file import ModelOptions, training_arguments


def symbols(text, start=False):
    return np.array([START] * start + list(text.encode()))


def tiny_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, **sizes))


@pytest.fixture
def tokenizer():
    return build_byte_tokenizer()


# n-gram baselines


def test_witten_bell_equals_the_hand_count():
    model = WittenBell(1, [symbols("abac")])
    # order 0: 4 bytes, 3 kinds; P0(a) = (2 + 3/256) / 7, P0(b) = P0(c) = (1 + 3/256) / 7
    a, b = (2 + 3 / 256) / 7, (1 + 3 / 256) / 7
    # after a: b once, c once, 2 kinds; after b: a once, 1 kind; c was never followed by anything
    expected = [a, (1 + 2 * b) / 4, (1 + 1 * a) / 2, (0 + 2 * a) / 4]
    np.testing.assert_allclose(model.probabilities(symbols("abaa")), expected)
    np.testing.assert_allclose(model.probabilities(symbols("ca")), [b, a])
    bits = -np.log2([*expected, b, a]).sum() / 6
    assert model.bits_per_byte([symbols("abaa"), symbols("ca")]) == pytest.approx(bits)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_ngram_probabilities_sum_to_one_in_every_context(order):
    rng = np.random.default_rng(0)
    model = WittenBell(order, [rng.integers(0, 7, 200), np.array([START, 3, 1, 2])])
    for context in ([START], [1, 2, 3], [200, 3, 1], [START, 3], []):
        total = sum(model.probabilities(np.array([*context, byte]))[-1] for byte in range(NUM_BYTES))
        assert total == pytest.approx(1.0)


def test_ngram_context_does_not_reach_into_the_segment_before():
    apart = WittenBell(1, [symbols("ab"), symbols("cd")])
    joined = WittenBell(1, [symbols("abcd")])
    assert apart.probabilities(symbols("bc"))[1] < joined.probabilities(symbols("bc"))[1]


def test_document_start_is_a_context_and_never_a_prediction():
    model = WittenBell(1, [symbols("xa", start=True), symbols("xb", start=True)])
    probabilities = model.probabilities(symbols("xa", start=True))
    assert len(probabilities) == 2
    assert probabilities[0] > model.probabilities(symbols("x"))[0]


# bits per byte


def test_model_that_knows_nothing_needs_log2_of_the_vocabulary(tokenizer):
    model = tiny_llama()
    nn.init.zeros_(model.lm_head.weight)
    score = evaluate_bits_per_byte(model, ["some text", "zwölf", ""], tokenizer, length=4)
    assert score.bits_per_byte == pytest.approx(math.log2(258), rel=1e-6)
    assert (score.num_bytes, score.num_tokens, score.num_documents) == (15, 15, 2)


@pytest.mark.parametrize("length", [1, 3, 8, 100])
@pytest.mark.parametrize("batch_tokens", [1, 16, 10_000])
def test_every_byte_is_scored_once_whatever_the_windows_and_batches(tokenizer, length, batch_tokens):
    torch.manual_seed(0)
    model = tiny_llama().double()
    texts = ["a first document", "tiny", "another one, longer than the first of them"]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([256, *text.encode()])
        for first in range(0, len(ids) - 1, length):
            window = ids[first : first + length + 1]
            log_probabilities = model(window[None, :-1]).logits[0].log_softmax(-1)
            nats -= log_probabilities.gather(1, window[1:, None]).sum().item()
    score = evaluate_bits_per_byte(model, texts, tokenizer, length, batch_tokens)
    assert score.num_tokens == sum(map(len, texts))
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)


def test_bits_are_counted_per_byte_also_when_a_token_holds_several(tokenizer):
    vocabulary = {"<eos>": 0, "a": 1, "b": 2, "ab": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    pairs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    model = tiny_llama()
    nn.init.zeros_(model.lm_head.weight)
    score = evaluate_bits_per_byte(model, ["abab", "ba"], pairs, length=4)
    assert (score.num_tokens, score.num_bytes) == (4, 6)
    assert score.bits_per_byte == pytest.approx(math.log2(258) * 4 / 6)


def test_measuring_leaves_the_model_in_its_mode_and_needs_text(tokenizer):
    model = tiny_llama().train()
    evaluate_bits_per_byte(model, ["text"], tokenizer, length=8)
    assert model.training
    with pytest.raises(ValueError, match="no held-out text"):
        evaluate_bits_per_byte(model, [""], tokenizer, length=8)
    with pytest.raises(ValueError, match="evaluation.lengths: 0"):
        evaluate_bits_per_byte(model, ["text"], tokenizer, length=0)


# parameter groups


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(4, 2)
        self.in_proj = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.A_log = nn.Parameter(torch.zeros(2, 3))
        self.D = nn.Parameter(torch.zeros(2, 1))
        self.dt_bias = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_only_matrices_outside_recurrences_decay(decay_embeddings):
    model = Recurrent()
    decayed, rest = parameter_groups(model, 0.1, decay_embeddings)
    expected = {"in_proj.weight"} | ({"embed_tokens.weight"} if decay_embeddings else set())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in decayed["params"]} == expected
    assert {names[id(parameter)] for parameter in rest["params"]} == set(names.values()) - expected - {"frozen"}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


# run files

MINIMAL = {"output_dir": "out", "model": {"config": {"hidden_size": 16}}, "data": {"path": "stdlib"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dat": {}}, "dat: unknown key, did you mean 'data'"),
        ({"data": {"path": "x", "lenght": 8}}, r"data\.lenght: unknown key, did you mean 'length'"),
        ({"data": {"path": "x", "length": "8"}}, r"data\.length: expected int, got '8'"),
        ({"data": {"path": "x", "streaming": 1}}, r"data\.streaming: expected bool, got 1"),
        ({"data": {"length": 8}}, r"data\.path: missing"),
        ({"data": None}, "data: expected keys and values, got None"),
        ({"model": {}}, "model: give exactly one of `config` and `pretrained`"),
        ({"model": {"config": "a", "pretrained": "b"}}, "model: give exactly one"),
        ({"evaluation": {"lengths": [8, "9"]}}, r"evaluation\.lengths: expected list\[int\] or null"),
        ({"training": {"learnin_rate": 1.0}}, r"training\.learnin_rate: unknown key, did you mean 'learning_rate'"),
        ({"training": {"max_steps": "many"}}, r"training\.max_steps: expected int, got 'many'"),
        ({"training": {"learning_rate": "fast"}}, r"training\.learning_rate: expected float, got 'fast'"),
        ({"training": {"output_dir": "x"}}, r"training\.output_dir: unknown key"),
        ({"training": {"lr_scheduler_type": "wavy"}}, "training: wavy is not a valid"),
        ({"data": {"path": "x", "streaming": True}}, r"training\.max_steps: must be given"),
    ],
)
def test_wrong_run_file_is_an_error_that_names_the_place(changes, message):
    with pytest.raises(ValueError, match=message):
        load_run_file(MINIMAL | changes)


def test_run_file_is_read_with_overrides_and_numbers_without_a_dot(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("output_dir: out\nmodel: {config: {}}\ndata: {path: stdlib}\ntraining: {learning_rate: 3e-3}\n")
    run_file = load_run_file(path, ["training.max_steps=7", "data.length=32", "evaluation.lengths=[8]"])
    arguments = training_arguments(run_file)
    assert (arguments.learning_rate, arguments.max_steps) == (3e-3, 7)
    assert (run_file.data.length, run_file.evaluation.lengths) == (32, [8])
    with pytest.raises(ValueError, match="expected path=value"):
        load_run_file(path, ["training.max_steps"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.config.foo=3", r"model\.config\.foo: model\.config is 'tiny_jamba', .* model\.config=PATH"),
        ("model.config.norm.eps=3", r"model\.config\.norm\.eps: model\.config is 'tiny_jamba', .* model\.config=PATH"),
        ("data.length.x=3", r"data\.length\.x: data\.length is 128, which has no settings inside$"),
    ],
)
def test_a_field_of_what_is_no_dictionary_cannot_be_replaced(override, message):
    with pytest.raises(ValueError, match=message):
        load_run_file("smoke", [override])
    assert load_run_file("smoke", ["model.config=tiny_llama"]).model.config == "tiny_llama"


@pytest.mark.parametrize("path", sorted(data_path("configs", "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_of_the_package_is_valid_and_its_model_builds(path, tokenizer):
    run_file = load_run_file(path.stem)
    with torch.device("meta"):
        model = build_model(run_file.model, tokenizer)
    assert model.num_parameters() < 3_000_000


def test_run_file_that_does_not_exist_or_is_not_yaml_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_run"):
        load_run_file("no_such_run")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"a\.yaml: not YAML"):
        load_run_file(tmp_path / "a.yaml")


def test_bfloat16_follows_the_device_unless_the_run_file_says(monkeypatch):
    assert training_arguments(load_run_file(MINIMAL)).bf16 == torch.cuda.is_available()
    assert training_arguments(load_run_file(MINIMAL | {"training": {"bf16": True, "use_cpu": True}})).bf16


def test_schedule_is_warm_up_then_cosine_to_a_tenth():
    arguments = training_arguments(load_run_file(MINIMAL | {"training": {"max_steps": 100, "use_cpu": True}}))
    trainer = HybridTrainer(model=tiny_llama(), args=arguments)
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[:6] == pytest.approx([0.0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert all(before >= after for before, after in zip(rates[5:], rates[6:], strict=False))
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-4)


def test_vocabulary_smaller_than_the_tokenizer_is_refused(tokenizer):
    config = {"model_type": "llama", "vocab_size": 100, "hidden_size": 16, "num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"model\.config\.vocab_size: 100 token ids are fewer"):
        build_model(ModelOptions(config=config), tokenizer)


# the trainer


class Recorded(PackedRows):
    """Packed rows that remember which were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def make_trainer(output_dir, data=None, eval_data=None, **arguments):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
    settings |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "remove_unused_columns": False}
    if data is None:
        data = Recorded([np.random.default_rng(0).integers(0, 256, 23 * 8)], 8)
    torch.manual_seed(0)
    args = TrainingArguments(output_dir=str(output_dir), **(settings | arguments))
    parts = {"train_dataset": data, "eval_dataset": eval_data, "data_collator": default_collate}
    return HybridTrainer(model=tiny_llama(), args=args, **parts)


@pytest.mark.parametrize(("steps", "accumulation"), [(3, 1), (3, 2), (15, 1), (13, 3)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_seen_are_those_that_training_read(tmp_path, steps, accumulation, drop_last):
    arguments = {"gradient_accumulation_steps": accumulation, "dataloader_drop_last": drop_last}
    trainer = make_trainer(tmp_path, max_steps=steps, **arguments)
    trained_on = set()
    training_step = trainer.training_step

    def record(model, inputs, *rest):
        rows = {tuple(row["input_ids"].tolist()): index for index, row in enumerate(trainer.train_dataset)}
        trained_on.update(rows[tuple(row.tolist())] for row in inputs["input_ids"])
        return training_step(model, inputs, *rest)

    trainer.training_step = record
    trainer.train()
    assert trainer.rows_seen() == sorted(trained_on)


def test_every_epoch_has_its_own_order(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=24, per_device_train_batch_size=2)
    trainer.train()
    read = trainer.train_dataset.read
    assert sorted(read[:23]) == sorted(read[23:46]) == list(range(23))
    assert read[:23] != read[23:46]


def test_selection_bias_moves_once_per_optimizer_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("hybridlm.training.callbacks.update_selection_bias", calls.append)
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=3)
    trainer.train()
    assert calls == [trainer.model] * 4


def test_records_carry_bits_per_byte_and_speed(tmp_path):
    data = Recorded([np.random.default_rng(0).integers(0, 256, 23 * 8)], 8)
    data.counts.num_bytes, data.counts.num_text_tokens = 300, 100
    make_trainer(tmp_path, data).train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2) / 3)
        assert record["tokens_per_second"] > 0


def test_the_trainer_takes_what_trainer_takes(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    trainer = HybridTrainer(tiny_llama(), args, train_dataset=rows)
    assert trainer.train().global_step == 1
    assert HybridTrainer(tiny_llama(), args, default_collate).data_collator is default_collate


@pytest.mark.parametrize("configured", [True, False])
def test_without_a_bar_a_line_a_record_tells_the_loss(tmp_path, caplog, capsys, monkeypatch, configured):
    caplog.set_level("INFO", logger="hybridlm.training.callbacks")
    if not configured:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
    make_trainer(tmp_path, max_steps=2).train()
    said = [record.message for record in caplog.records] if configured else capsys.readouterr().err.splitlines()
    for step in (1, 2):
        assert [line for line in said if line.startswith(f"step {step}: loss ")], said


def fill_disk(monkeypatch, name):
    """Make writing of one kind of file fail as on a full disk, after some bytes."""

    def full(content, path, *rest, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(name, full)


@pytest.mark.parametrize("write", ["transformers.trainer.torch.save", "transformers.modeling_utils.safe_save_file"])
def test_full_disk_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch, write):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    fill_disk(monkeypatch, write)
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    message = r"checkpoint-4 could not be written: .*No space left.*last whole checkpoint is .*checkpoint-2"
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == whole
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "metrics.jsonl"}


def test_half_a_checkpoint_of_a_killed_process_is_not_resumed_from(tmp_path):
    half = tmp_path / ".checkpoint-4.partial" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text("{")
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "metrics.jsonl"}


def test_best_checkpoint_is_remembered_where_it_ends_up(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    data = Recorded([np.random.default_rng(0).integers(0, 256, 23 * 8)], 8)
    arguments |= {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, data, data, **arguments)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"] == best


# what is written about a run


def test_loss_curve_is_a_picture_and_says_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    history = [{"step": step, "loss": 3.0 / step, "bits_per_byte": 4.0 / step} for step in range(1, 9)]
    plot_loss_curve(history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hybridlm\[plot\]'"):
        plot_loss_curve(history, tmp_path / "other.png")

"""The plain Trainer of transformers trains, evaluates, checkpoints and resumes all five heads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from stacks import build, config_of, prompt
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import hybridlm
from hybridlm import HybridLMForCausalLM
from hybridlm.modeling.remote_code import AUTO_CLASSES

CODE = {path.name for path in Path(hybridlm.__file__).parent.glob("modeling/*.py")} - {"__init__.py"}


def arguments(folder, **options):
    defaults = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"},
        **{"lr_scheduler_type": "constant", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 3},
        **{"save_strategy": "no", "dataloader_pin_memory": False},
    }
    return TrainingArguments(**defaults | options)


class Rows(torch.utils.data.Dataset):
    """Rows that count up by a step of their own; a pad and a mask where they are shorter."""

    def __init__(self, size, length=12, head="AutoModelForCausalLM"):
        self.size, self.length, self.head = size, length, head

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        step, start, count = 1 + i % 3, 2 + i % 7, self.length - i % 4
        ids = torch.zeros(self.length, dtype=torch.long)
        ids[:count] = 2 + (start + step * torch.arange(count)) % 40
        row = {"input_ids": ids, "attention_mask": (torch.arange(self.length) < count).long()}
        if self.head == "AutoModelForCausalLM":
            return row | {"labels": ids.masked_fill(row["attention_mask"] == 0, -100)}
        if self.head == "AutoModelForSequenceClassification":
            return row | {"labels": torch.tensor(step - 1)}
        if self.head == "AutoModelForTokenClassification":
            return row | {"labels": (ids % 3).masked_fill(row["attention_mask"] == 0, -100)}
        return row | {"start_positions": torch.tensor(1), "end_positions": torch.tensor(count - 1)}


def losses_of(trainer):
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.parametrize("head", [name for name in AUTO_CLASSES if name != "AutoModel"])
def test_each_head_trains_evaluates_and_ships_its_code(head, tmp_path):
    model = build("hybrid", torch.float32, getattr(hybridlm, AUTO_CLASSES[head]), num_labels=3, initializer_range=0.1)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=12, per_device_eval_batch_size=3),
        train_dataset=Rows(48, head=head),
        eval_dataset=Rows(7, head=head),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    result = trainer.predict(trainer.eval_dataset)
    predictions = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    assert len(predictions) == 7  # of uneven batches, without the cache and the router logits
    checkpoint = tmp_path / "checkpoint-12"
    assert {path.name for path in checkpoint.iterdir()} >= CODE | {"config.json", "model.safetensors"}
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *AUTO_CLASSES}
    assert config["architectures"] == [AUTO_CLASSES[head]]
    loaded = getattr(transformers, head).from_pretrained(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert all(getattr(hybridlm, name)._auto_class is None for name in AUTO_CLASSES.values())


def test_the_bare_stack_trains_with_a_loss_of_the_users_and_ships_its_code(tmp_path):
    class StackTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(inputs["input_ids"], inputs["attention_mask"])
            loss = out.last_hidden_state.square().mean()
            return (loss, out) if return_outputs else loss

    model = hybridlm.HybridLMModel(config_of("hybrid"))
    trainer = StackTrainer(
        model=model, args=arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), train_dataset=Rows(8)
    )
    trainer.train()
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} >= CODE
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "checkpoint-2")) is hybridlm.HybridLMModel


def train(folder, data=None, resume=None, collator=None, **options):
    torch.manual_seed(0)
    model = HybridLMForCausalLM(config_of("hybrid", initializer_range=0.1))
    trainer = Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=Rows(64) if data is None else data,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = train(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    again = train(tmp_path / "again", resume=str(tmp_path / "again" / "checkpoint-3"), **options)
    assert losses_of(again)[-3:] == losses_of(whole)[-3:]
    weights = [load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_gradient_accumulation_changes_nothing(tmp_path):
    options = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0}
    whole = train(tmp_path, per_device_train_batch_size=8, **options)
    parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    torch.testing.assert_close(losses_of(parts), losses_of(whole), rtol=1e-4, atol=1e-4)
    for (name, mine), expected in zip(parts.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_flattened_batches_train_like_padded_ones(tmp_path):
    def trimmed(i):
        row = Rows(64)[i]
        count = int(row["attention_mask"].sum())
        return {"input_ids": row["input_ids"][:count].tolist()}

    options = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0}
    padded = train(tmp_path, **options)
    data = [trimmed(i) for i in range(64)]
    for extra in ({}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True}):
        packed = train(tmp_path, data, collator=DataCollatorWithFlattening(**extra), **options)
        torch.testing.assert_close(losses_of(packed), losses_of(padded), rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_trains_the_same(tmp_path):
    options = {"max_steps": 3, "optim": "sgd"}
    plain = train(tmp_path, **options)
    checkpointed = train(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **options,
    )
    torch.testing.assert_close(losses_of(checkpointed), losses_of(plain), rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast_trains(tmp_path):
    trainer = train(tmp_path, max_steps=8, bf16=True)
    losses = losses_of(trainer)
    assert sum(losses[-2:]) < sum(losses[:2])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_evaluation_hands_logits_to_the_metrics(tmp_path):
    trainer = Trainer(
        model=build("hybrid", torch.float32),
        args=arguments(tmp_path, per_device_eval_batch_size=2),
        eval_dataset=Rows(6, length=8),
        compute_metrics=lambda out: {"right": float((out.predictions.argmax(-1) == out.label_ids).mean())},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["eval_right"] <= 1


def test_a_loop_of_accelerate_trains_too():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = HybridLMForCausalLM(config_of("hybrid", initializer_range=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(Rows(32), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(model(prompt()).logits).all()

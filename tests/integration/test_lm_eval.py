"""lm-eval gives every document the score that `hybridlm eval` gives it."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lookup_model import LookupConfig, LookupForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM

from hybridlm import HybridLMForCausalLM, presets
from hybridlm.data import build_byte_tokenizer
from hybridlm.evaluation import make_documents, model_logits, score_rows, text_tasks

TASKS = Path(__file__).resolve().parents[2] / "eval" / "tasks"
MODELS = {
    "ours": lambda: HybridLMForCausalLM(presets.load_config("tiny_jamba")),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ),
    "solves": lambda: LookupForCausalLM(LookupConfig()),
}


class _Loader(yaml.SafeLoader):
    """Reads `!function` as its text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read(path):
    return yaml.load(path.read_text(), Loader=_Loader)


@pytest.mark.parametrize("suite", ["recall", "ruler", "babi"])
def test_every_task_of_a_suite_has_its_file_and_its_place_in_the_group(suite):
    names = list(text_tasks(suite))
    assert read(TASKS / f"hybridlm_{suite}.yaml") == {
        "group": f"hybridlm_{suite}",
        "task": [f"hybridlm_{name}" for name in names],
    }
    for name in names:
        task = read(TASKS / f"hybridlm_{name}.yaml")
        assert task == {"task": f"hybridlm_{name}", "include": "_documents.yaml", "dataset_kwargs": {"task": name}}


def test_documents_for_lm_eval_are_those_of_the_suites(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TASKS)
    import hybridlm_documents

    build_byte_tokenizer().save_pretrained(tmp_path)
    made = hybridlm_documents.build("babi_qa2", pretrained=str(tmp_path), lengths=[300, 400], samples=3, version=1)
    tokenizer, task = build_byte_tokenizer(), text_tasks("babi")["babi_qa2"]
    expected = [d.text for length in (300, 400) for d in make_documents(task, tokenizer, length, 3, seed=0)]
    assert [(row["context"], row["answer"]) for row in made["test"]] == [
        (text.context, text.answer) for text in expected
    ]
    with pytest.raises(ValueError, match="tokenizer: lengths are counted in the model's tokens"):
        hybridlm_documents.build("babi_qa2")
    with pytest.raises(ValueError, match="questions"):
        hybridlm_documents.build("questions", pretrained=str(tmp_path))
    sys.modules.pop("hybridlm_documents")


@pytest.mark.parametrize("name", MODELS)
def test_lm_eval_scores_each_document_alike(name, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'hybridlm[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = ("babi_qa1", "passkey", "mqar", "niah_multivalue", "common_words", "phonebook")
    lengths, samples = [400, 480], 4
    torch.manual_seed(0)
    model, tokenizer = MODELS[name]().eval(), build_byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    metadata = {"tokenizer": str(tmp_path), "lengths": lengths, "samples": samples, "seed": 1}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, batch_size=3, device="cpu")
    theirs = simple_evaluate(
        wrapped, tasks=[f"hybridlm_{task}" for task in tasks], task_manager=manager, log_samples=True, bootstrap_iters=0
    )["samples"]
    right = 0
    for task in tasks:
        ours = []
        for length in lengths:
            documents = make_documents(text_tasks("all")[task], tokenizer, length, samples, seed=1)
            ours += score_rows(model_logits(model), [(d.ids, d.labels) for d in documents], 258)
        samples_of = sorted(theirs[f"hybridlm_{task}"], key=lambda sample: sample["doc_id"])
        assert [sample["acc"] for sample in samples_of] == [float(score.exact) for score in ours]
        for sample, score in zip(samples_of, ours, strict=True):
            assert sample["log_likelihood"] == pytest.approx(score.log_likelihood, abs=1e-4)
        right += sum(score.exact for score in ours)
    assert (right > 10) == (name == "solves")

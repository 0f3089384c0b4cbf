"""`pipeline("text-generation")` and chat, with the built-in byte tokenizer."""

import pytest
import torch
from stacks import build, greedy
from transformers import AutoTokenizer, pipeline

from hybridlm.data.tokenizer import build_byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    tokenizer = build_byte_tokenizer()
    build("hybrid", torch.float32, vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_text_generation_is_generate(folder):
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(generator.model).__module__ == "hybridlm.modeling.modeling_hybridlm"
    text = generator("ab", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("ab", return_tensors="pt").input_ids
    expected = tokenizer.decode(greedy(generator.model, ids, 5)[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == expected


def test_a_batch_of_prompts_is_padded_on_the_left(folder):
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert generator.tokenizer.padding_side == "left"
    options = {"max_new_tokens": 5, "do_sample": False}
    prompts = ["abcdef", "x", "hello"]
    together = generator(prompts, batch_size=3, **options)
    assert together == [generator(one, **options) for one in prompts]


def test_assisted_generation_through_the_pipeline(folder):
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert generator("abab", prompt_lookup_num_tokens=2, **options) == generator("abab", **options)

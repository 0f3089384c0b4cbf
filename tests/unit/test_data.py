"""Documents, the byte tokenizer, and packed rows."""

import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorWithFlattening, PreTrainedTokenizerFast

from hybridlm.data import (
    Framer,
    PackedRows,
    PackedStream,
    build_byte_tokenizer,
    load_documents,
    load_tokenizer,
    pack_documents,
    row_fields,
)
from hybridlm.data.documents import is_heldout, stdlib_files

TEXTS = ["one", "a longer document, which crosses the end of a row", "", "zwölf", "x", "the last of them"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows_of(texts):
    return [{"text": text} for text in texts]


# the byte tokenizer


@given(st.text())
def test_byte_tokenizer_ids_are_the_utf8_bytes_and_come_back_as_the_text(text):
    tokenizer = build_byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text


def test_byte_tokenizer_reads_its_own_special_tokens_as_plain_text(tokenizer):
    assert tokenizer("<eos><pad>")["input_ids"] == list(b"<eos><pad>")
    assert tokenizer.decode([104, 105, 256], skip_special_tokens=True) == "hi"


def test_saved_byte_tokenizer_loads_as_an_ordinary_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "größer <eos> 's \n\t"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id, len(loaded)) == (256, 256, 257, 258)


def test_tokenizer_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: 'no/such/place'"):
        load_tokenizer("no/such/place")
    with pytest.raises(ValueError, match="a folder without a readable tokenizer"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_an_end_token_is_refused(tokenizer, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(str(tmp_path))


# packing


def test_packed_row_has_the_fields_of_the_flattening_collator():
    documents = [[5, 6, 7], [8], [9, 10]]
    collator = DataCollatorWithFlattening(return_position_ids=True, return_seq_idx=True)
    expected = collator([{"input_ids": ids} for ids in documents])
    fields = row_fields(np.array(sum(documents, [])), np.array([True, False, False, True, True, False]))
    for name in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert torch.equal(fields[name], expected[name][0]), name
        assert fields[name].dtype == expected[name].dtype, name


@pytest.mark.parametrize("length", [2, 7, 16, 61])
def test_no_token_is_lost_between_documents_and_rows(tokenizer, length):
    packed = pack_documents(rows_of(TEXTS), tokenizer, length)
    framed = np.concatenate(Framer(tokenizer).encode([text for text in TEXTS if text]))
    kept = torch.cat([row["input_ids"] for row in packed]).numpy()
    dropped = packed.counts.num_dropped_tokens
    np.testing.assert_array_equal(kept, framed[: len(framed) - dropped])
    assert dropped == len(framed) % length
    assert packed.counts.num_empty_documents == 3
    assert packed.counts.num_bytes == len("".join(TEXTS).encode()) == packed.counts.num_text_tokens


def test_document_that_crosses_rows_goes_on_as_a_document_of_its_own():
    row = PackedRows([np.arange(10), np.arange(20, 23)], length=6)[1]  # the end of the first, then the second
    assert row["input_ids"].tolist() == [6, 7, 8, 9, 20, 21]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    assert row["seq_idx"].tolist() == [0, 0, 0, 0, 1, 1]
    assert row["labels"].tolist() == [-100, 7, 8, 9, -100, 21]


def test_stream_gives_the_same_rows_as_packing_everything_first(tokenizer):
    packed = list(pack_documents(rows_of(TEXTS), tokenizer, 16))
    stream = PackedStream(rows_of(TEXTS), tokenizer, 16)
    streamed = list(stream)
    assert len(streamed) == len(packed)
    for one, other in zip(streamed, packed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert stream.counts == pack_documents(rows_of(TEXTS), tokenizer, 16).counts


@pytest.mark.parametrize("shuffled", [False, True])
def test_stream_goes_on_exactly_after_any_row(tokenizer, shuffled):
    def make():
        documents = datasets.Dataset.from_list(rows_of(TEXTS)).to_iterable_dataset()
        if shuffled:
            documents = documents.shuffle(seed=3, buffer_size=4)
        return PackedStream(documents, tokenizer, 16, repeat=True)

    def take(stream, number):
        iterator = iter(stream)
        return [next(iterator)["input_ids"].tolist() for _ in range(number)]

    straight = take(make(), 60)  # more than three passes over the documents
    for stop in (0, 1, 2, 17, 41):
        first = make()
        before = take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        second = make()
        second.load_state_dict(state)
        assert before + take(second, 60 - stop) == straight


def test_repeated_stream_carries_the_rest_of_a_pass_into_the_next(tokenizer):
    stream = iter(PackedStream(rows_of(["abc"]), tokenizer, 4, repeat=True))  # 5 tokens a pass
    tokens = torch.cat([next(stream)["input_ids"] for _ in range(5)]).tolist()
    assert tokens == [256, *b"abc", 256] * 4


def test_endless_stream_of_nothing_ends(tokenizer):
    assert list(PackedStream([], tokenizer, 4, repeat=True)) == []


def test_row_of_one_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="data.length=1"):
        pack_documents(rows_of(TEXTS), tokenizer, 1)


# documents


def test_standard_library_is_found_without_tests_and_in_one_order():
    files = stdlib_files()
    assert files == stdlib_files()
    assert {"argparse.py", "abc.py"} <= {path.name for path in files}
    assert not {"test", "tests", "site-packages"} & {part for path in files for part in path.parts}


def test_standard_library_documents_are_split_by_hash_and_never_shared(tmp_path, monkeypatch):
    for name in ("a.py", "b/c.py", "b/tests/t.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\r\n")
    (tmp_path / "latin.py").write_bytes(b"# \xff\n")
    monkeypatch.setattr("hybridlm.data.documents.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = load_documents("stdlib", heldout_modulus=2)
    train, heldout = documents.train["text"], documents.heldout["text"]
    assert sorted([*train, *heldout]) == ["# a.py\r\n", "# b/c.py\r\n"]
    assert all(is_heldout(text, 2) for text in heldout)
    assert not any(is_heldout(text, 2) for text in train)
    assert documents.num_skipped == 1
    before = documents.manifest_hash
    (tmp_path / "a.py").write_text("# changed\n")
    assert load_documents("stdlib").manifest_hash != before


def write_jsonl(folder, texts):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(folder, texts):
    datasets.Dataset.from_list(rows_of(texts)).to_parquet(folder / "a.parquet")


def write_text(folder, texts):
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_text(text)


def write_disk(folder, texts):
    datasets.Dataset.from_list(rows_of(texts)).save_to_disk(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_text, write_disk])
def test_every_local_format_gives_the_same_documents(write, streaming, tmp_path):
    texts = [f"document {index}\nwith two lines" for index in range(12)]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, texts)
    documents = load_documents(str(folder), streaming=streaming, heldout_modulus=3)
    train, heldout = ([row["text"] for row in part] for part in (documents.train, documents.heldout))
    assert train == [text for text in texts if not is_heldout(text, 3)]
    assert heldout == [text for text in texts if is_heldout(text, 3)]
    assert train
    assert heldout


def test_another_text_column_can_be_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "hello", "text": "no"}\n')
    documents = load_documents(str(path), text_column="body", heldout_modulus=0)
    assert documents.train["text"] == ["hello"]
    assert documents.heldout is None
    with pytest.raises(ValueError, match="data.text_column: .* has no column 'boddy'"):
        load_documents(str(path), text_column="boddy")


@pytest.mark.parametrize("path", ["no/such/folder/here", "./missing", "missing.jsonl", "no-such-owner/no-such-data"])
def test_data_path_that_does_not_exist_is_an_error_that_names_it(path):
    with pytest.raises(ValueError, match=r"data\.path: .* does not exist"):
        load_documents(path)


def test_folder_of_several_kinds_of_files_is_refused(tmp_path):
    write_jsonl(tmp_path, ["a"])
    write_text(tmp_path, ["b"])
    with pytest.raises(ValueError, match=r"data\.path: .* files of one kind"):
        load_documents(str(tmp_path))


def test_broken_file_is_an_error_that_names_the_path(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"data\.path: .*a.parquet"):
        load_documents(str(tmp_path / "a.parquet"))


def test_heldout_modulus_of_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.heldout_modulus=1"):
        load_documents("stdlib", heldout_modulus=1)

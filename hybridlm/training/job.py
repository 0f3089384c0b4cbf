"""One run: read the run file, train, measure, publish."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from hybridlm.analysis.span_rules import check_top_k
from hybridlm.data import Documents, PackedRows, PackedStream, load_documents, load_tokenizer, pack_documents
from hybridlm.data.documents import STDLIB, text_hash
from hybridlm.data.tokenizer import BYTE_TOKENIZER
from hybridlm.evaluation.runner import write_whole
from hybridlm.hub.cards import CURVE as CURVE_FILE
from hybridlm.hub.folder import remove_card
from hybridlm.hub.folders import read_config
from hybridlm.hub.prune import prune_code
from hybridlm.presets import find_config

from .curve import plot_loss_curve
from .measure import describe_run, measure_heldout, shared_line_fraction, unmet_demands
from .publish import check_publish, check_reload, finish_folder, save_hub_folder
from .run_file import ModelOptions, RunFile, load_run_file, training_arguments
from .trainer import HybridTrainer

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
DATA_FILE = "data.json"
PROBE_TOKENS = 256


def run(
    source: str | Path | dict[str, Any], *, resume: bool = False, overrides: list[str] | None = None
) -> dict[str, Any]:
    """Train a model as a run file says, measure it on held-out text, and write everything to its `output_dir`.

    Args:
        source: Path, name or content of a run file.
        resume: Go on from the last checkpoint in `output_dir`.
        overrides: Settings that replace the file's, such as `training.max_steps=5`.

    Returns:
        What was measured, as in `results.json`; `failures` names every demand of the run file that was not met. On
        processes other than the first, an empty dict.

    Raises:
        FileNotFoundError: There is no such run file or config.
        ValueError: The run file or the data is wrong, or evaluation was asked for and nothing is held out; with the
            field's name.
        CheckpointError: A checkpoint could not be written.
    """
    started = time.perf_counter()
    run_file = load_run_file(source, overrides)
    args = training_arguments(run_file)
    output_dir = Path(run_file.output_dir)
    with args.main_process_first(desc="looking for earlier checkpoints"):
        _check_output_dir(output_dir, resume, run_file.overwrite)
    tokenizer = load_tokenizer(run_file.tokenizer)
    _check_ngrams(run_file)
    check_publish(run_file)
    with args.main_process_first(desc="reading the data"):
        documents, train_data, heldout = _prepare_data(run_file, tokenizer, args.seed)
    _check_same_data(output_dir, documents, resume, args.should_save)
    set_seed(args.seed)
    model = build_model(run_file.model, tokenizer)
    if run_file.evaluation.leaky_top_k:
        check_top_k(model, "evaluation.leaky_top_k")
    if not resume:  # nothing can be refused any more
        with args.main_process_first(desc="removing earlier checkpoints"):
            _remove_checkpoints(output_dir)
    evaluated = args.eval_strategy != "no"
    trainer = HybridTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=pack_documents(({"text": text} for text in heldout), tokenizer, run_file.data.length)
        if evaluated
        else None,
        processing_class=tokenizer,
        data_collator=default_collate,
        decay_embeddings=run_file.decay_embeddings,
    )
    outcome = trainer.train(resume_from_checkpoint=resume)
    if not trainer.is_world_process_zero():
        return {}
    results = describe_run(run_file, trainer, documents, train_data, outcome.metrics["train_runtime"])
    results |= measure_heldout(run_file, trainer, tokenizer, train_data, heldout)
    if heldout and run_file.data.path == STDLIB:
        results["shared_lines"] = shared_line_fraction(documents, heldout)
    _write_results(output_dir, results)  # should the folder not be saved
    results |= _save_folder(run_file, trainer, tokenizer, heldout)
    results["failures"] = unmet_demands(run_file, results)
    _write_results(output_dir, results)  # should the card not be written
    finish_folder(run_file, trainer.accelerator.unwrap_model(trainer.model), results)
    results["seconds"] = time.perf_counter() - started
    _write_results(output_dir, results)
    return results


def _write_results(output_dir: Path, results: dict[str, Any]) -> None:
    write_whole(output_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")


def build_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build the causal language model of a run: random from a config, or from pretrained weights.

    Raises:
        ValueError: The config does not fit the tokenizer.
    """
    if options.pretrained is not None:
        model = AutoModelForCausalLM.from_pretrained(
            options.pretrained, trust_remote_code=options.trust_remote_code, dtype=torch.float32
        )
        _check_vocabulary(model.config.vocab_size, tokenizer, "model.pretrained")
        return model
    fields = options.config
    if isinstance(fields, str):
        path = find_config(fields)
        fields = json.loads(path.read_text(encoding="utf-8"))
    fields = {"model_type": "hybridlm", "vocab_size": len(tokenizer)} | dict(fields)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = getattr(tokenizer, name)
    _check_vocabulary(fields["vocab_size"], tokenizer, "model.config.vocab_size")
    try:
        config = AutoConfig.for_model(**fields)
        return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"model.config.{error}") from error


def _check_vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    if vocab_size < len(tokenizer):
        raise ValueError(f"{where}: {vocab_size} token ids are fewer than the tokenizer's {len(tokenizer)}")


def _check_output_dir(output_dir: Path, resume: bool, overwrite: bool) -> None:
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if resume and last is None:
        raise ValueError(f"output_dir: {str(output_dir)!r} holds no checkpoint to resume from")
    if last is None or resume:
        return
    if not overwrite:
        raise ValueError(
            f"output_dir: {last!r} is of an earlier run; resume it, set overwrite to true, or name another folder"
        )


def _remove_checkpoints(output_dir: Path) -> None:
    for checkpoint in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)


def _check_same_data(output_dir: Path, documents: Documents, resume: bool, should_save: bool) -> None:
    """A resumed run must go on with the documents it began with."""
    path = output_dir / DATA_FILE
    if resume and path.exists():
        before = json.loads(path.read_text())["manifest_hash"]
        if before != documents.manifest_hash:
            raise ValueError(f"data.path: the documents are not those the run began with (manifest {before})")
    elif should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"manifest_hash": documents.manifest_hash}) + "\n")


def _check_ngrams(run_file: RunFile) -> None:
    options = run_file.evaluation
    if options.ngram_orders and (run_file.tokenizer != BYTE_TOKENIZER or run_file.data.streaming):
        raise ValueError("evaluation.ngram_orders: needs `tokenizer: byte` and data.streaming false")
    if options.below_ngram_order is not None and options.below_ngram_order not in options.ngram_orders:
        raise ValueError(f"evaluation.below_ngram_order: {options.below_ngram_order} is not among ngram_orders")


def _prepare_data(
    run_file: RunFile, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Documents, PackedRows | PackedStream, list[str]]:
    options = run_file.data
    documents = load_documents(
        options.path,
        name=options.name,
        split=options.split,
        text_column=options.text_column,
        streaming=options.streaming,
        heldout_modulus=options.heldout_modulus,
    )
    if options.streaming:
        train = documents.train
        if options.shuffle_buffer:
            train = train.shuffle(seed=seed, buffer_size=options.shuffle_buffer)
        data = PackedStream(train, tokenizer, options.length, repeat=True)
    else:
        data = pack_documents(documents.train, tokenizer, options.length)
        logger.info("packed %s", data.counts)
        if not len(data):
            raise ValueError(
                f"data.length: {options.length} tokens are more than the {data.counts.num_tokens} of all documents"
            )
    heldout = _heldout_texts(run_file, documents)
    if not heldout:
        _check_nothing_held_out(run_file)
    return documents, data, heldout


def _check_nothing_held_out(run_file: RunFile) -> None:
    """Refuse what asks for held-out text where there is none, and say once that the default evaluation is left out."""
    options, modulus = run_file.evaluation, run_file.data.heldout_modulus
    if options.lengths == []:
        why, remedy = "evaluation.lengths is empty", "name lengths"
    elif modulus == 0:
        why, remedy = "data.heldout_modulus is 0, so no document is held out", "hold documents out"
    else:
        why = f"no document is held out: data.heldout_modulus={modulus} takes about one document in {modulus}"
        remedy = "give more documents, a smaller data.heldout_modulus"
    asked = [
        *(["evaluation.lengths"] if options.lengths else []),
        *(["evaluation.ngram_orders"] if options.ngram_orders else []),
        *(["evaluation.below_ngram_order"] if options.below_ngram_order is not None else []),
        *(["evaluation.leaky_top_k"] if options.leaky_top_k else []),
        *(["training.eval_strategy"] if training_arguments(run_file).eval_strategy != "no" else []),
    ]
    if asked:
        raise ValueError(
            f"{asked[0]}: there is nothing to measure on, {why}; {remedy}, or leave out {' and '.join(asked)}"
        )
    if options.lengths is None:
        logger.warning("%s; nothing will be measured on held-out text", why)


def _heldout_texts(run_file: RunFile, documents: Documents) -> list[str]:
    """The held-out texts that are measured: in the order of their hashes, up to the allowed size."""
    if documents.heldout is None or run_file.evaluation.lengths == []:
        return []
    limit = run_file.evaluation.max_bytes
    if run_file.data.streaming and limit is None:
        raise ValueError("evaluation.max_bytes: must be given when data.streaming is true, or set lengths to []")
    texts = (row["text"] for row in documents.heldout if row["text"])
    if not run_file.data.streaming:
        texts = sorted(texts, key=text_hash)
    chosen, num_bytes = [], 0
    for text in texts:
        num_bytes += len(text.encode())
        if limit is not None and chosen and num_bytes > limit:
            break
        chosen.append(text)
    return chosen


def _save_folder(
    run_file: RunFile, trainer: HybridTrainer, tokenizer: PreTrainedTokenizerBase, heldout: list[str]
) -> dict[str, Any]:
    """Save the model's folder, all but its card, and check it if the run file asks for that."""
    options, folder = run_file.publish, Path(run_file.output_dir) / "model"
    model = trainer.accelerator.unwrap_model(trainer.model)
    remove_card(folder)
    save_hub_folder(model, tokenizer, folder)
    prune_code(folder, read_config(folder))
    published: dict[str, Any] = {"folder": os.fspath(folder), "curve": None}
    try:
        plot_loss_curve(trainer.state.log_history, folder / CURVE_FILE, options.name)
        published["curve"] = CURVE_FILE
    except ImportError as error:
        logger.warning("%s; no curve was drawn", error)
    if options.check_reload:
        text = heldout[0] if heldout else options.prompt or "hybridlm"
        input_ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]])
        published["reload"] = check_reload(folder, model, input_ids, options.prompt, options.max_new_tokens)
    return published

"""Model cards, rendered from stored files and nothing else.

Numbers reach the template as places in those files, see `figures.py`, and what was printed is read again: a card with a
digit that came from nowhere is not written. The list of its figures is stored with it, so that anyone can check it.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jinja2
from huggingface_hub.utils import yaml_dump

from hybridlm.presets import data_path

from .card_text import check_metadata, leaves, split_card, unbacked_metadata
from .facts import is_preset_source
from .figures import FORMS, CardError, Figure, Source, View, has_digit, pointer_of, unbacked, walk

TEMPLATE = "model_card.md.jinja"
RESULTS = "results"
LEDGER = f"{RESULTS}/card.json"
CONFIG, FACTS, PLAN = "config.json", f"{RESULTS}/facts.json", f"{RESULTS}/plan.json"
TRAINING, RUN_FILE = f"{RESULTS}/training.json", f"{RESULTS}/run.yaml"
CURVE = "loss_curve.png"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Bundle:
    """All that a card is rendered from.

    Attributes:
        name: Of the model.
        files: Content by path in the model folder: the config, the result files, the run file.
        has_tokenizer: Whether the folder has one.
        has_curve: Whether the folder has a loss curve.
        hashes: SHA-256 of files that are only named, by path.
    """

    name: str
    files: dict[str, bytes]
    has_tokenizer: bool = False
    has_curve: bool = False
    hashes: dict[str, str] = field(default_factory=dict)

    def sources(self) -> dict[str, Source]:
        """The JSON files, by path."""
        return {
            path: Source(path, json.loads(data)) for path, data in sorted(self.files.items()) if path.endswith(".json")
        }

    def all_hashes(self) -> dict[str, str]:
        """SHA-256 of all files, by path."""
        return {path: hashlib.sha256(data).hexdigest() for path, data in self.files.items()} | self.hashes


@dataclass
class Card:
    """A rendered card.

    Attributes:
        text: Content of `README.md`.
        ledger: Content of `results/card.json`.
    """

    text: str
    ledger: dict[str, Any]


def kind_of(data: Any) -> str:
    """The kind of a result file; empty for what is none."""
    if not isinstance(data, dict):
        return ""
    if "kind" in data:
        return str(data["kind"])
    if {"cells", "model", "settings"} <= data.keys():
        return "eval"
    return "check" if {"models", "command", "versions"} <= data.keys() else ""


def dump(data: Any) -> bytes:
    """JSON as it is stored beside a card."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def template_text() -> str:
    """The card's template."""
    return data_path("hub_cards", TEMPLATE).read_text(encoding="utf-8")


def template_hash(template: str) -> str:
    """SHA-256 of a template, by which a card names it."""
    return hashlib.sha256(template.encode()).hexdigest()


def check_name(name: str, where: str = "--name") -> None:
    """Refuse what the Hub takes for no name.

    Raises:
        CardError: It is none.
    """
    if not _NAME.fullmatch(name):
        raise CardError(f"{where}: {name!r}: expected NAME or ORG/NAME of letters, digits, '.', '_' and '-'")


def render_card(bundle: Bundle, template: str | None = None) -> Card:
    """Render a card.

    Args:
        bundle: What it is rendered from.
        template: Another template than that of the package.

    Raises:
        CardError: It would print a number that has no source, or the metadata would not be valid for the Hub.
    """
    template = template_text() if template is None else template
    check_name(bundle.name)
    ledger = {
        "kind": "card",
        "name": bundle.name,
        "has_tokenizer": bundle.has_tokenizer,
        "has_curve": bundle.has_curve,
        "package": {"hybridlm": importlib.metadata.version("hybridlm")},
        "template": template_hash(template),
        "files": [{"path": path, "sha": digest} for path, digest in sorted(bundle.all_hashes().items())],
    }
    sources = bundle.sources()
    context = _context(sources, Source(LEDGER, ledger), bundle)
    figures: list[Figure] = []
    body = _fill(template, context, figures)
    header, metadata = _metadata(context)
    ledger["figures"] = [[f.value, f.form, f.file, f.pointer] for f in figures]
    ledger["metadata"] = {place: [f.value, f.form, f.file, f.pointer] for place, f in metadata.items()}
    text = f"---\n{yaml_dump(header).strip()}\n---\n\n{body.strip()}\n"
    read_header, read_body = split_card(text)
    problem = unbacked(read_body, [(str(f.value), f.place) for f in figures])
    if problem is None:
        problem = next(unbacked_metadata(read_header, ledger["metadata"]), None)
    if problem is not None:
        raise CardError(f"the card would print a number without a source: {problem}")
    check_metadata(text)
    return Card(text, ledger)


def _context(sources: Mapping[str, Source], ledger: Source, bundle: Bundle) -> dict[str, Any]:
    """Names of the template."""
    kinds: dict[str, list[View]] = {}
    for source in sources.values():
        kinds.setdefault(kind_of(source.data), []).append(source.view)
    facts, training = kinds["facts"][0], next(iter(kinds.get("training", [])), None)
    plan = next(iter(kinds.get("plan", [])), None)
    config = sources[CONFIG].view
    total = None if plan is None else plan.total
    parameters = total.num_parameters if plan is not None else training and training.parameters
    if parameters is None:
        raise CardError("parameters: neither the planner nor a training record tells them")
    checks = [report for found in kinds.get("check", []) for report in found.models]
    commands = [found.command for found in kinds.get("check", []) for _ in found.models]
    pairs = ("active_parameters", "state_bytes", "step_flops", "prefill_flops")
    moving = total is not None and any(
        total[f"expected_{name}"] != total[name if name != "active_parameters" else "num_active_parameters"]
        for name in pairs
    )
    from_record = training is not None and training.base_model
    return {
        "name": ledger.view.name,
        "ledger": ledger.view,
        "config": config,
        "facts": facts,
        "shape": config.extra.source if is_preset_source(walk(sources[CONFIG].data, ("extra", "source"))) else None,
        "plan": plan,
        "total": total,
        "moving": moving,
        "parameters": parameters,
        "residual": config.residual and config.residual.name and config.residual.name != "add",
        "training": training,
        "base_model": training.base_model if from_record else facts.base_model,
        "heldout": training.heldout if training is not None else None,
        "evals": kinds.get("eval", []),
        "races": kinds.get("race", []),
        "checks": checks,
        "check_commands": commands,
        "run_file": RUN_FILE in bundle.files,
        "curve": bundle.has_curve,
        "has_tokenizer": bundle.has_tokenizer,
    }


def _fill(template: str, context: Mapping[str, Any], figures: list[Figure]) -> str:
    """The body, with every figure that it printed."""

    def printed(value: Any) -> str:
        if isinstance(value, View):
            value = value.figure("text")
        if isinstance(value, Figure):
            if has_digit(str(value.value)):
                figures.append(value)
            return value.value if isinstance(value.value, str) else json.dumps(value.value)
        if isinstance(value, str) and not has_digit(value):
            return value
        raise CardError(f"the template prints {value!r}, which has no source")

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, finalize=printed, autoescape=False)
    environment.filters |= {form: partial(_formed, form) for form in FORMS}
    try:
        return environment.from_string(template).render(context)
    except (jinja2.TemplateError, TypeError) as error:  # a view takes part in no arithmetic
        raise CardError(f"the template does not fit: {error}") from error


def _formed(form: str, view: Any) -> Figure:
    if not isinstance(view, View):
        raise CardError(f"the template gives {view!r} the form {form!r}; only places in result files have one")
    return view.figure(form)


def _metadata(context: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Figure]]:
    """The metadata, and the figures in them by JSON pointer."""
    facts, training = context["facts"], context["training"]
    header: dict[str, Any] = {}
    if facts.language:
        header["language"] = [item.figure("text") for item in facts.language]
    if facts.license:
        header["license"] = facts.license.figure("plain")
    header |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if context["base_model"]:
        header["base_model"] = context["base_model"].figure("plain")
    if training is not None and training.data.hub:
        header["datasets"] = [training.data.path.figure("plain")]
    header["tags"] = ["hybridlm", "custom_code", *_part_tags(context), *(p.figure("arxiv_tag") for p in facts.papers)]
    results = [*_heldout_results(context), *_eval_results(context)]
    if results:
        header["model-index"] = [{"name": context["name"].figure("plain"), "results": results}]
    figures = {pointer_of(path): leaf for path, leaf in leaves(header) if isinstance(leaf, Figure)}
    return _plain(header), {place: figure for place, figure in figures.items() if _counts(figure.value)}


def _counts(value: Any) -> bool:
    return not isinstance(value, str) or has_digit(value)


def _plain(data: Any) -> Any:
    """Metadata with the values of their figures."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value) for value in data]
    return data.value if isinstance(data, Figure) else data


def _part_tags(context: Mapping[str, Any]) -> list[Figure]:
    """The names of the parts that a reader may look for, once each."""
    places: list[View] = []
    if context["plan"] is not None:
        places += [layer.mixer for layer in context["plan"].layers if layer.mixer]
        places += [span.span for span in context["plan"].spans]
    if context["residual"]:
        places.append(context["config"].residual.name)
    named = {figure.value: figure for figure in reversed([place.figure("plain") for place in places])}
    return [named[name] for name in sorted(named)]


def _result(dataset: Any, kind: str, metric: str, name: Figure, value: Figure) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": kind, "name": dataset},
        "metrics": [{"type": metric, "name": name, "value": value}],
    }


def _heldout_results(context: Mapping[str, Any]) -> list[dict[str, Any]]:
    scores = context["heldout"] or ()
    data = context["training"] and context["training"].data.path
    return [
        _result(data.figure("text"), "text", "bits_per_byte", s.figure("bits_name"), s.bits_per_byte.figure("number"))
        for s in scores
    ]


def _eval_results(context: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        _result(
            cell.task.figure("text"),
            "hybridlm-eval",
            "bits_per_byte" if cell.bits_per_byte else "accuracy",
            cell.figure("cell_metric"),
            cell.figure("cell_score"),
        )
        for result in context["evals"]
        for cell in result.cells
        if cell.status == "scored"
    ]

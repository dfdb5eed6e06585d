"""Rules about what is released: GGUF files that can be made, and that answer well. Converts nothing."""

from collections.abc import Mapping
from typing import Any

from pipeline.converter_architectures import ARCHITECTURES, LLAMA_CPP_PYTHON, TOP_LEVEL
from pipeline.errors import Severity
from pipeline.experiment import nearest
from pipeline.rules.rule import Subject, Verdict

# Perplexity added on Llama 3 8B without an importance matrix: the table in llama.cpp's tools/quantize/quantize.cpp.
LOW_QUANTS = {"Q2_K": ("+3.52", "Q3_K_M"), "Q3_K_S": ("+1.63", "Q3_K_M")}


def converter_knows_base(subject: Subject) -> Verdict | None:
    """The pinned llama.cpp can convert the base's architecture

    Why: An unknown architecture is refused after training and merging were paid for.
    Fix: Remove `gguf`, or choose a base of a known architecture.
    """
    config = subject.facts.config
    if subject.file.experiment.gguf is None or config is None:
        return None
    architecture = _architecture(config)
    if architecture is None:
        message = f"`config.json` of `{subject.file.experiment.base.model}` names no `architectures`"
        return Verdict("gguf", message, "add `architectures` to the base's config.json, or remove `gguf`")
    if architecture in ARCHITECTURES:
        return None
    near = nearest(architecture, ARCHITECTURES)
    message = f"llama.cpp (llama_cpp_python {LLAMA_CPP_PYTHON}) cannot convert `{architecture}`"
    return Verdict("gguf", message, "remove `gguf`" + (f"; it knows the similar `{near}`" if near else ""))


def gguf_can_chat(subject: Subject) -> Verdict | None:
    """A base whose GGUF is released has a chat template

    Why: llama-server falls back to a template of its own, and the model answers to a format it never saw.
    Fix: The instruction-tuned base, or no `gguf`.
    """
    if subject.file.experiment.gguf is None or subject.facts.chat_template != "":
        return None
    message = f"`{subject.file.experiment.base.model}` has no chat template, and neither would its GGUF"
    hint = f"write the instruction-tuned variant of `{subject.file.experiment.base.model}` as `base.model`"
    return Verdict("base.model", message, hint, Severity.WARNING)


def quants_keep_quality(subject: Subject) -> Verdict | None:
    """No quant is so low that the model suffers

    Why: Without an importance matrix the lowest quants lose more than a fine-tune gains.
    Fix: Q3_K_M or larger; Q4_K_M is the usual choice.
    """
    gguf = subject.file.experiment.gguf
    low = next((quant for quant in gguf.quants if quant in LOW_QUANTS), None) if gguf else None
    if gguf is None or low is None:
        return None
    loss, better = LOW_QUANTS[low]
    kept = list(dict.fromkeys(better if quant == low else quant for quant in gguf.quants))
    message = f"`{low}` without an importance matrix costs much quality ({loss} perplexity on Llama 3 8B)"
    return Verdict("gguf.quants", message, f"write `quants: [{', '.join(kept)}]`", Severity.WARNING)


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The architecture the converter goes by: the text model's own, when the configuration names one."""
    top, text = _first(config), _first(config.get("text_config"))
    return top if top in TOP_LEVEL else text or top


def _first(config: Any) -> str | None:
    names = config.get("architectures") if isinstance(config, Mapping) else None
    return str(names[0]) if isinstance(names, list) and names else None

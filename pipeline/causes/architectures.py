"""Causes of failure in reading a model or tokenizer: unknown to the installed libraries, or asking for more."""

from pipeline.causes.cause import Cause, Weight

STRONG = Weight.STRONG
# Names that a transformers from before them answers with a KeyError; where it names the file, any name is known.
LLAMAS = ("llama", "llama4", "mistral", "mistral3", "mixtral", "phi3", "granite", "olmo2", "glm4", "smollm3", "gpt_oss")
GEMMAS = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "deepseek_v3")
QWENS = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5")
MODEL_TYPES = (*LLAMAS, *GEMMAS, *QWENS)
CAUSES = (
    Cause(
        "pillow",
        "the base's image processor needs Pillow, even for text",
        (
            "Could not load any image processor class",
            "No module named 'PIL'",
            "requires the PIL library",
            "requires the Torchvision library",
        ),
        "add `pillow` to `dependencies` in the script's header",
        rule="SCR010",
        weight=STRONG,
    ),
    Cause(
        "sentencepiece",
        "the tokenizer cannot be read: `sentencepiece`, `protobuf` or `tiktoken` is missing, or its files are",
        (
            "requires the SentencePiece library",
            "requires the protobuf library",
            "SentencePieceExtractor requires the protobuf library",
            "Couldn't instantiate the backend tokenizer",
            "need to have sentencepiece or tiktoken installed",
            "need to have sentencepiece installed",
            "`tiktoken` is required to read a `tiktoken` file",
            "Cannot instantiate this tokenizer from a slow version",
            "No module named 'sentencepiece'",
            "No module named 'tiktoken'",
            "Error parsing line b'",
            "sentencepiece_processor.cc",
            "Converting from SentencePiece and Tiktoken failed",
        ),
        "add `sentencepiece` and `protobuf` to the script's header, and keep the base's tokenizer files together",
        rule="SCR002",
        weight=STRONG,
    ),
    Cause(
        "transformers-too-old",
        "this version of transformers does not know the model's architecture",
        (
            "but Transformers does not recognize this architecture",
            "does not recognize this architecture",
            "Unrecognized configuration class",
            "`rope_scaling` must be a dictionary with two fields",
            "`rope_scaling` must be a dictionary with with two fields",
            "Tokenizer class {tokenizer} does not exist or is not currently imported",
            "module transformers has no attribute",
            "module 'transformers' has no attribute",
            "Unknown quantization type, got",
            "is not supported yet in transformers",
            "not supported yet!",
            *(f"KeyError: '{name}'$" for name in MODEL_TYPES),
        ),
        "the transformers that the job script pins, or newer; `mergetune rehearse {path}` tries it on the CPU",
        rule="EXP007",
        weight=STRONG,
    ),
    Cause(
        "model-type-unknown",
        "this version of transformers does not know the model type `{model}`",
        ("KeyError: '{model}'$",),
        "the transformers that the job script pins, or newer; `mergetune rehearse {path}` tries it on the CPU",
        rule="EXP007",
        within=("configuration_auto.py", "auto_factory.py", "tokenization_auto.py"),
    ),
    Cause(
        "tokenizers-too-old",
        "this version of tokenizers does not know the format of `tokenizer.json`",
        (
            "data did not match any variant of untagged enum",
            "Exception: unknown variant `",
            "expected `,` or `}` at line",
            "'list' object has no attribute 'keys'",
            "PyPreTokenizerTypeWrapper",
        ),
        "newer `tokenizers` and `transformers`, or the base's own tokenizer files, byte for byte",
        weight=STRONG,
    ),
    Cause(
        "token-types",
        "this version of the trainer does not give the base an input that it needs in training",
        ("`token_type_ids` is required as a model input when training", "`token_type_ids` is required"),
        "the TRL and transformers that the job script pins, or a text-only base of the family",
        weight=STRONG,
    ),
    Cause(
        "remote-code",
        "the repository asks to run code of its own, which is refused",
        (
            "contains custom code which must be executed",
            "requires you to execute the configuration file in that repo",
            "requires you to execute the modeling file in that repo",
            "trust_remote_code=True` to remove this",
            "set the option `trust_remote_code=True`",
            "pass the argument `trust_remote_code=True`",
            "Please pass the argument `trust_remote_code=True` to allow custom code to be run",
        ),
        "choose a base that transformers knows itself",
        weight=STRONG,
    ),
)

"""Causes of failure in model files: weights that are broken, missing, or of another model."""

from pipeline.causes.cause import Cause, Weight

STRONG = Weight.STRONG
CAUSES = (
    Cause(
        "weights-broken",
        "a weights file is broken: truncated, or a pointer in place of the file",
        (
            "Error while deserializing header",
            "HeaderTooLarge",
            "MetadataIncompleteBuffer",
            "InvalidHeaderDeserialization",
            "InvalidHeaderLength",
            "HeaderTooSmall",
            "incomplete metadata, file not fully covered",
            "invalid header length",
            "Unable to load weights from pytorch checkpoint file",
            "PytorchStreamReader failed",
            "failed finding central directory",
            "invalid load key, '",
            "You seem to have cloned a repository without having git-lfs installed",
            "mmap length is greater than file size",
            "UnpicklingError: invalid load key",
            "UnpicklingError: pickle data was truncated",
        ),
        "upload (or fetch) the file anew; a file of about 130 bytes is a Git LFS pointer",
        weight=STRONG,
    ),
    Cause(
        "pickle-refused",
        "weights in pickle form are refused: loading them runs code",
        (
            "Weights only load failed",
            "Due to a serious vulnerability issue in `torch.load`",
            "we now require users to upgrade torch to at least v2.6",
        ),
        "a base in safetensors: pin a `base.revision` that has it",
        weight=STRONG,
    ),
    Cause(
        "size-mismatch",
        "weights have another size than the model: adapter, vocabulary and base are not of one model",
        (
            "size mismatch for ",
            "copying a param with shape torch.Size",
            "ignore_mismatched_sizes=True",
            "Expected shape (* but received shape",
            "Trying to set a tensor of shape",
            "shape mismatch for ",
            "Error(s) in loading state_dict for",
            "Unexpected key(s) in state_dict",
            "Missing key(s) in state_dict",
            "mismatched shapes",
            "KeyError: '*.weight'$",
        ),
        "the base and revision that the adapter was trained on, with its own tokenizer: no added tokens",
        weight=STRONG,
    ),
    Cause(
        "shard-missing",
        "a part of the weights is missing",
        (
            "Missing or incomplete model files:",
            "Mismatch between weight map and model parts",
            "is not in the index",
            "No such file or directory*.safetensors",
            "model.safetensors.index.json*not found",
        ),
        "publish the model anew, or pin a revision that is whole",
        weight=STRONG,
    ),
    Cause(
        "no-adapter",
        "there is no adapter where one was expected",
        ("Can't find 'adapter_config.json' at", "adapter_config.json*not found", "Can't find weights for"),
        "the repository of the train stage, or a folder with `adapter_config.json`",
        weight=STRONG,
    ),
)

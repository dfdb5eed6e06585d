"""mergetune: merge a YAML file, get a fine-tuned model."""

__version__ = "0.1.0"

"""tuneline: fine-tune causal language models as declarative workflows on Kubeflow Pipelines."""

__version__ = "0.1.0"

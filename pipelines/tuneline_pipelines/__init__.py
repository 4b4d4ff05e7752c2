"""Pipelines over the components of `tuneline`, and the command line."""

"""What `tuneline doctor` looks at before a GPU is asked for."""

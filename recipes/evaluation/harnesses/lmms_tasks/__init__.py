"""Tasks of lmms-eval: a YAML per task, and the functions that it names."""

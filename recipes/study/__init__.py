# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The experiment of recipes/evidence.py: its arms, what each seed starts from, what is measured, the report."""

# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The web demo of `recipes/app.py`: one tab per file, what they share in `work.py` and `uploads.py`."""

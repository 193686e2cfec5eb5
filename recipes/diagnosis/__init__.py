# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a checkpoint's feedback does: one file per station of recipes/diagnose.py."""

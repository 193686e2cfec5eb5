# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Small parts trained on the synthetic world: they stand for the pretrained ones that a DEEM is composed of."""

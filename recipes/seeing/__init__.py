# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What an image encoder sees: images redrawn from their own tokens, and where and for want of which token that fails."""

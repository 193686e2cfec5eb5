# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.

# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Count the parameters of a configuration and what each training stage trains, without building the model in memory.

python recipes/inspect_model.py --config official-7b      # the paper's model, next to the paper's figures
python recipes/inspect_model.py --config FOLDER            # any DEEM checkpoint's config.json
"""

import argparse
from pathlib import Path
from typing import Any

from modeling_deem import DeemConfig
from recipes.original.parameter_counts import build, explain, format_stages, stage_table
from recipes.original.published import OFFICIAL_7B, STAGES


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Print the counts of each part and stage; return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="official-7b", help="official-7b, or a folder with a DEEM config.json")
    args = parser.parse_args(argv)
    official = args.config == "official-7b"
    if official:
        fields = OFFICIAL_7B
    elif (Path(args.config) / "config.json").exists():
        fields = DeemConfig.from_pretrained(args.config).to_dict()
        fields = {name: value for name, value in fields.items() if name in DeemConfig.__dataclass_fields__}
    else:
        raise SystemExit(f"error: --config {args.config} is neither official-7b nor a folder with a config.json.")

    tables = {stage.name: stage_table(fields, stage) for stage in STAGES}
    print("Parameters and what each stage trains, in millions. Of lm_head only the rows of new tokens train.")
    print(format_stages(tables))
    if official:
        trained = [sum(row["trainable"] for row in table.values()) for table in tables.values()]
        print("\nThe paper's figures:")
        print(explain(build(DeemConfig(**OFFICIAL_7B)), *trained[:2]))
    return tables


if __name__ == "__main__":
    main()

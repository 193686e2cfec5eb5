# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The original's tensors, if they are here: every case passes `compare.py`, and nothing stored is left out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripts import run_script

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parents[1] / "../shared/golden"
CASES = {
    "a_caption": 490,
    "c_mask_align": 450,
    "c2_mask_align_visual": 9,
    "d_greedy": 5,
    "f_mmfs": 90,
    "g_visual_tokenizer": 14,
}  # name -> comparisons at least


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the script, in a process of its own so that its memory is given back."""
    if not GOLDEN.exists():
        pytest.skip("the original's tensors (../shared/golden) are not here")
    out = tmp_path_factory.mktemp("golden") / "comparisons.json"
    run = run_script(HERE / "compare.py", GOLDEN, "--json", out, logs=out.parent)
    assert out.exists(), run.stdout[-2000:] + run.stderr[-2000:]
    return {**json.loads(out.read_text()), "returncode": run.returncode, "last": run.stdout.splitlines()[-1]}


def test_a_case_that_shares_inputs_and_stores_no_gradients(tmp_path: Path) -> None:
    """Losses of case a with other label rules and weights; a wrong one of them is found."""
    if not GOLDEN.exists():
        pytest.skip("the original's tensors (../shared/golden) are not here")
    stored = json.loads((GOLDEN / "case_a_caption.json").read_text())
    losses = stored["fixed_scalars"]
    weights = {"loss_txt_weight": 2.0, "loss_img_weight": 0.0, "loss_sniffer_weight": 0.5}
    total = 2.0 * losses["loss_txt"] + 0.5 * losses["loss_sniffer"]
    shared = {"inputs_of": "case_a_caption", "loss_weights": weights, "nearest_bos_idxs": stored["nearest_bos_idxs"]}
    for name, wrong in (("right", 0.0), ("wrong", 0.01)):
        scalars = losses | {"loss": total + wrong}
        (tmp_path / f"case_{name}.json").write_text(
            json.dumps({**shared, "fixed_scalars": scalars, "scalars": scalars})
        )
    run = run_script(HERE / "compare.py", tmp_path, "--weights", GOLDEN, logs=tmp_path / "logs")
    last = run.stdout.splitlines()[-1]
    assert last.startswith("golden: 8 tensors") and last.endswith("1 failed"), run.stdout + run.stderr
    (failed,) = [line for line in run.stdout.splitlines() if "  NO" in line]
    assert run.returncode == 1 and failed.startswith("wrong ")


@pytest.mark.parametrize("case", CASES)
def test_case_passes(case: str, result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["case"] == case]
    assert len(rows) >= CASES[case], Counter(row["kind"] for row in rows)
    failed = [(row["name"], row["error"], row["note"]) for row in rows if not row["passed"]]
    assert not failed


def test_every_stored_output_is_compared_and_the_status_says_so(result: dict[str, Any]) -> None:
    assert result["unmatched"] == []
    assert result["returncode"] == 0
    assert result["last"].startswith(f"golden: {len(result['rows'])} tensors, ") and result["last"].endswith(
        ", 0 failed"
    )

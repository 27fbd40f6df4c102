"""Make the files of test/data/saved_before with this version: `make_saved_before.py [NAME ...]`.

A name is one of the optimizers of optim_table.py, as Lion8bit, or "other_formats"; without one,
everything is made. What is there already is never overwritten: it is what an earlier version
wrote, and a version that cannot read it, or that comes to other bits, breaks a promise. So this is
run once for each new optimizer, when it is released.
"""

import lzma
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import saved_before
import torch
import torch.distributed.checkpoint as dcp
from optim_table import OPTIMIZERS, OptimizerCase
from saved_before import FOLDER, OTHER_FORMATS, STEPS, Run
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import torchao8
from torchao8.checkpoint import save_safetensors

ROOT = Path(__file__).resolve().parent.parent
CASES = {case.cls.__name__: case for case in OPTIMIZERS}
# Whose results depend on nothing else.
SOURCES = ("torchao8", "csrc", "setup.py")

# Rows of 70 are two blocks of 64 elements, or a short one of 256, and no multiple of any vector.
MATRIX, ROW, VECTOR = ["float32", [2, 70]], ["float32", [1, 70]], ["float32", [70]]
SCALAR, HALF = ["float32", []], ["float16", [1, 70]]
BFLOAT, BFLOAT_ROW = ["bfloat16", [2, 70]], ["bfloat16", [1, 70]]
SHORT_ROWS = ["float32", [20, 3]]  # blocks over its flattened elements
PAGED = ["float32", [1430, 70]]  # large enough for pages of the Paged classes
# All but the scalar keep 8 bits.
OPTIONS = {"min_8bit_size": 50, "seed": 3}


def run_of(case: OptimizerCase) -> Run:
    """Groups with what matters to a state, each with another set of options of the rule.

    32-bit states have no blocks, and take four bytes: where a class keeps them, one row will do.
    """
    if case.optim_bits == 8:
        plain, full, half = [MATRIX, VECTOR, SCALAR, HALF, PAGED], [MATRIX, SHORT_ROWS], [BFLOAT]
        other_bits = {"params": [ROW], "optim_bits": 32}
    else:
        plain, full, half = [ROW, SCALAR, HALF], [ROW], [BFLOAT_ROW]
        other_bits = {"params": [MATRIX], "optim_bits": 8}
    groups: list[dict[str, Any]] = [
        {"params": plain},
        {"params": full, **case.full},
        {"params": half, "stochastic_rounding": True, "percentile_clipping": 5},
        {"params": [ROW], "optim_bits": 8, "block_wise": False},
        other_bits,
    ]
    groups[1].update(block_size=64, state_rounding="nearest")
    # The first set is the defaults, or without a state.
    first, *others = case.options
    for i, group in enumerate(groups):
        groups[i] = {**case.base, **others[i % len(others)], **group}
    groups.append({**case.base, **first, "params": [SCALAR]})
    return {"class": case.cls.__name__, "options": OPTIONS, "groups": groups}


def small_run(name: str) -> Run:
    """Fewer tensors, as each of them is large in the other formats."""
    group = {"params": [BFLOAT, VECTOR, SCALAR], "stochastic_rounding": True, "lr": 0.02}
    groups = [
        {"params": [MATRIX]},
        {**group, "percentile_clipping": 5, **CASES[name].full},
    ]
    return {"class": name, "options": {**OPTIONS, "weight_decay": 0.1}, "groups": groups}


def trained(run: Run, prefix: str = "") -> tuple[Any, dict[int, Any]]:
    """The optimizer after the last step, and what was there after each of STEPS."""
    optimizer, done, after = saved_before.make_optimizer(run, prefix), 0, {}
    for step in STEPS:
        saved_before.train(optimizer, range(done + 1, step + 1))
        after[step], done = saved_before.ending(optimizer), step
    return optimizer, after


def make_file(path: Path, run: Run) -> None:
    """Writes the file of a run, and sees that it can be read and holds for the Paged class too."""
    _, after = trained(run)
    saved_before.write(path, {"made_with": versions(), "run": run, "after": after})
    paged, _ = trained(run, "Paged")
    saved = saved_before.read(path)["after"][STEPS[-1]]
    differing = saved_before.differences(paged, saved, but=["is_paged"])
    if differing:
        raise AssertionError(f"Paged{run['class']} differs: {differing}")


def make_other_formats(folder: Path) -> None:
    """Of AdamW8bit a pickle, a safetensors file and a packed folder of
    torch.distributed.checkpoint; of RMSprop a pickle. All after the first of STEPS."""
    folder.mkdir()
    for name in ("AdamW8bit", "RMSprop8bit"):
        run = small_run(name)
        make_file(saved_before.file_of(name, folder), run)
        optimizer = saved_before.make_optimizer(run)
        saved_before.train(optimizer, range(1, STEPS[0] + 1))
        pickled = lzma.compress(pickle.dumps(optimizer, protocol=4))
        (folder / f"{name}.pickle.xz").write_bytes(pickled)
    model, optimizer = saved_before.named(small_run("AdamW8bit"))
    saved_before.train(optimizer, range(1, STEPS[0] + 1))
    save_safetensors(optimizer, folder / "AdamW8bit.safetensors")
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    # Its metadata hold the path as it is given here.
    before = os.getcwd()
    os.chdir(folder)
    try:
        dcp.save(state, checkpoint_id="dcp", no_dist=True)
    finally:
        os.chdir(before)
    with zipfile.ZipFile(folder / "AdamW8bit.dcp.zip", "w", zipfile.ZIP_LZMA) as packed:
        for path in sorted((folder / "dcp").iterdir()):
            packed.write(path, path.name)
    shutil.rmtree(folder / "dcp")


def versions() -> dict[str, str]:
    """What makes the files; the commit is the last one that changed the library.

    Raises:
        RuntimeError: the library has changes that are not committed.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", *SOURCES]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain")
    if changed:
        raise RuntimeError(f"commit these first, as the files name a commit:\n{changed}")
    commit = git("log", "-1", "--format=%H")
    return {"torchao8": torchao8.__version__, "commit": commit, "torch": str(torch.__version__)}


def main(names: list[str]) -> int:
    names = names or [*CASES, OTHER_FORMATS.name]
    unknown = [name for name in names if name not in (*CASES, OTHER_FORMATS.name)]
    if unknown:
        print(f"{unknown[0]}: expected one of {', '.join(CASES)} or {OTHER_FORMATS.name}")
        return 1
    targets = {
        name: OTHER_FORMATS if name == OTHER_FORMATS.name else saved_before.file_of(name)
        for name in names
    }
    there = [path for path in targets.values() if path.exists()]
    if there:
        print(f"{there[0]} is there already and is kept; name those to make")
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as temporary:  # all of them, or none
        for name, path in targets.items():
            made = Path(temporary) / path.name
            if path == OTHER_FORMATS:
                make_other_formats(made)
            else:
                make_file(made, run_of(CASES[name]))
        for path in targets.values():
            (Path(temporary) / path.name).rename(path)
            print(path.relative_to(ROOT))
    print(versions())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

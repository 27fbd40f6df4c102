"""Step time and memory of 8-bit and 32-bit AdamW, side by side, on a CPU or a GPU.

Every contender lives in a process of its own and they take turns, in an order that rotates, so that
a machine whose speed drifts slows all of them alike. A row's time is the median over its turns; its
speed-up is the median of the ratios to torch's fused AdamW in the same round. The machine's memory
rate is measured by two more contenders in the same rounds. With --family it is every update rule
with 8-bit state against the same rule of torch, and speed-ups are over torch's fastest form of it.
With --list gpt2-hidden it is Muon, and speed-ups are over torch.optim.Muon.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import reporting
from benchmarks.step.contenders import (
    BASELINE,
    CONTENDERS,
    CPU_PATHS,
    MEMORY,
    MUON_BASELINES,
    QUICK,
    STATE_FORMATS,
    Contender,
    rivals,
    rule,
    rule_names,
)
from benchmarks.step.devices import Cpu, open_device
from benchmarks.step.rounds import Bench, Plan
from benchmarks.step.tables import Case, rules_table, table, title
from benchmarks.step.tensor_lists import LISTS, list_names, tensor_lists

_PACKAGES = ("torchao8", "bitsandbytes", "torchao", "deepspeed", "flashoptim", "triton")
_COUNTING_S = 25.0  # for the launches, which are counted after everything is timed


def _parser() -> argparse.ArgumentParser:
    shown = ["lists:"]
    for kind, names in LISTS.items():
        shown += [f"  {kind:6}{name:18}{tensor_lists()[name].label}" for name in names]
    shown += ["  also tiny (those that begin so) and all", "", "contenders:"]
    for one in CONTENDERS.values():
        where = "" if len(one.devices) > 1 else f" ({one.devices[0]})"
        shown.append(f"  {one.name:20}{one.label}{where}{' (only when named)' * (one.lists == ())}")
    parser = reporting.parser(__doc__, epilog="\n".join(shown))
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    reporting.add_timing(parser, "15; 9 on a GPU", "0.25; 0.05 on a GPU", "gpt2; all on a GPU")
    quick = "the first figures, of few lists, contenders and rounds; on a GPU within a minute"
    add("--quick", action="store_true", help=quick)
    add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="which (below)")
    paths = "folders with packages that are not installed, as FOLDER/bitsandbytes"
    add("--contenders-path", nargs="+", type=Path, default=[], metavar="FOLDER", help=paths)
    rules = "in place of AdamW's contenders: these rules, each against its forms in torch (all)"
    add("--family", nargs="*", choices=rule_names(), metavar="RULE", help=rules)
    of_state = "with --family: the format of 8-bit state (%(default)s)"
    add("--state-format", choices=STATE_FORMATS, default="dynamic", help=of_state)
    path = "with --family on a CPU: the path that torchao8 takes (the one that it chooses)"
    add("--cpu-path", choices=CPU_PATHS, help=path)
    positive = reporting.at_least(float, 1e-9)
    budget = "seconds of steps per row; who needs more for 3 rounds is skipped (60; 10 on a GPU)"
    add("--budget", type=positive, help=budget)
    limit = "seconds after which no further list or dtype is begun (none; 150 on a GPU)"
    add("--time-limit", type=positive, help=limit)
    return parser


def parse(argv: Iterable[str] | None) -> tuple[argparse.Namespace, Cpu]:
    """The command line, and the device that it names."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        device = open_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    for option, value in (device.quick if args.quick else device.defaults).items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    try:
        args.lists = list_names(args.list, device.lists)
    except ValueError as error:
        parser.error(f"--list: on {device.kind} {error}")
    if args.family is not None and args.contenders is not None:
        parser.error("--family: expected no --contenders with it")
    if args.family is None and (args.state_format != "dynamic" or args.cpu_path):
        option = "--cpu-path" if args.cpu_path else "--state-format"
        parser.error(f"{option}: expected --family with it; AdamW has a contender for each")
    if args.cpu_path and device.kind != "cpu":
        parser.error(f"--cpu-path: expected --device cpu, got {args.device}")
    for name in args.contenders or ():
        if device.kind not in CONTENDERS[name].devices:
            parser.error(f"--contenders: {name} does not run on {device.kind}")
    try:
        for folder in args.contenders_path:
            find_in(folder)
    except ValueError as error:
        parser.error(f"--contenders-path: {error}")
    if args.name is None:
        lists = [] if args.list in (["all"], [*QUICK]) else args.list
        kinds = ["quick"] * args.quick + ["family"] * (args.family is not None)
        kinds += [args.state_format] * (args.state_format != "dynamic")
        kinds += [args.cpu_path] * (args.cpu_path is not None)
        args.name = "-".join([device.result_name, *lists, *kinds])
    return args, device


def find_in(folder: Path) -> None:
    """Has this process and those that it starts look for packages in a folder first.

    Raises:
        ValueError: it has none of the other libraries, or a torch, which would be another one.
    """
    others = {one.package for one in CONTENDERS.values()} - {"torch", "torchao8"}
    if not any((folder / package / "__init__.py").is_file() for package in others):
        raise ValueError(f"expected a folder that holds one of {sorted(others)}, got {folder}")
    if (folder / "torch").exists():
        raise ValueError(f"expected a folder without a torch of its own, got {folder}")
    sys.path.insert(0, str(folder.resolve()))


def _chosen(args: argparse.Namespace, kind: str, list_name: str) -> list[Contender]:
    """The contenders that are named, or those that run on a list, beside torch's."""

    def runs(one: Contender) -> bool:
        if list_name in MUON_BASELINES:
            chosen = one.lists is not None and list_name in one.lists
        elif args.quick:
            chosen = one.name in QUICK.get(list_name, QUICK["gpt2"])
        else:  # on a GPU the quick form's, too: it has a compiled step
            in_quick = kind != "cpu" and one.name in QUICK.get(list_name, ())
            chosen = one.lists is None or list_name in one.lists or in_quick
        return kind in one.devices and chosen

    named = args.contenders or [name for name, one in CONTENDERS.items() if runs(one)]
    baseline = MUON_BASELINES.get(list_name, BASELINE)
    return [CONTENDERS[name] for name in dict.fromkeys(named) if name != baseline]


def measure(
    args: argparse.Namespace,
    device: Cpu,
    bench: Bench,
    save: Callable[[list[Case]], object] = lambda cases: None,
) -> tuple[list[Case], list[dict[str, Any]]]:
    """Measures all lists and dtypes asked for; also tells what the time limit left out.

    `save` gets what is measured so far, each time that there is more.
    """
    cases: list[Case] = []
    left_out: list[dict[str, Any]] = []
    rules = [None] if args.family is None else args.family or rule_names()
    for list_name, dtype, name in itertools.product(args.lists, args.dtype, rules):
        if bench.plan.late():
            reason = f"the time limit of {args.time_limit:.0f} s had passed"
            named = {} if name is None else {"rule": name}
            left_out.append({"list": list_name, "dtype": dtype, **named, "reason": reason})
            continue
        tensors = tensor_lists()[list_name]
        chosen = _chosen(args, device.kind, list_name)
        theirs = [CONTENDERS[MUON_BASELINES.get(list_name, BASELINE)]]
        if name is not None:
            ours, _ = rule(name, args.state_format, args.cpu_path)
            chosen, theirs = [ours], rivals(name, device.kind, dtype)
        rows = bench.measure(chosen, [*MEMORY, *theirs], tensors, dtype)
        cases.append(Case(list_name, tensors, dtype, theirs, name, rows))
        if name is not None:
            bench.stop()  # no other rule needs these processes
        _show(cases[-1])  # now: a run on a GPU may be cut off before the others are measured
        save(cases)
    return cases, left_out


def _show(case: Case) -> None:
    record = case.record()
    print(f"\n{title(record)}\n{table(record)}\n", flush=True)


def main(argv: Iterable[str] | None = None) -> None:
    args, device = parse(argv)
    torch.set_num_threads(args.threads)
    watch, begin = reporting.CpuWatch(), time.monotonic()
    options = ("rounds", "turn", "budget", "time_limit")
    record: dict[str, Any] = {
        "device": device.describe(args.threads),
        "versions": {**reporting.versions(_PACKAGES), "cuda": torch.version.cuda},
        # No limit is infinite, which JSON has no number for.
        "settings": {o: getattr(args, o) for o in options if getattr(args, o) != math.inf},
        "left_out": [],
    }

    def save(cases: list[Case]) -> Path:
        record["cases"] = [case.record() for case in cases]
        record["seconds"] = time.monotonic() - begin
        return reporting.write_results(args, record)

    plan = Plan(args.rounds, args.turn, args.budget, begin + args.time_limit)
    with Bench(device, args.threads, plan) as bench:
        cases, record["left_out"] = measure(args, device, bench, save)
        if device.kind != "cpu":
            record["device"]["gpu_after"] = device.clocks()
        if device.kind != "cpu" and not args.quick:  # quick: launches are not counted
            late = time.monotonic() + _COUNTING_S
            bench.plan = dataclasses.replace(plan, deadline=late)
            for case in cases:
                bench.count_launches(case.rows, case.tensors, case.dtype)
                _show(case)
    record["device"]["cpu_taken_by_others"] = watch.shares()
    for one in record["left_out"]:
        print(f"left out: {one['list']}, {one['dtype']}: {one['reason']}")
    if args.family is not None:
        print(rules_table(record["cases"]))
    path = save(cases)
    print(f"took {record['seconds']:.0f} s\nwrote {path}")


if __name__ == "__main__":
    main()

"""Step time and memory of 8-bit and 32-bit AdamW, side by side, on a CPU or a GPU.

Every contender lives in a process of its own and they take turns, in an order that rotates, so that
a machine whose speed drifts slows all of them alike. A row's time is the median over its turns; its
speed-up is the median of the ratios to torch's fused AdamW in the same round. The machine's memory
rate is measured by two more contenders in the same rounds. With --family it is every update rule
with 8-bit state against the same rule of torch, and speed-ups are over torch's fastest form of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import reporting
from benchmarks.step.contenders import BASELINE, CONTENDERS, Contender, contender, rule, rule_names
from benchmarks.step.devices import Cpu, open_device
from benchmarks.step.rounds import MIN_ROUNDS, Bench, Plan, say
from benchmarks.step.tables import draw, rules_table, table, title
from benchmarks.step.tensor_lists import GROUPS, LISTS, tensor_list

_PACKAGES = ("torchao8", "bitsandbytes", "torchao", "deepspeed", "flashoptim", "triton")
_COUNTING_S = 25.0  # for the launches, which are counted after everything is timed

# What an option is if it is not given. On a GPU everything must be over in three minutes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"list": "gpt2", "repeats": 15, "turn": 0.25, "budget": 60.0, "setup_timeout": 600.0,
            "time_limit": math.inf},
    "cuda": {"list": "all", "repeats": 9, "turn": 0.05, "budget": 10.0, "setup_timeout": 80.0,
             "time_limit": 150.0},
}  # fmt: skip
Cases = list[dict[str, Any]]


def _parser() -> argparse.ArgumentParser:
    labels = {name: tensor_list(name).label for names in LISTS.values() for name in names}
    labels["llama"] = "Llama 7B, as many of its 32 layers as fit into memory"
    lists = "\n".join(
        f"  {kind}:\n" + "\n".join(f"    {name:18}{labels[name]}" for name in names)
        for kind, names in LISTS.items()
    )
    names = "\n".join(
        f"  {one.name:20}{one.label}"
        + ("" if len(one.devices) > 1 else f"  ({one.devices[0]})")
        + ("  (only when named)" if one.lists == () else "")
        for one in CONTENDERS.values()
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        epilog=f"lists:\n{lists}\n\ncontenders:\n{names}\n\nrules: {', '.join(rule_names())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def seconds(option: str, text: str, kind: type = float, least: float = 1e-9) -> None:
        name = option.replace("-", "_")
        values = f"({_DEFAULTS['cpu'][name]:g}; {_DEFAULTS['cuda'][name]:g} on a GPU)"
        add(f"--{option}", type=reporting.at_least(kind, least), help=f"{text} {values}")

    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    every = ", ".join([*GROUPS, "all"])
    add("--list", metavar="LIST", help=f"one of those below, {every} (gpt2; all on a GPU)")
    dtypes = ["float32", "bfloat16", "both"]
    add("--dtype", choices=dtypes, default="both", help="of parameters and gradients (both)")
    add("--contenders", nargs="+", metavar="NAME", help="which (below)")
    family = "in place of AdamW's contenders: these rules, each against its forms in torch (all)"
    add("--family", nargs="*", choices=rule_names(), metavar="RULE", help=family)
    seconds("repeats", "rounds of turns", int, MIN_ROUNDS)
    seconds("turn", "seconds of steps in a turn")
    seconds("budget", "seconds of steps per row; who needs more for 3 rounds is skipped")
    seconds("setup-timeout", "seconds for a contender's first two steps, some compile in them")
    seconds("time-limit", "seconds after which no further list or dtype is begun")
    add(
        "--threads",
        type=reporting.at_least(int, 1),
        default=reporting.usable_cores(),
        help="threads (all cores)",
    )
    add("--name", help="name of the result files (step-cpu-LIST; on a GPU its name)")
    add("--out", type=Path, default=reporting.RESULTS, help="folder of the result files")
    add("--no-plot", action="store_true", help="draw no PNG")
    return parser


def parse(argv: Iterable[str] | None) -> tuple[argparse.Namespace, Cpu]:
    """The command line, and the device that it names."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        device = open_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    problem = device.problem()
    if problem is not None:
        parser.error(f"--device {args.device}: {problem}")
    for option, value in _DEFAULTS[device.kind].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    args.lists = device.lists if args.list == "all" else GROUPS.get(args.list, (args.list,))
    if not {*args.lists} <= {*device.lists}:
        known = ", ".join([*device.lists, *GROUPS, "all"])
        parser.error(f"--list: on {device.kind} one of {known}, got {args.list}")
    if args.family is not None and args.contenders is not None:
        parser.error("--family: expected no --contenders with it")
    for name in args.contenders or ():
        try:
            devices = contender(name).devices
        except KeyError:
            parser.error(f"--contenders: expected names of the list in --help, got {name!r}")
        if device.kind not in devices:
            parser.error(f"--contenders: {name} does not run on {device.kind}")
    if not args.no_plot and not reporting.installed("matplotlib"):
        if device.kind == "cpu":
            parser.error("the plot needs matplotlib: install it, or give --no-plot")
        args.no_plot = True
    if args.name is None:
        args.name = device.result_name() + ("" if args.list == "all" else f"-{args.list}")
        args.name += "" if args.family is None else "-family"
    return args, device


def _chosen(args: argparse.Namespace, kind: str, list_name: str) -> list[Contender]:
    if args.contenders is None:
        every = [c for c in CONTENDERS.values() if c.lists is None or list_name in c.lists]
        return [c for c in every if kind in c.devices and c.name != BASELINE]
    return [contender(name) for name in dict.fromkeys(args.contenders) if name != BASELINE]


def measure(args: argparse.Namespace, device: Cpu, bench: Bench) -> tuple[Cases, Cases]:
    """Measures all lists and dtypes asked for.

    Returns the cases of the result file, and what the time limit left out.
    """
    cases: Cases = []
    left_out: Cases = []
    rules = [None] if args.family is None else args.family or rule_names()
    for list_name in args.lists:
        for dtype in ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]:
            for name in rules:
                named = {} if name is None else {"rule": name}
                if bench.plan.late():
                    reason = f"the time limit of {args.time_limit:.0f} s had passed"
                    left_out.append({"list": list_name, "dtype": dtype, **named, "reason": reason})
                    continue
                if name is None:
                    chosen = _chosen(args, device.kind, list_name)
                    case = bench.case(chosen, [CONTENDERS[BASELINE]], list_name, dtype)
                else:
                    rivals = rule(name).rivals(device.kind, dtype)
                    case = bench.case([rule(name).ours], rivals, list_name, dtype)
                    bench.close()  # no other rule needs these processes
                cases.append({**named, **case})
                if device.kind == "cpu":  # on a GPU launches are still to be counted
                    print(f"\n{title(cases[-1])}\n{table(cases[-1])}\n", flush=True)
    return cases, left_out


def main(argv: Iterable[str] | None = None, make_bench: type[Bench] = Bench) -> None:
    """Runs the benchmark with the command line `argv` (of the process if None)."""
    args, device = parse(argv)
    torch.set_num_threads(args.threads)
    watch, begin = reporting.CpuWatch(), time.monotonic()
    options = ("repeats", "turn", "budget", "setup_timeout", "time_limit")
    record: dict[str, Any] = {
        "device": device.describe(args.threads),
        "versions": {**reporting.versions(_PACKAGES), "cuda": torch.version.cuda},
        # No limit is infinite, which JSON has no number for.
        "settings": {o: getattr(args, o) for o in options if getattr(args, o) != math.inf},
    }
    plan = Plan(args.repeats, args.turn, args.budget, args.setup_timeout, begin + args.time_limit)
    bench = make_bench(device, args.device, args.threads, plan)
    try:
        record["cases"], record["left_out"] = cases, left_out = measure(args, device, bench)
        if device.kind != "cpu":
            reporting.write_results(args.name, record, args.out)  # before a profiler has its turn
            late = time.monotonic() + _COUNTING_S
            bench.plan = dataclasses.replace(plan, deadline=late)
            for case in cases:
                bench.count_launches(case)
                print(f"\n{title(case)}\n{table(case)}")
    finally:
        bench.close()
    record["seconds"] = time.monotonic() - begin
    record["device"]["cpu_taken_by_others"] = watch.shares()
    for line in watch.warning():
        say(line)
    for one in left_out:
        print(f"left out: {one['list']}, {one['dtype']}: {one['reason']}")
    if args.family is not None:
        print(rules_table(cases))
    written = reporting.write_results(args.name, record, args.out)
    print(f"took {record['seconds']:.0f} s\nwrote {written}")
    if not args.no_plot:
        machine = record["device"].get("gpu", {}).get("name") or record["device"]["cpu"]
        draw(cases, f"{machine}, {args.threads} threads", args.out / f"{args.name}.png")


if __name__ == "__main__":
    main()

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from _bars import bars, rule_bars
from _common import RESULTS, CpuWatch, installed, usable_cores, versions, write_results
from _contenders import BASELINE, CONTENDERS, Contender
from _devices import Cpu, open_device
from _family import RULES, Rule
from _lists import GROUPS, LISTS, tensor_list
from _measure import MIN_ROUNDS, Bench, Plan, say
from _tables import draw, rules_table, table, title
from _workers import PROGRAM, Workers

_PACKAGES = {
    "cpu": ("torchao8", "bitsandbytes", "torchao", "deepspeed"),
    "cuda": ("torchao8", "bitsandbytes", "torchao", "flashoptim", "triton"),
}
_BUSY_SHARE = 0.03  # of the CPU time; with more gone elsewhere, timings are doubtful
_COUNTING_S = 25.0  # for the launches, which are counted after everything is timed

# What an option is if it is not given. On a GPU everything must be over in three minutes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "list": "gpt2",
        "repeats": 15,
        "turn": 0.25,
        "budget": 60.0,
        "setup_timeout": 600.0,
        "time_limit": math.inf,
    },
    "cuda": {
        "list": "all",
        "repeats": 9,
        "turn": 0.05,
        "budget": 10.0,
        "setup_timeout": 80.0,
        "time_limit": 150.0,
    },
}


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    labels = {name: tensor_list(name).label for names in LISTS.values() for name in names}
    labels["llama"] = "Llama 7B, as many of its 32 layers as fit into memory"
    lists = "\n".join(
        f"  {kind}:\n" + "\n".join(f"    {name:18}{labels[name]}" for name in names)
        for kind, names in LISTS.items()
    )
    of_rules = {one.name for rule in RULES.values() for one in rule.contenders()}
    names = "\n".join(
        f"  {one.name:20}{one.label}"
        + ("" if len(one.needs) > 1 else f"  ({', '.join(one.needs)})")
        + ("" if one.lists else "  (only when named)")
        for one in CONTENDERS.values()
        if one.name not in of_rules
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"lists:\n{lists}\n\ncontenders:\n{names}\n\nrules: {', '.join(RULES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def default(option: str) -> str:
        return f"({_DEFAULTS['cpu'][option]:g}; {_DEFAULTS['cuda'][option]:g} on a GPU)"

    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--list", choices=[*labels, *GROUPS, "all"], help="tensors (gpt2; all on a GPU)")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "both"],
        default="both",
        help="dtype of parameters and gradients (both)",
    )
    add("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help="which (below)")
    family = "in place of AdamW's contenders: these rules, each against its forms in torch (all)"
    add("--family", nargs="*", choices=list(RULES), metavar="RULE", help=family)
    repeats = f"rounds of turns, at least {MIN_ROUNDS} {default('repeats')}"
    add("--repeats", type=_positive(int), help=repeats)
    add("--turn", type=_positive(float), help=f"seconds of steps in a turn {default('turn')}")
    budget = "seconds of steps per row; who needs more for 3 rounds is skipped"
    add("--budget", type=_positive(float), help=f"{budget} {default('budget')}")
    timeout = "seconds for a contender's first two steps, some compile in them"
    add("--setup-timeout", type=_positive(float), help=f"{timeout} {default('setup_timeout')}")
    limit = "seconds after which no further list or dtype is begun"
    add("--time-limit", type=_positive(float), help=f"{limit} {default('time_limit')}")
    add("--threads", type=_positive(int), default=usable_cores(), help="threads (all cores)")
    add("--name", help="name of the result files (step-cpu-LIST; on a GPU its name)")
    add("--out", type=Path, default=RESULTS, help="folder of the result files")
    add("--no-plot", action="store_true", help="draw no PNG")
    return parser


def _parse(argv: Iterable[str] | None) -> tuple[argparse.Namespace, Cpu]:
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
        parser.error(f"--list: on {device.kind} one of {', '.join(device.lists)}, got {args.list}")
    if args.family is not None and args.contenders is not None:
        parser.error("--family: expected no --contenders with it")
    for name in args.contenders or ():
        if device.kind not in CONTENDERS[name].needs:
            parser.error(f"--contenders: {name} does not run on {device.kind}")
    if args.repeats < MIN_ROUNDS:
        parser.error(f"--repeats: must be at least {MIN_ROUNDS}, got {args.repeats}")
    if not args.no_plot and not installed("matplotlib"):
        if device.kind == "cpu":
            parser.error("the plot needs matplotlib: install it, or give --no-plot")
        args.no_plot = True
    if args.name is None:
        args.name = device.result_name() + ("" if args.list == "all" else f"-{args.list}")
        args.name += "" if args.family is None else "-family"
    return args, device


def _chosen(args: argparse.Namespace, kind: str, list_name: str) -> list[Contender]:
    if args.contenders is None:
        return [c for c in CONTENDERS.values() if kind in c.needs and list_name in c.lists]
    names = dict.fromkeys([BASELINE, *args.contenders])  # speed-ups are ratios to it
    return [CONTENDERS[name] for name in names]


def _rules(args: argparse.Namespace) -> list[Rule | None]:
    """The rules to measure; None stands for AdamW against other libraries."""
    if args.family is None:
        return [None]
    return [RULES[name] for name in args.family or RULES]


Cases = list[dict[str, Any]]


def _keep_nothing(cases: Cases, left_out: Cases) -> None:
    pass


def measure(
    args: argparse.Namespace,
    device: Cpu,
    keep: Callable[[Cases, Cases], None] = _keep_nothing,
    program: Path = PROGRAM,
) -> tuple[Cases, Cases]:
    """Measures all lists and dtypes asked for.

    Returns the cases of the result file, and what the time limit left out. `keep` gets both as soon
    as everything is timed. `program` is what workers run.
    """
    begin = time.monotonic()
    plan = Plan(args.repeats, args.turn, args.budget, args.setup_timeout, begin + args.time_limit)
    workers = Workers(args.device, args.threads, program)
    bench = Bench(device, workers, plan)
    cases: Cases = []
    left_out: Cases = []
    try:
        for list_name in args.lists:
            for dtype in ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]:
                for rule in _rules(args):
                    if plan.late():
                        reason = f"the time limit of {args.time_limit:.0f} s had passed"
                        where = {"list": list_name, "dtype": dtype}
                        named = {} if rule is None else {"rule": rule.name}
                        left_out.append({**where, **named, "reason": reason})
                        continue
                    start = time.monotonic()
                    if rule is None:
                        case = bench.case(_chosen(args, device.kind, list_name), list_name, dtype)
                    else:
                        case = bench.rule_case(rule, list_name, dtype)
                    cases.append(case)
                    if device.kind == "cpu":
                        text = f"{title(case)}, {args.threads} threads\n{table(case)}"
                        print(f"\n{text}\n", flush=True)
                    else:
                        say(f"  took {time.monotonic() - start:.1f} s")
        keep(cases, left_out)
        if device.kind != "cpu":
            counting = dataclasses.replace(plan, deadline=time.monotonic() + _COUNTING_S)
            for case in cases:
                Bench(device, workers, counting).count_launches(case)
    finally:
        workers.stop_all()
    return cases, left_out


def _run_on_cpu(args: argparse.Namespace, device: Cpu) -> None:
    machine = device.describe(args.threads)
    watch = CpuWatch()
    cases, left_out = measure(args, device)
    _note_others(machine, watch)
    record = {"device": machine, "versions": versions(_PACKAGES["cpu"]), "cases": cases}
    if left_out:
        record["left_out"] = left_out
    if args.family is not None:
        record["bars"] = _without_text(rule_bars(cases))
        _print_rules(cases)
    _write(args, record, f"{machine['cpu']}, {args.threads} threads")


def _run_on_gpu(args: argparse.Namespace, device: Cpu) -> None:
    machine = device.describe(args.threads)
    found_versions = {**versions(_PACKAGES["cuda"]), "cuda": torch.version.cuda}
    watch = CpuWatch()
    begin = time.monotonic()
    bars_of = bars if args.family is None else rule_bars

    def record(cases: Cases, left_out: Cases) -> dict[str, Any]:
        options = ("repeats", "turn", "budget", "setup_timeout", "time_limit")
        return {
            "device": machine,
            "versions": found_versions,
            "settings": {option: getattr(args, option) for option in options},
            "seconds": time.monotonic() - begin,
            "cases": cases,
            "left_out": left_out,
            "bars": _without_text(bars_of(cases)),
        }

    def keep(cases: Cases, left_out: Cases) -> None:
        write_results(args.name, record(cases, left_out), args.out)

    cases, left_out = measure(args, device, keep)
    _note_others(machine, watch)
    for case in cases:
        print(f"\n{title(case)}, {machine['gpu']['name']}\n{table(case)}")
    print()
    for one in left_out:
        print(f"left out: {one['list']}, {one['dtype']}: {one['reason']}")
    if args.family is None:
        for bar in bars(cases):
            print(bar["text"])
    else:
        _print_rules(cases)
    finished = record(cases, left_out)
    print(f"took {finished['seconds']:.0f} s")
    _write(args, finished, machine["gpu"]["name"])


def _without_text(found: Cases) -> Cases:
    return [{k: v for k, v in bar.items() if k != "text"} for bar in found]


def _print_rules(cases: Cases) -> None:
    print(f"{rules_table(cases)}\n")
    for bar in rule_bars(cases):
        print(bar["text"])


def _note_others(machine: dict[str, Any], watch: CpuWatch) -> None:
    machine["cpu_taken_by_others"] = shares = watch.shares()
    if shares is not None and sum(shares.values()) > _BUSY_SHARE:
        say(
            f"the machine was not quiet: other processes took {shares['others']:.0%} of the CPU "
            f"time, a hypervisor {shares['stolen']:.0%}"
        )


def _write(args: argparse.Namespace, record: dict[str, Any], machine: str) -> None:
    print(f"wrote {write_results(args.name, record, args.out)}")
    if not args.no_plot:
        picture = args.out / f"{args.name}.png"
        draw(record["cases"], machine, picture)
        print(f"wrote {picture}")


def main(argv: Iterable[str] | None = None) -> None:
    """Runs the benchmark with the command line `argv` (of the process if None)."""
    args, device = _parse(argv)
    torch.set_num_threads(args.threads)
    if device.kind == "cpu":
        _run_on_cpu(args, device)
    else:
        _run_on_gpu(args, device)


if __name__ == "__main__":
    main()

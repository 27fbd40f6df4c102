"""Counts the instructions that a warp executes for one aligned block of 256 elements.

    python tools/count_instructions.py nvdisasm kernel.cubin

prints the instructions an element of each step kernel in the file, with stochastic rounding. It
counts the shortest path through the kernel's loop that loads, takes roots, and does what only
stochastic rounding does: in the dynamic format it converts floats to integers, in the others it
adds the top bits of a hash to a number. Rare cases (a bad block, a new tensor) are on longer paths.
``nvdisasm`` comes with the CUDA toolkit, or alone as the package nvidia-cuda-nvdisasm.
"""

import heapq
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

PER_LANE = 8


class Function(NamedTuple):
    name: str
    instructions: list[str]
    labels: dict[str, int]  # the index of the instruction after each label


def functions(text: str) -> Iterator[Function]:
    """The functions of a disassembly; instructions are without their addresses."""
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        instructions: list[str] = []
        labels = {}
        for line in part.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(instructions)
            elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                instructions.append(code[1])
        yield Function(part.split(":")[0], instructions, labels)


def successors(f: Function, i: int) -> list[int]:
    """The instructions that may follow; calls return."""
    code = f.instructions[i]
    conditional = code.startswith("@") or re.search(r"\bBRA[\w.]* !?U?P\d", code) is not None
    following = [i + 1] if i + 1 < len(f.instructions) else []
    if re.search(r"\b(EXIT|RET|BPT)\b", code):
        return following if conditional else []
    if re.search(r"\bBRA\b", code):
        target = re.search(r"\.L_\w+", code)
        to = [f.labels[target[0]]] if target else []
        return to + following if conditional or ".DIV" in code else to
    return following


def way(f: Function, start: int, reached: Callable[[int], bool]) -> list[int] | None:
    """The shortest path from `start` (excluded) to an instruction that is `reached` (included). A
    call is rare, so it counts as a hundred."""
    queue, seen = [(0, start, -1)], {}
    while queue:
        cost, i, before = heapq.heappop(queue)
        if i in seen:
            continue
        seen[i] = before
        if before >= 0 and reached(i):
            path = []
            while i != start or not path:
                path.append(i)
                i = seen[i]
                if i < 0:
                    break
            return path[::-1]
        for following in successors(f, i):
            step = 100 if "CALL" in f.instructions[i] else 1
            heapq.heappush(queue, (cost + step, following, i))
    return None


def eights(places: list[int]) -> set[int]:
    """The places of an instruction that is repeated nearby for each of a lane's elements."""
    return {i for i in places if sum(abs(i - j) < 300 for j in places) >= PER_LANE}


def of_stochastic_rounding(f: Function) -> list[int]:
    """The places of instructions that only stochastic rounding of a state has."""
    # Of 16 bits it would be the rounding of a parameter.
    top_bits_of_a_hash = re.compile(r"LEA\.HI R\d+, R\d+(\.reuse)?, R\d+(\.reuse)?, RZ, 0x(?!10)")
    return [
        i
        for i, code in enumerate(f.instructions)
        if "F2I.TRUNC" in code or top_bits_of_a_hash.search(code)
    ]


def loop(f: Function) -> Counter[str]:
    """How often each opcode is executed for one block."""

    def having(*texts: str) -> list[int]:
        return [i for i, code in enumerate(f.instructions) if any(t in code for t in texts)]

    barrier = having("BAR.SYNC")[0]  # the tables have been copied
    load = next(i for i in having("LDG.E.128") if i > barrier)
    roots, codes = eights(having("MUFU.RSQ")), eights(of_stochastic_rounding(f))
    total: Counter[str] = Counter()
    at = load
    for goals in (roots, codes, {load}):
        path = way(f, at, lambda i, goals=goals: i in goals)
        if path is None:
            raise SystemExit(f"{f.name}: no way through the loop")
        for i in path:
            total[re.sub(r"^@!?U?P\w+ ", "", f.instructions[i]).split()[0].split(".")[0]] += 1
        at = path[-1]
    return total


def main(arguments: list[str]) -> int:
    nvdisasm, cubin = arguments
    text = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    for f in functions(text.stdout):
        if "step_blocks" in f.name:
            count = loop(f)
            print(f"{sum(count.values()) / PER_LANE:.1f} an element: {f.name}")
            print("   ", {op: n / PER_LANE for op, n in count.most_common(16)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m torchao8 estimate``: the memory of training, from the shapes of a model."""

import argparse
import math
from collections.abc import Sequence

from torchao8.block_layout import check_block_size
from torchao8.estimate import class_names, estimate
from torchao8.matrix_shape import HIGHER_DIMS
from torchao8.ops import FORMATS
from torchao8.optim._params import PARAM_DTYPES
from torchao8.optim.contract import bare_name

Shapes = dict[str, tuple[int, ...]]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PARAM_DTYPES}
_EXAMPLES = """examples:
  python -m torchao8 estimate --model llama-70b --dtype bfloat16 --mesh 8 64 8x64
  python -m torchao8 estimate --shapes 32000x4096,32*4096x4096,65*4096
  python -m torchao8 estimate --model llama-8b --embeddings-in-32bit
  python -m torchao8 estimate --model gpt2 --optimizer SGD --momentum 0.9
  python -m torchao8 estimate --model llama-8b --optimizer MuonAdamW
"""


def command(arguments: Sequence[str]) -> int:
    """Prints the tables that the arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m torchao8 estimate",
        description="The memory of parameters, gradients and optimizer state in 32, 8 and 4 bits,\n"
        "on the rank that holds most and on all. Activations are not counted.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    parsed = parser.parse_args(arguments)
    try:
        print(_tables(parsed))
    except ValueError as error:  # an option that the optimizer does not have
        parser.error(str(error))
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", choices=MODELS, help="the shapes of a known model")
    what.add_argument(
        "--shapes",
        type=_shapes,
        help="of the parameters, separated by commas; 32*4096x1024 stands for 32 of a shape, and "
        "32000x4096:embedding for an embedding",
    )
    parser.add_argument(
        "--mesh",
        type=_mesh,
        nargs="+",
        default=[None],
        metavar="RANKS",
        help="to shard over as FSDP2 does: 8, or 4x8 for 4 replicas of 8 shards (HSDP); a table "
        "for each. Without it nothing is sharded",
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of the parameters (%(default)s)"
    )
    parser.add_argument(
        "--min-8bit-size",
        type=_size,
        default=4096,
        help="parameters with fewer elements keep 32-bit state (%(default)s)",
    )
    parser.add_argument(
        "--embeddings-in-32bit",
        action="store_true",
        help="embeddings keep 32-bit state, as in torchao8.param_groups(model)",
    )
    parser.add_argument(
        "--block-size",
        type=_block_size,
        help="elements that share a scale (256 with 8 bits, 64 with 4)",
    )
    parser.add_argument(
        "--state-format",
        choices=[each.name for each in FORMATS if each.bits == 8],
        default="dynamic",
        help="what 8-bit codes stand for; all take the same memory (%(default)s)",
    )
    parser.add_argument(
        "--block-wise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a scale for each block, or one for each tensor",
    )
    parser.add_argument(
        "--optimizer",
        type=bare_name,
        choices=class_names(),
        default="AdamW",
        help="with 32 bits, with 8 and, if it has them, with 4 (%(default)s)",
    )
    for option in ("amsgrad", "centered"):
        what_it_is = "of the optimizer, if it has it: one more state"
        parser.add_argument(f"--{option}", action="store_true", help=what_it_is)
    parser.add_argument(
        "--momentum",
        type=_momentum,
        default=0.0,
        help="of the optimizer, if it has it: one more state, unless it is 0 (%(default)s)",
    )
    parser.add_argument(
        "--higher-dims",
        choices=[name for name in HIGHER_DIMS if name != "refuse"],
        help="of Muon: a parameter of more than two dimensions is a batch of matrices, or one "
        "matrix when it is flattened behind its first dimension",
    )
    parser.add_argument(
        "--percentile-clipping",
        type=_size,
        default=100,
        metavar="P",
        help="keeps 100 norms for each parameter, unless it is 100 (%(default)s)",
    )


def _tables(arguments: argparse.Namespace) -> str:
    shapes = arguments.shapes if arguments.model is None else MODELS[arguments.model]
    layout = ("min_8bit_size", "block_size", "state_format", "block_wise")
    of_rule = ("optimizer", "amsgrad", "centered", "momentum", "percentile_clipping")
    options = {name: getattr(arguments, name) for name in (*layout, *of_rule)}
    if arguments.higher_dims is not None:
        options["higher_dims"] = arguments.higher_dims
    if arguments.embeddings_in_32bit:
        options["embeddings_in_32bit"] = _embeddings(shapes)
    tables = []
    for mesh in arguments.mesh:
        table = estimate(shapes, mesh, dtype=_DTYPES[arguments.dtype], **options)
        replicas = f" as {mesh[0]} replicas of {mesh[1]} shards" if len(mesh or ()) == 2 else ""
        name = "shapes" if arguments.model is None else arguments.model
        tables.append(f"{name} in {arguments.dtype}{replicas}: {table}")
    return "\n\n".join(tables)


def _embeddings(shapes: Shapes) -> list[str]:
    found = [name for name in shapes if name in EMBEDDINGS or name.endswith(_MARK)]
    if not found:
        raise ValueError(
            "--embeddings-in-32bit: none of the shapes is said to be of an embedding, as in "
            f"--shapes 32000x4096{_MARK},65*4096"
        )
    return found


# -- what a person types ---------------------------------------------------------------------------


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.strip().lower().split("x")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with an x between them, as 4096x1024, got {text!r}"
        )
    return tuple(int(part) for part in parts)


# Behind a shape: that of an embedding.
_MARK = ":embedding"


def _shapes(text: str) -> Shapes:
    shapes: Shapes = {}
    for entry in text.split(","):
        count, star, shape = entry.strip().rpartition("*")
        mark = _MARK if shape.endswith(_MARK) else ""
        numbers = _numbers(shape.removesuffix(_MARK))
        copies = _numbers(count) if star else (1,)
        if len(copies) != 1:
            raise argparse.ArgumentTypeError(f"expected one number before the *, got {entry!r}")
        for _ in range(copies[0]):
            shapes[f"{len(shapes)}: {'x'.join(map(str, numbers))}{mark}"] = numbers
    return shapes


def _mesh(text: str) -> tuple[int, ...]:
    try:
        numbers = _numbers(text)
    except argparse.ArgumentTypeError:
        numbers = (0,)
    if len(numbers) > 2 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a number of ranks, as 8, or replicas x shards, as 4x8, got {text!r}"
        )
    return numbers


def _size(text: str) -> int:
    numbers = _numbers(text)
    if len(numbers) != 1:
        raise argparse.ArgumentTypeError(f"expected one number, got {text!r}")
    return numbers[0]


def _momentum(text: str) -> float:
    try:
        momentum = float(text)
    except ValueError:
        momentum = -1.0
    if not 0 <= momentum < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number >= 0, got {text!r}")
    return momentum


def _block_size(text: str) -> int:
    block_size = _size(text)
    try:
        check_block_size(block_size)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return block_size


# -- models ----------------------------------------------------------------------------------------


def _llama(vocabulary: int, layers: int, hidden: int, keys: int, inner: int) -> Shapes:
    """Llama 3 as transformers names it; ``keys`` is the width of keys and values."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _gpt2(vocabulary: int, positions: int, layers: int, hidden: int) -> Shapes:
    """GPT-2 with its head tied to the embedding; matrices stand as in ``Conv1D``, inputs first."""
    shapes: Shapes = {"wte.weight": (vocabulary, hidden), "wpe.weight": (positions, hidden)}
    linear = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, 4 * hidden),
        "mlp.c_proj": (4 * hidden, hidden),
    }
    for i in range(layers):
        for name, shape in linear.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[1:]
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.{kind}": (hidden,) for kind in ("weight", "bias")}
    return {**shapes, "ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}


MODELS = {
    "gpt2": _gpt2(50257, 1024, 12, 768),
    "llama-8b": _llama(128256, 32, 4096, 1024, 14336),
    "llama-70b": _llama(128256, 80, 8192, 1024, 28672),
}
# The names of their embeddings.
EMBEDDINGS = {"wte.weight", "wpe.weight", "model.embed_tokens.weight"}

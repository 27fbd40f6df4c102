"""A program for ncu: steps of AdamW8bit over one large parameter."""

from __future__ import annotations

import argparse

import torch

import torchao8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--elements", type=int, default=1 << 26, help="a multiple of 1,024")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape, dtype = (args.elements // 1024, 1024), getattr(torch, args.dtype)
    param = torch.nn.Parameter(torch.randn(shape, device=args.device, dtype=dtype))
    param.grad = torch.randn_like(param)
    optimizer = torchao8.AdamW8bit([param], weight_decay=0.01)
    for _ in range(5):
        optimizer.step()
    print(f"5 steps of {param.numel()} elements, {args.dtype}: the mean is {param.mean():.3e}")


if __name__ == "__main__":
    main()

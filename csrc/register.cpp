// Every op schema of the library. The kernels are registered beside their code.
//
// What changes from step to step (lr, steps, grad_scale, found_inf) is a tensor, so that a compiled
// step is traced once. Lists that belong together have an element per parameter; an empty list
// means that no parameter has it. shard_offsets and shard_row_strides place a local shard in its
// global tensor (flat index of its first element; elements between two rows) and only feed the
// random numbers of stochastic rounding. `steps` are those made before; an optimizer counts its
// step by one count_step_ for all its tensors, behind the updates.
//
// sum_squares gives an int64 row per tensor, the exact sum as a fixed-point number
// (common/exact_sum.h), so that rows of shards can be added; norms rounds once, and takes roots.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torchao8, m) {
  m.def(
      "quantize_blockwise(Tensor input, *, int block_size=256, bool signed=True) "
      "-> (Tensor codes, Tensor scale)");
  m.def(
      "dequantize_blockwise(Tensor codes, Tensor scale, *, int block_size=256, bool signed=True, "
      "ScalarType dtype=float) -> Tensor");
  m.def(
      "adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] exp_avg_scales, "
      "Tensor(f!)[] exp_avg_sq_scales, Tensor(g!)[] max_exp_avg_sq_scales, Tensor[] steps, "
      "Tensor lr, Tensor? grad_scale, Tensor? found_inf, *, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled_weight_decay, bool maximize, int block_size=256, "
      "bool stochastic_rounding=True, int seed=0, int[] shard_offsets=[], "
      "int[] shard_row_strides=[]) -> ()");
  m.def("count_step_(Tensor(a!)[] steps, Tensor? found_inf) -> ()");
  m.def("sum_squares(Tensor[] tensors) -> Tensor");
  m.def("norms(Tensor sums) -> Tensor");
  m.def("cpu_capability() -> int");
}

// Every op of the library. Those of the families (rules/families.h) and lamb_update_sums have
// schemas that follow from code: op/schema.h writes the text, op/step_call.h and op/lamb_call.h
// name the arguments. The other schemas stand here. Kernels are registered beside their code.
//
// A step op updates parameters in place by one rule (see rules/). What changes from step to step
// (lr, steps, grad_scale, found_inf) is a tensor, so that a compiled step is traced once. So is the
// rest of a rule's numbers, all in one: `numbers`, float64 in the order of its kNumbers. Lists
// that belong together have an element per parameter; an empty list means that no parameter has it.
// shard_offsets and shard_row_strides place a local shard in its global tensor (flat index of its
// first element; elements between two rows, which are those of the block layout, or of 32-bit state
// the last dimension) and only feed the random numbers of stochastic rounding: of states, and, if
// stochastic_params, of bfloat16 parameters. `steps` are those made before; with count_steps the op
// counts its own behind the update, and else count_step_ does (of parameters that are in a call
// several times, or in none). An op that only counted what another one has read would cost
// torch.compile a dependency on each output of that one, for each count. `factors` are two float64
// numbers a parameter, or none at all: what its gradient and what the learning rate is multiplied
// by. Where the first is NaN, the parameter and its states keep their values.
//
// `state_format` is the number of the format of states with scales (formats/formats.h); float32
// states are told by their dtype.
//
// `extremes` are given where a tensor has one scale for each state, of shape (1,), in place of one
// for each block: int64 numbers, one a state, of what a step would make of all of the tensor. An
// op like adam_extremes finds them, a row for each parameter; of parts of a tensor they are
// compared by their maximum (codec/block_scale.h).
//
// sum_squares gives an int64 row per tensor, the exact sum as a fixed-point number
// (codec/exact_sum.h), so that rows of shards can be added; norms rounds once, and takes roots.
// prefetch_pages_ asks for paged memory ahead of the op that wants it; no value changes, but a
// compiler must keep it, in its place. allocate_managed and free_managed are of CUDA alone.
// lamb_update_sums gives such rows, of the updates that a step would make before a learning rate
// multiplies them. clip_factors_ and lars_trust_ratios are Python, in torchao8/optim. So are
// muon_update_, a step of Muon with its matrix products, and matrix_factors, which finds gradients
// that are not finite.
#include <torch/csrc/stable/library.h>

#include "op/schema.h"
#include "rules/families.h"

STABLE_TORCH_LIBRARY(torchao8, m) {
  m.def(
      "quantize_blockwise(Tensor input, *, int block_size=256, bool signed=True, "
      "int state_format=0) -> (Tensor codes, Tensor scale)");
  m.def(
      "dequantize_blockwise(Tensor codes, Tensor scale, *, int block_size=256, bool signed=True, "
      "ScalarType dtype=float, int state_format=0) -> Tensor");
  torchao8::for_each_type(torchao8::Families(), [&](auto type) {
    using Family = typename decltype(type)::type;
    m.def(torchao8::step_schema<Family>().c_str());
    m.def(torchao8::extremes_schema<Family>().c_str());
  });
  m.def(torchao8::lamb_schema().c_str());
  // Nothing but the checks of these ops, for torchao8/portable (check.cpp).
  torchao8::for_each_type(torchao8::Families(), [&](auto type) {
    using Family = typename decltype(type)::type;
    m.def((torchao8::kCheck + torchao8::step_schema<Family>(true)).c_str());
    m.def((torchao8::kCheck + torchao8::extremes_schema<Family>()).c_str());
  });
  m.def((torchao8::kCheck + torchao8::lamb_schema()).c_str());
  m.def("check_count_step_(Tensor[] steps, Tensor? found_inf) -> ()");
  m.def("check_sum_squares(Tensor[] tensors) -> ()");
  m.def("check_norms(Tensor sums) -> ()");
  m.def("check_quantize_blockwise(Tensor input, int block_size, int state_format) -> ()");
  m.def(
      "check_dequantize_blockwise(Tensor codes, Tensor scale, int block_size, ScalarType dtype, "
      "int state_format) -> ()");
  m.def(
      "clip_factors_(Tensor(a!)[] histories, Tensor norms, Tensor[] steps, Tensor? found_inf, "
      "SymInt percentile) -> Tensor");
  m.def(
      "lars_trust_ratios(Tensor param_norms, Tensor grad_norms, Tensor trust_coefficient, "
      "Tensor weight_decay) -> Tensor");
  m.def(
      "muon_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] momentum_buffer_scales, Tensor(d!)[] steps, Tensor[] factors, "
      "Tensor[] extremes, Tensor lr, Tensor numbers, Tensor? grad_scale, Tensor? found_inf, *, "
      "bool nesterov, bool maximize, int[] matrices, float[] coefficients, float eps, "
      "bool match_rms, int block_size, bool stochastic_params, bool count_steps, "
      "int state_format, SymInt seed) -> ()");
  m.def("matrix_factors(Tensor[] grads) -> Tensor");
  m.def("count_step_(Tensor(a!)[] steps, Tensor? found_inf) -> ()");
  m.def("sum_squares(Tensor[] tensors) -> Tensor");
  m.def("norms(Tensor sums) -> Tensor");
  m.def("prefetch_pages_(Tensor(a!)[] pages, Tensor now) -> ()");
  m.def("allocate_managed(Tensor like, int size) -> int");
  m.def("free_managed(Tensor like, int address) -> ()");
  m.def("cpu_capability() -> int");
}

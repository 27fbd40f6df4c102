// Every op schema of the library. The kernels are registered beside their code.
//
// A step op updates parameters in place by one rule (see rules/). What changes from step to step
// (lr, steps, grad_scale, found_inf) is a tensor, so that a compiled step is traced once. So is the
// rest of a rule's numbers, all in one: `numbers`, float64 in the order of its kNumbers. Lists
// that belong together have an element per parameter; an empty list means that no parameter has it.
// shard_offsets and shard_row_strides place a local shard in its global tensor (flat index of its
// first element; elements between two rows, which are those of the block layout, or of 32-bit state
// the last dimension) and only feed the random numbers of stochastic rounding: of states, and, if
// stochastic_params, of bfloat16 parameters. `steps` are those made before; an optimizer counts its
// step by one count_step_ for all its tensors, behind the updates. `factors` are two float64
// numbers a parameter, or none at all: what its gradient and what the learning rate is multiplied
// by.
//
// `extremes` are given where a tensor has one scale for each state, of shape (1,), in place of one
// for each block: int64 numbers, one a state, of what a step would make of all of the tensor. An
// op like adam_extremes finds them, a row for each parameter; of parts of a tensor they are
// compared by their maximum (common/block_scale.h).
//
// sum_squares gives an int64 row per tensor, the exact sum as a fixed-point number
// (common/exact_sum.h), so that rows of shards can be added; norms rounds once, and takes roots.
// prefetch_pages_ asks for paged memory ahead of the op that wants it; no value changes, but a
// compiler must keep it, in its place. allocate_managed and free_managed are of CUDA alone.
// lamb_update_sums gives such rows, of the updates that a step would make before a learning rate
// multiplies them. clip_factors_ and lars_trust_ratios are Python, in torchao8/optim.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// The lists of the states and their scales, in this order: all lists, then all scales.
std::string step_schema(const char* op, const char* lists, const char* options) {
  return std::string(op) + "(Tensor(a!)[] params, Tensor[] grads, " + lists +
         ", Tensor[] steps, Tensor[] factors, Tensor[] extremes, Tensor lr, Tensor numbers, "
         "Tensor? grad_scale, Tensor? found_inf, *, " +
         options +
         ", int block_size=256, bool stochastic_rounding=True, bool stochastic_params=False, "
         "SymInt seed=0, "
         "int[] shard_offsets=[], int[] shard_row_strides=[]) -> ()";
}

// Of the op that finds the extreme elements: the same lists, none of which is written to.
std::string extremes_schema(const std::string& op, std::string lists, const char* options) {
  for (size_t at; (at = lists.find('(')) != std::string::npos;) lists.erase(at, 4);
  return op + "(Tensor[] params, Tensor[] grads, " + lists +
         ", Tensor[] steps, Tensor[] factors, Tensor lr, Tensor numbers, Tensor? grad_scale, *, " +
         options + ") -> Tensor";
}

// The two ops of a family.
template <class Library>
void define_family(Library& m, const std::string& name, const char* lists, const char* options) {
  m.def(step_schema((name + "_step_").c_str(), lists, options).c_str());
  m.def(extremes_schema(name + "_extremes", lists, options).c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY(torchao8, m) {
  m.def(
      "quantize_blockwise(Tensor input, *, int block_size=256, bool signed=True) "
      "-> (Tensor codes, Tensor scale)");
  m.def(
      "dequantize_blockwise(Tensor codes, Tensor scale, *, int block_size=256, bool signed=True, "
      "ScalarType dtype=float) -> Tensor");
  define_family(m, "adagrad", "Tensor(b!)[] sums, Tensor(c!)[] sum_scales", "bool maximize");
  define_family(m, "adam",
                "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
                "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] exp_avg_scales, "
                "Tensor(f!)[] exp_avg_sq_scales, Tensor(g!)[] max_exp_avg_sq_scales",
                "bool decoupled_weight_decay, bool maximize");
  define_family(m, "ademamix",
                "Tensor(b!)[] exp_avg_fasts, Tensor(c!)[] exp_avg_slows, "
                "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_fast_scales, "
                "Tensor(f!)[] exp_avg_slow_scales, Tensor(g!)[] exp_avg_sq_scales",
                "bool maximize");
  define_family(m, "lion", "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_scales", "bool maximize");
  define_family(m, "rmsprop",
                "Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
                "Tensor(d!)[] momentum_buffers, Tensor(e!)[] square_avg_scales, "
                "Tensor(f!)[] grad_avg_scales, Tensor(g!)[] momentum_buffer_scales",
                "bool maximize");
  define_family(m, "sgd", "Tensor(b!)[] momentum_buffers, Tensor(c!)[] momentum_buffer_scales",
                "bool nesterov, bool rate_in_buffer, bool maximize");
  m.def(
      "clip_factors_(Tensor(a!)[] histories, Tensor norms, Tensor[] steps, Tensor? found_inf, "
      "SymInt percentile) -> Tensor");
  m.def(
      "lamb_update_sums(Tensor[] params, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, "
      "Tensor[] exp_avg_scales, Tensor[] exp_avg_sq_scales, Tensor[] steps, Tensor[] factors, "
      "Tensor numbers, Tensor? grad_scale, *, bool maximize, int block_size=256, bool "
      "block_wise=True) -> Tensor");
  m.def(
      "lars_trust_ratios(Tensor param_norms, Tensor grad_norms, Tensor trust_coefficient, "
      "Tensor weight_decay) -> Tensor");
  m.def("count_step_(Tensor(a!)[] steps, Tensor? found_inf) -> ()");
  m.def("sum_squares(Tensor[] tensors) -> Tensor");
  m.def("norms(Tensor sums) -> Tensor");
  m.def("prefetch_pages_(Tensor(a!)[] pages, Tensor now) -> ()");
  m.def("allocate_managed(Tensor like, int size) -> int");
  m.def("free_managed(Tensor like, int address) -> ()");
  m.def("cpu_capability() -> int");
}

// The call of a step op: its arguments, and every check that does not read a number from memory.
// What an engine adds is where those numbers are.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "common/block_layout.h"
#include "common/block_scale.h"
#include "common/checks.h"
#include "common/numbers.h"
#include "rules/rule.h"

namespace torchao8 {

// The two lists of a state: codes and their scales, or float32 values and no scales.
struct StateLists {
  std::string name, scale_name;
  const TensorList *values, *scales;
};

// The arguments as they came.
struct StepCall {
  const char* op;
  const TensorList &params, &grads, &steps, &factors, &extremes;
  std::vector<StateLists> lists;   // of all states of the family
  std::vector<StateLists> states;  // of those that the call has
  const bool* has;
  int64_t block_size;
  bool stochastic;
  bool stochastic_params;
  int64_t seed;
  const std::vector<int64_t>&shard_offsets, &shard_row_strides;
  Place place;
  bool one_scale;  // of 8-bit state: for a tensor, in place of one for each block

  bool quantized() const {
    return !params.empty() && !states.empty() &&
           (*states[0].values)[0].scalar_type() == ScalarType::Byte;
  }
};

// Which of a family's states a call has.
template <class Family>
struct PresentStates {
  static constexpr int kCount = int(std::size(Family::kStates));
  bool has[kCount];
  std::vector<StateLists> lists, states;

  PresentStates(const TensorList* const* values, const TensorList* const* scales) {
    for (int s = 0; s < kCount; s++) {
      const std::string name = Family::kStates[s];
      lists.push_back({name + "s", name + "_scales", values[s], scales[s]});
      has[s] = !Family::kOptional[s] || !values[s]->empty();
      if (has[s]) states.push_back(lists.back());
    }
  }
};

template <class List>
void check_length(const char* op, const std::string& name, const List& list, size_t expected,
                  const std::string& why) {
  TORCHAO8_CHECK(list.size() == expected, op, ": ", name, " must have ", expected, " elements (",
                 why, "), got ", list.size());
}

inline void check_lengths(const StepCall& call) {
  const size_t n = call.params.size();
  const char* why = "one per parameter";
  check_length(call.op, "grads", call.grads, n, why);
  check_length(call.op, "steps", call.steps, n, why);
  if (!call.factors.empty())
    check_length(call.op, "factors", call.factors, n, "none, or one per parameter");
  for (const StateLists& state : call.states)
    check_length(call.op, state.name, *state.values, n, why);
  const bool quantized = call.quantized();
  if (!call.extremes.empty()) {
    const std::string first = call.states.empty() ? "" : call.states[0].name + "[0] ";
    check_length(call.op, "extremes", call.extremes, quantized ? n : 0,
                 quantized ? "none, or one per parameter" : "none, " + first + "not being uint8");
  }
  for (size_t s = 0; s < call.lists.size(); s++) {
    const StateLists& state = call.lists[s];
    const std::string first = call.states.empty() ? "" : call.states[0].name + "[0]";
    const std::string reason = !call.has[s] ? "none, " + state.name + " being empty"
                               : quantized  ? "one per parameter, " + first + " being uint8"
                                            : "none, " + first + " not being uint8";
    check_length(call.op, state.scale_name, *state.scales, quantized && call.has[s] ? n : 0,
                 reason);
  }
  check_length(call.op, "shard_row_strides", call.shard_row_strides, call.shard_offsets.size(),
               "as many as shard_offsets");
  if (!call.shard_offsets.empty())
    check_length(call.op, "shard_offsets", call.shard_offsets, n, "none, or one per parameter");
}

inline void check_state(const StepCall& call, const StateLists& state, int64_t i,
                        const BlockLayout& layout) {
  const auto sizes = call.params[i].sizes();
  const Argument values{call.op, state.name.c_str(), i};
  const Tensor& t = (*state.values)[i];
  check_place(values, t, call.place);
  check_dtype(values, t, call.quantized() ? ScalarType::Byte : ScalarType::Float);
  check_shape(values, t, sizes, "that of the parameter");
  check_contiguous(values, t);
  if (!call.quantized()) return;
  const Argument scale{call.op, state.scale_name.c_str(), i};
  const Tensor& u = (*state.scales)[i];
  check_place(scale, u, call.place);
  check_dtype(scale, u, ScalarType::Float);
  const std::vector<int64_t> one = {1};
  check_shape(scale, u, call.one_scale ? one : layout.scale_shape,
              call.one_scale ? "one scale for the tensor" : "one scale per block of a row");
  check_contiguous(scale, u);
}

inline void check_parameter(const StepCall& call, int64_t i) {
  const Argument param{call.op, "params", i}, grad{call.op, "grads", i}, step{call.op, "steps", i};
  check_place(param, call.params[i], call.place);
  check_place(grad, call.grads[i], call.place);
  check_float_type(param, call.params[i]);
  check_float_type(grad, call.grads[i]);
  TORCHAO8_CHECK(!call.stochastic_params || call.params[i].scalar_type() != ScalarType::Half,
                 param.text(),
                 " must be bfloat16, which stochastic_params rounds, or float32, which takes no "
                 "rounding; got float16");
  check_shape(grad, call.grads[i], call.params[i].sizes(), "that of the parameter");
  check_no_overlap(param, call.params[i]);
  check_step(step, call.steps[i], call.place);
  if (!call.factors.empty()) check_factors({call.op, "factors", i}, call.factors[i], call.place);
  if (!call.extremes.empty()) {
    const Argument extremes{call.op, "extremes", i};
    const std::vector<int64_t> shape = {int64_t(call.states.size())};
    check_place(extremes, call.extremes[i], call.place);
    check_dtype(extremes, call.extremes[i], ScalarType::Long);
    check_shape(extremes, call.extremes[i], shape, "one for each state");
    check_contiguous(extremes, call.extremes[i]);
  }
  const BlockLayout layout = block_layout(call.params[i].sizes(), call.block_size);
  for (const StateLists& state : call.states) check_state(call, state, i, layout);
}

// All that can be told without reading a number.
inline void check_call(const StepCall& call) {
  check_lengths(call);
  for (size_t i = 0; i < call.params.size(); i++) check_parameter(call, int64_t(i));
  check_distinct(call.op, "params", call.params);
  for (const StateLists& state : call.states)
    check_distinct(call.op, state.name.c_str(), *state.values);
}

// Of extremes on the CPU, the numbers that they hold.
inline void check_extreme_values(const Argument& a, const Tensor& extremes) {
  const int64_t* values = extremes.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < extremes.numel(); s++)
    TORCHAO8_CHECK(values[s] >= 0 && values[s] <= kNoExtreme, a.text(),
                   " must hold numbers from 0 to 2^32 - 1, got ", values[s]);
}

// The numbers and flags of a family as its options. Numbers that lie on a GPU are NaN: no rule may
// be chosen by them here.
template <class Options, class... Flags>
Options make_options(const CommonOptions& common, const double* numbers, Flags... flags) {
  static_assert(sizeof...(flags) == std::size(Options::kFlags));
  Options options = {common};
  double unknown[kNumberCount<Options>];
  std::fill(std::begin(unknown), std::end(unknown), std::nan(""));
  set_numbers(options, numbers ? numbers : unknown);
  size_t i = 0;
  ((options.*Options::kFlags[i++] = flags), ...);
  return options;
}

template <class Options>
void check_options(const char* op, const Options& o, bool numbers_are_known = true) {
  for (const auto& argument : Options::kNumbers) {
    if (!numbers_are_known) break;
    const double value = o.*argument.value;
    const char* wanted = nullptr;
    switch (argument.range) {
      case Range::kDecayRate:
        if (!(value >= 0 && value < 1)) wanted = "be in [0, 1)";
        break;
      case Range::kNotNegative:
        if (!(value >= 0)) wanted = "not be negative";
        break;
      case Range::kFinite:
        if (!std::isfinite(value)) wanted = "be finite";
        break;
    }
    TORCHAO8_CHECK(!wanted, op, ": ", argument.name, " must ", wanted, ", got ", value);
  }
  TORCHAO8_CHECK(std::isfinite(o.lr), op, ": lr must be finite, got ", o.lr);
  TORCHAO8_CHECK(o.grad_scale > 0 && std::isfinite(o.grad_scale), op,
                 ": grad_scale must be positive and finite, got ", o.grad_scale);
}

}  // namespace torchao8

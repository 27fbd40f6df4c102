// The calls of a family's two ops: the step, and the one that finds the extreme elements which a
// step of tensors with one scale needs. Here are their names, their arguments, and the checks that
// both engines share. Only check_extreme_values reads tensors' memory: the CPU engine calls it.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "codec/block_layout.h"
#include "codec/block_scale.h"
#include "op/arguments.h"
#include "op/checks.h"
#include "op/format_check.h"
#include "op/numbers.h"
#include "rules/rule.h"

namespace torchao8 {

template <class Family>
const char* step_op() {
  static const std::string name = std::string(Family::kName) + "_step_";
  return name.c_str();
}

template <class Family>
const char* extremes_op() {
  static const std::string name = std::string(Family::kName) + "_extremes";
  return name.c_str();
}

constexpr int kMaxLists = 4;  // of the states of a family, scalar ones included
constexpr int kMaxFlags = 4;

// The two lists of a state: codes and their scales, or float32 values and no scales. Scalar states
// have no scales either.
struct StateLists {
  State state = {};
  TensorList values, scales;
};

// The suffixes of a state's name in those of its lists.
constexpr const char* kOfValues = "s";
constexpr const char* kOfScales = "_scales";

// A call as it came. Empty lists and the values here are those that a schema may leave out.
struct StepCall {
  const char* op = nullptr;
  Device device = kCpu;
  TensorList params, grads, steps, factors, extremes;
  StateLists lists[kMaxLists];  // of all states of the family
  int list_count = 0;
  std::optional<Tensor> lr, numbers, grad_scale, found_inf;
  bool flags[kMaxFlags] = {};
  int64_t block_size = 256;
  bool stochastic_rounding = true, stochastic_params = false;
  bool count_steps = false;  // adds 1 to each of steps, once the update is made
  int64_t seed = 0;
  std::vector<int64_t> shard_offsets, shard_row_strides;
  bool one_scale = false;    // of 8-bit state: for a tensor, in place of one for each block
  int64_t state_format = 0;  // of state with scales: its number (formats/formats.h)

  // What follows from the lists, by find_states(): the states that the call has.
  bool has[kMaxLists] = {};
  const StateLists* states[kMaxStates] = {};    // in tensors of the parameter's shape
  const StateLists* scalars[kMaxScalars] = {};  // numbers
  int state_count = 0, scalar_count = 0;
  bool quantized = false;

  explicit StepCall(const char* name) : op(name) {}
  template <class Family>
  void set_family(Type<Family>) {
    static_assert(std::size(Family::kStates) <= kMaxLists);
    static_assert(count_tensors<Family>() <= kMaxStates);
    static_assert(count_scalars<Family>() <= kMaxScalars);
    static_assert(std::size(Family::Options::kFlags) <= kMaxFlags);
    for (const State& state : Family::kStates) lists[list_count++].state = state;
  }

  void inspect() {
    for (TensorList* list : {&params, &grads, &steps, &factors, &extremes}) list->inspect();
    for (int s = 0; s < list_count; s++) {
      lists[s].values.inspect();
      lists[s].scales.inspect();
    }
  }
  void find_states() {
    for (int s = 0; s < list_count; s++) {
      const Presence presence = lists[s].state.presence;
      has[s] = presence != Presence::kOptional || !lists[s].values.empty();
      if (presence == Presence::kScalar) {
        scalars[scalar_count++] = &lists[s];
      } else if (has[s]) {
        states[state_count++] = &lists[s];
      }
    }
    quantized = !params.empty() && state_count > 0 && !states[0]->values.empty() &&
                states[0]->values[0].scalar_type() == ScalarType::Byte;
  }

  const TensorView& values(int s, size_t i) const { return states[s]->values[i]; }
  const TensorView& scales(int s, size_t i) const { return states[s]->scales[i]; }
  bool scales_gradient() const { return grad_scale.has_value() || !factors.empty(); }
};

// ---- the arguments ------------------------------------------------------------------------------

// The lists of the states, then those of their scales.
template <class Visitor>
void visit_states(Visitor& visit, StepCall& call, Access access) {
  for (int s = 0; s < call.list_count; s++)
    visit.list(std::string(call.lists[s].state.name) + kOfValues, call.lists[s].values, access);
  for (int s = 0; s < call.list_count; s++) {
    if (call.lists[s].state.presence == Presence::kScalar) continue;
    visit.list(std::string(call.lists[s].state.name) + kOfScales, call.lists[s].scales, access);
  }
}

template <class Family, class Visitor>
void visit_flags(Visitor& visit, StepCall& call) {
  bool* flag = call.flags;
  for (const auto& argument : Family::Options::kFlags) visit.flag(argument.name, *flag++);
}

template <class Family, class Visitor>
void visit_step(Visitor& visit, StepCall& call) {
  visit.list("params", call.params, Access::kWrite);
  visit.list("grads", call.grads);
  visit_states(visit, call, Access::kWrite);
  visit.list("steps", call.steps, Access::kWrite);
  visit.list("factors", call.factors);
  visit.list("extremes", call.extremes);
  visit.tensor("lr", call.lr);
  visit.tensor("numbers", call.numbers);
  visit.optional_tensor("grad_scale", call.grad_scale);
  visit.optional_tensor("found_inf", call.found_inf);
  visit.keywords();
  visit_flags<Family>(visit, call);
  visit.option("block_size", call.block_size);
  visit.option("stochastic_rounding", call.stochastic_rounding);
  visit.option("stochastic_params", call.stochastic_params);
  visit.option("count_steps", call.count_steps);
  visit.option("state_format", call.state_format);
  visit.symbolic_option("seed", call.seed);
  visit.option("shard_offsets", call.shard_offsets);
  visit.option("shard_row_strides", call.shard_row_strides);
}

template <class Family, class Visitor>
void visit_extremes(Visitor& visit, StepCall& call) {
  visit.list("params", call.params);
  visit.list("grads", call.grads);
  visit_states(visit, call, Access::kRead);
  visit.list("steps", call.steps);
  visit.list("factors", call.factors);
  visit.tensor("lr", call.lr);
  visit.tensor("numbers", call.numbers);
  visit.optional_tensor("grad_scale", call.grad_scale);
  visit.keywords();
  visit_flags<Family>(visit, call);
  visit.option("state_format", call.state_format);
}

// ---- the checks ---------------------------------------------------------------------------------

inline void check_lengths(const StepCall& call) {
  const size_t n = call.params.size();
  const auto check = [&](const char* name, const char* suffix, size_t length, size_t expected,
                         auto why) {
    if (length != expected)
      refuse(call.op, ": ", name, suffix, " must have ", expected, " elements (", why(), "), got ",
             length);
  };
  const auto one = [] { return "one per parameter"; };
  const auto any = [] { return "none, or one per parameter"; };
  const auto first = [&] {
    return call.state_count == 0 ? "" : std::string(call.states[0]->state.name) + kOfValues + "[0]";
  };
  check("grads", "", call.grads.size(), n, one);
  check("steps", "", call.steps.size(), n, one);
  if (!call.factors.empty()) check("factors", "", call.factors.size(), n, any);
  for (int s = 0; s < call.list_count; s++) {
    if (call.has[s])
      check(call.lists[s].state.name, kOfValues, call.lists[s].values.size(), n, one);
  }
  if (!call.extremes.empty()) {
    check("extremes", "", call.extremes.size(), call.quantized ? n : 0, [&] {
      if (call.quantized) return std::string("none, or one per parameter");
      return "none, " + first() + (call.state_count == 0 ? "" : " ") + "not being uint8";
    });
  }
  for (int s = 0; s < call.list_count; s++) {
    const StateLists& list = call.lists[s];
    const bool has_scales = call.has[s] && list.state.presence != Presence::kScalar;
    check(list.state.name, kOfScales, list.scales.size(), call.quantized && has_scales ? n : 0,
          [&] {
            if (!call.has[s])
              return std::string("none, ") + list.state.name + kOfValues + " being empty";
            return call.quantized ? "one per parameter, " + first() + " being uint8"
                                  : "none, " + first() + " not being uint8";
          });
  }
  check("shard_row_strides", "", call.shard_row_strides.size(), call.shard_offsets.size(),
        [] { return "as many as shard_offsets"; });
  if (!call.shard_offsets.empty()) check("shard_offsets", "", call.shard_offsets.size(), n, any);
}

// code_bits: of codes; those of 8 have the shape of the parameter, as float32 values do.
inline void check_state(const StepCall& call, const StateLists& lists, size_t i,
                        const BlockLayout& layout, int code_bits) {
  const Sizes sizes = call.params[i].sizes();
  const Argument values{call.op, lists.state.name, int64_t(i), kOfValues};
  const TensorView& t = lists.values[i];
  check_device(values, t, call.device);
  check_dtype(values, t, call.quantized ? ScalarType::Byte : ScalarType::Float);
  if (call.quantized && code_bits != 8) {
    check_shape(values, t, layout.codes_shape(sizes, code_bits), "two elements a byte of a row");
  } else {
    check_shape(values, t, sizes, "that of the parameter");
  }
  check_contiguous(values, t);
  if (!call.quantized) return;
  const Argument scale{call.op, lists.state.name, int64_t(i), kOfScales};
  const TensorView& u = lists.scales[i];
  check_device(scale, u, call.device);
  check_dtype(scale, u, ScalarType::Float);
  if (call.one_scale) {
    const int64_t one = 1;
    check_shape(scale, u, Sizes(&one, 1), "one scale for the tensor");
  } else if (!layout.is_scale_shape(sizes, u.sizes())) {
    check_shape(scale, u, layout.scale_shape(sizes), "one scale per block of a row");
  }
  check_contiguous(scale, u);
}

inline void check_scalar(const StepCall& call, const StateLists& lists, size_t i) {
  const Argument values{call.op, lists.state.name, int64_t(i), kOfValues};
  check_device(values, lists.values[i], call.device);
  check_dtype(values, lists.values[i], ScalarType::Float);
  check_shape(values, lists.values[i], Sizes(), "one number for the parameter");
}

inline void check_extremes(const StepCall& call, size_t i) {
  const Argument extremes{call.op, "extremes", int64_t(i)};
  const int64_t count = call.state_count;
  check_device(extremes, call.extremes[i], call.device);
  check_dtype(extremes, call.extremes[i], ScalarType::Long);
  check_shape(extremes, call.extremes[i], Sizes(&count, 1), "one for each state");
  check_contiguous(extremes, call.extremes[i]);
}

inline void check_parameter(const StepCall& call, size_t i, int code_bits) {
  const int64_t index = int64_t(i);
  const Argument param{call.op, "params", index}, grad{call.op, "grads", index};
  const TensorView &p = call.params[i], &g = call.grads[i];
  check_device(param, p, call.device);
  check_device(grad, g, call.device);
  check_float_type(param, p);
  check_float_type(grad, g);
  TORCHAO8_CHECK(!call.stochastic_params || p.scalar_type() != ScalarType::Half, param.text(),
                 " must be bfloat16, which stochastic_params rounds, or float32, which takes no "
                 "rounding; got float16");
  check_shape(grad, g, p.sizes(), "that of the parameter");
  check_no_overlap(param, p);
  check_step({call.op, "steps", index}, call.steps[i], call.device);
  if (!call.factors.empty())
    check_factors({call.op, "factors", index}, call.factors[i], call.device);
  if (!call.extremes.empty()) check_extremes(call, i);
  BlockLayout layout;
  if (call.quantized) layout = block_layout(p.sizes(), call.block_size);
  for (int s = 0; s < call.state_count; s++)
    check_state(call, *call.states[s], i, layout, code_bits);
  for (int s = 0; s < call.scalar_count; s++) check_scalar(call, *call.scalars[s], i);
}

// All that can be told without reading a number.
inline void check_call(const StepCall& call) {
  check_lengths(call);
  const int code_bits = format_info(call.state_format).bits;
  for (size_t i = 0; i < call.params.size(); i++) check_parameter(call, i, code_bits);
  check_distinct(call.op, "params", "", call.params);
  for (int s = 0; s < call.list_count; s++) {
    if (call.has[s])
      check_distinct(call.op, call.lists[s].state.name, kOfValues, call.lists[s].values);
  }
  if (call.count_steps) check_distinct(call.op, "steps", "", call.steps);
}

// The format of states with scales. Those: the formats that the engine has kernels of.
template <class Those>
void check_state_format(const StepCall& call, Those those) {
  check_state_format(call.op, call.state_format, those);
  TORCHAO8_CHECK(call.quantized || call.state_count == 0 || call.state_format == 0, call.op,
                 ": state_format must be 0 where states are float32, got ", call.state_format);
}

// Of the op that finds extreme elements, also.
inline void check_extremes_call(const StepCall& call) {
  check_call(call);
  const State& first = call.lists[0].state;
  TORCHAO8_CHECK(call.quantized, call.op, ": ", first.name, kOfValues,
                 " must be uint8, as 8-bit state is, got ",
                 call.state_count == 0 ? "none" : dtype_name(call.values(0, 0).scalar_type()));
}

// Of extremes on the CPU, the numbers that they hold.
inline void check_extreme_values(const Argument& a, const TensorView& extremes) {
  const int64_t* values = extremes.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < extremes.numel(); s++)
    TORCHAO8_CHECK(values[s] >= 0 && values[s] <= kNoExtreme, a.text(),
                   " must hold numbers from 0 to 2^32 - 1, got ", values[s]);
}

// ---- the options --------------------------------------------------------------------------------

// The numbers and flags of a family as its options. Numbers that lie on a GPU are NaN: no rule may
// be chosen by them here.
template <class Options>
Options make_options(const CommonOptions& common, const double* numbers, const bool* flags) {
  Options options = {};
  static_cast<CommonOptions&>(options) = common;
  double unknown[kNumberCount<Options>];
  std::fill(std::begin(unknown), std::end(unknown), std::nan(""));
  set_numbers(options, numbers ? numbers : unknown);
  for (const auto& argument : Options::kFlags) options.*argument.value = *flags++;
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

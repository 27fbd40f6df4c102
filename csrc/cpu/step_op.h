// A step op on the CPU, for any family of rules: its checks, and what the engine needs of its
// arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/step_call.h"
#include "cpu/engine.h"
#include "cpu/extremes.h"

namespace torchao8 {

inline double read_scalar(const Argument& a, const Tensor& t) {
  check_place(a, t, kCpu);
  check_number(a, t);
  return read_number(t);
}

// A family's options from the arguments of a call.
template <class Options, class... Flags>
Options read_options(const char* op, const std::optional<Tensor>& lr, const Tensor& numbers,
                     const std::optional<Tensor>& grad_scale, Flags... flags) {
  check_place({op, "numbers"}, numbers, kCpu);
  check_numbers({op, "numbers"}, numbers, kNumberCount<Options>);
  const CommonOptions common = {lr ? read_scalar({op, "lr"}, *lr) : 1,
                                grad_scale ? read_scalar({op, "grad_scale"}, *grad_scale) : 1};
  const auto options = make_options<Options>(common, numbers.const_data_ptr<double>(), flags...);
  check_options(op, options);
  return options;
}

template <class Rule>
Item<Rule> make_item(const StepCall& call, int64_t i) {
  Item<Rule> item;
  const Tensor &param = call.params[i], &grad = call.grads[i];
  item.param =
      FloatArray(param, check_float_type({call.op, "params", i}, param), param.mutable_data_ptr());
  item.grad =
      FloatArray(grad, check_float_type({call.op, "grads", i}, grad), grad.const_data_ptr());
  const bool sharded = !call.shard_offsets.empty();
  item.shard_offset = sharded ? call.shard_offsets[i] : 0;
  item.rounds_param = call.stochastic_params && item.param.type() == FloatType::kBFloat16;
  if (!call.quantized()) {
    item.row_length = item.run_length = param.numel();
    if (sharded && param.dim() > 1 && call.shard_row_strides[i] != param.sizes().back()) {
      item.run_length = param.sizes().back();
      item.row_stride = call.shard_row_strides[i];
    }
    item.units_per_row = Engine<Rule>::chunks(item.row_length);
    for (int s = 0; s < Rule::kStates; s++)
      item.states[s] = (*call.states[s].values)[i].template mutable_data_ptr<float>();
    return item;
  }
  const BlockLayout layout = block_layout(param.sizes(), call.block_size);
  item.rows = layout.rows;
  item.row_length = item.row_stride = layout.row_length;
  item.units_per_row = layout.blocks_per_row;
  if (sharded) item.row_stride = call.shard_row_strides[i];
  item.one_scale = call.one_scale;
  for (int s = 0; s < Rule::kStates; s++) {
    if (!call.extremes.empty()) {
      const int64_t key = call.extremes[i].template const_data_ptr<int64_t>()[s];
      item.extremes[s] = Rule::kSigned[s] ? extreme_of_key<true>(key) : extreme_of_key<false>(key);
    }
    item.codes[s] = (*call.states[s].values)[i].template mutable_data_ptr<uint8_t>();
    item.scales[s] = (*call.states[s].scales)[i].template mutable_data_ptr<float>();
  }
  return item;
}

template <class Rule>
void step_all(const StepCall& call, const typename Rule::Options& options) {
  Engine<Rule> engine(call.block_size, call.stochastic);
  Item<Rule> latest;  // parameters mostly share their step
  int64_t latest_step = -1;
  for (size_t i = 0; i < call.params.size(); i++) {
    const int64_t step = int64_t(*call.steps[i].const_data_ptr<float>()) + 1;
    if (step != latest_step || !call.factors.empty()) {
      typename Rule::Options own = options;
      if (!call.factors.empty()) own.multiply(call.factors[i].const_data_ptr<double>());
      latest.rule = Rule::at_step(own, step, call.quantized());
      for (int s = 0; s < Rule::kStates; s++)
        latest.keys[s] = random_key(uint64_t(call.seed), uint64_t(step), s);
      latest.param_key = random_key(uint64_t(call.seed), uint64_t(step), kParamStream);
      latest_step = step;
    }
    Item<Rule> item = make_item<Rule>(call, int64_t(i));
    item.rule = latest.rule;
    std::copy(latest.keys, latest.keys + kMaxStates, item.keys);
    item.param_key = latest.param_key;
    engine.add(std::move(item));
  }
  engine.run();
  engine.write_scales();
}

// A row for each parameter: the keys of the extreme elements of its new states.
template <class Rule>
Tensor find_extremes(const StepCall& call, const typename Rule::Options& options) {
  Tensor keys = new_extremes(call);
  ExtremeFinder<Rule> finder;
  for (size_t i = 0; i < call.params.size(); i++) {
    Item<Rule> item = make_item<Rule>(call, int64_t(i));
    typename Rule::Options own = options;
    if (!call.factors.empty()) own.multiply(call.factors[i].const_data_ptr<double>());
    item.rule = Rule::at_step(own, int64_t(*call.steps[i].const_data_ptr<float>()) + 1, true);
    finder.add(std::move(item), keys.mutable_data_ptr<int64_t>() + i * call.states.size());
  }
  finder.run();
  return keys;
}

// The op's function. Its lists of states and its own arguments are those of the family.
template <class Family, class States, class Flags>
struct StepOpOf;
template <class Family, size_t... S, size_t... F>
struct StepOpOf<Family, std::index_sequence<S...>, std::index_sequence<F...>> {
  template <size_t>
  using List = TensorList;
  template <size_t>
  using Flag = bool;
  using Options = typename Family::Options;

  static void run(TensorList params, TensorList grads, List<S>... values, List<S>... scales,
                  TensorList steps, TensorList factors, TensorList extremes, Tensor lr,
                  Tensor numbers, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                  Flag<F>... flags, int64_t block_size, bool stochastic_rounding,
                  bool stochastic_params, int64_t seed, std::vector<int64_t> shard_offsets,
                  std::vector<int64_t> shard_row_strides) {
    const TensorList *value_lists[] = {&values...}, *scale_lists[] = {&scales...};
    const PresentStates<Family> present(value_lists, scale_lists);
    const StepCall call{Family::kOp,
                        params,
                        grads,
                        steps,
                        factors,
                        extremes,
                        present.lists,
                        present.states,
                        present.has,
                        block_size,
                        stochastic_rounding,
                        stochastic_params,
                        seed,
                        shard_offsets,
                        shard_row_strides,
                        kCpu,
                        !extremes.empty()};
    check_block_size(Family::kOp, block_size);
    const DefaultFloatingPoint guard;
    const auto options = read_options<Options>(Family::kOp, lr, numbers, grad_scale, flags...);
    check_call(call);
    for (size_t i = 0; i < steps.size(); i++)
      check_count({Family::kOp, "steps", int64_t(i)}, steps[i]);
    for (size_t i = 0; i < factors.size(); i++)
      check_factor_values({Family::kOp, "factors", int64_t(i)}, factors[i]);
    for (size_t i = 0; i < extremes.size(); i++)
      check_extreme_values({Family::kOp, "extremes", int64_t(i)}, extremes[i]);
    if (found_inf && read_scalar({Family::kOp, "found_inf"}, *found_inf) != 0) return;
    Family::choose(options, present.has, grad_scale.has_value() || !factors.empty(),
                   [&](auto rule) { step_all<typename decltype(rule)::type>(call, options); });
  }

  // The op that looks at a step with one scale a tensor before it is made.
  static Tensor extremes(TensorList params, TensorList grads, List<S>... values, List<S>... scales,
                         TensorList steps, TensorList factors, Tensor lr, Tensor numbers,
                         std::optional<Tensor> grad_scale, Flag<F>... flags) {
    const char* op = Family::kExtremesOp;
    const TensorList *value_lists[] = {&values...}, *scale_lists[] = {&scales...};
    const ExtremesCall<Family> wanted(params, grads, value_lists, scale_lists, steps, factors,
                                      kCpu);
    const StepCall& call = wanted.call;
    const DefaultFloatingPoint guard;
    const auto options = read_options<Options>(op, lr, numbers, grad_scale, flags...);
    wanted.check();
    for (size_t i = 0; i < steps.size(); i++) check_count({op, "steps", int64_t(i)}, steps[i]);
    for (size_t i = 0; i < factors.size(); i++)
      check_factor_values({op, "factors", int64_t(i)}, factors[i]);
    std::optional<Tensor> keys;
    Family::choose(options, wanted.present.has, grad_scale.has_value() || !factors.empty(),
                   [&](auto rule) {
                     using Rule = typename decltype(rule)::type;
                     if constexpr (Rule::kStates > 0) keys = find_extremes<Rule>(call, options);
                   });
    return *keys;
  }
};
template <class Family>
using StepOp = StepOpOf<Family, std::make_index_sequence<std::size(Family::kStates)>,
                        std::make_index_sequence<std::size(Family::Options::kFlags)>>;

}  // namespace torchao8

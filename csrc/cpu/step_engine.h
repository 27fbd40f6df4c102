// What the CPU does with a checked call of a family's ops: makes the engine's items of it.
#pragma once

#include <deque>
#include <vector>

#include "cpu/engine.h"
#include "cpu/extremes.h"
#include "op/step_call.h"

namespace torchao8 {

inline double read_scalar(const Argument& a, const Tensor& tensor) {
  const TensorView t(tensor);
  check_device(a, t, kCpu);
  check_number(a, t);
  return read_number(t);
}

// The numbers of a call, read.
template <class Options>
struct CpuNumbers {
  Options options;
  bool found_inf;

  explicit CpuNumbers(const StepCall& call) {
    const Argument argument{call.op, "numbers"};
    const TensorView numbers(*call.numbers);
    check_device(argument, numbers, kCpu);
    check_numbers(argument, numbers, kNumberCount<Options>, kCpu);
    const CommonOptions common = {
        call.lr ? read_scalar({call.op, "lr"}, *call.lr) : 1,
        call.grad_scale ? read_scalar({call.op, "grad_scale"}, *call.grad_scale) : 1};
    options = make_options<Options>(common, numbers.const_data_ptr<double>(), call.flags);
    check_options(call.op, options);
    found_inf = call.found_inf && read_scalar({call.op, "found_inf"}, *call.found_inf) != 0;
  }
  bool skips() const { return found_inf; }
};

// All but `step`.
template <class Rule>
void fill_item(Item<Rule>& item, const StepCall& call, size_t i) {
  const int64_t index = int64_t(i);
  const TensorView &param = call.params[i], &grad = call.grads[i];
  item.param = FloatArray(param, check_float_type({call.op, "params", index}, param),
                          param.mutable_data_ptr());
  item.grad =
      FloatArray(grad, check_float_type({call.op, "grads", index}, grad), grad.const_data_ptr());
  const bool sharded = !call.shard_offsets.empty();
  item.shard_offset = sharded ? call.shard_offsets[i] : 0;
  item.rounds_param = call.stochastic_params && item.param.type() == FloatType::kBFloat16;
  if (!call.quantized) {
    item.row_length = item.run_length = param.numel();
    if (sharded && param.dim() > 1 && call.shard_row_strides[i] != param.sizes().back()) {
      item.run_length = param.sizes().back();
      item.row_stride = call.shard_row_strides[i];
    }
    item.units_per_row = Engine<Rule>::chunks(item.row_length);
    for (int s = 0; s < Rule::kStates; s++)
      item.states[s] = call.values(s, i).template mutable_data_ptr<float>();
    return;
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
    item.codes[s] = call.values(s, i).template mutable_data_ptr<uint8_t>();
    item.scales[s] = call.scales(s, i).template mutable_data_ptr<float>();
  }
}

// The rules of a call's tensors, at their steps. Neighbours mostly share one.
template <class Rule>
class RulesOfCall {
 public:
  RulesOfCall(const StepCall& call, const typename Rule::Options& options)
      : call_(call), options_(options) {}

  // The rule of tensor i. It lives as long as this object.
  const StepOfRule<Rule>* at(size_t i) {
    const int64_t t = int64_t(*call_.steps[i].const_data_ptr<float>()) + 1;
    if (t == latest_ && call_.factors.empty() && kScalarsOf<Rule> == 0) return &steps_.back();
    latest_ = t;
    typename Rule::Options own = options_;
    if (!call_.factors.empty()) own.multiply(call_.factors[i].const_data_ptr<double>());
    StepOfRule<Rule>& step = steps_.emplace_back();
    float scalars[kMaxScalars] = {};
    for (int s = 0; s < kScalarsOf<Rule>; s++)
      scalars[s] = *call_.scalars[s]->values[i].template const_data_ptr<float>();
    step.rule = rule_at_step<Rule>(own, t, call_.quantized, scalars);
    for (int s = 0; s < kScalarsOf<Rule>; s++) scalars_.push_back(scalars[s]);
    for (int s = 0; s < Rule::kStates; s++)
      step.keys[s] = random_key(uint64_t(call_.seed), uint64_t(t), uint64_t(s));
    step.param_key = random_key(uint64_t(call_.seed), uint64_t(t), kParamStream);
    return &step;
  }

  // Writes the new scalar states of all tensors. at(i) has been called once for each, in order.
  void write_scalars() const {
    auto value = scalars_.begin();
    for (size_t i = 0; i < call_.params.size(); i++) {
      for (int s = 0; s < kScalarsOf<Rule>; s++)
        *call_.scalars[s]->values[i].template mutable_data_ptr<float>() = *value++;
    }
  }

 private:
  const StepCall& call_;
  const typename Rule::Options& options_;
  int64_t latest_ = -1;
  std::deque<StepOfRule<Rule>> steps_;
  std::vector<float> scalars_;
};

// See FamilyOps.
struct CpuStep {
  using Formats = torchao8::Formats;
  static constexpr bool kNeedsTensors = false;
  using Guard = DefaultFloatingPoint;
  template <class Options>
  using Numbers = CpuNumbers<Options>;

  static Device device_of(const StepCall&) { return kCpu; }

  static void check_values(const StepCall& call) {
    for (size_t i = 0; i < call.steps.size(); i++)
      check_count({call.op, "steps", int64_t(i)}, call.steps[i]);
    for (size_t i = 0; i < call.factors.size(); i++)
      check_factor_values({call.op, "factors", int64_t(i)}, call.factors[i]);
    for (size_t i = 0; i < call.extremes.size(); i++)
      check_extreme_values({call.op, "extremes", int64_t(i)}, call.extremes[i]);
  }

  template <class Rule>
  static void step(const StepCall& call, const Numbers<typename Rule::Options>& numbers) {
    RulesOfCall<Rule> rules(call, numbers.options);
    Engine<Rule> engine(call.block_size, call.stochastic_rounding, call.state_format,
                        call.params.size());
    for (size_t i = 0; i < call.params.size(); i++) {
      engine.add([&](Item<Rule>& item) {
        fill_item(item, call, i);
        item.step = rules.at(i);
      });
    }
    engine.run();
    engine.write_scales();
    if constexpr (kScalarsOf<Rule> > 0) rules.write_scalars();
  }

  template <class Options>
  static void count_steps(const StepCall& call, const Numbers<Options>&) {
    for (const TensorView& step : call.steps) *step.mutable_data_ptr<float>() += 1;
  }

  template <class Rule>
  static void find_extremes(const StepCall& call, const Numbers<typename Rule::Options>& numbers,
                            int64_t* keys) {
    RulesOfCall<Rule> rules(call, numbers.options);
    ExtremeFinder<Rule> finder(call.state_format);
    for (size_t i = 0; i < call.params.size(); i++) {
      finder.add(
          [&](Item<Rule>& item) {
            fill_item(item, call, i);
            item.step = rules.at(i);
          },
          keys + i * size_t(call.state_count));
    }
    finder.run();
  }
};

}  // namespace torchao8

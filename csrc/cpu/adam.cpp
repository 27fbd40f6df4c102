// The op adam_step_ on the CPU: its checks, and what Adam needs of the engine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "rules/adam.h"

namespace torchao8 {
namespace {

constexpr const char* kOp = "adam_step_";
constexpr float kLastStep = 16777216.0f;
constexpr int kMoments = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

using TensorList = std::vector<Tensor>;

// The arguments as they came.
struct AdamCall {
  const TensorList &params, &grads;
  const TensorList* moments[kMoments];
  const TensorList* scales[kMoments];
  const TensorList& steps;
  int64_t block_size;
  bool stochastic;
  int64_t seed;
  const std::vector<int64_t>&shard_offsets, &shard_row_strides;

  bool amsgrad() const { return !moments[2]->empty(); }
  int states() const { return amsgrad() ? 3 : 2; }
  bool quantized() const {
    return !params.empty() && (*moments[0])[0].scalar_type() == ScalarType::Byte;
  }
};

constexpr const char* kMomentNames[kMoments] = {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"};
constexpr const char* kScaleNames[kMoments] = {"exp_avg_scales", "exp_avg_sq_scales",
                                               "max_exp_avg_sq_scales"};

template <class List>
void check_length(const char* name, const List& list, size_t expected, const char* why) {
  STD_TORCH_CHECK(list.size() == expected, kOp, ": ", name, " must have ", expected, " elements (",
                  why, "), got ", list.size());
}

void check_lengths(const AdamCall& call) {
  const size_t n = call.params.size();
  const char* why = "one per parameter";
  check_length("grads", call.grads, n, why);
  check_length("steps", call.steps, n, why);
  check_length("exp_avgs", *call.moments[0], n, why);
  check_length("exp_avg_sqs", *call.moments[1], n, why);
  if (call.amsgrad()) check_length("max_exp_avg_sqs", *call.moments[2], n, why);
  const bool quantized = call.quantized();
  for (int s = 0; s < kMoments; s++) {
    const bool present = quantized && s < call.states();
    const char* reason = present      ? "one per parameter, exp_avgs[0] being uint8"
                         : !quantized ? "none, exp_avgs[0] not being uint8"
                                      : "none, max_exp_avg_sqs being empty";
    check_length(kScaleNames[s], *call.scales[s], present ? n : 0, reason);
  }
  check_length("shard_row_strides", call.shard_row_strides, call.shard_offsets.size(),
               "as many as shard_offsets");
  if (!call.shard_offsets.empty())
    check_length("shard_offsets", call.shard_offsets, n, "none, or one per parameter");
}

void check_state(const AdamCall& call, int s, int64_t i, const BlockLayout& layout) {
  const auto sizes = call.params[i].sizes();
  const Argument moment{kOp, kMomentNames[s], i};
  const Tensor& m = (*call.moments[s])[i];
  check_cpu(moment, m);
  check_dtype(moment, m, call.quantized() ? ScalarType::Byte : ScalarType::Float);
  check_shape(moment, m, sizes, "that of the parameter");
  check_contiguous(moment, m);
  if (!call.quantized()) return;
  const Argument scale{kOp, kScaleNames[s], i};
  const Tensor& t = (*call.scales[s])[i];
  check_cpu(scale, t);
  check_dtype(scale, t, ScalarType::Float);
  check_shape(scale, t, layout.scale_shape, "one scale per block of a row");
  check_contiguous(scale, t);
}

void check_parameter(const AdamCall& call, int64_t i) {
  const Argument param{kOp, "params", i}, grad{kOp, "grads", i}, step{kOp, "steps", i};
  check_cpu(param, call.params[i]);
  check_cpu(grad, call.grads[i]);
  check_float_type(param, call.params[i]);
  check_float_type(grad, call.grads[i]);
  check_shape(grad, call.grads[i], call.params[i].sizes(), "that of the parameter");
  check_no_overlap(param, call.params[i]);
  check_cpu(step, call.steps[i]);
  check_dtype(step, call.steps[i], ScalarType::Float);
  STD_TORCH_CHECK(call.steps[i].numel() == 1, step.text(), " must have one element, got shape ",
                  shape_text(call.steps[i].sizes()));
  const float value = *call.steps[i].const_data_ptr<float>();
  STD_TORCH_CHECK(value >= 0 && value < kLastStep && std::floor(value) == value, step.text(),
                  " must be a whole number from 0 to 2^24 - 1, up to which float32 counts, got ",
                  value);
  const BlockLayout layout = block_layout(call.params[i].sizes(), call.block_size);
  for (int s = 0; s < call.states(); s++) check_state(call, s, i, layout);
}

// A number that is given as a tensor, so that it can change without a new trace.
double read_scalar(const char* name, const Tensor& t) {
  const Argument argument{kOp, name};
  check_cpu(argument, t);
  STD_TORCH_CHECK(t.numel() == 1, argument.text(), " must have one element, got shape ",
                  shape_text(t.sizes()));
  if (t.scalar_type() == ScalarType::Double) return *t.const_data_ptr<double>();
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, argument.text(),
                  " must be float32 or float64, got ", dtype_name(t.scalar_type()));
  return *t.const_data_ptr<float>();
}

void check_options(const AdamOptions& o) {
  const auto in_unit = [](double beta) { return beta >= 0 && beta < 1; };
  STD_TORCH_CHECK(in_unit(o.beta1), kOp, ": beta1 must be in [0, 1), got ", o.beta1);
  STD_TORCH_CHECK(in_unit(o.beta2), kOp, ": beta2 must be in [0, 1), got ", o.beta2);
  STD_TORCH_CHECK(o.eps >= 0, kOp, ": eps must not be negative, got ", o.eps);
  STD_TORCH_CHECK(o.weight_decay >= 0, kOp, ": weight_decay must not be negative, got ",
                  o.weight_decay);
  STD_TORCH_CHECK(o.grad_scale > 0 && std::isfinite(o.grad_scale), kOp,
                  ": grad_scale must be positive and finite, got ", o.grad_scale);
}

// Two threads may work on two entries of a list at once.
void check_distinct(const char* name, const TensorList& tensors) {
  std::vector<std::pair<const void*, size_t>> places;
  for (size_t i = 0; i < tensors.size(); i++) {
    if (tensors[i].numel() > 0) places.emplace_back(tensors[i].const_data_ptr(), i);
  }
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); i++) {
    STD_TORCH_CHECK(places[i].first != places[i - 1].first, kOp, ": ", name, "[",
                    places[i - 1].second, "] and ", name, "[", places[i].second,
                    "] must be different tensors, got the same memory twice");
  }
}

template <class Rule>
Item<Rule> make_item(const AdamCall& call, int64_t i) {
  Item<Rule> item;
  const Tensor &param = call.params[i], &grad = call.grads[i];
  item.param =
      FloatArray(param, check_float_type({kOp, "params", i}, param), param.mutable_data_ptr());
  item.grad = FloatArray(grad, check_float_type({kOp, "grads", i}, grad), grad.const_data_ptr());
  if (!call.quantized()) {
    item.row_length = param.numel();
    item.units_per_row = Engine<Rule>::chunks(item.row_length);
    for (int s = 0; s < Rule::kStates; s++)
      item.states[s] = (*call.moments[s])[i].template mutable_data_ptr<float>();
    return item;
  }
  const BlockLayout layout = block_layout(param.sizes(), call.block_size);
  item.rows = layout.rows;
  item.row_length = item.row_stride = layout.row_length;
  item.units_per_row = layout.blocks_per_row;
  if (!call.shard_offsets.empty()) {
    item.shard_offset = call.shard_offsets[i];
    item.row_stride = call.shard_row_strides[i];
  }
  for (int s = 0; s < Rule::kStates; s++) {
    item.codes[s] = (*call.moments[s])[i].template mutable_data_ptr<uint8_t>();
    item.scales[s] = (*call.scales[s])[i].template mutable_data_ptr<float>();
  }
  return item;
}

template <class Rule>
void step_all(const AdamCall& call, const AdamOptions& options) {
  Engine<Rule> engine(call.block_size, call.stochastic);
  Item<Rule> latest;  // parameters mostly share their step
  int64_t latest_step = -1;
  for (size_t i = 0; i < call.params.size(); i++) {
    const int64_t step = int64_t(*call.steps[i].const_data_ptr<float>()) + 1;
    if (step != latest_step) {
      latest.rule = Rule::at_step(options, step, call.quantized());
      for (int s = 0; s < Rule::kStates; s++)
        latest.keys[s] = random_key(uint64_t(call.seed), uint64_t(step), s);
      latest_step = step;
    }
    Item<Rule> item = make_item<Rule>(call, int64_t(i));
    item.rule = latest.rule;
    std::copy(latest.keys, latest.keys + kMaxStates, item.keys);
    engine.add(std::move(item));
  }
  engine.run();
  for (const Tensor& step : call.steps) *step.mutable_data_ptr<float>() += 1;
}

void adam_step_cpu(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                   TensorList max_exp_avg_sqs, TensorList exp_avg_scales,
                   TensorList exp_avg_sq_scales, TensorList max_exp_avg_sq_scales, TensorList steps,
                   Tensor lr, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                   double beta1, double beta2, double eps, double weight_decay,
                   bool decoupled_weight_decay, bool maximize, int64_t block_size,
                   bool stochastic_rounding, int64_t seed, std::vector<int64_t> shard_offsets,
                   std::vector<int64_t> shard_row_strides) {
  const AdamCall call{params,
                      grads,
                      {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs},
                      {&exp_avg_scales, &exp_avg_sq_scales, &max_exp_avg_sq_scales},
                      steps,
                      block_size,
                      stochastic_rounding,
                      seed,
                      shard_offsets,
                      shard_row_strides};
  check_block_size(kOp, block_size);
  const DefaultFloatingPoint guard;
  AdamOptions options;
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.eps = eps;
  options.weight_decay = weight_decay;
  options.lr = read_scalar("lr", lr);
  options.grad_scale = grad_scale ? read_scalar("grad_scale", *grad_scale) : 1;
  options.maximize = maximize;
  options.decoupled = decoupled_weight_decay;
  check_options(options);
  check_lengths(call);
  for (size_t i = 0; i < params.size(); i++) check_parameter(call, int64_t(i));
  check_distinct("params", params);
  check_distinct("exp_avgs", exp_avgs);
  check_distinct("exp_avg_sqs", exp_avg_sqs);
  check_distinct("steps", steps);
  if (found_inf && read_scalar("found_inf", *found_inf) != 0) return;

  const bool plain = AdamRule<false, true>::gradient_is_plain(options);
  if (call.amsgrad()) {
    plain ? step_all<AdamRule<true, true>>(call, options)
          : step_all<AdamRule<true, false>>(call, options);
  } else {
    plain ? step_all<AdamRule<false, true>>(call, options)
          : step_all<AdamRule<false, false>>(call, options);
  }
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("adam_step_", TORCH_BOX(&torchao8::adam_step_cpu));
}

// The op adam_step_ on the CPU: its checks, and what Adam needs of the engine.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "common/adam_call.h"
#include "cpu/engine.h"
#include "rules/adam.h"

namespace torchao8 {
namespace {

double read_scalar(const char* name, const Tensor& t) {
  check_place({kAdamOp, name}, t, kCpu);
  check_number({kAdamOp, name}, t);
  return read_number(t);
}

template <class Rule>
Item<Rule> make_item(const AdamCall& call, int64_t i) {
  Item<Rule> item;
  const Tensor &param = call.params[i], &grad = call.grads[i];
  item.param =
      FloatArray(param, check_float_type({kAdamOp, "params", i}, param), param.mutable_data_ptr());
  item.grad =
      FloatArray(grad, check_float_type({kAdamOp, "grads", i}, grad), grad.const_data_ptr());
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
                      shard_row_strides,
                      kCpu};
  check_block_size(kAdamOp, block_size);
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
  check_call(call);
  for (size_t i = 0; i < steps.size(); i++) check_count({kAdamOp, "steps", int64_t(i)}, steps[i]);
  if (found_inf && read_scalar("found_inf", *found_inf) != 0) return;

  // A gradient scale of 1 takes the path of any other, as on a GPU, where the host does not know
  // it.
  const bool plain = !grad_scale && AdamRule<false, true>::gradient_is_plain(options);
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

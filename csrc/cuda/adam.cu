// The op adam_step_ on CUDA: its checks, and what Adam needs of the kernels.
//
// One launch updates a bucket; longer lists take more. The host waits for nothing, and reads
// nothing from the device, so that a step can be captured in a CUDA graph. A step count, a learning
// rate or a gradient scale that is out of range on the device is therefore not refused.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/adam_call.h"
#include "cuda/launch.h"
#include "cuda/step.cuh"
#include "cuda/tables.cuh"

namespace torchao8::cuda {
namespace {

// Kernels read dense memory in row-major order. What is not like that is copied, and back.
class Dense {
 public:
  explicit Dense(const Tensor& t)
      : original_(t), dense_(t.is_contiguous() ? t : torch::stable::contiguous(t)) {}
  void* data() const { return dense_.mutable_data_ptr(); }
  const void* const_data() const { return dense_.const_data_ptr(); }
  void write_back() {
    if (!original_.is_contiguous()) torch::stable::copy_(original_, dense_);
  }

 private:
  Tensor original_, dense_;
};

// Arguments of a call after the checks, and the copies that must live until the launches are made.
struct Step {
  const AdamCall& call;
  const Launcher& launcher;
  Numbers<AdamRule<false, false>> numbers;
  std::vector<Dense> params, grads;

  template <class Rule>
  Numbers<Rule> numbers_of() const {
    return {numbers.options,   numbers.lr,   numbers.grad_scale,
            numbers.found_inf, numbers.seed, numbers.scaled_state};
  }
};

Places places_of(const Step& step, size_t i) {
  Places places;
  places.param = step.params[i].data();
  places.grad = step.grads[i].const_data();
  places.step = step.call.steps[i].const_data_ptr<float>();
  places.param_type = check_float_type({kAdamOp, "params", int64_t(i)}, step.call.params[i]);
  places.grad_type = check_float_type({kAdamOp, "grads", int64_t(i)}, step.call.grads[i]);
  return places;
}

template <class Rule, class T>
void step_blocks_of(const Step& step, FloatType type) {
  constexpr int N = Rule::kStates;
  using Entry = BlockEntry<N>;
  const AdamCall& call = step.call;
  const Tables* tables = tables_on(step.launcher);
  const auto kernel = call.block_size > kSpan    ? step_blocks<Rule, T, Blocks::kLong>
                      : call.block_size == kSpan ? step_blocks<Rule, T, Blocks::kSpan>
                                                 : step_blocks<Rule, T, Blocks::kShort>;
  const auto launch = [&](const Table<Rule, Entry>& table) {
    step.launcher.launch_over(table.units, kernel, sizeof(SharedOfBlocks<Rule>), table, tables);
  };
  Filler<Rule, Entry, decltype(launch)> filler(step.numbers_of<Rule>(), int(call.block_size),
                                               call.stochastic, launch);
  for (size_t i = 0; i < call.params.size(); i++) {
    const BlockLayout layout = block_layout(call.params[i].sizes(), call.block_size);
    TORCHAO8_CHECK(layout.rows * layout.blocks_per_row <= kMostUnits,
                   Argument{kAdamOp, "params", int64_t(i)}.text(), " has more than 2^31 blocks");
    Entry entry = {};
    static_cast<Places&>(entry) = places_of(step, i);
    for (int s = 0; s < N; s++) {
      entry.codes[s] = (*call.moments[s])[i].template mutable_data_ptr<uint8_t>();
      entry.scales[s] = (*call.scales[s])[i].template mutable_data_ptr<float>();
    }
    entry.rows = layout.rows;
    entry.row_length = entry.row_stride = layout.row_length;
    entry.blocks_per_row = uint32_t(layout.blocks_per_row);
    if (!call.shard_offsets.empty()) {
      entry.shard_offset = uint64_t(call.shard_offsets[i]);
      entry.row_stride = call.shard_row_strides[i];
    }
    entry.finish(type, int(call.block_size));
    filler.add(entry);
  }
  filler.flush();
}

template <class Rule, class T>
void step_elements_of(const Step& step, FloatType type) {
  constexpr int N = Rule::kStates;
  using Entry = ElementEntry<N>;
  const AdamCall& call = step.call;
  const auto launch = [&](const Table<Rule, Entry>& table) {
    step.launcher.launch_over(table.units, step_elements<Rule, T>, sizeof(SharedOfElements<Rule>),
                              table);
  };
  Filler<Rule, Entry, decltype(launch)> filler(step.numbers_of<Rule>(), int(call.block_size),
                                               call.stochastic, launch);
  for (size_t i = 0; i < call.params.size(); i++) {
    Entry entry = {};
    static_cast<Places&>(entry) = places_of(step, i);
    for (int s = 0; s < N; s++)
      entry.states[s] = (*call.moments[s])[i].template mutable_data_ptr<float>();
    entry.count = call.params[i].numel();
    entry.finish(type);
    filler.add(entry);
  }
  filler.flush();
}

template <class Rule, class T>
void step_all_of(const Step& step, FloatType type) {
  if (step.call.quantized()) {
    step_blocks_of<Rule, T>(step, type);
  } else {
    step_elements_of<Rule, T>(step, type);
  }
}

template <class Rule>
void step_all(Step& step) {
  const FloatType type = check_float_type({kAdamOp, "params", 0}, step.call.params[0]);
  switch (type) {
    case FloatType::kFloat32:
      step_all_of<Rule, float>(step, type);
      break;
    case FloatType::kBFloat16:
      step_all_of<Rule, BFloat16>(step, type);
      break;
    case FloatType::kFloat16:
      step_all_of<Rule, Half>(step, type);
      break;
  }
  for (Dense& param : step.params) param.write_back();
}

void adam_step_cuda(TensorList params, TensorList grads, TensorList exp_avgs,
                    TensorList exp_avg_sqs, TensorList max_exp_avg_sqs, TensorList exp_avg_scales,
                    TensorList exp_avg_sq_scales, TensorList max_exp_avg_sq_scales,
                    TensorList steps, Tensor lr, std::optional<Tensor> grad_scale,
                    std::optional<Tensor> found_inf, double beta1, double beta2, double eps,
                    double weight_decay, bool decoupled_weight_decay, bool maximize,
                    int64_t block_size, bool stochastic_rounding, int64_t seed,
                    std::vector<int64_t> shard_offsets, std::vector<int64_t> shard_row_strides) {
  if (params.empty()) return;
  const Place place = place_of({kAdamOp, "params", 0}, params[0]);
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
                      place};
  check_block_size(kAdamOp, block_size);
  AdamOptions options;
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.eps = eps;
  options.weight_decay = weight_decay;
  options.grad_scale = 1;
  options.maximize = maximize;
  options.decoupled = decoupled_weight_decay;
  const Scalar lr_number = scalar_argument({kAdamOp, "lr"}, lr, 0, place);
  const Scalar scale = scalar_argument({kAdamOp, "grad_scale"}, grad_scale, 1, place);
  const Scalar found = scalar_argument({kAdamOp, "found_inf"}, found_inf, 0, place);
  options.lr = lr_number.place ? 0 : lr_number.value;  // on the device, nobody looks at it
  if (!scale.place) options.grad_scale = scale.value;
  check_options(options);
  check_call(call);

  const Launcher launcher(kAdamOp, place.index);
  Step step{
      call, launcher, {options, lr_number, scale, found, uint64_t(seed), call.quantized()}, {}, {}};
  for (const Tensor& param : params) step.params.emplace_back(param);
  for (const Tensor& grad : grads) step.grads.emplace_back(grad);
  const bool plain = !grad_scale && AdamRule<false, true>::gradient_is_plain(options);
  if (call.amsgrad()) {
    plain ? step_all<AdamRule<true, true>>(step) : step_all<AdamRule<true, false>>(step);
  } else {
    plain ? step_all<AdamRule<false, true>>(step) : step_all<AdamRule<false, false>>(step);
  }
}

}  // namespace
}  // namespace torchao8::cuda

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl("adam_step_", TORCH_BOX(&torchao8::cuda::adam_step_cuda));
}

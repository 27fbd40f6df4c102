// The op adam_step_ on CUDA: its checks, and what Adam needs of the kernels.
//
// Two launches a bucket: one turns the steps and the numbers on the device into each tensor's rule,
// one updates all tensors. Longer lists take more. The host waits for nothing, and reads nothing
// from the device, so that a step can be captured in a CUDA graph. A step count, a learning rate or
// a gradient scale that is out of range on the device is therefore not refused.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "common/adam_call.h"
#include "cuda/launch.h"
#include "cuda/prepare.cuh"
#include "cuda/tables.cuh"

namespace torchao8::cuda {
namespace {

// lr, grad_scale, found_inf: on the device of the call, or on the CPU, where it is read now.
Scalar scalar_argument(const char* name, const Tensor& t, const Place& place) {
  check_number(name, t);
  if (t.is_cpu()) return {nullptr, read_number(t), false};
  check_place({kAdamOp, name}, t, place);
  return {t.const_data_ptr(), 0, t.scalar_type() == ScalarType::Double};
}

bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Kernels read dense memory in row-major order. What is not like that is copied, and back.
class Dense {
 public:
  explicit Dense(const Tensor& t)
      : original_(t), dense_(t.is_contiguous() ? t : torch::stable::contiguous(t)) {}
  void* data() const { return dense_.mutable_data_ptr(); }
  void write_back() {
    if (!original_.is_contiguous()) torch::stable::copy_(original_, dense_);
  }

 private:
  Tensor original_, dense_;
};

// Arguments of a call after the checks, and the buffers that must live until the launches are made.
struct Step {
  const AdamCall& call;
  const Launcher& launcher;
  AdamOptions options;  // but for lr and grad_scale
  Scalar lr, grad_scale, found_inf;
  std::vector<Dense> params, grads;
};

template <class Rule>
Tensor prepare_all(const Step& step) {
  const AdamCall& call = step.call;
  const int64_t n = int64_t(call.params.size()), bytes = n * int64_t(sizeof(Prepared<Rule>));
  Tensor buffer = torch::stable::new_empty(call.params[0], {bytes}, ScalarType::Byte);
  auto table = std::make_unique<StepTable>();
  for (int64_t first = 0; first < n; first += StepTable::kCapacity) {
    table->first = uint32_t(first);
    table->count = uint32_t(std::min<int64_t>(n - first, StepTable::kCapacity));
    for (uint32_t i = 0; i < table->count; i++)
      table->steps[i] = call.steps[size_t(first + i)].mutable_data_ptr<float>();
    const unsigned blocks = (table->count + kThreads - 1) / kThreads;
    step.launcher.launch(prepare<Rule>, blocks, 0, *table, step.options, step.lr, step.grad_scale,
                         step.found_inf, uint64_t(call.seed), call.quantized(),
                         static_cast<Prepared<Rule>*>(buffer.mutable_data_ptr()));
  }
  return buffer;
}

template <class Rule>
Places places_of(const Step& step, size_t i) {
  Places places;
  places.param = step.params[i].data();
  places.grad = step.grads[i].data();
  places.index = uint32_t(i);
  places.param_type = check_float_type({kAdamOp, "params", int64_t(i)}, step.call.params[i]);
  places.grad_type = check_float_type({kAdamOp, "grads", int64_t(i)}, step.call.grads[i]);
  return places;
}

constexpr int64_t kMostUnits = int64_t(1) << 31;  // of one launch

// Fills a table and launches it when it is full.
template <class Entry, class Launch>
class Filler {
 public:
  explicit Filler(Launch launch) : table_(std::make_unique<Table<Entry>>()), launch_(launch) {
    table_->count = table_->units = 0;
  }
  void add(Entry entry, int64_t units) {
    if (units == 0) return;
    if (table_->count == Table<Entry>::kCapacity || table_->units + units > kMostUnits) flush();
    entry.first_unit = table_->units;
    table_->entries[table_->count++] = entry;
    table_->units += uint32_t(units);
  }
  void flush() {
    if (table_->count > 0) launch_(*table_);
    table_->count = table_->units = 0;
  }

 private:
  std::unique_ptr<Table<Entry>> table_;
  Launch launch_;
};

template <class Rule, class T>
void step_blocks_of(const Step& step, FloatType type, const Prepared<Rule>* prepared) {
  constexpr int N = Rule::kStates;
  using Entry = BlockEntry<N>;
  const AdamCall& call = step.call;
  const Tables* tables = nullptr;
  step.launcher.check(
      cudaGetSymbolAddress(reinterpret_cast<void**>(const_cast<Tables**>(&tables)), device_tables));
  const auto launch = [&](Table<Entry>& table) {
    table.block_size = int32_t(call.block_size);
    table.stochastic = call.stochastic;
    step.launcher.launch(step_blocks<Rule, T>, step.launcher.grid_for(table.units, kWarps),
                         sizeof(Tables), table, prepared, tables);
  };
  Filler<Entry, decltype(launch)> filler(launch);
  for (size_t i = 0; i < call.params.size(); i++) {
    const BlockLayout layout = block_layout(call.params[i].sizes(), call.block_size);
    const int64_t blocks = layout.rows * layout.blocks_per_row;
    TORCHAO8_CHECK(blocks <= kMostUnits, Argument{kAdamOp, "params", int64_t(i)}.text(),
                   " has more than 2^31 blocks");
    Entry entry = {};
    static_cast<Places&>(entry) = places_of<Rule>(step, i);
    entry.row_length = entry.row_stride = layout.row_length;
    entry.blocks_per_row = uint32_t(layout.blocks_per_row);
    if (!call.shard_offsets.empty()) {
      entry.shard_offset = uint64_t(call.shard_offsets[i]);
      entry.row_stride = call.shard_row_strides[i];
    }
    bool fast = call.block_size == kFastBlock && layout.row_length % kPerLane == 0 &&
                entry.param_type == type && entry.grad_type == type && aligned(entry.param, 16) &&
                aligned(entry.grad, 16);
    for (int s = 0; s < N; s++) {
      entry.codes[s] = (*call.moments[s])[i].template mutable_data_ptr<uint8_t>();
      entry.scales[s] = (*call.scales[s])[i].template mutable_data_ptr<float>();
      fast = fast && aligned(entry.codes[s], 8);
    }
    entry.fast = fast;
    filler.add(entry, blocks);
  }
  filler.flush();
}

template <class Rule>
void step_elements_of(const Step& step, const Prepared<Rule>* prepared) {
  constexpr int N = Rule::kStates;
  using Entry = ElementEntry<N>;
  const AdamCall& call = step.call;
  const auto launch = [&](const Table<Entry>& table) {
    step.launcher.launch(step_elements<Rule>, step.launcher.grid_for(table.units, kWarps), 0, table,
                         prepared);
  };
  Filler<Entry, decltype(launch)> filler(launch);
  for (size_t i = 0; i < call.params.size(); i++) {
    Entry entry = {};
    static_cast<Places&>(entry) = places_of<Rule>(step, i);
    entry.count = call.params[i].numel();
    for (int s = 0; s < N; s++)
      entry.states[s] = (*call.moments[s])[i].template mutable_data_ptr<float>();
    filler.add(entry, (entry.count + kChunk - 1) / kChunk);
  }
  filler.flush();
}

template <class Rule>
void step_all(Step& step) {
  const Tensor buffer = prepare_all<Rule>(step);
  const auto* prepared = static_cast<const Prepared<Rule>*>(buffer.const_data_ptr());
  if (!step.call.quantized()) {
    step_elements_of<Rule>(step, prepared);
  } else {
    const FloatType type = check_float_type({kAdamOp, "params", 0}, step.call.params[0]);
    switch (type) {
      case FloatType::kFloat32:
        step_blocks_of<Rule, float>(step, type, prepared);
        break;
      case FloatType::kBFloat16:
        step_blocks_of<Rule, BFloat16>(step, type, prepared);
        break;
      case FloatType::kFloat16:
        step_blocks_of<Rule, Half>(step, type, prepared);
        break;
    }
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
  const Place place = {true, params[0].is_cuda() ? params[0].get_device_index() : -1};
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
  options.lr = 0;
  options.grad_scale = 1;
  options.maximize = maximize;
  options.decoupled = decoupled_weight_decay;
  const Scalar none = {nullptr, 0, false};
  const Scalar lr_number = scalar_argument("lr", lr, place);
  const Scalar scale =
      grad_scale ? scalar_argument("grad_scale", *grad_scale, place) : Scalar{nullptr, 1, false};
  const Scalar found = found_inf ? scalar_argument("found_inf", *found_inf, place) : none;
  if (!scale.place) options.grad_scale = scale.value;
  check_options(options);
  check_call(call);

  const Launcher launcher(kAdamOp, place.index);
  Step step{call, launcher, options, lr_number, scale, found, {}, {}};
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

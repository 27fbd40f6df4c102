// The op lamb_update_sums on the CPU.
#include <torch/csrc/stable/library.h>

#include <mutex>

#include "cpu/step_engine.h"
#include "op/lamb_call.h"
#include "op/sums_call.h"

namespace torchao8 {
namespace {

// A unit of work is a block, or a chunk of elements with 32-bit state, as the engine has them.
constexpr int64_t kChunk = 1024;
constexpr int64_t kGrainUnits = 64;
static_assert(kChunk <= kMaxBlock && kChunk % kWidest == 0);

class Measurer {
 public:
  explicit Measurer(const StepCall& call) : call_(call) {}

  // fill(item) makes the item, whose updates are summed up in this row.
  template <class Fill>
  void add(Fill fill, int64_t row) {
    Item<LambRule>& item = items_.emplace_back();
    fill(item);
    if (item.units() == 0) return items_.pop_back();
    item.first_cost = units_;
    units_ += item.units();
    rows_.push_back(row);
  }

  void run(int64_t* limbs) {
    std::mutex adding;
    torch::stable::parallel_for(0, units_, kGrainUnits, [&](int64_t begin, int64_t end) {
      const DefaultFloatingPoint guard;
      SquareSum sum;
      for (size_t k = 0; k < items_.size(); k++) {
        const Item<LambRule>& item = items_[k];
        const int64_t first = std::max<int64_t>(0, begin - item.first_cost);
        const int64_t last = std::min(item.units(), end - item.first_cost);
        if (first >= last) continue;
        for (int64_t unit = first; unit < last; unit++) measure(item, unit, sum);
        sum.finish();
        const std::lock_guard<std::mutex> lock(adding);
        for (int i = 0; i < kLimbs; i++) limbs[rows_[k] * kLimbs + i] += sum.limbs[i];
        std::fill_n(sum.limbs, kLimbs, 0);
      }
    });
  }

 private:
  void measure(const Item<LambRule>& item, int64_t unit, SquareSum& sum) const {
    alignas(64) float param[kMaxBlock], grad[kMaxBlock], updates[kMaxBlock];
    const bool blocks = item.codes[0] != nullptr;
    const int64_t size = blocks ? call_.block_size : kChunk;
    const int64_t row = unit / item.units_per_row, column = unit % item.units_per_row * size;
    const int64_t begin = row * item.row_length + column;
    const int length = int(std::min(size, item.row_length - column));
    const int padded = (length + kWidest - 1) / kWidest * kWidest;
    item.param.read(convert_, begin, length, param);
    item.grad.read(convert_, begin, length, grad);
    std::fill(param + length, param + padded, 0.0f);
    std::fill(grad + length, grad + padded, 0.0f);
    if (blocks) {
      alignas(64) uint8_t codes[LambRule::kStates][kMaxBlock];
      BlockRun run = {};
      run.param = param;
      run.grad = grad;
      run.length = padded;
      for (int s = 0; s < LambRule::kStates; s++) {
        run.codes[s] = item.codes[s] + begin;
        run.scales[s] = item.scales[s] + (item.one_scale ? 0 : unit);
        if (padded == length) continue;
        std::memcpy(codes[s], run.codes[s], size_t(length));
        std::memset(codes[s] + length, 0, size_t(padded - length));
        run.codes[s] = codes[s];
      }
      measure_block_(item.step->rule, run, updates);
    } else {
      alignas(64) float states[LambRule::kStates][kChunk];
      ElementRun run = {};
      run.param = param;
      run.grad = grad;
      run.count = padded;
      for (int s = 0; s < LambRule::kStates; s++) {
        run.states[s] = item.states[s] + begin;
        if (padded == length) continue;
        std::copy(run.states[s], run.states[s] + length, states[s]);
        std::fill(states[s] + length, states[s] + padded, 0.0f);
        run.states[s] = states[s];
      }
      measure_elements_(item.step->rule, run, updates);
    }
    add_squares_(updates, length, sum);
  }

  const StepCall& call_;
  const ConvertKernels& convert_ = convert_kernels();
  const decltype(FormatKernels::measure) measure_block_ =
      format_kernels(call_.state_format).measure;
  const decltype(ElementTable::measure) measure_elements_ = element_table().measure;
  AddSquares* const add_squares_ = add_squares_kernel();
  std::vector<Item<LambRule>> items_;
  std::vector<int64_t> rows_;
  int64_t units_ = 0;
};

Tensor lamb_update_sums_cpu(LambCall& call) {
  const DefaultFloatingPoint guard;
  check_block_size(call.op, call.block_size);
  const CpuNumbers<AdamOptions> numbers(call);
  check_call(call);
  CpuStep::check_values(call);

  Tensor sums = new_sums(call.params);
  RulesOfCall<LambRule> rules(call, numbers.options);
  Measurer measurer(call);
  for (size_t i = 0; i < call.params.size(); i++) {
    measurer.add(
        [&](Item<LambRule>& item) {
          fill_item(item, call, i);
          item.step = rules.at(i);
        },
        int64_t(i));
  }
  int64_t* const limbs = sums.mutable_data_ptr<int64_t>();
  measurer.run(limbs);
  for (size_t i = 0; i < call.params.size(); i++) make_canonical(limbs + int64_t(i) * kLimbs);
  return sums;
}

}  // namespace
}  // namespace torchao8

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("lamb_update_sums",
         &torchao8::lamb_update_sums<torchao8::lamb_update_sums_cpu, torchao8::MeasuredFormats>);
}

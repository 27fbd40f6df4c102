// The op lamb_update_sums on CUDA.
#include "cuda/lamb.cuh"

#include <torch/csrc/stable/library.h>

#include "cuda/step_engine.cuh"
#include "op/lamb_call.h"
#include "op/sums_call.h"

namespace torchao8::cuda {
namespace {

template <class Format>
void measure_blocks_of(const Step<LambRule>& step, int64_t* sums) {
  using Entry = Measured<BlockEntry<LambRule::kStates>>;
  const auto* tables = tables_on<Format>(step.launcher);
  launch_tables<Entry>(
      step,
      [&](const Table<LambRule, Entry>& table) {
        step.launcher.launch_over(table.units, measure_blocks<LambRule, Format>,
                                  sizeof(SharedOfMeasuredBlocks<Format, LambRule>), table, tables,
                                  sums);
      },
      [&](Entry& entry, size_t i) {
        set_blocks(entry, step, i);
        entry.row = uint32_t(i);
        entry.one_scale = step.call.one_scale;
      });
}

void measure_elements_of(const Step<LambRule>& step, int64_t* sums) {
  using Entry = Measured<ElementEntry<LambRule::kStates>>;
  launch_tables<Entry>(
      step,
      [&](const Table<LambRule, Entry>& table) {
        step.launcher.launch_over(table.units, measure_elements<LambRule>,
                                  sizeof(SharedOfMeasure<LambRule>), table, sums);
      },
      [&](Entry& entry, size_t i) {
        set_elements(entry, step, i);
        entry.row = uint32_t(i);
      });
}

Tensor lamb_update_sums_cuda(LambCall& call) {
  call.device = CudaStep::device_of(call);
  check_block_size(call.op, call.block_size);
  const CudaNumbers<AdamOptions> numbers(call);
  check_call(call);

  const Step<LambRule> step(call, numbers);
  Tensor sums = new_sums(call.params);
  int64_t* const limbs = sums.mutable_data_ptr<int64_t>();
  if (call.quantized) {
    visit_format_of(
        call, [&](auto type) { measure_blocks_of<typename decltype(type)::type>(step, limbs); });
  } else {
    measure_elements_of(step, limbs);
  }
  const int64_t rows = int64_t(call.params.size());
  step.launcher.launch(canonicalize<int64_t>, blocks_of_rows(call.op, rows), 0, limbs, rows);
  return sums;
}

}  // namespace
}  // namespace torchao8::cuda

STABLE_TORCH_LIBRARY_IMPL(torchao8, CUDA, m) {
  m.impl(
      "lamb_update_sums",
      &torchao8::lamb_update_sums<torchao8::cuda::lamb_update_sums_cuda, torchao8::cuda::Formats>);
}

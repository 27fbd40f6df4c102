// What lamb_update_sums adds up: the updates of a rule before they are made. A warp takes a unit of
// work at a time, as the step kernels do, and reads elements one by one in any layout; nothing but
// the sums is written.
#pragma once

#include "cuda/floats.cuh"
#include "cuda/formats/dynamic.cuh"
#include "cuda/formats/mulaw.cuh"
#include "cuda/warp_sum.cuh"

namespace torchao8::cuda {

template <class Entry>
struct Measured : Entry {
  uint32_t row;    // of the sums, to which the entry adds
  bool one_scale;  // of all blocks
};

// The sum of a warp. It is added to the row of the entry that the warp has worked on.
class RowSum {
 public:
  __device__ __forceinline__ RowSum(BlockSum& limbs, int64_t* sums, int lane)
      : limbs_(limbs), sums_(sums), warp_(limbs), lane_(lane) {
    if (lane < kLimbs) limbs.limbs[lane] = 0;
    warp_barrier();
  }
  __device__ __forceinline__ void add(float x) { warp_.add_one(x); }
  __device__ __forceinline__ void start(uint32_t row) {
    finish();
    row_ = row;
  }
  __device__ __forceinline__ void finish() {
    warp_.flush();
    warp_barrier();
    if (lane_ < kLimbs && limbs_.limbs[lane_] != 0) {
      add_atomically(&sums_[int64_t(row_) * kLimbs + lane_], limbs_.limbs[lane_]);
      limbs_.limbs[lane_] = 0;
    }
    warp_barrier();
  }

 private:
  BlockSum& limbs_;
  int64_t* sums_;
  WarpSum warp_;
  int lane_;
  uint32_t row_ = 0;
};

// The update of an element, 0 where it is not usable.
template <class Rule, bool kScaledState>
__device__ __forceinline__ float update_of(const Rule& rule, const Addresses& tensor, int64_t at,
                                           Real* values) {
  const Real p(load_as(tensor.param_type, tensor.param, at));
  rule.template moments<kScaledState>(p, Real(load_as(tensor.grad_type, tensor.grad, at)), values);
  bool good = true;
  for_each_state<Rule::kStates>(
      [&](auto s) { good = good && usable<Rule::kSigned[s]>(values[s].x); });
  return good ? rule.template update_of<kScaledState>(p, values).x : 0.0f;
}

template <class Format, class Rule>
struct BlockMeasurer {
  static constexpr int N = Rule::kStates;
  using Entry = Measured<BlockEntry<N>>;
  const TablesOf<Format>& tables;
  RowSum& sum;
  int lane, block_size;

  __device__ __forceinline__ uint32_t operator()(const Entry& entry, const Prepared<Rule>& prepared,
                                                 uint32_t unit, uint32_t end) {
    sum.start(entry.row);
    for (; unit < end; unit += kWarps) measure_unit(entry, prepared, unit);
    return unit;
  }
  __device__ __forceinline__ void measure_unit(const Entry& entry, const Prepared<Rule>& prepared,
                                               uint32_t unit) {
    const uint32_t per_unit = block_size < kSpan ? uint32_t(kSpan / block_size) : 1;
    const uint32_t row = unit / entry.units_per_row;
    const uint32_t column = (unit - row * entry.units_per_row) * per_unit;
    for (uint32_t i = 0; i < per_unit && column + i < entry.blocks_per_row; i++)
      measure(entry, prepared, row * entry.blocks_per_row + column + i);
  }

  __device__ __forceinline__ void measure(const Entry& entry, const Prepared<Rule>& prepared,
                                          uint32_t block) {
    const BlockPosition position(entry, block_size, block);
    float scale[N];
    for_each_state<N>([&](auto s) {
      scale[s] = CodecOf<Format>::scale(entry.scales[s][entry.one_scale ? 0 : block]);
    });
    const Rule rule = prepared.rule.with_scales(scale);
#pragma unroll 1
    for (int i = lane; i < position.length + lane;
         i += kLanes) {  // all lanes make as many turns: sum.add() has barriers
      float update = 0;
      if (i < position.length) {
        Real values[Rule::kValues];
        for_each_state<N>([&](auto s) {
          values[s] = Real(CodecOf<Format>::template decode<Rule::kSigned[s]>(
              tables, entry.codes[s][position.begin + i]));
        });
        update = update_of<Rule, true>(rule, entry, position.begin + i, values);
      }
      sum.add(update);
    }
  }
};

template <class Rule>
struct ElementMeasurer {
  static constexpr int N = Rule::kStates;
  using Entry = Measured<ElementEntry<N>>;
  RowSum& sum;
  int lane;

  __device__ __forceinline__ uint32_t operator()(const Entry& entry, const Prepared<Rule>& prepared,
                                                 uint32_t unit, uint32_t end) {
    sum.start(entry.row);
    for (; unit < end; unit += kWarps) measure_unit(entry, prepared, unit);
    return unit;
  }
  __device__ __forceinline__ void measure_unit(const Entry& entry, const Prepared<Rule>& prepared,
                                               uint32_t unit) {
    const int64_t begin = int64_t(unit) * kChunk;
    const int64_t end = begin + kChunk < entry.count ? begin + kChunk : entry.count;
#pragma unroll 1
    for (int64_t at = begin + lane; at < end + lane;
         at += kLanes) {  // all lanes make as many turns: sum.add() has barriers
      float update = 0;
      if (at < end) {
        Real values[Rule::kValues];
        for_each_state<N>([&](auto s) { values[s] = Real(entry.states[s][at]); });
        update = update_of<Rule, false>(prepared.rule, entry, at, values);
      }
      sum.add(update);
    }
  }
};

template <class Rule>
struct SharedOfMeasure {
  BlockSum limbs[kWarps];
  Prepared<Rule> window[kWindow];
};
template <class Format, class Rule>
struct SharedOfMeasuredBlocks : SharedOfMeasure<Rule> {
  TablesOf<Format> tables;
};

// With four thread blocks a processor, the mu-law kernel has a stack frame on sm_80.
template <class Format>
constexpr int kBlocksOfMeasure = std::is_same_v<Format, MulawFormat> ? 3 : 4;

template <class Rule, class Format>
__global__ void __launch_bounds__(kThreads, kBlocksOfMeasure<Format>)
    measure_blocks(const __grid_constant__ Table<Rule, Measured<BlockEntry<Rule::kStates>>> table,
                   const TablesOf<Format>* source, int64_t* sums) {
  static_assert(sizeof table + sizeof source + sizeof sums <= kArgumentBytes);
  using Shared = SharedOfMeasuredBlocks<Format, Rule>;
  static_assert(sizeof(Shared) <= 48 << 10);  // the default limit of shared memory
  TORCHAO8_SHARED(Shared, shared);
  CodecOf<Format>::copy_tables(shared.tables, *source);  // for_each_unit has the barrier
  const int lane = int(threadIdx.x % kLanes);
  RowSum sum(shared.limbs[threadIdx.x / kLanes], sums, lane);
  BlockMeasurer<Format, Rule> measurer = {shared.tables, sum, lane, table.block_size};
  for_each_unit(table, shared.window, measurer);
  sum.finish();
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, 4) measure_elements(
    const __grid_constant__ Table<Rule, Measured<ElementEntry<Rule::kStates>>> table,
    int64_t* sums) {
  static_assert(sizeof table + sizeof sums <= kArgumentBytes);
  TORCHAO8_SHARED(SharedOfMeasure<Rule>, shared);
  const int lane = int(threadIdx.x % kLanes);
  RowSum sum(shared.limbs[threadIdx.x / kLanes], sums, lane);
  ElementMeasurer<Rule> measurer = {sum, lane};
  for_each_unit(table, shared.window, measurer);
  sum.finish();
}

}  // namespace torchao8::cuda

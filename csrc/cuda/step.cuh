// The step kernels, for any rule of rules/. Thread blocks do not communicate; each finds its work
// in the table of tensors, a kernel argument. A warp takes a unit of work at a time.
#pragma once

#include "cuda/fast_block.cuh"
#include "cuda/slow_block.cuh"

namespace torchao8::cuda {

// ---- 8-bit state -----------------------------------------------------------------------------

// kRounds: with bfloat16 parameters rounded stochastically. T is bfloat16 then.
template <class Format, class Rule, class T, Blocks kBlocks, bool kRounds>
struct BlockWorker {
  static constexpr int N = Rule::kStates;
  using Entry = BlockEntryOf<Rule>;
  const TablesOf<Format>& tables;
  RandomsAhead<Rule, kRounds>& randoms;
  int lane, block_size, log_of_block;
  bool stochastic;

  // Behind a call of slow_block it returns: values that are kept across the call would need a stack
  // frame.
  __device__ __forceinline__ uint32_t operator()(const Entry& entry, const Prepared<Rule>& prepared,
                                                 uint32_t unit, uint32_t end) {
    const uint32_t fast_units = prepared.is_bounded ? entry.fast_units : 0;
    const uint32_t end_of_fast = end < fast_units ? end : fast_units;
    if constexpr (kBlocks == Blocks::kLong) {
      BlockRandoms<Rule, kRounds> of_blocks(randoms);
      for (; unit < end_of_fast; unit += kWarps) {
        if (!step_long_block<Format, Rule, T, kRounds>(entry, prepared, tables, of_blocks,
                                                       block_size, stochastic, unit, lane))
          break;
      }
      if (unit >= end) return unit;
      slow_block<Format, Rule, kRounds>(entry, prepared, tables, block_size, stochastic, unit,
                                        lane);
    } else {
      unit = step_spans<Format, Rule, T, kBlocks == Blocks::kSpan, kRounds>(
          entry, prepared, tables, randoms, log_of_block, stochastic, unit, end_of_fast, lane);
      if (unit >= end) return unit;
      slow_unit<Format, Rule, kRounds>(entry, prepared, tables, block_size, stochastic, unit, lane);
    }
    return unit + kWarps;
  }
};

template <class Format, class Rule, bool kRounds>
struct SharedOfBlocks {
  TablesOf<Format> tables;
  RandomsAhead<Rule, kRounds> randoms[kWarps];
  Prepared<Rule> window[kWindow];
};

// T: the type that fast entries have.
template <class Rule, class T, Blocks kBlocks, bool kRounds, class Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor -
                                                (Rule::kStates > 2 || Rule::kMomentsNeedParam))
    step_blocks(const __grid_constant__ Table<Rule, BlockEntryOf<Rule>> table,
                const TablesOf<Format>* source) {
  static_assert(sizeof table + sizeof source <= kArgumentBytes);
  if (table.numbers.found_inf.get() != 0) return;
  using Shared = SharedOfBlocks<Format, Rule, kRounds>;
  static_assert(sizeof(Shared) <= 48 << 10);  // the default limit of shared memory
  TORCHAO8_SHARED(Shared, shared);
  CodecOf<Format>::copy_tables(shared.tables, *source);  // for_each_unit has the barrier
  BlockWorker<Format, Rule, T, kBlocks, kRounds> worker = {shared.tables,
                                                           shared.randoms[threadIdx.x / kLanes],
                                                           int(threadIdx.x % kLanes),
                                                           table.block_size,
                                                           table.log_of_block,
                                                           table.stochastic};
  for_each_unit(table, shared.window, worker);
}

// ---- 32-bit state ----------------------------------------------------------------------------

template <class Rule, class T, bool kRounds>
struct ElementWorker {
  static constexpr int N = Rule::kStates;
  using Entry = ElementEntryOf<Rule, kRounds>;
  int lane;
  Rule rule;
  uint64_t param_key;

  __device__ __forceinline__ uint32_t operator()(const Entry& entry, const Prepared<Rule>& prepared,
                                                 uint32_t unit, uint32_t end) {
    rule = prepared.rule;
    if constexpr (kRounds) param_key = prepared.param_key;
    for (; unit < end; unit += kWarps) step_unit(entry, unit);
    return unit;
  }
  __device__ __forceinline__ void step_unit(const Entry& entry, uint32_t unit) const {
    const int64_t begin = int64_t(unit) * kChunk;
    const int64_t end = begin + kChunk < entry.count ? begin + kChunk : entry.count;
    if (entry.fast && begin + kChunk <= entry.count) {
#pragma unroll 2
      for (int64_t at = begin + lane * kPerThread; at < end; at += kLanes * kPerThread)
        step_four(entry, at);
    } else {
      for (int64_t at = begin + lane; at < end; at += kLanes) step_any(entry, at);
    }
  }

  // False: the element stays as it is, and what is returned is not to be stored.
  __device__ __forceinline__ bool step_one(float& p, float g, float* states) const {
    Real values[Rule::kValues];
    for_each_state<N>([&](auto s) { values[s] = Real(states[s]); });
    rule.template moments<false>(Real(p), Real(g), values);
    bool good = usable<Rule::kSigned[0]>(values[0].x);
    for_each_state<N>([&](auto s) { good = good && usable<Rule::kSigned[s]>(values[s].x); });
    p = update<false>(rule, Real(p), values).x;
    for_each_state<N>([&](auto s) { states[s] = values[s].x; });
    return good;
  }

  __device__ __forceinline__ void step_any(const Entry& entry, int64_t at) const {
    float values[kMaxStates], p = load_as(entry.param_type, entry.param, at);
    for_each_state<N>([&](auto s) { values[s] = entry.states[s][at]; });
    if (!step_one(p, load_as(entry.grad_type, entry.grad, at), values)) return;
    for_each_state<N>([&](auto s) { entry.states[s][at] = values[s]; });
    if constexpr (kRounds) {
      ElementRandom random(param_key);
      store_as(entry.param_type, entry.param, at, p, random(entry.element(at)));
    } else {
      store_as(entry.param_type, entry.param, at, p);
    }
  }

  __device__ __forceinline__ void step_four(const Entry& entry, int64_t at) const {
    Several<T, kPerThread> param, grad;
    Several<float, kPerThread> states[kSlots<N>];
    for_each_state<N>([&](auto s) { states[s].load(entry.states[s] + at); });
    grad.load(static_cast<const T*>(entry.grad) + at);
    param.load(static_cast<const T*>(entry.param) + at);
    [[maybe_unused]] ElementRandom random(param_key);
    [[maybe_unused]] uint64_t first = 0;
    if constexpr (kRounds) first = entry.element(at);
    bool good = true;
#pragma unroll
    for (int i = 0; i < kPerThread; i += 2) {
      float p[2], values[2][kSlots<N>];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        for_each_state<N>([&](auto s) { values[j][s] = states[s].get(i + j); });
        p[j] = param.get(i + j);
        good = step_one(p[j], grad.get(i + j), values[j]) && good;
      }
      if constexpr (kRounds) {
        const uint32_t hashes[2] = {random(first + uint64_t(i)), random(first + uint64_t(i) + 1)};
        param.set_pair(i / 2, p[0], p[1], hashes);
      } else {
        param.set_pair(i / 2, p[0], p[1]);
      }
      for_each_state<N>([&](auto s) { states[s].set_pair(i / 2, values[0][s], values[1][s]); });
    }
    if (!good) {
#pragma unroll 1
      for (int i = 0; i < kPerThread; i++) step_any(entry, at + i);
      return;
    }
    for_each_state<N>([&](auto s) { states[s].store(entry.states[s] + at); });
    param.store(static_cast<T*>(entry.param) + at);
  }
};

template <class Rule>
struct SharedOfElements {
  Prepared<Rule> window[kWindow];
};

// T: the type that fast entries have.
template <class Rule, class T, bool kRounds>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor - (kRounds && Rule::kStates > 2))
    step_elements(const __grid_constant__ Table<Rule, ElementEntryOf<Rule, kRounds>> table) {
  static_assert(sizeof table <= kArgumentBytes);
  if (table.numbers.found_inf.get() != 0) return;
  TORCHAO8_SHARED(SharedOfElements<Rule>, shared);
  ElementWorker<Rule, T, kRounds> worker = {int(threadIdx.x % kLanes)};
  for_each_unit(table, shared.window, worker);
}

// ---- scalar states -----------------------------------------------------------------------------

// A unit is a tensor.
template <class Rule>
struct ScalarsEntryOf : Addresses, ScalarAddresses<kScalarsOf<Rule>> {
  int64_t units() const { return 1; }
};

// One thread a tensor, when all kernels that read the old ones are done.
template <class Rule>
__global__ void __launch_bounds__(kThreads)
    write_scalars(const __grid_constant__ Table<Rule, ScalarsEntryOf<Rule>> table) {
  static_assert(sizeof table <= kArgumentBytes);
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.count || table.numbers.found_inf.get() != 0) return;
  const auto& entry = table.entries[i];
  typename Rule::Options options;
  float scalars[kMaxScalars];
  rule_of(table.numbers, entry, int64_t(*entry.step) + 1, options, scalars);
  for (int s = 0; s < kScalarsOf<Rule>; s++) *entry.scalars[s] = scalars[s];
}

}  // namespace torchao8::cuda

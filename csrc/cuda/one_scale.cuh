// Tensors with one scale for each 8-bit state: the pass that finds the extreme elements of their
// new states, the step, and the scales, which are written when all blocks have been stepped.
#pragma once

#include "cuda/step.cuh"

namespace torchao8::cuda {

// ---- the extreme elements ----------------------------------------------------------------------

// A unit is a chunk of elements, in their order in memory.
template <int N, int kScalars = 0>
struct ExtremesEntry : Addresses, ScalarAddresses<kScalars> {
  static constexpr bool kOneScale = true;
  uint8_t* codes[N];
  float* scales[N];
  int64_t* keys;  // of the tensor, one a state; 0 at first
  int64_t count;
  bool fast;  // whether runs of elements can be loaded as words; finish() sets it

  int64_t units() const { return (count + kChunk - 1) / kChunk; }

  void finish(FloatType type) {
    fast = this->fits(type, kPerLane) && count < kMostOfFastPath;
    for (int s = 0; s < N; s++) fast = fast && is_aligned(codes[s], kPerLane);
  }
};

template <class Rule>
using ExtremesEntryOf = ExtremesEntry<Rule::kStates, kScalarsOf<Rule>>;

// Finds the extreme elements of an entry; the lanes of a warp raise the entry's keys together.
template <class Format, class Rule, class T>
struct ExtremesFinder {
  static constexpr int N = Rule::kStates;
  using Entry = ExtremesEntryOf<Rule>;
  const TablesOf<Format>& tables;
  int lane;
  int64_t* keys;  // of the entry at work; none before the first
  Extremes<Rule> found;

  __device__ __forceinline__ uint32_t operator()(const Entry& entry, const Prepared<Rule>& prepared,
                                                 uint32_t unit, uint32_t end) {
    finish();
    keys = entry.keys;
    found = Extremes<Rule>();
    for (; unit < end; unit += kWarps) find(entry, prepared, unit);
    return unit;
  }
  __device__ __forceinline__ void finish() const {
    if (!keys) return;
    for_each_state<N>([&](auto s) {
      const int64_t key = key_of_extreme<Rule::kSigned[s]>(found.result(s, kLanes));
      if (lane == 0) raise_atomically(&keys[s], key);
    });
  }

  __device__ __forceinline__ void find(const Entry& entry, const Prepared<Rule>& prepared,
                                       uint32_t unit) {
    const int64_t begin = int64_t(unit) * kChunk;
    const int64_t end = begin + kChunk < entry.count ? begin + kChunk : entry.count;
    float scale[N];
    for_each_state<N>([&](auto s) { scale[s] = CodecOf<Format>::scale(entry.scales[s][0]); });
    const Rule rule = prepared.rule.with_scales(scale);
    if (entry.fast && begin + kChunk <= entry.count) {
      Extremes<Rule> extremes;
#pragma unroll 1
      for (int64_t at = begin + lane * kPerLane; at < end; at += kSpan) {
        LaneElements<Format, Rule, T> elements;
        elements.load(LaneAddresses<Format, Rule, T>(entry, uint32_t(at / kPerLane), 0),
                      Rule::kMomentsNeedParam);
        elements.find_moments(rule, tables, scale);
        elements.add_to(extremes);
      }
      bool good = true;
      for_each_state<N>([&](auto s) { good = good && extremes.is_usable(s); });
      if (all_of_warp(good)) {
        found.add_all_of(extremes);
        return;
      }
    }
#pragma unroll 1
    for (int64_t at = begin + lane; at < end; at += kLanes) add(entry, rule, scale, at);
  }

  // An element that is not usable counts with its old state, which it keeps.
  __device__ __forceinline__ void add(const Entry& entry, const Rule& rule, const float* scale,
                                      int64_t at) {
    const SlowElement<Rule> e = slow_element<Format>(entry, rule, tables, scale, at);
    for_each_state<N>([&](auto s) { found.add(s, e.values[s]); });
  }
};

template <class Format, class Rule>
struct SharedOfExtremes {
  TablesOf<Format> tables;
  Prepared<Rule> window[kWindow];
};

// T: the type that fast entries have.
template <class Rule, class T, class Format>
__global__ void __launch_bounds__(kThreads, 2)
    find_extremes(const __grid_constant__ Table<Rule, ExtremesEntryOf<Rule>> table,
                  const TablesOf<Format>* source) {
  static_assert(sizeof table + sizeof source <= kArgumentBytes);
  using Shared = SharedOfExtremes<Format, Rule>;
  static_assert(sizeof(Shared) <= 48 << 10);  // the default limit of shared memory
  TORCHAO8_SHARED(Shared, shared);
  CodecOf<Format>::copy_tables(shared.tables, *source);  // for_each_unit has the barrier
  ExtremesFinder<Format, Rule, T> finder = {shared.tables, int(threadIdx.x % kLanes), nullptr, {}};
  for_each_unit(table, shared.window, finder);
  finder.finish();
}

// ---- the step ----------------------------------------------------------------------------------

template <int N, int kScalars = 0>
struct OneScaleEntry : BlockEntry<N, kScalars> {
  static constexpr bool kOneScale = true;
  const int64_t* extremes;  // keys, one a state

  template <bool kSigned>
  TORCHAO8_HD float extreme(int s) const {
    return extreme_of_key<kSigned>(extremes[s]);
  }
};

template <class Rule>
using OneScaleEntryOf = OneScaleEntry<Rule::kStates, kScalarsOf<Rule>>;

// The fast path takes blocks of kSpan elements only. With one scale, the block size decides nothing
// but which random numbers an element gets.
template <class Format, class Rule, class T, bool kRounds>
struct OneScaleWorker {
  static constexpr int N = Rule::kStates;
  using Entry = OneScaleEntryOf<Rule>;
  const TablesOf<Format>& tables;
  RandomsAhead<Rule, kRounds>& randoms;
  int lane, block_size, log_of_block;
  bool stochastic;

  __device__ __forceinline__ uint32_t operator()(const Entry& entry, const Prepared<Rule>& prepared,
                                                 uint32_t unit, uint32_t end) {
    const uint32_t fast_units = block_size == kSpan && prepared.is_bounded ? entry.fast_units : 0;
    unit = step_spans<Format, Rule, T, true, kRounds>(entry, prepared, tables, randoms,
                                                      log_of_block, stochastic, unit,
                                                      end < fast_units ? end : fast_units, lane);
    if (unit >= end) return unit;
    slow_unit<Format, Rule, kRounds>(entry, prepared, tables, block_size, stochastic, unit, lane);
    return unit + kWarps;
  }
};

// T: the type that fast entries have; kRounds: as in step_blocks.
template <class Rule, class T, bool kRounds, class Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor -
                                                (Rule::kStates > 2 || Rule::kMomentsNeedParam))
    step_one_scale(const __grid_constant__ Table<Rule, OneScaleEntryOf<Rule>> table,
                   const TablesOf<Format>* source) {
  static_assert(sizeof table + sizeof source <= kArgumentBytes);
  if (table.numbers.found_inf.get() != 0) return;
  using Shared = SharedOfBlocks<Format, Rule, kRounds>;
  TORCHAO8_SHARED(Shared, shared);
  CodecOf<Format>::copy_tables(shared.tables, *source);  // for_each_unit has the barrier
  OneScaleWorker<Format, Rule, T, kRounds> worker = {shared.tables,
                                                     shared.randoms[threadIdx.x / kLanes],
                                                     int(threadIdx.x % kLanes),
                                                     table.block_size,
                                                     table.log_of_block,
                                                     table.stochastic};
  for_each_unit(table, shared.window, worker);
}

// ---- the scales --------------------------------------------------------------------------------

// A unit is a tensor, or a part of one: an empty one has scales too.
template <int N, int kScalars = 0>
struct ScalesEntry : Addresses, ScalarAddresses<kScalars> {
  float* scales[N];
  const int64_t* extremes;
  int64_t units() const { return 1; }
};

template <class Rule>
using ScalesEntryOf = ScalesEntry<Rule::kStates, kScalarsOf<Rule>>;

// One thread a tensor, when all of its blocks have been stepped with the old scales.
template <class Rule, class Format>
__global__ void __launch_bounds__(kThreads)
    write_scales(const __grid_constant__ Table<Rule, ScalesEntryOf<Rule>> table) {
  static_assert(sizeof table <= kArgumentBytes);
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= table.count || table.numbers.found_inf.get() != 0) return;
  const auto& entry = table.entries[i];
  Prepared<Rule> prepared;
  prepared.set(table.numbers, entry);
  for_each_state<Rule::kStates>([&](auto s) {
    constexpr bool is_signed = Rule::kSigned[s];
    entry.scales[s][0] = Format::template scale_of<is_signed, Rule::kStochastic[s]>(
        extreme_of_key<is_signed>(entry.extremes[s]), prepared.rule.unit[s]);
  });
}

}  // namespace torchao8::cuda

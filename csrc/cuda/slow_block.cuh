// The slow path of a block of 8-bit state: any row length and address, mixed dtypes, elements that
// are not usable, scales that are NaN or infinite. It reads each element twice: to find the block's
// extreme element, and to update. With one scale for a tensor, which is known before, it reads
// once.
#pragma once

#include "cuda/floats.cuh"
#include "cuda/formats/format.cuh"

namespace torchao8::cuda {

// Sets the new values of an element by its old ones. scale: of the block, as steps take it; `rule`
// has it already.
template <class Format, class Rule, class Entry>
__device__ __forceinline__ void find_new_values(SlowElement<Rule>& e, const Entry& entry,
                                                const Rule& rule, const float* scale, int64_t at) {
  constexpr int N = Rule::kStates;
  Real x[Rule::kValues];
  for_each_state<N>([&](auto s) { x[s] = Real(e.old[s]); });
  e.param = 0.0f;
  if constexpr (Rule::kMomentsNeedParam) e.param = load_as(entry.param_type, entry.param, at);
  e.grad = load_as(entry.grad_type, entry.grad, at);
  rule.template moments<true>(Real(e.param), Real(e.grad), x);
  e.good = true;
  for_each_state<N>([&](auto s) { e.good = e.good && usable<Rule::kSigned[s]>(x[s].x); });
  for_each_value<Rule>([&](auto v) { e.values[v] = x[v].x; });
  if (!e.good) {
    for_each_state<N>(
        [&](auto s) { e.values[s] = CodecOf<Format>::kept(e.old[s], scale[s], rule.unit[s]); });
  }
}

// An element of a block whose codes are bytes.
template <class Format, class Rule, class Entry>
__device__ __forceinline__ SlowElement<Rule> slow_element(const Entry& entry, const Rule& rule,
                                                          const TablesOf<Format>& tables,
                                                          const float* scale, int64_t at) {
  SlowElement<Rule> e;
  for_each_state<Rule::kStates>([&](auto s) {
    e.old[s] = CodecOf<Format>::template decode<Rule::kSigned[s]>(tables, entry.codes[s][at]);
  });
  find_new_values<Format>(e, entry, rule, scale, at);
  return e;
}

// Writes the parameter of an element, number i of its block, whose new values are usable. kRounds:
// rounded stochastically if it is a bfloat16, by these numbers.
template <bool kRounds, class Rule, class Entry>
__device__ __forceinline__ void store_updated(const Entry& entry, const Rule& rule,
                                              const SlowElement<Rule>& e, int64_t at,
                                              const BlockRandom& of_param, uint32_t i) {
  Real x[Rule::kValues];
  for_each_value<Rule>([&](auto v) { x[v] = Real(e.values[v]); });
  const Real p(load_as(entry.param_type, entry.param, at));
  const float updated = update<true>(rule, p, x).x;
  if constexpr (kRounds) {
    store_as(entry.param_type, entry.param, at, updated, of_param(i));
  } else {
    store_as(entry.param_type, entry.param, at, updated);
  }
}

// A block whose codes share bytes, in three parts: find_scales(lane); write(lane, param_key),
// behind a barrier; store_scales(block).
template <class Format, class Rule, bool kRounds, class Entry>
struct SlowPackedBlock;

// Any block whose codes are bytes; kRounds: with bfloat16 parameters rounded stochastically. A lane
// takes every 32nd element, computes the moments once for the scales and again to use them; only
// the lane itself reads what it writes.
template <class Format, class Rule, bool kRounds, class Entry>
__device__ __forceinline__ void slow_bytes(const Entry& entry, const Prepared<Rule>& prepared,
                                           const TablesOf<Format>& tables, int block_size,
                                           bool stochastic, uint32_t block, int lane) {
  constexpr int N = Rule::kStates;
  const BlockPosition position(entry, block_size, block);
  float scale[N];
  for_each_state<N>([&](auto s) {
    scale[s] = CodecOf<Format>::scale(entry.scales[s][Entry::kOneScale ? 0 : block]);
  });
  const Rule rule = prepared.rule.with_scales(scale);
  const auto element = [&](int i) {
    return slow_element<Format>(entry, rule, tables, scale, position.begin + i);
  };
  SlowScales<Format, Rule, Entry> scales;
  if constexpr (!Entry::kOneScale) {
    for (int i = lane; i < position.length; i += kLanes) scales.add(element(i));
  }
  scales.finish(rule, scale, entry);
  BlockRandom random[N];
  [[maybe_unused]] BlockRandom of_param;
  if constexpr (kRounds) of_param.start(prepared.param_key, position.first_element);
  for_each_state<N>([&](auto s) {
    if constexpr (Format::template draws<Rule>(s))
      random[s].start(prepared.keys[s], position.first_element);
  });
  warp_barrier();  // every lane has read the scales
  for (int i = lane; i < position.length; i += kLanes) {
    const int64_t at = position.begin + i;
    const SlowElement<Rule> e = element(i);
    if (e.good) store_updated<kRounds>(entry, rule, e, at, of_param, uint32_t(i));
    for_each_state<N>([&](auto s) {
      constexpr bool is_stochastic = Format::template draws<Rule>(s);
      uint32_t code;
      if (is_stochastic && stochastic) {
        code = scales.encode_stochastic(s, tables, e.values[s], random[s](uint32_t(i)));
      } else {
        code = scales.encode_nearest(s, tables, e.values[s]);
      }
      entry.codes[s][at] = uint8_t(code);
    });
  }
  if (!Entry::kOneScale && lane == 0) scales.store(entry, block);
}

template <class Format, class Rule, bool kRounds, class Entry>
__device__ __noinline__ void slow_block(const Entry& entry, const Prepared<Rule>& prepared,
                                        const TablesOf<Format>& tables, int block_size,
                                        bool stochastic, uint32_t block, int lane) {
  if constexpr (Format::kBits == 8) {
    slow_bytes<Format, Rule, kRounds>(entry, prepared, tables, block_size, stochastic, block, lane);
  } else {
    SlowPackedBlock<Format, Rule, kRounds, Entry> packed(entry, prepared, block_size, stochastic,
                                                         block);
    packed.find_scales(lane);
    warp_barrier();  // every lane has read the scales
    packed.write(lane, prepared.param_key);
    if (lane == 0) packed.store_scales(block);
  }
}

// The blocks of a unit of up to kSpan elements, or one longer block.
template <class Format, class Rule, bool kRounds, class Entry>
__device__ __forceinline__ void slow_unit(const Entry& entry, const Prepared<Rule>& prepared,
                                          const TablesOf<Format>& tables, int block_size,
                                          bool stochastic, uint32_t unit, int lane) {
  const uint32_t per_unit = block_size < kSpan ? uint32_t(kSpan / block_size) : 1;
  const uint32_t row = unit / entry.units_per_row;
  const uint32_t column = (unit - row * entry.units_per_row) * per_unit;
  for (uint32_t i = 0; i < per_unit && column + i < entry.blocks_per_row; i++)
    slow_block<Format, Rule, kRounds>(entry, prepared, tables, block_size, stochastic,
                                      row * entry.blocks_per_row + column + i, lane);
}

}  // namespace torchao8::cuda

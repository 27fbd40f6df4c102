// The slow path of a block of 8-bit state: any row length and address, mixed dtypes, elements that
// are not usable, scales that are NaN or infinite. It reads each element twice: to find the block's
// extreme element, and to update. With one scale for a tensor, which is known before, it reads
// once.
#pragma once

#include "cuda/block.cuh"
#include "cuda/codec.cuh"
#include "cuda/floats.cuh"

namespace torchao8::cuda {

// Any block; kRounds: with bfloat16 parameters rounded stochastically. A lane takes every 32nd
// element, computes the moments once for the extremes and again to use them; only the lane itself
// reads what it writes.
template <class Rule, bool kRounds, class Entry>
__device__ __noinline__ void slow_block(const Entry& entry, const Prepared<Rule>& prepared,
                                        const Tables& tables, int block_size, bool stochastic,
                                        uint32_t block, int lane) {
  constexpr int N = Rule::kStates;
  const BlockPosition position(entry, block_size, block);
  float scale[N];
  for_each_state<N>([&](auto s) { scale[s] = entry.scales[s][Entry::kOneScale ? 0 : block]; });
  const Rule rule = prepared.rule.with_scales(scale);

  // The new values; whether the element is updated.
  const auto moments = [&](int i, float* values) {
    const int64_t at = position.begin + i;
    float old[N];
    Real x[Rule::kValues], p(0.0f);
    for_each_state<N>([&](auto s) {
      old[s] = decode<Rule::kSigned[s]>(tables, entry.codes[s][at]);
      x[s] = Real(old[s]);
    });
    if constexpr (Rule::kMomentsNeedParam) p = Real(load_as(entry.param_type, entry.param, at));
    rule.template moments<true>(p, Real(load_as(entry.grad_type, entry.grad, at)), x);
    bool good = true;
    for_each_state<N>([&](auto s) { good = good && usable<Rule::kSigned[s]>(x[s].x); });
    for_each_value<Rule>([&](auto v) { values[v] = x[v].x; });
    if (!good) {
      for_each_state<N>(
          [&](auto s) { values[s] = (Real(old[s]) * Real(scale[s] / rule.unit[s])).x; });
    }
    return good;
  };

  float extreme[N], inverse[N];
  if constexpr (Entry::kOneScale) {
    for_each_state<N>([&](auto s) {
      extreme[s] = entry.template extreme<Rule::kSigned[s]>(s);
      inverse[s] = inverse_of<Rule::kSigned[s]>(extreme[s]);
    });
  } else {
    Extremes<Rule> extremes;
    for (int i = lane; i < position.length; i += kLanes) {
      float values[Rule::kValues];
      moments(i, values);
      for_each_state<N>([&](auto s) { extremes.add(s, values[s]); });
    }
    for_each_state<N>([&](auto s) {
      extreme[s] = extremes.result(s, kLanes);
      inverse[s] = inverse_of<Rule::kSigned[s]>(extreme[s]);
    });
  }
  bool encodes[N];
  BlockRandom random[N];
  [[maybe_unused]] BlockRandom of_param;
  if constexpr (kRounds) of_param.start(prepared.param_key, position.first_element);
  for_each_state<N>([&](auto s) {
    encodes[s] = has_scale<Rule::kSigned[s]>(extreme[s], rule.unit[s]);
    if constexpr (Rule::kStochastic[s]) random[s].start(prepared.keys[s], position.first_element);
  });
  warp_barrier();  // every lane has read the scales
  for (int i = lane; i < position.length; i += kLanes) {
    const int64_t at = position.begin + i;
    float values[Rule::kValues];
    if (moments(i, values)) {
      Real x[Rule::kValues];
      for_each_value<Rule>([&](auto v) { x[v] = Real(values[v]); });
      const Real p(load_as(entry.param_type, entry.param, at));
      const float updated = update<true>(rule, p, x).x;
      if constexpr (kRounds) {
        store_as(entry.param_type, entry.param, at, updated, of_param(uint32_t(i)));
      } else {
        store_as(entry.param_type, entry.param, at, updated);
      }
    }
    for_each_state<N>([&](auto s) {
      constexpr bool is_stochastic = Rule::kStochastic[s];
      uint32_t code = zero_code<Rule::kSigned[s]>();
      if constexpr (Entry::kOneScale) {  // larger ones have no code
        if (!is_within(values[s], extreme[s])) values[s] = extreme[s];
      }
      if (encodes[s] && is_stochastic && stochastic) {
        code = encode_stochastic<Rule::kSigned[s]>(tables, values[s], inverse[s],
                                                   one_to_two(random[s](uint32_t(i))));
      } else if (encodes[s]) {
        code = encode_nearest<Rule::kSigned[s]>(tables, values[s], inverse[s]);
      }
      entry.codes[s][at] = uint8_t(code);
    });
  }
  if (!Entry::kOneScale && lane == 0) {
    for_each_state<N>([&](auto s) {
      const float product = extreme[s] * rule.unit[s];
      const bool finite = usable<Rule::kSigned[s]>(extreme[s]) && usable<true>(product);
      entry.scales[s][block] = encodes[s] ? product : finite ? 0.0f : bits_float(0x7fc00000u);
    });
  }
}

// The blocks of a unit of up to kSpan elements, or one longer block.
template <class Rule, bool kRounds, class Entry>
__device__ __forceinline__ void slow_unit(const Entry& entry, const Prepared<Rule>& prepared,
                                          const Tables& tables, int block_size, bool stochastic,
                                          uint32_t unit, int lane) {
  const uint32_t per_unit = block_size < kSpan ? uint32_t(kSpan / block_size) : 1;
  const uint32_t row = unit / entry.units_per_row;
  const uint32_t column = (unit - row * entry.units_per_row) * per_unit;
  for (uint32_t i = 0; i < per_unit && column + i < entry.blocks_per_row; i++)
    slow_block<Rule, kRounds>(entry, prepared, tables, block_size, stochastic,
                              row * entry.blocks_per_row + column + i, lane);
}

}  // namespace torchao8::cuda

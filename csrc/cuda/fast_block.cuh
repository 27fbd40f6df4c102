// The fast path of 8-bit state: aligned blocks, in rows of multiples of 8, of one dtype. A lane
// takes 8 neighbouring elements at a time, in 16-byte words, and what does not occur in a healthy
// run is tested for a block at a time, before anything is written.
#pragma once

#include "cuda/floats.cuh"
#include "cuda/formats/format.cuh"

namespace torchao8::cuda {

// Where a lane's eight elements lie, number `eight` of the tensor's eights, and the scales of their
// block.
template <class Format, class Rule, class T>
struct LaneAddresses {
  static constexpr int N = Rule::kStates;
  T* param;
  const T* grad;
  uint8_t* codes[N];
  float* scales[N];

  template <class Entry>
  TORCHAO8_HD LaneAddresses(const Entry& entry, uint32_t eight, uint32_t block) {
    const int64_t at = int64_t(eight) * kPerLane;  // a number of 32 bits takes no 64-bit addition
    param = static_cast<T*>(entry.param) + at;
    grad = static_cast<const T*>(entry.grad) + at;
    for_each_state<N>([&](auto s) {
      codes[s] = entry.codes[s] + int64_t(eight) * (kPerLane * Format::kBits / 8);
      scales[s] = entry.scales[s] + (Entry::kOneScale ? 0 : block);
    });
  }
};

// The hashes of eight neighbouring elements, number `eight` of their block's eights.
TORCHAO8_HD void hash_eight(const BlockRandom& random, uint32_t eight, uint32_t* hash) {
  const uint32_t start = random.c0 + random.c2 * eight, slope = random.c1 + random.c3 * eight;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) hash[i] = start + slope * lane_factor(uint32_t(i));
}

// Eight neighbouring elements of one lane, decoded.
template <class Rule, class T>
struct LaneValues {
  Several<T, kPerLane> param, grad;
  float values[Rule::kValues][kPerLane];

  // From the stored numbers, as multiples of the scales that `rule` already has, to the new ones.
  __device__ __forceinline__ void moments_of_decoded(const Rule& rule) {
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      Real new_values[Rule::kValues], p(0.0f);
      for_each_state<Rule::kStates>([&](auto s) { new_values[s] = Real(values[s][i]); });
      if constexpr (Rule::kMomentsNeedParam) p = Real(param.get(i));
      rule.template moments<true>(p, Real(grad.get(i)), new_values);
      for_each_value<Rule>([&](auto v) { values[v][i] = new_values[v].x; });
    }
  }

  // kRounds: stochastically, by these numbers; `eight` as in hash_eight().
  template <bool kRounds>
  __device__ __forceinline__ void update(const Rule& rule, T* to, const BlockRandom& random,
                                         uint32_t eight) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2) {
      float updated[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        BoundedReal x[Rule::kValues];
        for_each_value<Rule>([&](auto v) { x[v] = BoundedReal(values[v][i + j]); });
        updated[j] = torchao8::update<true>(rule, BoundedReal(param.get(i + j)), x).x;
      }
      if constexpr (kRounds) {
        const BlockRandom here = random.from(eight);
        const uint32_t hashes[2] = {here(uint32_t(i)), here(uint32_t(i + 1))};
        param.set_pair(i / 2, updated[0], updated[1], hashes);
      } else {
        param.set_pair(i / 2, updated[0], updated[1]);
      }
    }
    param.store(to);
  }
};

// The same with their codes.
template <class Format, class Rule, class T>
struct LaneElements : LaneValues<Rule, T> {
  static constexpr int N = Rule::kStates;
  using Codec = CodecOf<Format>;
  using Tables = TablesOf<Format>;
  using Addresses = LaneAddresses<Format, Rule, T>;
  uint2 codes[N];

  __device__ __forceinline__ void load(const Addresses& at, bool with_param) {
    for_each_state<N>([&](auto s) { codes[s] = *reinterpret_cast<const uint2*>(at.codes[s]); });
    this->grad.load(at.grad);
    if (with_param) this->param.load(at.param);
  }

  // The stored numbers, as multiples of the block's scales.
  __device__ __forceinline__ void decode(const Tables& tables) {
    for_each_state<N>([&](auto s) {
      Codec::template decode_four<Rule::kSigned[s]>(tables, codes[s].x, this->values[s]);
      Codec::template decode_four<Rule::kSigned[s]>(tables, codes[s].y, this->values[s] + 4);
    });
  }

  // `rule` already has the block's scales, for which the third argument is.
  __device__ __forceinline__ void find_moments(const Rule& rule, const Tables& tables,
                                               const float*) {
    decode(tables);
    this->moments_of_decoded(rule);
  }

  __device__ __forceinline__ void add_to(Extremes<Rule>& extremes) const {
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
      for_each_state<N>([&](auto s) { extremes.add(s, this->values[s][i]); });
  }

  // Writes the codes of the new states. random_of(s): the random numbers of the block, of a state
  // that is rounded stochastically; eight: number of these elements among the block's eights.
  template <bool, class Scales, class RandomOf>
  __device__ __forceinline__ void store_states(const Addresses& at, const Tables& tables,
                                               const Scales& scales, int, bool stochastic,
                                               const RandomOf& random_of, uint32_t eight) const {
    for_each_state<N>([&](auto s) {
      uint2* const to = reinterpret_cast<uint2*>(at.codes[s]);
      const auto& encoding = scales.encoding(s);
      if (!Format::template draws<Rule>(s) || !stochastic) {
        *to = Codec::template encode_eight_nearest<Rule::kSigned[s]>(tables, this->values[s],
                                                                     encoding);
        return;
      }
      uint32_t hash[kPerLane];
      hash_eight(random_of(s), eight, hash);
      *to = Codec::template encode_eight_stochastic<Rule::kSigned[s]>(tables, this->values[s],
                                                                      encoding, hash);
    });
  }
};

// The coefficients of the random numbers of a warp's next blocks, in shared memory: each lane
// hashes for one of them. Those of the parameter, if it needs any, follow those of the states.
template <class Rule, bool kRounds>
struct RandomsAhead {
  struct alignas(16) Coefficients {
    uint32_t c0, c1, c2, c3;
  };
  alignas(kLanes * sizeof(Coefficients)) Coefficients of_unit[Rule::kStates + kRounds][kLanes];
};

// Those of the block at hand.
template <class Rule, bool kRounds>
class BlockRandoms {
  using Ahead = RandomsAhead<Rule, kRounds>;

 public:
  // At the last of them: none has been prepared.
  __device__ __forceinline__ explicit BlockRandoms(Ahead& ahead)
      : ahead_(ahead), of_block_(&ahead.of_unit[0][kLanes - 1]) {}

  // Goes on to a block. first_element_of(unit): the global index of the first element of the unit's
  // block.
  template <class Format, class FirstElement>
  __device__ __forceinline__ void prepare(const Prepared<Rule>& prepared,
                                          const FirstElement& first_element_of, uint32_t unit,
                                          int lane) {
    if (!of_block_.next()) return;
    const uint64_t first = first_element_of(unit + uint32_t(lane) * kWarps);
    warp_barrier();  // all lanes have read the earlier ones
    const auto set = [&](int s, uint64_t key) {
      BlockRandom random;
      random.start(key, first);
      ahead_.of_unit[s][lane] = {random.c0, random.c1, random.c2, random.c3};
    };
    for_each_state<Rule::kStates>([&](auto s) {
      if constexpr (Format::template draws<Rule>(s)) set(s, prepared.keys[s]);
    });
    if constexpr (kRounds) set(Rule::kStates, prepared.param_key);
    warp_barrier();
  }
  TORCHAO8_HD BlockRandom get(int s) const {
    const auto c = of_block_[s * kLanes];
    return {c.c0, c.c1, c.c2, c.c3};
  }

 private:
  Ahead& ahead_;
  SharedRing<typename Ahead::Coefficients, kLanes> of_block_;
};

// Where the 8 elements of a lane lie when a warp takes the blocks of up to kSpan elements that
// begin within a span of a row. Lanes past the row's end repeat what others do: its last block, of
// which the last 8 elements. What they write is the same.
struct LanePosition {
  uint32_t eight, block;    // of the tensor
  uint32_t eight_of_block;  // number of these elements among the block's eights

  template <class Entry>
  TORCHAO8_HD LanePosition(const Entry& entry, uint32_t unit, int lane, int log_of_block) {
    const int log_of_eights = log_of_block - 3, per_unit = kLanes >> log_of_eights;
    int number = lane >> log_of_eights;
    eight_of_block = uint32_t(lane) & ((1u << log_of_eights) - 1);
    if (entry.whole_spans) {
      block = unit * uint32_t(per_unit) + uint32_t(number);
      eight = unit * kLanes + uint32_t(lane);
      return;
    }
    const uint32_t row = unit / entry.units_per_row;
    const uint32_t first_block = (unit - row * entry.units_per_row) * uint32_t(per_unit);
    const int last = int(entry.blocks_per_row - 1 - first_block);  // of the row, from here
    if (number > last) number = last;
    const uint32_t column = (first_block + uint32_t(number)) << log_of_eights;
    const uint32_t eights_of_row = uint32_t(entry.row_length / kPerLane);
    const uint32_t last_eight = eights_of_row - column - 1;
    if (eight_of_block > last_eight) eight_of_block = last_eight;
    block = row * entry.blocks_per_row + first_block + uint32_t(number);
    eight = row * eights_of_row + column + eight_of_block;
  }
};

// The blocks of a unit, of up to kSpan elements together. False: nothing has been written.
template <class Format, class Rule, class T, bool kOneBlock, bool kRounds, class Entry>
__device__ __forceinline__ bool step_span(const Entry& entry, const Prepared<Rule>& prepared,
                                          const TablesOf<Format>& tables,
                                          BlockRandoms<Rule, kRounds>& randoms, int log_of_block,
                                          bool stochastic, uint32_t unit, int lane) {
  constexpr int N = Rule::kStates;
  const int lanes = 1 << (log_of_block - 3);
  const LanePosition position(entry, unit, lane, log_of_block);
  const LaneAddresses<Format, Rule, T> at(entry, position.eight, position.block);
  const auto first_element_of_block = [&](uint32_t b) {
    return BlockPosition(entry, 1 << log_of_block, b).first_element;
  };
  LaneElements<Format, Rule, T> elements;
  using Scales = FastScales<Format, Rule, Entry>;
  Scales scales;
  scales.load(entry, at);
  elements.load(at, true);
  warp_barrier();  // every lane has read before any writes; the compiler keeps the loads above
  const Rule rule = prepared.rule.with_scales(scales.scale);
  const auto look = scales.look(rule, elements, tables);
  if (!scales.finish(rule, look, lanes)) return false;
  if constexpr (!Scales::kLooksAtMoments) elements.moments_of_decoded(rule);

  BlockRandom of_param = {};
  if constexpr (kRounds) {
    if constexpr (kOneBlock) {
      randoms.template prepare<Format>(prepared, first_element_of_block, unit, lane);
      of_param = randoms.get(N);
    } else {
      of_param.start(prepared.param_key, first_element_of_block(position.block));
    }
  }
  elements.template update<kRounds>(rule, at.param, of_param, position.eight_of_block);
  if (!kRounds && stochastic && kOneBlock)
    randoms.template prepare<Format>(prepared, first_element_of_block, unit, lane);
  const auto random_of = [&](int s) {
    if (kOneBlock) return randoms.get(s);
    BlockRandom random;
    random.start(prepared.keys[s], first_element_of_block(position.block));
    return random;
  };
  elements.template store_states<true>(at, tables, scales, lanes, stochastic, random_of,
                                       position.eight_of_block);
  if (lane % lanes == 0) scales.store(at);
  return true;
}

// The units of a warp from `unit` up to `end`. Returns the first one that it did not take, because
// it is past the end or step_span() returned false.
template <class Format, class Rule, class T, bool kOneBlock, bool kRounds, class Entry>
__device__ __forceinline__ uint32_t step_spans(const Entry& entry, const Prepared<Rule>& prepared,
                                               const TablesOf<Format>& tables,
                                               RandomsAhead<Rule, kRounds>& ahead, int log_of_block,
                                               bool stochastic, uint32_t unit, uint32_t end,
                                               int lane) {
  if (kOneBlock) log_of_block = 8;
  BlockRandoms<Rule, kRounds> randoms(ahead);
  for (; unit < end; unit += kWarps) {
    if (!step_span<Format, Rule, T, kOneBlock, kRounds>(entry, prepared, tables, randoms,
                                                        log_of_block, stochastic, unit, lane))
      break;
  }
  return unit;
}

// A block of more than kSpan elements: twice over its spans, the second time from the cache, or
// three times.
template <class Format, class Rule, class T, bool kRounds>
__device__ __forceinline__ bool step_long_block(const BlockEntryOf<Rule>& entry,
                                                const Prepared<Rule>& prepared,
                                                const TablesOf<Format>& tables,
                                                BlockRandoms<Rule, kRounds>& randoms,
                                                int block_size, bool stochastic, uint32_t block,
                                                int lane) {
  constexpr int N = Rule::kStates;
  const BlockPosition position(entry, block_size, block);
  const uint32_t first_eight = uint32_t(position.begin / kPerLane);  // a register, not two
  const auto at_of_lane = [&](int start) {
    return LaneAddresses<Format, Rule, T>(entry, first_eight + uint32_t(start) / kPerLane, block);
  };
  using Scales = FastScales<Format, Rule, BlockEntryOf<Rule>>;
  Scales scales;
  scales.load(entry, at_of_lane(0));
  const Rule rule = prepared.rule.with_scales(scales.scale);
  typename Scales::Look look;
  const auto start_of_lane = [&](int span) {
    const int start = span + lane * kPerLane, last = position.length - kPerLane;
    return start < last ? start : last;
  };
  for (int span = 0; span < position.length; span += kSpan) {
    LaneElements<Format, Rule, T> elements;
    elements.load(at_of_lane(start_of_lane(span)), Rule::kMomentsNeedParam);
    look.add_all_of(scales.look(rule, elements, tables));
  }
  if (!scales.finish(rule, look, kLanes)) return false;

  if (stochastic || kRounds) {
    randoms.template prepare<Format>(
        prepared, [&](uint32_t b) { return BlockPosition(entry, block_size, b).first_element; },
        block, lane);
  }
  const auto random_of = [&](int s) { return randoms.get(s); };
  if constexpr (Scales::kLooksAgain) {
    Extremes<Rule> quotients;
    for (int span = 0; span < position.length; span += kSpan) {
      const int start = start_of_lane(span);
      LaneElements<Format, Rule, T> elements;
      elements.load(at_of_lane(start), Rule::kMomentsNeedParam);
      elements.find_moments(rule, tables, scales.scale);
      elements.find_quotients(tables, scales, stochastic, random_of, uint32_t(start) / kPerLane);
      elements.add_to(quotients);
    }
    scales.finish_levels(quotients, kLanes);
  }
  for (int span = 0; span < position.length; span += kSpan) {
    const int start = start_of_lane(span);
    const LaneAddresses<Format, Rule, T> at = at_of_lane(start);
    LaneElements<Format, Rule, T> elements;
    elements.load(at, true);
    warp_barrier();  // every lane has read, the lanes past the end too, before any writes
    elements.find_moments(rule, tables, scales.scale);
    const BlockRandom of_param = kRounds ? randoms.get(N) : BlockRandom{};
    elements.template update<kRounds>(rule, at.param, of_param, uint32_t(start) / kPerLane);
    elements.template store_states<false>(at, tables, scales, kLanes, stochastic, random_of,
                                          uint32_t(start) / kPerLane);
  }
  if (lane == 0) scales.store(at_of_lane(0));
  return true;
}

}  // namespace torchao8::cuda

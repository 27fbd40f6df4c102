// The 4-bit format on a GPU. The same bits as the CPU's (cpu/formats/four_bit/scalar.inl is the
// definition). The roots of second moments are looked up in shared memory; all else is arithmetic.
#pragma once

#include "cuda/fast_block.cuh"
#include "cuda/slow_block.cuh"
#include "formats/four_bit_format.h"

namespace torchao8::cuda {

namespace four_bit {

using Squares = FourBitSquares;
using Levels = FourBitLevels;

// Nibble i of a word, from bit kShift on; there are other bits around it.
template <int kShift>
TORCHAO8_HD uint32_t nibble_from(uint32_t word, int i) {
  const int left = kShift - 4 * i;
  return left >= 0 ? word << left : word >> -left;
}

// The same number in both halves of a word.
constexpr uint32_t both_halves(uint32_t x) {
  return x << 16 | x;
}

// The roots of a scale of 1, and two more. Those of four times the scale are twice as large. Those
// of twice the scale are behind them by two entries, as two codes further on is twice the number.
constexpr int kRootEntries = 16 + 2;

struct alignas(16) Tables {
  uint32_t roots[kRootEntries], reciprocals[kRootEntries];
};

// The roots of one block's second moments.
struct Roots {
  const char *roots, *reciprocals;
  uint32_t up;  // what is added to the bits of a root, and taken from those of a reciprocal

  TORCHAO8_HD Roots(const Tables& tables, float scale) {
    const uint32_t ahead = FourBitRoots(scale).base - FourBitRoots(1.0f).base, first = ahead & 3;
    roots = reinterpret_cast<const char*>(tables.roots + first);
    reciprocals = reinterpret_cast<const char*>(tables.reciprocals + first);
    up = (ahead - first) << (23 - 2);
  }
  TORCHAO8_HD static uint32_t entry(const char* of, uint32_t codes, int i) {
    return *reinterpret_cast<const uint32_t*>(of + (nibble_from<2>(codes, i) & 60));
  }
  // Of the second moment with code i of a word, an eighth of the root.
  TORCHAO8_HD float eighth_of_root(uint32_t codes, int i) const {
    return bits_float(entry(roots, codes, i) + (up - (3u << 23)));
  }
  TORCHAO8_HD float reciprocal(uint32_t codes, int i) const {
    return bits_float(entry(reciprocals, codes, i) - up);
  }
};

// The second moments that the eight codes of a word stand for, as multiples of the scale.
__device__ __forceinline__ void decode_squares(uint32_t codes, float* to) {
  constexpr int kShift = Squares::kShift;
  static_assert((Squares::kFirst & 15) == 0);
#pragma unroll
  for (int i = 0; i < kPerLane; i++)
    to[i] =
        bits_float(and_or(nibble_from<kShift>(codes, i), 15u << kShift, Squares::kFirst << kShift));
}

// The level of code i of a word, from -7 to 8.
__device__ __forceinline__ float level(uint32_t codes, int i) {
  constexpr float kInteger = 0x1p23f;  // the lowest bit of this float is worth 1
  const float above = bits_float(and_or(nibble_from<0>(codes, i), 15, float_bits(kInteger)));
  return (Real(above) + Real(-kInteger - float(Levels::kZero))).x;
}

// The codes of eight second moments. hash: null to round to nearest. The high halves of floats have
// all bits of a code, so that two of them are clamped at a time.
__device__ __forceinline__ uint32_t encode_squares(const float* x, float inverse,
                                                   const uint32_t* hash) {
  constexpr int kShift = Squares::kShift - 16;
  constexpr uint32_t kStep = 1u << kShift;
  uint32_t sum[kPerLane], codes = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i++)
    sum[i] = float_bits((Real(x[i]) * Real(inverse)).x) +
             (hash ? Squares::draw(hash[i]) : Squares::kHalf);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t two = add_and_clamp_halves(permute_bytes(sum[i], sum[i + 4], 0x7632),
                                              both_halves(0x10000 - Squares::kFirst * kStep),
                                              both_halves(16 * kStep - 1));
    const uint32_t moved = 4 * i < kShift ? two >> (kShift - 4 * i) : two << (4 * i - kShift);
    codes = and_or(moved, both_halves(15u << 4 * i), codes);
  }
  return codes;
}

// The codes of eight quotients. hash: null to round to nearest. Their levels are then the lowest
// bits of floats; else the high halves, less those of kFine. -8 becomes -7.
__device__ __forceinline__ uint32_t encode_levels(const float* quotients, float inverse,
                                                  const uint32_t* hash) {
  static_assert((float_bits(Levels::kRound) & 0xffff) == 0);
  static_assert((float_bits(Levels::kFine) & 0xffff) == 0);
  constexpr uint32_t kLessFine = 0x10000 - (float_bits(Levels::kFine) >> 16);
  const uint32_t added = both_halves(Levels::kZero + (hash ? kLessFine : 0));
  uint32_t sum[kPerLane], codes = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const Real to(hash ? Levels::kFine : Levels::kRound);
    sum[i] = float_bits(fma(Real(quotients[i]), Real(inverse), to).x) +
             (hash ? Levels::draw(hash[i]) : 0);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t levels = permute_bytes(sum[i], sum[i + 4], hash ? 0x7632 : 0x5410);
    codes += add_and_clamp_halves(levels, added, both_halves(15)) << 4 * i;
  }
  return codes;
}

}  // namespace four_bit

template <>
struct CodecOf<FourBitFormat> {
  using Tables = four_bit::Tables;

  // Not from a copy: each entry is a few operations.
  static __device__ __forceinline__ void copy_tables(Tables& to, const Tables&) {
    const uint32_t i = threadIdx.x;
    if (i >= four_bit::kRootEntries) return;
    to.roots[i] = float_bits(FourBitRoots(1.0f).root(i));
    to.reciprocals[i] = float_bits(FourBitRoots(1.0f).reciprocal_of_root(i));
  }
  template <bool kSigned>
  static TORCHAO8_HD float decode(const Tables&, uint32_t code) {
    if constexpr (kSigned) return FourBitLevels::decode(code);
    return FourBitSquares::decode(code);
  }
  static TORCHAO8_HD float kept(float old, float scale, float unit) {
    return kept_value(old, scale, unit);
  }
};

// As in fast_block.cuh. A lane's eight codes are a word. Signed states are encoded when the codes
// of the second moments are known whose roots they are divided by, so that these come first.
template <class Rule, class T>
struct LaneElements<FourBitFormat, Rule, T> : LaneValues<Rule, T> {
  static constexpr int N = Rule::kStates;
  using Tables = four_bit::Tables;
  using Addresses = LaneAddresses<FourBitFormat, Rule, T>;
  uint32_t codes[N];

  __device__ __forceinline__ void load(const Addresses& at, bool with_param) {
    for_each_state<N>([&](auto s) { codes[s] = *reinterpret_cast<const uint32_t*>(at.codes[s]); });
    this->grad.load(at.grad);
    if (with_param) this->param.load(at.param);
  }

  // scale: of the old states.
  __device__ __forceinline__ void find_moments(const Rule& rule, const Tables& tables,
                                               const float* scale) {
    for_each_state<N>([&](auto s) {
      if constexpr (!Rule::kSigned[s]) {
        four_bit::decode_squares(codes[s], this->values[s]);
      } else if constexpr (Rule::kRootOf[s] < 0) {
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
          this->values[s][i] = (Real(four_bit::level(codes[s], i)) * Real(0.125f)).x;
      } else {
        constexpr int kRoot = Rule::kRootOf[s];
        const four_bit::Roots roots(tables, scale[kRoot]);
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
          const Real eighth(roots.eighth_of_root(codes[kRoot], i));
          this->values[s][i] = (Real(four_bit::level(codes[s], i)) * eighth).x;
        }
      }
    });
    this->moments_of_decoded(rule);
  }

  // Encodes the unsigned states, and divides the signed ones by their roots.
  template <class Scales, class RandomOf>
  __device__ __forceinline__ void find_quotients(const Tables& tables, const Scales& scales,
                                                 bool stochastic, const RandomOf& random_of,
                                                 uint32_t eight) {
    for_each_state<N>([&](auto s) {
      if constexpr (!Rule::kSigned[s]) {
        if (FourBitFormat::draws<Rule>(s) && stochastic) {
          uint32_t hash[kPerLane];
          hash_eight(random_of(s), eight, hash);
          codes[s] = four_bit::encode_squares(this->values[s], scales.inverse[s], hash);
        } else {
          codes[s] = four_bit::encode_squares(this->values[s], scales.inverse[s], nullptr);
        }
      }
    });
    for_each_state<N>([&](auto s) {
      if constexpr (Rule::kRootOf[s] >= 0) {
        constexpr int kRoot = Rule::kRootOf[s];
        const four_bit::Roots roots(tables, scales.new_scale[kRoot]);
#pragma unroll
        for (int i = 0; i < kPerLane; i++)
          this->values[s][i] =
              (Real(this->values[s][i]) * Real(roots.reciprocal(codes[kRoot], i))).x;
      }
    });
  }
  __device__ __forceinline__ void add_to(Extremes<Rule>& extremes) const {
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
      for_each_state<N>([&](auto s) { extremes.add(s, this->values[s][i]); });
  }

  // kWholeBlock: the lanes have all of a block at hand. Else `scales` already has the signed ones.
  template <bool kWholeBlock, class Scales, class RandomOf>
  __device__ __forceinline__ void store_states(const Addresses& at, const Tables& tables,
                                               Scales& scales, int lanes, bool stochastic,
                                               const RandomOf& random_of, uint32_t eight) {
    find_quotients(tables, scales, stochastic, random_of, eight);
    if constexpr (kWholeBlock) {
      Extremes<Rule> extremes;
      add_to(extremes);
      scales.finish_levels(extremes, lanes);
    }
    for_each_state<N>([&](auto s) {
      if constexpr (Rule::kSigned[s]) {
        if (FourBitFormat::draws<Rule>(s) && stochastic) {
          uint32_t hash[kPerLane];
          hash_eight(random_of(s), eight, hash);
          codes[s] = four_bit::encode_levels(this->values[s], scales.inverse[s], hash);
        } else {
          codes[s] = four_bit::encode_levels(this->values[s], scales.inverse[s], nullptr);
        }
      }
      *reinterpret_cast<uint32_t*>(at.codes[s]) = codes[s];
    });
  }
};

// A look at the new states gives the scales of the unsigned ones. Those of the others follow when
// the unsigned ones are encoded.
template <class Rule, class Entry>
struct FastScales<FourBitFormat, Rule, Entry> {
  static constexpr int N = Rule::kStates;
  static constexpr bool kLooksAtMoments = true, kLooksAgain = true;
  float scale[N], new_scale[N], inverse[N], unit[N];

  // Signed: the largest magnitude, NaN if one is.
  struct Look {
    Extreme<false> squares[N];
    float magnitude = 0.0f;

    __device__ __forceinline__ void add_all_of(const Look& other) {
      for_each_state<N>([&](auto s) { squares[s].add_all_of(other.squares[s]); });
      magnitude = larger_magnitude(magnitude, other.magnitude);
    }
  };

  template <class Addresses>
  TORCHAO8_HD void load(const Entry&, const Addresses& at) {
    for_each_state<N>([&](auto s) { scale[s] = *at.scales[s]; });
  }
  template <class Elements>
  __device__ __forceinline__ Look look(const Rule& rule, Elements& elements,
                                       const four_bit::Tables& tables) const {
    Look l;
    elements.find_moments(rule, tables, scale);
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      for_each_state<N>([&](auto s) {
        if constexpr (Rule::kSigned[s]) {
          l.magnitude = larger_magnitude(l.magnitude, elements.values[s][i]);
        } else {
          l.squares[s].add(elements.values[s][i]);
        }
      });
    }
    return l;
  }

  // Within these bounds the quotients and their scale are far below 2^126: a root is at least the
  // one of 2^-117, the smallest number at this scale.
  static constexpr float kMostOfLevels = 0x1p60f, kLeastOfRoots = 0x1p-110f;

  __device__ __forceinline__ bool finish(const Rule& rule, const Look& l, int lanes) {
    bool good = l.magnitude < kMostOfLevels;
    for_each_state<N>([&](auto s) {
      unit[s] = rule.unit[s];
      good = good & usable<Rule::kSigned[s]>(scale[s]);
      if constexpr (!Rule::kSigned[s]) {
        const float largest = l.squares[s].result(lanes);
        const float exact = (Real(largest) * Real(unit[s]) * Real(1.0f / FourBitSquares::kTop)).x;
        const bool has_scale = exact >= kMinScale;
        const float rounded = round_up_to_bits<0>(exact);
        good = good & usable<false>(largest) & (exact < 0x1p125f) &
               (!is_root(s) | !has_scale | (rounded >= kLeastOfRoots));
        const float one_by_scale = bits_float(0x7f000000u - float_bits(rounded));
        new_scale[s] = has_scale ? rounded : 0.0f;
        inverse[s] = has_scale ? (Real(unit[s]) * Real(one_by_scale)).x : 0.0f;
      }
    });
    return all_of_warp(good);
  }
  // extremes: of the quotients. As FourBitLevels::scale_of() and inverse_of(), without branches.
  __device__ __forceinline__ void finish_levels(const Extremes<Rule>& extremes, int lanes) {
    using Levels = FourBitLevels;
    for_each_state<N>([&](auto s) {
      if constexpr (Rule::kSigned[s]) {
        const float highest = extremes.of_signed[s].highest(lanes);
        const float less_lowest = -extremes.of_signed[s].lowest(lanes);
        const float extreme = larger(highest, less_lowest), other = smaller(highest, less_lowest);
        const float needed = (Real(other) * Real(8.0f / 7.0f)).x;
        const bool fits = needed <= (Real(extreme) * Real(Levels::kRoundings)).x;
        const float exact = (Real(fits ? extreme : needed) * Real(unit[s])).x;
        const float magnitude = fits ? exact : Levels::rounded(exact);
        const float signed_scale = highest >= less_lowest ? magnitude : -magnitude;
        const bool has_scale = extreme >= Levels::kLeast & magnitude >= kMinScale;
        const Real one_by_scale(bounded_reciprocal(signed_scale));
        const float eight_by_scale = (one_by_scale * (Real(8.0f) * Real(unit[s]))).x;
        new_scale[s] = has_scale ? signed_scale : 0.0f;
        inverse[s] = has_scale ? eight_by_scale : 0.0f;
      }
    });
  }
  template <class Addresses>
  TORCHAO8_HD void store(const Addresses& at) const {
    for_each_state<N>([&](auto s) { *at.scales[s] = new_scale[s]; });
  }

 private:
  // Whether a signed state is divided by the roots of this one.
  static constexpr bool is_root(int s) {
    bool is = false;
    for (int i = 0; i < N; i++) is = is || Rule::kRootOf[i] == s;
    return is;
  }
};

// Any block. A lane takes every 32nd pair of elements, whose codes share a byte; only the lane
// itself reads what it writes. It computes the moments three times: for the scales of unsigned
// states, for those of signed ones, and to use them.
template <class Rule, bool kRounds, class Entry>
struct SlowPackedBlock<FourBitFormat, Rule, kRounds, Entry> {
  static constexpr int N = Rule::kStates;
  using Squares = FourBitSquares;
  using Levels = FourBitLevels;
  const Entry& entry;
  const bool stochastic;
  const BlockPosition position;
  uint8_t* codes[N];  // of the block
  float scale[N], new_scale[N], inverse[N];
  Rule rule;
  BlockRandom random[N];

  __device__ __forceinline__ SlowPackedBlock(const Entry& e, const Prepared<Rule>& prepared,
                                             int block_size, bool is_stochastic, uint32_t block)
      : entry(e), stochastic(is_stochastic), position(e, block_size, block) {
    const uint32_t row = block / entry.blocks_per_row;
    const int64_t column = position.begin - row * entry.row_length;
    for_each_state<N>([&](auto s) {
      codes[s] = entry.codes[s] + row * ((entry.row_length + 1) / 2) + column / 2;
      scale[s] = four_bit_scale<Rule::kSigned[s]>(entry.scales[s][block]);
      if constexpr (FourBitFormat::draws<Rule>(s))
        random[s].start(prepared.keys[s], position.first_element);
    });
    rule = prepared.rule.with_scales(scale);
  }

  __device__ __forceinline__ SlowElement<Rule> element(int i) const {
    SlowElement<Rule> e;
    for_each_state<N>([&](auto s) {
      const uint32_t code = four_bit_code(codes[s], i);
      if constexpr (!Rule::kSigned[s]) {
        e.old[s] = Squares::decode(code);
      } else if constexpr (Rule::kRootOf[s] < 0) {
        e.old[s] = Levels::decode(code);
      } else {
        constexpr int kRoot = Rule::kRootOf[s];
        const float root = FourBitRoots(scale[kRoot]).root(four_bit_code(codes[kRoot], i));
        e.old[s] = (Real(root) * Real(Levels::decode(code))).x;
      }
    });
    find_new_values<FourBitFormat>(e, entry, rule, scale, position.begin + i);
    return e;
  }

  // The codes of the new states of an element. Without a scale that is a number there are none.
  template <int s>
  __device__ __forceinline__ uint32_t code_of_square(int i, const SlowElement<Rule>& e) const {
    if (std::isnan(new_scale[s])) return 0;
    uint32_t added = Squares::kHalf;
    if constexpr (FourBitFormat::draws<Rule>(s)) {
      if (stochastic) added = Squares::draw(random[s](uint32_t(i)));
    }
    return Squares::encode(e.values[s], inverse[s], added);
  }
  template <int s>
  __device__ __forceinline__ float quotient(int i, const SlowElement<Rule>& e) const {
    if constexpr (Rule::kRootOf[s] < 0) return e.values[s];
    constexpr int kRoot = Rule::kRootOf[s] < 0 ? 0 : Rule::kRootOf[s];
    const uint32_t code = code_of_square<kRoot>(i, e);
    const float reciprocal = FourBitRoots(new_scale[kRoot]).reciprocal_of_root(code);
    return (Real(e.values[s]) * Real(reciprocal)).x;
  }
  template <int s>
  __device__ __forceinline__ uint32_t code_of_level(int i, const SlowElement<Rule>& e) const {
    if (std::isnan(new_scale[s])) return Levels::kZero;
    const float q = quotient<s>(i, e);
    if constexpr (FourBitFormat::draws<Rule>(s)) {
      if (stochastic) return Levels::encode(q, inverse[s], Levels::draw(random[s](uint32_t(i))));
    }
    return Levels::encode(q, inverse[s]);
  }

  __device__ __forceinline__ void find_scales(int lane) {
    Extremes<Rule> extremes;
    for_each_element(lane, [&](int i) {
      const SlowElement<Rule> e = element(i);
      for_each_state<N>([&](auto s) {
        if constexpr (!Rule::kSigned[s]) extremes.add(s, e.values[s]);
      });
    });
    for_each_state<N>([&](auto s) {
      if constexpr (!Rule::kSigned[s]) {
        const float largest = extremes.result(s, kLanes);
        new_scale[s] =
            Squares::scale_of(usable<false>(scale[s]) ? largest : scale[s], rule.unit[s]);
        inverse[s] = Squares::inverse_of(new_scale[s], rule.unit[s]);
      }
    });
    for_each_element(lane, [&](int i) {
      const SlowElement<Rule> e = element(i);
      for_each_state<N>([&](auto s) {
        if constexpr (Rule::kSigned[s]) extremes.add(s, quotient<s>(i, e));
      });
    });
    for_each_state<N>([&](auto s) {
      if constexpr (Rule::kSigned[s]) {
        const Extreme<true>& ends = extremes.of_signed[s];
        const float highest = ends.highest(kLanes), lowest = ends.lowest(kLanes);
        new_scale[s] =
            usable<true>(scale[s]) ? Levels::scale_of(highest, lowest, rule.unit[s]) : scale[s];
        inverse[s] = Levels::inverse_of(new_scale[s], rule.unit[s]);
      }
    });
  }

  __device__ __forceinline__ void write(int lane, uint64_t param_key) const {
    [[maybe_unused]] BlockRandom of_param;
    if constexpr (kRounds) of_param.start(param_key, position.first_element);
#pragma unroll 1
    for (int i = 2 * lane; i < position.length; i += 2 * kLanes) {
      uint32_t bytes[N] = {};
#pragma unroll 1
      for (int j = 0; j < 2; j++) {
        uint32_t code[N];
        for_each_state<N>(
            [&](auto s) { code[s] = FourBitFormat::zero_byte<Rule::kSigned[s]>() & 15; });
        if (i + j < position.length) write_element(i + j, of_param, code);
        for_each_state<N>([&](auto s) { bytes[s] |= code[s] << 4 * j; });
      }
      for_each_state<N>([&](auto s) { codes[s][i / 2] = uint8_t(bytes[s]); });
    }
  }
  TORCHAO8_HD void store_scales(uint32_t block) const {
    for_each_state<N>([&](auto s) { entry.scales[s][block] = new_scale[s]; });
  }

 private:
  template <class Function>
  __device__ __forceinline__ void for_each_element(int lane, const Function& f) const {
#pragma unroll 1
    for (int i = lane; i < position.length; i += kLanes) f(i);
  }
  // Writes the parameter; the codes are for the caller to write.
  __device__ __forceinline__ void write_element(int i, const BlockRandom& of_param,
                                                uint32_t* code) const {
    const SlowElement<Rule> e = element(i);
    if (e.good) store_updated<kRounds>(entry, rule, e, position.begin + i, of_param, uint32_t(i));
    for_each_state<N>([&](auto s) {
      if constexpr (!Rule::kSigned[s]) {
        code[s] = code_of_square<s>(i, e);
      } else {
        code[s] = code_of_level<s>(i, e);
      }
    });
  }
};

}  // namespace torchao8::cuda

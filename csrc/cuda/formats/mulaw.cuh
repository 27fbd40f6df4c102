// The mu-law format on a GPU: a few integer operations a number, no table. The same bits as the
// CPU's (cpu/formats/mulaw/scalar.inl is the definition).
//
// Numbers are decoded from, and encoded to, floats of twice the size: the bits of 2.0 and of larger
// floats have nothing where a code has its bits, so that a code is put into place by one operation,
// and taken out by a shift.
#pragma once

#include "cuda/device.cuh"
#include "cuda/formats/format.cuh"
#include "formats/mulaw_format.h"

namespace torchao8::cuda {

namespace mulaw {

constexpr uint32_t kTwoBits = 0x40000000u;

template <bool kSigned>
using Code = MulawFormat::Codec<kSigned>;

// Of a block that has a scale: no second moment is rounded to zero.
template <bool kSigned>
constexpr uint32_t kLeast = !kSigned;

// From one code to the next, in the high halves of floats.
template <bool kSigned>
constexpr uint32_t kStep = 1u << (Code<kSigned>::kShift - 16);

// The same number in both halves of a word.
constexpr uint32_t both_halves(uint32_t x) {
  return x << 16 | x;
}

// 2 a / b of a in [2^-53, 1] and b in [2^-126, 2^118), a / b rounded to nearest: the quotient's
// residue is exact, and the reciprocal rounded to nearest (Markstein, "Computation of elementary
// functions on the IBM RISC System/6000 processor", 1990).
template <bool kPowerOfTwo>
TORCHAO8_HD float twice_quotient(float a, float b) {
  if constexpr (kPowerOfTwo) return (Real(a) * Real(bits_float(0x7f800000u - float_bits(b)))).x;
  const Real r(bounded_reciprocal(b)), q = Real(a) * r;
  return 2.0f * fma(fma(Real(-q.x), Real(b), Real(a)), r, q).x;
}

// How the fast path encodes a state of a block. kMayExceed: numbers may be larger than the extreme,
// which the caller gave for the whole tensor; they get the last code.
template <bool kMayExceed>
struct Encoding {
  float scale, twice_inverse;
  uint32_t least_codes, less_least;  // see codes_of_four()

  // As MulawScale, of an extreme in units that is usable. There are no branches.
  template <bool kSigned, bool kStill>
  TORCHAO8_HD void set(float extreme, float unit) {
    const float exact =
        (Real(std::fabs(extreme)) * Real(unit) * Real(1.0f / Code<kSigned>::kTop)).x;
    const bool has_scale = exact >= kMinScale;
    const float rounded = round_up_to_bits<kStill ? 0 : 7>(exact);
    const float quotient = twice_quotient<kStill>(unit, rounded);
    scale = has_scale ? rounded : 0.0f;
    twice_inverse = has_scale ? quotient : 0.0f;
    constexpr uint32_t kLow = kLeast<kSigned> * kStep<kSigned>, kZero = kTwoBits >> 16;
    constexpr uint32_t kLessLow = both_halves(0x10000 - kZero - kLow),
                       kLessZero = both_halves(0x10000 - kZero);
    least_codes = has_scale ? both_halves(kLeast<kSigned> << 8) : 0;
    less_least = has_scale ? kLessLow : kLessZero;
  }
};

// Byte i of a word, from bit kShift on; there are other bits around it.
template <int kShift>
TORCHAO8_HD uint32_t byte_from(uint32_t word, int i) {
  const int left = kShift - 8 * i;
  return left >= 0 ? word << left : word >> -left;
}

// The magnitudes of signed bytes 0 and 2 of a word (kOdd: of 1 and 3), as two bfloat16. They have 8
// significant bits.
template <bool kOdd>
__device__ __forceinline__ uint32_t magnitudes_of(uint32_t word) {
  constexpr int kUp = Code<true>::kShift - 16;
  constexpr uint32_t kBits = (Code<true>::kLast << kUp) * 0x10001u,
                     kTwos = kTwoBits >> 16 | kTwoBits;
  static_assert(Code<true>::kTop < 256 && MulawFormat::kMantissaBits[1] == 4);
  return half_less_one(and_or(kOdd ? word >> (8 - kUp) : word << kUp, kBits, kTwos));
}

// The signs of four numbers in the highest bits of four bytes, with other bits around them.
__device__ __forceinline__ uint32_t signs_of(const float* x) {
  uint32_t y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) y[i] = float_bits(x[i]);
  return permute_bytes(permute_bytes(y[0], y[1], 0x0073), permute_bytes(y[2], y[3], 0x0073),
                       0x5410);
}

// A number in the form that encoding adds to, without its sign.
template <bool kSigned, class Encoding>
__device__ __forceinline__ uint32_t twice_of(float x, const Encoding& e) {
  return float_bits(fma(Real(kSigned ? std::fabs(x) : x), Real(e.twice_inverse), Real(2.0f)).x);
}

// The codes of four such numbers; x: with their signs. The high halves have all bits of a code, so
// that two of them are raised to the least code, kept from exceeding the last one, and shifted at a
// time. kAdded: to the high halves.
template <bool kSigned, uint32_t kAdded, class Encoding>
__device__ __forceinline__ uint32_t codes_of_four(const uint32_t* twice, const float* x,
                                                  const Encoding& e) {
  constexpr uint32_t kCodes = Code<kSigned>::kLast + 1 - kLeast<kSigned>;
  constexpr uint32_t kMost = kCodes * kStep<kSigned> - 1;
  const auto two = [&](uint32_t low, uint32_t high) {
    const uint32_t above = add_and_clamp_halves(
        permute_bytes(low, high, 0x7632), e.less_least + both_halves(kAdded), both_halves(kMost));
    return (above << (24 - Code<kSigned>::kShift)) + e.least_codes;
  };
  const uint32_t codes =  // in the higher bytes of the halves
      permute_bytes(two(twice[0], twice[2]), two(twice[1], twice[3]), 0x7351);
  return kSigned ? and_or(signs_of(x), 0x80808080u, codes) : codes;
}

// The codes of four numbers, to nearest.
template <bool kSigned, bool kMayExceed>
__device__ __forceinline__ uint32_t encode_nearest_four(const float* x,
                                                        const Encoding<kMayExceed>& e) {
  constexpr uint32_t kHalf = Code<kSigned>::kHalf >> 16;
  uint32_t twice[4];
#pragma unroll
  for (int i = 0; i < 4; i++) twice[i] = twice_of<kSigned>(x[i], e);
  if constexpr (kSigned && !kMayExceed) {
    // No code is too large: the tolerance of the scale is less than half a step.
    constexpr int kUp = 24 - Code<true>::kShift;
    const uint32_t even =
        (permute_bytes(twice[0], twice[2], 0x7632) << kUp) + both_halves(kHalf << kUp);
    const uint32_t odd =
        (permute_bytes(twice[1], twice[3], 0x7632) << kUp) + both_halves(kHalf << kUp);
    return and_or(signs_of(x), 0x80808080u, permute_bytes(even, odd, 0x7351));
  } else {
    return codes_of_four<kSigned, kHalf>(twice, x, e);
  }
}

template <bool kSigned, bool kMayExceed>
__device__ __forceinline__ uint32_t encode_stochastic_four(const float* x,
                                                           const Encoding<kMayExceed>& e,
                                                           const uint32_t* hash) {
  uint32_t sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] = twice_of<kSigned>(x[i], e) + Code<kSigned>::draw(hash[i]);
  return codes_of_four<kSigned, 0>(sum, x, e);
}

}  // namespace mulaw

template <>
struct CodecOf<MulawFormat> {
  struct Tables {};
  static TORCHAO8_HD void copy_tables(Tables&, const Tables&) {}
  static TORCHAO8_HD float scale(float stored) { return mulaw_scale(stored); }
  static TORCHAO8_HD float kept(float old, float scale, float unit) {
    return kept_value(old, scale, unit);
  }

  template <bool kSigned>
  static TORCHAO8_HD float decode(const Tables&, uint32_t code) {
    return mulaw::Code<kSigned>::decode(code);
  }
  template <bool kSigned>
  static __device__ __forceinline__ void decode_four(const Tables&, uint32_t word, float* to) {
    if constexpr (kSigned) {
      const uint32_t even = and_or(word << 8, 0x80008000u, mulaw::magnitudes_of<false>(word));
      const uint32_t odd = and_or(word, 0x80008000u, mulaw::magnitudes_of<true>(word));
      to[0] = bits_float(even << 16);
      to[1] = bits_float(odd << 16);
      to[2] = bits_float(even & 0xffff0000u);
      to[3] = bits_float(odd & 0xffff0000u);
    } else {
      using Code = mulaw::Code<false>;
      constexpr uint32_t kBits = Code::kLast << Code::kShift;
      static_assert((kBits & mulaw::kTwoBits) == 0);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float twice =
            bits_float(and_or(mulaw::byte_from<Code::kShift>(word, i), kBits, mulaw::kTwoBits));
        to[i] = fma(Real(twice), Real(0.5f), Real(-1.0f)).x;
      }
    }
  }

  template <bool kSigned, bool kMayExceed>
  static __device__ __forceinline__ uint2
  encode_eight_nearest(const Tables&, const float* x, const mulaw::Encoding<kMayExceed>& e) {
    return make_uint2(mulaw::encode_nearest_four<kSigned>(x, e),
                      mulaw::encode_nearest_four<kSigned>(x + 4, e));
  }
  template <bool kSigned, bool kMayExceed>
  static __device__ __forceinline__ uint2 encode_eight_stochastic(
      const Tables&, const float* x, const mulaw::Encoding<kMayExceed>& e, const uint32_t* hash) {
    return make_uint2(mulaw::encode_stochastic_four<kSigned>(x, e, hash),
                      mulaw::encode_stochastic_four<kSigned>(x + 4, e, hash + 4));
  }
};

// A look at the gradients, the codes and, if the rule wants them, the parameters bounds the new
// states. Of a rule that is not monotone it is a look at the new states themselves.
template <class Rule, class Entry>
struct FastScales<MulawFormat, Rule, Entry> {
  static constexpr int N = Rule::kStates;
  static constexpr bool kLooksAtMoments = !kMonotoneOf<Rule>, kLooksAgain = false;
  using Tables = TablesOf<MulawFormat>;
  float scale[N], extreme[N];
  using Encoding = mulaw::Encoding<Entry::kOneScale>;
  Encoding encodings[N];

  // The largest magnitudes, as bits: those of NaN are above all others.
  struct Look {
    uint32_t param = 0, grad = 0, states[N] = {};

    TORCHAO8_HD void add_all_of(const Look& other) {
      raise(param, other.param);
      raise(grad, other.grad);
      for_each_state<N>([&](auto s) { raise(states[s], other.states[s]); });
    }
  };

  template <class Addresses>
  TORCHAO8_HD void load(const Entry& entry, const Addresses& at) {
    for_each_state<N>([&](auto s) {
      scale[s] = *at.scales[s];
      if constexpr (Entry::kOneScale) extreme[s] = entry.template extreme<Rule::kSigned[s]>(s);
    });
  }
  template <class Elements>
  static __device__ __forceinline__ Look look(const Rule& rule, Elements& elements,
                                              const Tables& tables) {
    Look l;
    if constexpr (kLooksAtMoments) {
      elements.find_moments(rule, tables, nullptr);
      for_each_state<N>([&](auto s) {
        l.states[s] = largest_of_eight([&](int i) { return elements.values[s][i]; });
      });
    } else {
      elements.decode(tables);
      for_each_state<N>([&](auto s) {
        l.states[s] = largest_code<Rule::kSigned[s]>(elements.codes[s], elements.values[s]);
      });
      l.grad = largest_of_eight([&](int i) { return elements.grad.get(i); });
      if constexpr (Rule::kMomentsNeedParam)
        l.param = largest_of_eight([&](int i) { return elements.param.get(i); });
    }
    return l;
  }
  __device__ __forceinline__ bool finish(const Rule& rule, const Look& l, int lanes) {
    const auto of_block = [&](uint32_t bits) { return bits_float(largest_of_lanes(bits, lanes)); };
    float states[N], bounds[N];
    for_each_state<N>([&](auto s) { states[s] = bounds[s] = of_block(l.states[s]); });
    if constexpr (!kLooksAtMoments) {
      float param = 0.0f;
      if constexpr (Rule::kMomentsNeedParam) param = of_block(l.param);
      mulaw_bounds(rule, param, of_block(l.grad), states, bounds);
    }
    uint32_t most = 0;
    for_each_state<N>([&](auto s) {
      raise(most, float_bits(scale[s]));
      raise(most, float_bits(bounds[s]));
      if constexpr (Entry::kOneScale) {
        raise(most, float_bits(extreme[s]) & 0x7fffffffu);
      } else {
        extreme[s] = bounds[s];
      }
      encodings[s].template set<Rule::kSigned[s], Rule::kStochastic[s]>(extreme[s], rule.unit[s]);
    });
    const bool good = most < float_bits(kOverflow);
    return lanes == kLanes ? good : all_of_warp(good);  // of one block, all lanes find the same
  }
  template <class S>
  TORCHAO8_HD const Encoding& encoding(S s) const {
    return encodings[s];
  }
  // One scale is written when all blocks have been stepped with the old one.
  template <class Addresses>
  TORCHAO8_HD void store(const Addresses& at) const {
    if constexpr (!Entry::kOneScale) {
      for_each_state<N>([&](auto s) { *at.scales[s] = encodings[s].scale; });
    }
  }

 private:
  static TORCHAO8_HD void raise(uint32_t& most, uint32_t x) { most = x > most ? x : most; }

  template <class Get>
  static __device__ __forceinline__ uint32_t largest_of_eight(const Get& get) {
    float largest = std::fabs(get(0));
#pragma unroll
    for (int i = 1; i < kPerLane; i++) largest = larger_magnitude(largest, get(i));
    return float_bits(largest);
  }
  // The magnitude of the largest code, as a float.
  template <bool kSigned>
  static __device__ __forceinline__ uint32_t largest_code(uint2 codes, const float* decoded) {
    if constexpr (kSigned) {
      const uint32_t pairs = larger_halves(
          larger_halves(mulaw::magnitudes_of<false>(codes.x), mulaw::magnitudes_of<true>(codes.x)),
          larger_halves(mulaw::magnitudes_of<false>(codes.y), mulaw::magnitudes_of<true>(codes.y)));
      uint32_t most = pairs << 16;
      raise(most, pairs & 0xffff0000u);
      return most;
    } else {
      uint32_t most = float_bits(decoded[0]);
#pragma unroll
      for (int i = 1; i < kPerLane; i++) raise(most, float_bits(decoded[i]));
      return most;
    }
  }
};

// Bounds are of the elements that are usable; the others keep their states, which need a code too.
template <class Rule, class Entry>
struct SlowScales<MulawFormat, Rule, Entry> {
  static constexpr int N = Rule::kStates;
  using Tables = TablesOf<MulawFormat>;
  bool any_good = false, any_bad = false;
  float param = 0.0f, grad = 0.0f, largest_new[N] = {}, largest_old[N] = {};
  MulawScale scales[N];

  TORCHAO8_HD void add(const SlowElement<Rule>& e) {
    any_good = any_good || e.good;
    any_bad = any_bad || !e.good;
    if (e.good) {
      param = max(std::fabs(e.param), param);
      grad = max(std::fabs(e.grad), grad);
    }
    for_each_state<N>([&](auto s) {
      largest_new[s] = max(std::fabs(e.values[s]), largest_new[s]);
      largest_old[s] = max(std::fabs(e.old[s]), largest_old[s]);
    });
  }
  // scale: of the old states, NaN where it is none, and so are the new ones then.
  __device__ __forceinline__ void finish(const Rule& rule, const float* scale, const Entry& entry) {
    float extremes[N];
    if constexpr (Entry::kOneScale) {
      for_each_state<N>([&](auto s) { extremes[s] = entry.template extreme<Rule::kSigned[s]>(s); });
    } else {
      find_extremes(rule, scale, extremes);
    }
    for_each_state<N>([&](auto s) {
      const float extreme = usable<false>(scale[s]) ? extremes[s] : scale[s];
      scales[s].template set<Rule::kSigned[s], Rule::kStochastic[s]>(extreme, rule.unit[s]);
    });
  }
  template <class S>
  __device__ __forceinline__ uint32_t encode_nearest(S s, const Tables&, float x) const {
    return encode(s, x, mulaw::Code<Rule::kSigned[s]>::kHalf);
  }
  template <class S>
  __device__ __forceinline__ uint32_t encode_stochastic(S s, const Tables&, float x,
                                                        uint32_t hash) const {
    return encode(s, x, mulaw::Code<Rule::kSigned[s]>::draw(hash));
  }
  TORCHAO8_HD void store(const Entry& entry, uint32_t block) const {
    for_each_state<N>([&](auto s) { entry.scales[s][block] = scales[s].scale; });
  }

 private:
  __device__ __forceinline__ void find_extremes(const Rule& rule, const float* scale,
                                                float* extremes) const {
    const auto of_block = [](float x) {
      return bits_float(largest_of_lanes(float_bits(x), kLanes));
    };
    if constexpr (!kMonotoneOf<Rule>) {
      for_each_state<N>([&](auto s) { extremes[s] = of_block(largest_new[s]); });
    } else {
      float old[N];
      for_each_state<N>([&](auto s) { old[s] = of_block(largest_old[s]); });
      mulaw_bounds(rule, of_block(param), of_block(grad), old, extremes);
      const bool good = largest_of_lanes(any_good, kLanes), bad = largest_of_lanes(any_bad, kLanes);
      for_each_state<N>([&](auto s) {
        // No element that is good has more, and without one the bound is of none.
        if (!usable<false>(extremes[s])) extremes[s] = kLargestUsable;
        if (!good) extremes[s] = 0.0f;
        if (bad) {
          extremes[s] = max(kept_value(old[s], scale[s], rule.unit[s]), extremes[s]);
        }
      });
    }
  }
  // Without a scale that is a number there are no states.
  template <class S>
  TORCHAO8_HD uint32_t encode(S s, float x, uint32_t added) const {
    if (std::isnan(scales[s].scale)) return 0;
    return mulaw::Code<Rule::kSigned[s]>::encode(x, scales[s].inverse, added, scales[s].least_code);
  }
};

}  // namespace torchao8::cuda

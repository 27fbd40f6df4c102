// The dynamic format on a GPU: every direction of the codec is a look-up in shared memory. The same
// bits as the CPU's (cpu/formats/dynamic/scalar.h is the definition), from the same tables
// (codec/dynamic_map.h).
#pragma once

#include "codec/dynamic_map.h"
#include "codec/random.h"
#include "cuda/device.cuh"
#include "cuda/formats/format.cuh"
#include "formats/dynamic.h"

namespace torchao8::cuda {

namespace dynamic {

// Below these cells every magnitude gets the smallest code: zero's if signed, 1 if not.
constexpr uint32_t kLowestSigned = 0x3480;    // 2^-22
constexpr uint32_t kLowestUnsigned = 0x3500;  // 2^-21

static_assert(rounds_up_from(value_of_code(true, 127), value_of_code(true, 128)) >=
                  bits_float(kLowestSigned << 16) &&
              rounds_up_from(value_of_code(false, 1), value_of_code(false, 2)) >=
                  bits_float(kLowestUnsigned << 16));

// The position lines of stochastic rounding. Cell j is of the floats whose top byte is j more than
// that of 2^-31. Behind the cells' own lines are those for what lies below their starts, with a gap
// between: two lanes that need different entries find them in different banks, but for cells that
// are 8 apart, which is 16 binades.
constexpr int kPositionCells = 16, kFirstPositionCell = 48;
constexpr int kBelowStart = kPositionCells + 8, kPositionEntries = kBelowStart + kPositionCells;

struct alignas(16) Tables {
  // Of magnitudes; signed: of codes counted from zero's.
  uint32_t nearest_signed[kCells - kLowestSigned];
  uint32_t nearest_unsigned[kCells - kLowestUnsigned];
  float map[2][256];  // [signed][code]
  // Cell j has its start and c in entry j, its a and b in entry kPositionEntries + j, and what lies
  // below its start kBelowStart further on. [signed]
  struct alignas(8) Two {
    float first, second;
  } positions[2][2 * kPositionEntries];
};

// In a constant expression, so that the tables lie in the program: nothing to set up on a device.
constexpr Tables make_tables() {
  Tables t = {};
  build_nearest_words(t.nearest_signed, true, false, kLowestSigned);
  for (uint32_t& word : t.nearest_signed) word -= uint32_t(kZeroCodeSigned) << 16;
  build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned);
  for (int is_signed = 0; is_signed < 2; is_signed++) {
    for (int code = 0; code < 256; code++) t.map[is_signed][code] = value_of_code(is_signed, code);
  }
  for (int is_signed = 0; is_signed < 2; is_signed++) {
    PositionLines lines = {};
    build_position_lines(lines, is_signed);
    for (int i = 0; i < 2 * kPositionCells; i++) {
      const int entry = i < kPositionCells ? i : i - kPositionCells + kBelowStart;
      t.positions[is_signed][entry] = {lines.cell_start[i % kPositionCells], lines.cell_c[i]};
      t.positions[is_signed][kPositionEntries + entry] = {lines.cell_a[i], lines.cell_b[i]};
    }
  }
  return t;
}

// Below, |x * inverse| is at most the float above 1, x being an element of a block and inverse of
// its extreme element.

// Nearest rounding: the code of x, or of its magnitude counted from zero's, in byte 2.
template <bool kSigned>
__device__ __forceinline__ uint32_t nearest_word(const Tables& t, float y) {
  constexpr uint32_t lowest = kSigned ? kLowestSigned : kLowestUnsigned;
  const uint32_t magnitude = float_bits(larger(std::fabs(y), bits_float(lowest << 16)));
  const uint32_t* words = kSigned ? t.nearest_signed : t.nearest_unsigned;
  return entry_of_high_half(&t, words, int(lowest), magnitude)[0] + magnitude;
}

__device__ __forceinline__ uint32_t pack_bytes(const uint32_t* word, int byte) {
  const uint32_t two = uint32_t(byte | (byte + 4) << 4);
  return permute_bytes(permute_bytes(word[0], word[1], two), permute_bytes(word[2], word[3], two),
                       0x5410);
}

// The codes of four numbers. A second moment that is not zero never gets the code of zero.
template <bool kSigned>
__device__ __forceinline__ uint32_t encode_nearest_four(const Tables& t, const float* x,
                                                        float inverse) {
  uint32_t word[4], y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float scaled = (Real(x[i]) * Real(inverse)).x;
    y[i] = float_bits(scaled);
    word[i] = nearest_word<kSigned>(t, scaled);
    if (!kSigned && x[i] == 0.0f) word[i] = 0;
  }
  uint32_t codes = pack_bytes(word, 2);
  if constexpr (kSigned) {
    // 127 + magnitude, 127 - magnitude: without a carry between bytes.
    const uint32_t negative =
        permute_bytes(permute_bytes(y[0], y[1], 0x00fb), permute_bytes(y[2], y[3], 0x00fb), 0x5410);
    codes -= (codes & negative & 0x80808080u) >> 7;  // there is no -1.0
    codes = (codes ^ (negative & 0x7f7f7f7fu)) + (~negative & 0x7f7f7f7fu);
  }
  return codes;
}

template <bool kSigned>
__device__ __forceinline__ uint32_t encode_nearest(const Tables& t, float x, float inverse) {
  const float four[4] = {x, x, x, x};
  return encode_nearest_four<kSigned>(t, four, inverse) & 0xff;
}

template <bool kSigned>
__device__ __forceinline__ uint32_t encode_stochastic(const Tables& t, float x, float inverse,
                                                      float one_to_two) {
  const Real y = kSigned ? fma(Real(std::fabs(x)), Real(std::fabs(inverse)), Real(kPositionBias))
                         : fma(Real(x), Real(inverse), Real(kPositionBias));
  auto cell = entry_of_byte(&t, t.positions[kSigned], kFirstPositionCell, float_bits(y.x), 3);
  cell.template skip_if_below<kBelowStart>(y.x, cell[0].first);
  const Tables::Two ab = cell[kPositionEntries];
  const Real line = fma(y, Real(ab.first), Real(ab.second));
  const Real gap = fma(line, Real(kGapSlope), Real(cell[0].second));
  const Real position = Real(smaller(gap.x, line.x)) + Real(one_to_two);
  if constexpr (kSigned) {
    const int32_t minus = int32_t(float_bits(x) ^ float_bits(inverse)) >> 31;  // 0 or -1
    const int32_t kk = int32_t(position.x), most = 128 + minus;                // there is no -1.0
    return uint32_t(int32_t(kZeroCodeSigned) + (((kk < most ? kk : most) ^ minus) - minus));
  }
  // Where x is not zero, its bits are no number below its code: a minimum in place of a branch.
  const uint32_t code = uint32_t(int32_t(position.x));
  return code < float_bits(x) ? code : float_bits(x);
}

// one_to_two() of random.h.
__device__ __forceinline__ float one_to_two_of(uint32_t hash) {
  return bits_float(and_or(hash, kRandomMask, kOneBits));
}

}  // namespace dynamic

template <>
struct CodecOf<DynamicFormat> {
  using Tables = dynamic::Tables;

  static __device__ __forceinline__ void copy_tables(Tables& to, const Tables& from) {
    const uint4* source = reinterpret_cast<const uint4*>(&from);
    uint4* target = reinterpret_cast<uint4*>(&to);
    for (uint32_t i = threadIdx.x; i < sizeof(Tables) / sizeof(uint4); i += kThreads)
      target[i] = source[i];
  }
  static TORCHAO8_HD float scale(float stored) { return stored; }
  static TORCHAO8_HD float kept(float old, float scale, float unit) {
    return (Real(old) * Real(scale / unit)).x;
  }

  template <bool kSigned>
  static TORCHAO8_HD float decode(const Tables& t, uint32_t code) {
    return t.map[kSigned][code];
  }
  template <bool kSigned>
  static __device__ __forceinline__ void decode_four(const Tables& t, uint32_t word, float* to) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = entry_of_byte(&t, t.map[kSigned], 0, word, i)[0];
  }

  template <bool kSigned>
  static __device__ __forceinline__ uint2 encode_eight_nearest(const Tables& t, const float* x,
                                                               float inverse) {
    return make_uint2(dynamic::encode_nearest_four<kSigned>(t, x, inverse),
                      dynamic::encode_nearest_four<kSigned>(t, x + 4, inverse));
  }
  template <bool kSigned>
  static __device__ __forceinline__ uint2 encode_eight_stochastic(const Tables& t, const float* x,
                                                                  float inverse,
                                                                  const uint32_t* hash) {
    uint32_t code[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const float u = dynamic::one_to_two_of(hash[i]);
      code[i] = dynamic::encode_stochastic<kSigned>(t, x[i], inverse, u);
    }
    return make_uint2(pack_numbers(code), pack_numbers(code + 4));
  }
};

template <class Rule, class Entry>
struct FastScales<DynamicFormat, Rule, Entry> {
  static constexpr int N = Rule::kStates;
  static constexpr bool kLooksAtMoments = true, kLooksAgain = false;
  using Look = Extremes<Rule>;
  float scale[N], extreme[N], inverse[N], new_scale[N];

  template <class Addresses>
  TORCHAO8_HD void load(const Entry& entry, const Addresses& at) {
    for_each_state<N>([&](auto s) {
      scale[s] = *at.scales[s];
      if constexpr (Entry::kOneScale) extreme[s] = entry.template extreme<Rule::kSigned[s]>(s);
    });
  }
  template <class Elements>
  static __device__ __forceinline__ Look look(const Rule& rule, Elements& elements,
                                              const dynamic::Tables& tables) {
    Look extremes;
    elements.find_moments(rule, tables, nullptr);
    elements.add_to(extremes);
    return extremes;
  }
  __device__ __forceinline__ bool finish(const Rule& rule, const Look& extremes, int lanes) {
    bool good = true;
    for_each_state<N>([&](auto s) {
      const float own = extremes.result(s, lanes);
      if constexpr (Entry::kOneScale) {
        // All elements of the block are usable, and none is larger than the tensor's extreme
        // element.
        good = good && usable<Rule::kSigned[s]>(own) && is_within(own, extreme[s]);
      } else {
        extreme[s] = own;
      }
      // As has_scale() of a unit up to 1: then a scale is in range if the extreme element is not
      // too large and the scale not too small. A stored scale that is NaN or infinite needs no
      // look: it makes the new states NaN or infinite, and the largest of them is the extreme
      // element.
      new_scale[s] = (Real(extreme[s]) * Real(rule.unit[s])).x;
      const bool is_zero = extreme[s] == 0;
      const bool has_scale = std::fabs(new_scale[s]) >= kMinScale;
      good = good & usable<Rule::kSigned[s]>(extreme[s]) & (has_scale | is_zero);
      inverse[s] = is_zero ? 0.0f : bounded_reciprocal(extreme[s]);
    });
    return lanes == kLanes ? good : all_of_warp(good);  // of one block, all lanes find the same
  }
  template <class S>
  TORCHAO8_HD float encoding(S s) const {
    return inverse[s];
  }
  // One scale is written when all blocks have been stepped with the old one.
  template <class Addresses>
  TORCHAO8_HD void store(const Addresses& at) const {
    if constexpr (!Entry::kOneScale) {
      for_each_state<N>([&](auto s) { *at.scales[s] = new_scale[s]; });
    }
  }
};

template <class Rule, class Entry>
struct SlowScales<DynamicFormat, Rule, Entry> {
  static constexpr int N = Rule::kStates;
  Extremes<Rule> extremes;
  float extreme[N], inverse[N], unit[N];
  bool encodes[N];

  TORCHAO8_HD void add(const SlowElement<Rule>& e) {
    for_each_state<N>([&](auto s) { extremes.add(s, e.values[s]); });
  }
  __device__ __forceinline__ void finish(const Rule& rule, const float*, const Entry& entry) {
    for_each_state<N>([&](auto s) {
      constexpr bool is_signed = Rule::kSigned[s];
      if constexpr (Entry::kOneScale) {
        extreme[s] = entry.template extreme<is_signed>(s);
      } else {
        extreme[s] = extremes.result(s, kLanes);
      }
      unit[s] = rule.unit[s];
      inverse[s] = inverse_of<is_signed>(extreme[s]);
      encodes[s] = has_scale<is_signed>(extreme[s], unit[s]);
    });
  }
  template <class S>
  __device__ __forceinline__ uint32_t encode_nearest(S s, const dynamic::Tables& t, float x) const {
    if (!encodes[s]) return zero_code<Rule::kSigned[s]>();
    return dynamic::encode_nearest<Rule::kSigned[s]>(t, within(s, x), inverse[s]);
  }
  template <class S>
  __device__ __forceinline__ uint32_t encode_stochastic(S s, const dynamic::Tables& t, float x,
                                                        uint32_t hash) const {
    if (!encodes[s]) return zero_code<Rule::kSigned[s]>();
    return dynamic::encode_stochastic<Rule::kSigned[s]>(t, within(s, x), inverse[s],
                                                        one_to_two(hash));
  }
  TORCHAO8_HD void store(const Entry& entry, uint32_t block) const {
    for_each_state<N>(
        [&](auto s) { entry.scales[s][block] = scale_of<Rule::kSigned[s]>(extreme[s], unit[s]); });
  }

 private:
  // With one scale: larger numbers have no code.
  template <class S>
  TORCHAO8_HD float within(S s, float x) const {
    if (Entry::kOneScale && !is_within(x, extreme[s])) return extreme[s];
    return x;
  }
};

}  // namespace torchao8::cuda

// The codec on a GPU: every direction a look-up in shared memory. The same bits as the CPU's
// (cpu/formats/dynamic/scalar.h is the definition), from the same tables (codec/dynamic_map.h).
#pragma once

#include "codec/dynamic_map.h"
#include "codec/random.h"
#include "cuda/device.cuh"

namespace torchao8::cuda {

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

template <bool kSigned>
TORCHAO8_HD float decode(const Tables& t, uint32_t code) {
  return t.map[kSigned][code];
}
// The code that byte i of a word is.
template <bool kSigned>
__device__ __forceinline__ float decode_byte(const Tables& t, uint32_t word, int i) {
  return entry_of_byte(&t, t.map[kSigned], 0, word, i)[0];
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

// Into shared memory, before a barrier.
__device__ __forceinline__ void copy_tables(Tables& to, const Tables& from) {
  const uint4* source = reinterpret_cast<const uint4*>(&from);
  uint4* target = reinterpret_cast<uint4*>(&to);
  for (uint32_t i = threadIdx.x; i < sizeof(Tables) / sizeof(uint4); i += kThreads)
    target[i] = source[i];
}

}  // namespace torchao8::cuda

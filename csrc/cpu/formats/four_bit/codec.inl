// The 4-bit codec in vectors. The bits are those of formats/four_bit.h.
#pragma once

#include "cpu/kernel_tables.h"
#include "cpu/step/states.inl"

namespace torchao8::TORCHAO8_ISA::four_bit {

// Only a format with more than blocks has one: see instances.inl.
template <class Rule>
struct StateDecoder;

static_assert(FourBitFormat::kStep % (2 * kWidth) == 0);

TORCHAO8_HD F decode_squares(U codes) {
  return float_of((codes + lanes_of(FourBitSquares::kFirst)) << FourBitSquares::kShift);
}
// In eighths.
TORCHAO8_HD F decode_levels(U codes) {
  return float_of_integers(codes + lanes_of(-FourBitLevels::kZero));
}

TORCHAO8_HD U encode_squares(F x, F inverse, U added) {
  const U rounded = (bits_of(x * inverse) + added) >> FourBitSquares::kShift;
  // The last four bits of the first code are 0.
  return at_most(at_least(rounded, FourBitSquares::kFirst), FourBitSquares::kLast) & lanes_of(15);
}
TORCHAO8_HD U encode_levels(F quotient, F inverse) {
  constexpr uint32_t kZero = float_bits(FourBitLevels::kRound), kLeast = kZero - 7;
  const U rounded = bits_of(fma(quotient, inverse, F(FourBitLevels::kRound)));
  return at_least(rounded, kLeast) + lanes_of(-kLeast);
}
TORCHAO8_HD U encode_levels(F quotient, F inverse, U drawn) {
  constexpr uint32_t kZero = float_bits(FourBitLevels::kFine) >> 16, kLeast = kZero - 7;
  const U fine = bits_of(fma(quotient, inverse, F(FourBitLevels::kFine)));
  return at_least((fine + drawn) >> 16, kLeast) + lanes_of(-kLeast);
}

// Roots by codes, as FourBitRoots has them.
struct Roots {
  uint32_t base;
  TORCHAO8_HD explicit Roots(float scale) : base(FourBitRoots(scale).base) {}

  TORCHAO8_HD U index(U codes) const { return codes + lanes_of(base); }
  static TORCHAO8_HD U shift(U index) { return (index >> 2) << 23; }
};
// An eighth of a root, so that levels may be in eighths.
struct RootEighths : Roots {
  static constexpr uint32_t kLess = (68u + 3u) << 23;
  static constexpr uint32_t kTable[4] = {
      FourBitRoots::kRoots[0] - kLess, FourBitRoots::kRoots[1] - kLess,
      FourBitRoots::kRoots[2] - kLess, FourBitRoots::kRoots[3] - kLess};
  Table4 table;
  TORCHAO8_HD explicit RootEighths(float scale) : Roots(scale), table(kTable) {}
  TORCHAO8_HD F operator()(U codes) const {
    const U i = index(codes);
    return float_of(table(i) + shift(i));
  }
};
struct RootReciprocals : Roots {
  static constexpr uint32_t kMore = 68u << 23;
  static constexpr uint32_t kTable[4] = {
      FourBitRoots::kReciprocals[0] + kMore, FourBitRoots::kReciprocals[1] + kMore,
      FourBitRoots::kReciprocals[2] + kMore, FourBitRoots::kReciprocals[3] + kMore};
  Table4 table;
  TORCHAO8_HD explicit RootReciprocals(float scale) : Roots(scale), table(kTable) {}
  TORCHAO8_HD F operator()(U codes) const {
    const U i = index(codes);
    return float_of(table(i) - shift(i));
  }
};

// The stored numbers of all states of a rule in one block.
template <class Rule>
struct BlockDecoder {
  static constexpr int N = Rule::kStates;
  float scale[N];
  TORCHAO8_HD explicit BlockDecoder(const float* scales) {
    for (int s = 0; s < N; s++) scale[s] = scales[s];
  }
  template <class Codes>
  TORCHAO8_HD void operator()(const Codes& bytes, int i, F* values) const {
    U codes[N];
    for (int s = 0; s < N; s++) codes[s] = load_codes(bytes[s] + i / 2);
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (!Rule::kSigned[s]) {
        values[s] = decode_squares(codes[s]);
      } else if constexpr (Rule::kRootOf[s] < 0) {
        values[s] = decode_levels(codes[s]) * F(0.125f);
      } else {
        constexpr int kRoot = Rule::kRootOf[s];
        values[s] = decode_levels(codes[s]) * RootEighths(scale[kRoot])(codes[kRoot]);
      }
    });
  }
};

template <bool kSigned>
TORCHAO8_HD U nearest_codes(F x, F inverse) {
  if constexpr (kSigned) {
    return encode_levels(x, inverse);
  } else {
    return encode_squares(x, inverse, lanes_of(FourBitSquares::kHalf));
  }
}

template <bool kSigned>
float quantize_block(const float* x, int n, uint8_t* codes) {
  const FourBitScale to = four_bit_scale_of_block<kSigned>(x, n);
  constexpr uint8_t kZero = FourBitFormat::zero_byte<kSigned>();
  if (std::isnan(to.scale)) {
    std::memset(codes, kZero, size_t(n + 1) / 2);
    return to.scale;
  }
  int i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store_codes(codes + i / 2, nearest_codes<kSigned>(load(x + i), F(to.inverse)));
  if (i < n) {
    float tail[kWidth] = {};
    uint8_t tail_codes[kWidth / 2];
    std::memcpy(tail, x + i, size_t(n - i) * sizeof(float));
    store_codes(tail_codes, nearest_codes<kSigned>(load(tail), F(to.inverse)));
    std::memcpy(codes + i / 2, tail_codes, size_t(n - i + 1) / 2);
  }
  return to.scale;
}

template <bool kSigned>
TORCHAO8_HD F decode(const uint8_t* codes) {
  if constexpr (kSigned) {
    return decode_levels(load_codes(codes)) * F(0.125f);
  } else {
    return decode_squares(load_codes(codes));
  }
}

template <bool kSigned>
void dequantize_block(const uint8_t* codes, int n, float scale, float* x) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, decode<kSigned>(codes + i / 2) * F(scale));
  if (i < n) {
    float tail[kWidth];
    uint8_t tail_codes[kWidth / 2] = {};
    std::memcpy(tail_codes, codes + i / 2, size_t(n - i + 1) / 2);
    store(tail, decode<kSigned>(tail_codes) * F(scale));
    std::memcpy(x + i, tail, size_t(n - i) * sizeof(float));
  }
}

}  // namespace torchao8::TORCHAO8_ISA::four_bit

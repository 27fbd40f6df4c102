// The mu-law codec on AVX-512. Included behind cpu/vec/avx512.h, inside the region that is compiled
// for its target. Byte permutations take any byte of a dword, so that all numbers are in order.
#pragma once

namespace torchao8::avx512::mulaw {

template <class T>
struct Lanes {
  // Sixteen values.
  template <bool kSigned, int kShift>
  static TORCHAO8_HD F decode(const uint8_t* codes) {
    constexpr uint32_t kOne = 0x3f800000u;
    if constexpr (kSigned) {
      const U shifted = load_signed_bytes(codes) << kShift;  // the sign ends in the highest bit
      const U magnitude = shifted & lanes_of(127u << kShift);
      const F value = float_of(magnitude + lanes_of(kOne)) - F(1.0f);
      return float_of(bits_of(value) | (shifted & lanes_of(0x80000000u)));
    } else {
      return float_of((load_bytes(codes) << kShift) + lanes_of(kOne)) - F(1.0f);
    }
  }

  static TORCHAO8_HD F load(const T* x) { return avx512::load(x); }
  template <class... Draw>
  static TORCHAO8_HD void store_quiet(T* x, F v, Draw... hashes) {
    avx512::store_quiet(x, v, hashes...);
  }
  using Stream = RandomStream;
};

// Encodes kStep numbers: add() both vectors, then store(). kDraws: stochastically.
template <bool kSigned, bool kDraws, int kShift, class Lanes>
struct Encoder {
  U rounded[2];
  F x[2];

  TORCHAO8_HD Encoder() {}

  // Not less than 0 where unsigned.
  template <class... Draw>
  TORCHAO8_HD void add(int which, F v, F inverse, Draw... hashes) {
    const F size = kSigned ? float_of(bits_of(v) & lanes_of(0x7fffffffu)) : v;
    U added = lanes_of(1u << (kShift - 1));
    if constexpr (kDraws) added = ((lanes_of(hashes) >> (32 - kShift)), ...);
    rounded[which] = (bits_of(fma(size, inverse, F(1.0f))) + added) >> kShift;
    x[which] = v;
  }
  TORCHAO8_HD void store(uint8_t* codes, Bytes least) const {
    constexpr uint32_t kOne = 0x3f800000u >> kShift;
    const Bytes magnitudes = pack_less<kSigned ? 127 : 255>(rounded[0], rounded[1], kOne);
    if constexpr (kSigned) {
      store_bytes(codes, magnitudes | sign_bytes(x[0], x[1]));
    } else {
      store_bytes(codes, max(magnitudes, least));
    }
  }
};

}  // namespace torchao8::avx512::mulaw

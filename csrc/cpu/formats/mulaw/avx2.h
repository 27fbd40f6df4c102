// The mu-law codec on AVX2. Included behind cpu/vec/avx2.h, inside the region that is compiled for
// its target.
//
// A code has a float's sign, exponent and first mantissa bits: all of it lies in the high half of a
// dword. So codes are widened to words, made into high halves there, sixteen by an instruction, and
// only then into floats. The way back is the same, but for the random bits, which need the low
// halves.
//
// That halves of dwords become neighbouring words costs shuffles where the floats are in order.
// With bfloat16 nothing need be in order: the sixteen numbers of an F are those of even index, then
// those of odd index. A shift and a mask load them, and a blend makes words of them.
#pragma once

namespace torchao8::avx2::mulaw {

// Sixteen words.
struct Words {
  __m256i x;
};
TORCHAO8_HD __m256i all_words(uint16_t x) {
  return _mm256_castps_si256(_mm256_set1_ps(bits_float(x * 0x10001u)));
}

// The order of numbers in an F, by the type of parameters and gradients. Words are in the order in
// which store_bytes() takes them.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  static TORCHAO8_HD Words high_words(U a) {
    return {_mm256_packus_epi32(_mm256_srli_epi32(a.low, 16), _mm256_srli_epi32(a.high, 16))};
  }
  // What has the signs of a in the highest bits.
  static TORCHAO8_HD Words signs(F a) {
    const U u = bits(a);
    return {_mm256_packs_epi32(u.low, u.high)};
  }
  // 32 bytes of two words' vectors that were packed.
  static TORCHAO8_HD void store_packed(uint8_t* to, Bytes bytes) { store_bytes(to, bytes); }

  // Sixteen values: what `widen` makes of dwords.
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

  static TORCHAO8_HD F load(const float* x) { return avx2::load(x); }
  static TORCHAO8_HD void store_quiet(float* x, F v) { avx2::store(x, v); }
  using Stream = RandomStream;
};

template <>
struct Lanes<BFloat16> {
  // Words as the high halves of dwords, those of even index first.
  static TORCHAO8_HD U widen(__m256i words) {
    return {_mm256_slli_epi32(words, 16), _mm256_and_si256(words, all_lanes(0xffff0000u).low)};
  }
  static TORCHAO8_HD Words high_words(U a) {
    return {_mm256_blend_epi16(_mm256_srli_epi32(a.low, 16), a.high, 0xaa)};
  }
  static TORCHAO8_HD Words low_words(U a) {
    return {_mm256_blend_epi16(a.low, _mm256_slli_epi32(a.high, 16), 0xaa)};
  }
  static TORCHAO8_HD Words signs(F a) { return high_words(bits(a)); }
  static TORCHAO8_HD void store_packed(uint8_t* to, Bytes bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(bytes.x, 0xd8));
  }

  template <bool kSigned, int kShift>
  static TORCHAO8_HD F decode(const uint8_t* codes) {
    constexpr int kInWords = kShift - 16;
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m256i words = kSigned ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
    __m256i magnitudes = _mm256_slli_epi16(words, kInWords);
    if (kSigned) magnitudes = _mm256_and_si256(magnitudes, all_words(uint16_t(127 << kInWords)));
    const F values = float_of(widen(_mm256_add_epi16(magnitudes, all_words(0x3f80)))) - F(1.0f);
    if (!kSigned) return values;
    const U signs = widen(_mm256_and_si256(words, all_words(0x8000)));
    return float_of(bits_of(values) | signs);
  }

  static TORCHAO8_HD F load(const BFloat16* x) {
    return float_of(widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
  }
  static TORCHAO8_HD void store_words(BFloat16* x, __m256i words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), words);
  }
  // As the function of this name in vec/avx2.h: low halves of more than 0x8000 round up, and
  // 0x8000 does where the high half is odd. The average of words, (a + b + 1) / 2, has the carry
  // of their sum.
  static TORCHAO8_HD void store_quiet(BFloat16* x, F v) {
    const __m256i high = high_words(bits(v)).x, low = low_words(bits(v)).x;
    const __m256i odd = _mm256_and_si256(high, all_words(1));
    const __m256i sum = _mm256_avg_epu16(low, _mm256_or_si256(odd, all_words(0x7ffe)));
    store_words(x, _mm256_add_epi16(high, _mm256_srli_epi16(sum, 15)));
  }
  static TORCHAO8_HD void store_quiet(BFloat16* x, F v, Hashes h) {
    store_words(x, high_words(round_to_bfloat16(bits(v), h)).x);
  }

  // The hashes of sixteen elements in this order.
  struct Stream {
    I h, difference;
    TORCHAO8_HD void start(const BlockRandom& r) {
      const I t = {_mm256_setr_epi32(kT(0), kT(2), kT(4), kT(6), kT(0), kT(2), kT(4), kT(6)),
                   _mm256_setr_epi32(kT(1), kT(3), kT(5), kT(7), kT(1), kT(3), kT(5), kT(7))};
      const auto line = [&](uint32_t a, uint32_t b) TORCHAO8_LAMBDA {
        const __m256i all = _mm256_set1_epi32(int(b));
        return I{_mm256_mullo_epi32(all, t.low), _mm256_mullo_epi32(all, t.high)} +
               I{_mm256_set1_epi32(int(a)), _mm256_set1_epi32(int(a))};
      };
      const I step = line(r.c2, r.c3);
      const __m256i second = _mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1);  // eight elements
      h = line(r.c0, r.c1) + (step & I{second, second});
      difference = step << 1;
    }
    TORCHAO8_HD Hashes next_hashes() {
      const I now = h;
      h = h + difference;
      return now;
    }

   private:
    static constexpr int kT(uint32_t l) { return int(lane_factor(l)); }
  };
};

// Encodes kStep numbers: add() both vectors, then store(). kDraws: stochastically. What is kept of
// the first vector takes few registers.
template <bool kSigned, bool kDraws, int kShift, class Lanes>
struct Encoder {
  Words rounded[2], signs[2];

  TORCHAO8_HD Encoder() {}

  // Not less than 0 where unsigned. To nearest, one half is added to words: it lies in the high
  // halves, and the low ones, which are dropped, carry nothing.
  template <class... Draw>
  TORCHAO8_HD void add(int which, F v, F inverse, Draw... hashes) {
    constexpr int kInWords = kShift - 16;
    constexpr uint16_t kLess = 0x3f80 - (kDraws ? 0 : 1 << (kInWords - 1));
    U number = bits(fma(kSigned ? magnitude(v) : v, inverse, F(1.0f)));
    if constexpr (kDraws) number = number + ((hashes >> (32 - kShift)) + ...);
    const __m256i words = _mm256_sub_epi16(Lanes::high_words(number).x, all_words(kLess));
    rounded[which].x = _mm256_srli_epi16(words, kInWords);
    if (kSigned) signs[which] = Lanes::signs(v);
  }
  // Packing saturates.
  TORCHAO8_HD void store(uint8_t* codes, Bytes least) const {
    const __m256i a = rounded[0].x, b = rounded[1].x;
    if constexpr (kSigned) {
      const __m256i sign =
          _mm256_and_si256(_mm256_packs_epi16(signs[0].x, signs[1].x), all_bytes(0x80).x);
      Lanes::store_packed(codes, {_mm256_or_si256(_mm256_packs_epi16(a, b), sign)});
    } else {
      Lanes::store_packed(codes, max(Bytes{_mm256_packus_epi16(a, b)}, least));
    }
  }
};

}  // namespace torchao8::avx2::mulaw

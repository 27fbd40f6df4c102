// What the 4-bit format needs of AVX2 beyond cpu/vec/avx2.h. Included inside a region compiled for
// that target.
#pragma once

namespace torchao8::avx2::four_bit {

// Sixteen codes of eight bytes, of each byte the low half first.
TORCHAO8_HD U load_codes(const uint8_t* x) {
  const __m256i bytes =
      _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
  const __m256i first = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  const __m256i rest = _mm256_set1_epi32(int(0x80808000u));  // become zero
  const __m256i four = _mm256_set1_epi32(4), halves = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
  const __m256i low = _mm256_or_si256(first, rest);
  const __m256i high = _mm256_or_si256(_mm256_add_epi32(first, four), rest);
  const U spread = {_mm256_shuffle_epi8(bytes, low), _mm256_shuffle_epi8(bytes, high)};
  return (spread >> U{halves, halves}) & lanes_of(15);
}

// The reverse, of numbers below 16.
TORCHAO8_HD void store_codes(uint8_t* to, U x) {
  // Words of both halves, in two lanes; of each pair of words a byte.
  const __m256i words = _mm256_packus_epi32(x.low, x.high);
  __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi32(1 | 16 << 16));
  pairs = _mm256_packus_epi16(_mm256_packus_epi32(pairs, pairs), pairs);
  const __m128i packed =
      _mm_unpacklo_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), packed);
}

// The same of two vectors, whose shares of a byte are packed together.
TORCHAO8_HD void store_codes(uint8_t* to, U x, U y) {
  const __m256i words = _mm256_packus_epi32(x.low, x.high);
  const __m256i codes = _mm256_packus_epi16(words, _mm256_packus_epi32(y.low, y.high));
  __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(1 | 16 << 8));
  pairs = _mm256_packus_epi16(pairs, pairs);
  // Each half of a register has every other word.
  const __m128i packed =
      _mm_unpacklo_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

TORCHAO8_HD U at_least(U x, uint32_t least) {
  return max(x, lanes_of(least));
}
TORCHAO8_HD U at_most(U x, uint32_t most) {
  return min(x, lanes_of(most));
}

// Integers as floats.
TORCHAO8_HD F float_of_integers(U x) {
  return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)};
}

// The highest and the lowest of many numbers and zero. NaN is not seen here.
struct Ends {
  F high, low;
  TORCHAO8_HD Ends() : high(0.0f), low(0.0f) {}
  TORCHAO8_HD void add(F v) {
    high = max(v, high);
    low = min(v, low);
  }
  TORCHAO8_HD float highest() const { return reduce_max(_mm256_max_ps(high.low, high.high)); }
  TORCHAO8_HD float lowest() const {
    const __m256 all = _mm256_min_ps(low.low, low.high);
    return -reduce_max(_mm256_xor_ps(all, _mm256_set1_ps(-0.0f)));
  }
};

// A look-up by the low two bits of an index.
struct Table4 {
  __m256 values;
  TORCHAO8_HD Table4() {}
  TORCHAO8_HD explicit Table4(const uint32_t* x)
      : values(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x))) {}
  TORCHAO8_HD U operator()(U i) const {
    return {_mm256_castps_si256(_mm256_permutevar_ps(values, i.low)),
            _mm256_castps_si256(_mm256_permutevar_ps(values, i.high))};
  }
};

}  // namespace torchao8::avx2::four_bit

// What the 4-bit format needs of AVX-512 beyond cpu/vec/avx512.h. Included inside a region compiled
// for that target.
#pragma once

namespace torchao8::avx512::four_bit {

// Sixteen codes of eight bytes, of each byte the low half first.
TORCHAO8_HD U load_codes(const uint8_t* x) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  const __m128i twice = _mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4));
  return U{_mm512_cvtepu8_epi32(twice)} & lanes_of(15);
}

// The reverse, of numbers below 16.
TORCHAO8_HD void store_codes(uint8_t* to, U x) {
  const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(x.x), _mm_set1_epi16(1 | 16 << 8));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(pairs, pairs));
}

TORCHAO8_HD void store_codes(uint8_t* to, U x, U y) {
  store_codes(to, x);
  store_codes(to + 8, y);
}

TORCHAO8_HD U operator-(U a, U b) {
  return {_mm512_sub_epi32(a.x, b.x)};
}
TORCHAO8_HD U at_least(U x, uint32_t least) {
  return {_mm512_max_epu32(x.x, all_lanes(least))};
}
TORCHAO8_HD U at_most(U x, uint32_t most) {
  return {_mm512_min_epu32(x.x, all_lanes(most))};
}

// Integers as floats.
TORCHAO8_HD F float_of_integers(U x) {
  return _mm512_cvtepi32_ps(x.x);
}

// The highest and the lowest of many numbers and zero. NaN is not seen here.
struct Ends {
  __m512 high, low;
  TORCHAO8_HD Ends() : high(_mm512_setzero_ps()), low(_mm512_setzero_ps()) {}
  TORCHAO8_HD void add(F v) {
    high = _mm512_max_ps(v.x, high);
    low = _mm512_min_ps(v.x, low);
  }
  TORCHAO8_HD float highest() const { return _mm512_reduce_max_ps(high); }
  TORCHAO8_HD float lowest() const { return _mm512_reduce_min_ps(low); }
};

// A look-up by the low two bits of an index.
struct Table4 {
  __m512 values;
  TORCHAO8_HD Table4() {}
  TORCHAO8_HD explicit Table4(const uint32_t* x)
      : values(_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(x)))) {}
  TORCHAO8_HD U operator()(U i) const {
    return {_mm512_castps_si512(_mm512_permutevar_ps(values, i.x))};
  }
};

}  // namespace torchao8::avx512::four_bit

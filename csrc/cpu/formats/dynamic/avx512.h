// The codec of the dynamic map on AVX-512. Included behind cpu/vec/avx512.h, inside the region that
// is compiled for its target.
#pragma once

namespace torchao8::avx512::dynamic {

// A look-up for each lane. The register it goes to is known to be ready; the plain intrinsics merge
// into one that is not, and GCC sees through a zero.
TORCHAO8_HD __m512i gather(const void* table, __m512i index) {
  __m512i to = _mm512_setzero_si512();
  __mmask16 all;
  asm("kxnorw %%k0, %%k0, %1\n\tvpgatherdd (%2,%3,4), %0%{%1%}"
      : "+&v"(to), "=&Yk"(all)
      : "r"(table), "v"(index)
      : "memory");
  return to;
}

template <bool kSigned>
struct Decoder {
  __m512 a, b;
  TORCHAO8_HD explicit Decoder(const CodecTables& t)
      : a(_mm512_load_ps(t.decode[kSigned].a)), b(_mm512_load_ps(t.decode[kSigned].b)) {}

  // Code c becomes the float 2^25 + 4 * c (2^24 + 2 * c) by putting its byte into the mantissa;
  // a subtraction leaves 4 * (c - 127) (2 * (c + 1)), exactly, whose exponent is the table's index.
  TORCHAO8_HD F operator()(const uint8_t* codes) const {
    const __m512i four_times =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i spread = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i magic = all_lanes(kSigned ? 0x4c000000 : 0x4b800000);
    const __m512 raw = _mm512_castsi512_ps(
        _mm512_mask_shuffle_epi8(magic, 0x1111111111111111u, four_times, spread));
    const __m512 k = _mm512_sub_ps(raw, _mm512_set1_ps(kSigned ? 33554940.0f : 16777214.0f));
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(k), 23);
    __m512 offset = _mm512_permutexvar_ps(exponent, b);
    if constexpr (kSigned) {  // offset ^ (k & sign)
      offset = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
          _mm512_castps_si512(offset), _mm512_castps_si512(k), all_lanes(0x80000000), 0x78));
    }
    return _mm512_fmadd_ps(_mm512_permutexvar_ps(exponent, a), k, offset);
  }
};

template <bool kSigned>
struct NearestEncoder {
  const uint32_t* words;
  TORCHAO8_HD explicit NearestEncoder(const CodecTables& t) : words(t.nearest[kSigned]) {}

  TORCHAO8_HD void operator()(F x, float inverse, uint8_t* codes) const {
    const F y = x * F(inverse);
    const __m512i word = gather(words, _mm512_srli_epi32(bits(y), 16));
    const __m512i sum = _mm512_add_epi32(word, bits(y));
    const __m512i order = load_order(kThirdBytes);
    __m512i packed;
    if constexpr (kSigned) {
      packed = _mm512_permutexvar_epi8(order, _mm512_abs_epi16(sum));
    } else {
      const __mmask16 nonzero = _mm512_test_epi32_mask(bits(x), bits(x));
      packed = _mm512_maskz_permutexvar_epi8(nonzero, order, sum);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_castsi512_si128(packed));
  }
};

// A look-up in 32 floats by the low five bits of an index.
struct Lookup32 {
  __m512 low, high;
  TORCHAO8_HD explicit Lookup32(const float* table)
      : low(_mm512_load_ps(table)), high(_mm512_load_ps(table + 16)) {}
  TORCHAO8_HD __m512 operator()(__m512i i) const { return _mm512_permutex2var_ps(low, i, high); }
};

template <bool kSigned>
struct StochasticEncoder {
  __m512 cell_start;
  Lookup32 a, b, c;
  TORCHAO8_HD explicit StochasticEncoder(const CodecTables& t)
      : cell_start(_mm512_load_ps(t.position[kSigned].cell_start)),
        a(t.position[kSigned].cell_a),
        b(t.position[kSigned].cell_b),
        c(t.position[kSigned].cell_c) {}

  TORCHAO8_HD void operator()(F x, float inverse, F one_to_two, uint8_t* codes) const {
    __m512 y;
    if constexpr (kSigned) {
      y = fma(F(_mm512_abs_ps(x.x)), F(std::fabs(inverse)), F(kPositionBias)).x;
    } else {
      y = fma(x, F(inverse), F(kPositionBias)).x;
    }
    __m512i cell = _mm512_srli_epi32(_mm512_castps_si512(y), 24);  // 48 + j
    const __mmask16 above =
        _mm512_cmp_ps_mask(y, _mm512_permutexvar_ps(cell, cell_start), _CMP_GE_OQ);
    cell = _mm512_mask_add_epi32(cell, above, cell, all_lanes(16));
    const __m512 line = _mm512_fmadd_ps(y, a(cell), b(cell));
    const __m512 gap = _mm512_fmadd_ps(line, _mm512_set1_ps(kGapSlope), c(cell));
    const F position = F(_mm512_min_ps(gap, line)) + one_to_two;
    const __m512i kk = _mm512_cvttps_epi32(position.x);
    __m512i code;
    if constexpr (kSigned) {
      const __m512i minus = _mm512_srai_epi32(
          _mm512_xor_si512(bits(x), _mm512_set1_epi32(int(float_bits(inverse)))), 31);
      const __m512i magnitude =
          _mm512_min_epi32(kk, _mm512_add_epi32(_mm512_set1_epi32(128), minus));
      code = _mm512_add_epi32(_mm512_set1_epi32(kZeroCodeSigned),
                              _mm512_sub_epi32(_mm512_xor_si512(magnitude, minus), minus));
    } else {
      // Zero stays zero: where x is not zero, its bits are a number above any code it can have.
      code = _mm512_min_epu32(kk, bits(x));
    }
    const __m512i packed = _mm512_permutexvar_epi8(load_order(kLowBytes), code);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_castsi512_si128(packed));
  }
};

}  // namespace torchao8::avx512::dynamic

// Eight floats in an AVX register (AVX2, FMA, F16C: Haswell and later, Zen and later). Included
// inside a region compiled for that target: see isa_avx2.cpp. The arithmetic is that of
// vec_scalar.h.
#pragma once

namespace torchao8::avx2 {

constexpr int kWidth = 8;

struct F {
  __m256 x;
  TORCHAO8_HD F() {}
  TORCHAO8_HD F(__m256 v) : x(v) {}
  TORCHAO8_HD explicit F(float v) : x(_mm256_set1_ps(v)) {}
};
TORCHAO8_HD F operator*(F a, F b) {
  return _mm256_mul_ps(a.x, b.x);
}
TORCHAO8_HD F operator+(F a, F b) {
  return _mm256_add_ps(a.x, b.x);
}
TORCHAO8_HD F operator-(F a, F b) {
  return _mm256_sub_ps(a.x, b.x);
}
TORCHAO8_HD F fma(F a, F b, F c) {
  return _mm256_fmadd_ps(a.x, b.x, c.x);
}
TORCHAO8_HD F sqrt(F a) {
  return _mm256_sqrt_ps(a.x);
}
TORCHAO8_HD F reciprocal(F a) {
  return _mm256_div_ps(_mm256_set1_ps(1.0f), a.x);
}
TORCHAO8_HD F max(F a, F b) {
  return _mm256_max_ps(a.x, b.x);
}
TORCHAO8_HD F sign(F a) {
  const __m256 nonzero = _mm256_cmp_ps(a.x, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  const __m256 x = _mm256_or_ps(_mm256_and_ps(a.x, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
  return _mm256_and_ps(nonzero, x);
}
TORCHAO8_HD __m256i bits(F a) {
  return _mm256_castps_si256(a.x);
}
TORCHAO8_HD F from_bits(__m256i a) {
  return _mm256_castsi256_ps(a);
}

// Four doubles, for sums.
constexpr int kDoubles = 4;
struct Doubles {
  __m256d x;
  TORCHAO8_HD Doubles() {}
  TORCHAO8_HD Doubles(__m256d v) : x(v) {}
  TORCHAO8_HD explicit Doubles(double v) : x(_mm256_set1_pd(v)) {}
};
TORCHAO8_HD Doubles operator+(Doubles a, Doubles b) {
  return _mm256_add_pd(a.x, b.x);
}
TORCHAO8_HD Doubles operator-(Doubles a, Doubles b) {
  return _mm256_sub_pd(a.x, b.x);
}
TORCHAO8_HD Doubles fma(Doubles a, Doubles b, Doubles c) {
  return _mm256_fmadd_pd(a.x, b.x, c.x);
}
TORCHAO8_HD Doubles load_doubles(const float* x) {
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
}
TORCHAO8_HD void store_doubles(double* x, Doubles v) {
  _mm256_store_pd(x, v.x);
}

// The high halves of eight dwords, and the bytes of eight numbers below 256.
TORCHAO8_HD void store_high_halves(void* to, __m256i x) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1));
  x = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x, order), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(x));
}
TORCHAO8_HD void store_bytes(uint8_t* to, __m256i x) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  x = _mm256_shuffle_epi8(x, order);
  x = _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(x));
}

TORCHAO8_HD F load(const float* x) {
  return _mm256_loadu_ps(x);
}
TORCHAO8_HD void store(float* x, F v) {
  _mm256_storeu_ps(x, v.x);
}
TORCHAO8_HD F load(const BFloat16* x) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
TORCHAO8_HD __m256i round_to_bfloat16(__m256i u) {  // in the high halves
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}
TORCHAO8_HD void store(BFloat16* x, F v) {
  const __m256i quiet = _mm256_or_si256(bits(v), _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.x, v.x, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(round_to_bfloat16(bits(v)), quiet, nan);
  store_high_halves(x, r);
}
// For values that are not NaN, or one that came from memory as bfloat16, which rounding leaves
// alone.
TORCHAO8_HD void store_quiet(BFloat16* x, F v) {
  const __m256i r = round_to_bfloat16(bits(v));
  store_high_halves(x, r);
}
TORCHAO8_HD void store_quiet(float* x, F v) {
  store(x, v);
}

// The random numbers of F's elements; stores that round stochastically by them.
using Hashes = __m256i;
TORCHAO8_HD Hashes load_hashes(const uint32_t* x) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
}
TORCHAO8_HD __m256i round_to_bfloat16(__m256i u, Hashes h) {  // in the high halves
  return _mm256_add_epi32(u, _mm256_srli_epi32(h, 16));
}
TORCHAO8_HD void store(BFloat16* x, F v, Hashes h) {
  const __m256i quiet = _mm256_or_si256(bits(v), _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.x, v.x, _CMP_UNORD_Q));
  store_high_halves(x, _mm256_blendv_epi8(round_to_bfloat16(bits(v), h), quiet, nan));
}
TORCHAO8_HD void store_quiet(BFloat16* x, F v, Hashes h) {
  store_high_halves(x, round_to_bfloat16(bits(v), h));
}
TORCHAO8_HD F load(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
TORCHAO8_HD void store(Half* x, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v.x, _MM_FROUND_TO_NEAREST_INT));
}

using Mask = __m256;
template <bool kSigned>
TORCHAO8_HD Mask in_range(F v) {
  __m256i u = kSigned ? _mm256_and_si256(bits(v), _mm256_set1_epi32(0x7fffffff)) : bits(v);
  u = _mm256_min_epu32(u, _mm256_set1_epi32(0x7fffffff));  // the comparison is a signed one
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(0x7e800000), u));
}
TORCHAO8_HD Mask both(Mask a, Mask b) {
  return _mm256_and_ps(a, b);
}
TORCHAO8_HD bool all(Mask a) {
  return _mm256_movemask_ps(a) == 0xff;
}
TORCHAO8_HD F select(Mask m, F yes, F no) {
  return _mm256_blendv_ps(no.x, yes.x, m);
}

TORCHAO8_HD float reduce_max(__m256 v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Signed: NaN is not seen here, but in the unsigned moment, which has one wherever a gradient has.
template <bool kSigned>
struct Extreme;
template <>
struct Extreme<true> {
  __m256 high, negated_low;
  TORCHAO8_HD Extreme() : high(_mm256_setzero_ps()), negated_low(_mm256_setzero_ps()) {}
  TORCHAO8_HD void add(F v) {
    high = _mm256_max_ps(v.x, high);
    negated_low = _mm256_max_ps(_mm256_xor_ps(v.x, _mm256_set1_ps(-0.0f)), negated_low);
  }
  TORCHAO8_HD float result() const {
    const float h = reduce_max(high), l = reduce_max(negated_low);
    return l > h ? -l : h;
  }
};
template <>
struct Extreme<false> {
  __m256i high;
  TORCHAO8_HD Extreme() : high(_mm256_setzero_si256()) {}
  TORCHAO8_HD void add(F v) { high = _mm256_max_epu32(high, bits(v)); }
  TORCHAO8_HD float result() const {
    __m128i x = _mm_max_epu32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
    return bits_float(uint32_t(_mm_cvtsi128_si32(x)));
  }
};

template <bool kSigned>
struct Decoder {
  __m256 a, b;
  TORCHAO8_HD explicit Decoder(const CodecTables& t)
      : a(_mm256_load_ps(t.decode[kSigned].a)), b(_mm256_load_ps(t.decode[kSigned].b)) {}

  // As in vec_avx512.h; the tables' period is 8.
  TORCHAO8_HD F operator()(const uint8_t* codes) const {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m256i magic = _mm256_set1_epi32(kSigned ? 0x4c000000 : 0x4b800000);
    const __m256 raw = _mm256_castsi256_ps(_mm256_or_si256(_mm256_cvtepu8_epi32(eight), magic));
    const __m256 k = _mm256_sub_ps(raw, _mm256_set1_ps(kSigned ? 33554940.0f : 16777214.0f));
    const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(k), 23);
    __m256 offset = _mm256_permutevar8x32_ps(b, exponent);
    if constexpr (kSigned) offset = _mm256_xor_ps(offset, _mm256_and_ps(k, _mm256_set1_ps(-0.0f)));
    return _mm256_fmadd_ps(_mm256_permutevar8x32_ps(a, exponent), k, offset);
  }
};

template <bool kSigned>
struct NearestEncoder {
  const uint32_t* words;
  TORCHAO8_HD explicit NearestEncoder(const CodecTables& t) : words(t.nearest[kSigned]) {}

  TORCHAO8_HD void operator()(F x, float inverse, uint8_t* codes) const {
    const F y = x * F(inverse);
    const __m256i cell = _mm256_srli_epi32(bits(y), 16);
    const __m256i word = _mm256_i32gather_epi32(reinterpret_cast<const int*>(words), cell, 4);
    __m256i code = _mm256_srai_epi32(_mm256_add_epi32(word, bits(y)), 16);
    if constexpr (kSigned) {
      code = _mm256_abs_epi32(code);
    } else {
      code = _mm256_andnot_si256(_mm256_cmpeq_epi32(bits(x), _mm256_setzero_si256()), code);
    }
    store_bytes(codes, code);
  }
};

// The hashes of 8 neighbouring elements, the first one's number being a multiple of 8.
struct RandomStream {
  __m256i h, difference;
  TORCHAO8_HD void start(BlockRandom r, uint32_t first = 0) {
    r = r.from(first / 8);
    const __m256i t = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneFactors.t));
    const auto line = [&](uint32_t a, uint32_t b) TORCHAO8_LAMBDA {
      return _mm256_add_epi32(_mm256_set1_epi32(int(a)),
                              _mm256_mullo_epi32(_mm256_set1_epi32(int(b)), t));
    };
    h = line(r.c0, r.c1);
    difference = line(r.c2, r.c3);
  }
  TORCHAO8_HD Hashes next_hashes() {
    const __m256i now = h;
    h = _mm256_add_epi32(h, difference);
    return now;
  }
  TORCHAO8_HD F next() {
    const __m256i random = _mm256_and_si256(next_hashes(), _mm256_set1_epi32(int(kRandomMask)));
    return from_bits(_mm256_or_si256(random, _mm256_set1_epi32(int(kOneBits))));
  }
};

template <bool kSigned>
struct StochasticEncoder {
  __m256 floor, next_start, a, b, c;
  TORCHAO8_HD explicit StochasticEncoder(const CodecTables& tables) {
    const PositionLines& t = tables.position[kSigned];
    // Signed: below it, 2^-23, all is class 0; it only keeps the guess from being negative.
    floor = _mm256_set1_ps(kSigned ? 0x1p-23f : t.floor);
    next_start = _mm256_loadu_ps(t.start + 1);
    a = _mm256_load_ps(t.a);
    b = _mm256_load_ps(t.b);
    c = _mm256_load_ps(t.c);
  }

  TORCHAO8_HD void operator()(F x, float inverse, F one_to_two, uint8_t* codes) const {
    __m256 y, floored;
    if constexpr (kSigned) {
      const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.x);
      y = fma(F(magnitude), F(std::fabs(inverse)), F(kPositionBias)).x;
      floored = max(F(y), F(floor)).x;
    } else {
      y = floored = max(fma(x, F(inverse), F(kPositionBias)), F(floor)).x;
    }
    // The bits of a float are its base-2 logarithm, scaled, up to 0.086 too low. The class guessed
    // from them is the right one or the one below.
    const __m256 log2 = _mm256_cvtepi32_ps(_mm256_castps_si256(floored));
    const __m256i guess = _mm256_cvttps_epi32(
        _mm256_fmadd_ps(log2, _mm256_set1_ps(3.5885572e-8f), _mm256_set1_ps(-31.230809f)));
    const __m256 above = _mm256_cmp_ps(y, _mm256_permutevar8x32_ps(next_start, guess), _CMP_GE_OQ);
    const __m256i d = _mm256_sub_epi32(guess, _mm256_castps_si256(above));
    const __m256 line =
        _mm256_fmadd_ps(y, _mm256_permutevar8x32_ps(a, d), _mm256_permutevar8x32_ps(b, d));
    const __m256 gap =
        _mm256_fmadd_ps(line, _mm256_set1_ps(kGapSlope), _mm256_permutevar8x32_ps(c, d));
    const F position = F(_mm256_min_ps(gap, line)) + one_to_two;
    const __m256i kk = _mm256_cvttps_epi32(position.x);
    if constexpr (kSigned) {
      const __m256i minus = _mm256_srai_epi32(
          _mm256_xor_si256(bits(x), _mm256_set1_epi32(int(float_bits(inverse)))), 31);
      const __m256i magnitude =
          _mm256_min_epi32(kk, _mm256_add_epi32(_mm256_set1_epi32(128), minus));
      store_bytes(codes,
                  _mm256_add_epi32(_mm256_set1_epi32(kZeroCodeSigned),
                                   _mm256_sub_epi32(_mm256_xor_si256(magnitude, minus), minus)));
    } else {
      // Zero stays zero: where x is not zero, its bits are a number above any code it can have.
      store_bytes(codes, _mm256_min_epu32(kk, bits(x)));
    }
  }
};

}  // namespace torchao8::avx2

// The codec of the dynamic map on AVX2. Included behind cpu/vec/avx2.h, inside the region that is
// compiled for its target.
#pragma once

namespace torchao8::avx2::dynamic {

template <bool kSigned>
struct Decoder {
  Table8 a, b;
  TORCHAO8_HD explicit Decoder(const CodecTables& t)
      : a(t.decode[kSigned].a), b(t.decode[kSigned].b) {}

  // As in avx512.h; the tables' period is 8.
  TORCHAO8_HD F operator()(const uint8_t* codes) const {
    const __m128i* p = reinterpret_cast<const __m128i*>(codes);
    const __m128i* q = reinterpret_cast<const __m128i*>(codes + 8);
    const I c = {_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)),
                 _mm256_cvtepu8_epi32(_mm_loadl_epi64(q))};
    const F raw = from_bits(c | all_lanes(kSigned ? 0x4c000000 : 0x4b800000));
    const F k = raw - F(kSigned ? 33554940.0f : 16777214.0f);
    const I exponent = bits(k) >> 23;
    F offset = b(exponent);
    if constexpr (kSigned) offset = offset ^ (k & F(-0.0f));
    return fma(a(exponent), k, offset);
  }
};

// By the lines of codec_tables.h: a gather takes longer than all of it, the more so where it is
// slowed down for the sake of security.
template <bool kSigned>
struct NearestEncoder {
  // What lies this little above a tie, after kNearTie has been added, may belong below it. In units
  // of what is left of z below kk, moved up by the bits of kk: the longest one but that of 1.0 has
  // 7, unsigned 8.
  static constexpr uint32_t kTies = (2 * kNearTie << (kSigned ? 7 : 8)) - 1;
  const uint32_t* words;
  Table16 decade_bits;
  Table8 next_start, slope;
  F floor;
  TORCHAO8_HD explicit NearestEncoder(const CodecTables& t)
      : words(t.nearest[kSigned]),
        decade_bits(t.nearest_lines[kSigned].bits),
        next_start(t.nearest_lines[kSigned].next_start),
        slope(t.nearest_lines[kSigned].slope),
        floor(t.nearest_lines[kSigned].floor) {}

  TORCHAO8_HD I look_up(F y) const {
    const int* const table = reinterpret_cast<const int*>(words);
    const I cell = bits(y) >> 16;
    const I sum = bits(y) + I{_mm256_i32gather_epi32(table, cell.low, 4),
                              _mm256_i32gather_epi32(table, cell.high, 4)};
    const I code = {_mm256_srai_epi32(sum.low, 16), _mm256_srai_epi32(sum.high, 16)};
    return kSigned ? I{_mm256_abs_epi32(code.low), _mm256_abs_epi32(code.high)} : code;
  }

  TORCHAO8_HD void operator()(F x, float inverse, uint8_t* codes) const {
    const F y = x * F(inverse);
    const F floored = max(kSigned ? magnitude(y) : y, floor);
    const I guess = decade_bits(bits(floored) >> 24);  // too low by at most one
    const I length = guess - bits(compare<_CMP_GE_OQ>(floored, next_start(guess)));
    const float ulp = 0x1p-23f;
    F z = fma(floored, slope(length), F(float(8.0 / 9) + kNearTie * ulp));
    z = min(z, F(2 - ulp));
    const I significand = bits(z) & all_lanes(0xffffff);
    const I kk = significand >> (all_lanes(24) - length);
    I code;
    if constexpr (kSigned) {
      code = with_sign(kk, bits(y)) + all_lanes(kZeroCodeSigned);  // -1 is stored as 0
    } else {
      code = kk - all_lanes(1);
    }
    const I rest = (significand << length) & all_lanes(0xffffff);
    const I near_tie = equal(min(rest, all_lanes(kTies)), rest);
    if (__builtin_expect(any(near_tie), 0)) code = select(near_tie, look_up(y), code);
    // Zero stays zero: where x is not zero, its bits are a number above any code it can have.
    if constexpr (!kSigned) code = min(code, bits(x));
    store_bytes(codes, code);
  }
};

template <bool kSigned>
struct StochasticEncoder {
  F floor;
  Table8 next_start, a, b, c;
  TORCHAO8_HD explicit StochasticEncoder(const CodecTables& t)
      // Signed: below it, 2^-23, all is class 0; it only keeps the guess from being negative.
      : floor(kSigned ? 0x1p-23f : t.position[kSigned].floor),
        next_start(t.position[kSigned].start + 1),
        a(t.position[kSigned].a),
        b(t.position[kSigned].b),
        c(t.position[kSigned].c) {}

  TORCHAO8_HD void operator()(F x, float inverse, F one_to_two, uint8_t* codes) const {
    F y, floored;
    if constexpr (kSigned) {
      y = fma(magnitude(x), F(std::fabs(inverse)), F(kPositionBias));
      floored = max(y, floor);
    } else {
      y = floored = max(fma(x, F(inverse), F(kPositionBias)), floor);
    }
    // The bits of a float are its base-2 logarithm, scaled, up to 0.086 too low. The class guessed
    // from them is the right one or the one below.
    const I u = bits(floored);
    const F log2 = {_mm256_cvtepi32_ps(u.low), _mm256_cvtepi32_ps(u.high)};
    const I guess = truncate(fma(log2, F(3.5885572e-8f), F(-31.230809f)));
    const I d = guess - bits(compare<_CMP_GE_OQ>(y, next_start(guess)));
    const F line = fma(y, a(d), b(d));
    const F gap = fma(line, F(kGapSlope), c(d));
    const I kk = truncate(min(gap, line) + one_to_two);
    I code;
    if constexpr (kSigned) {
      // There is no code for -1.0: its number is -1, which is stored as 0.
      const I sign = (bits(x) ^ all_lanes(float_bits(inverse))) | all_lanes(1);
      code = with_sign(kk, sign) + all_lanes(kZeroCodeSigned);
    } else {
      // Zero stays zero: where x is not zero, its bits are a number above any code it can have.
      code = min(kk, bits(x));
    }
    store_bytes(codes, code);
  }
};

}  // namespace torchao8::avx2::dynamic

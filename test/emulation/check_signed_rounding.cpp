// Checks the stochastic encoder of the signed map: its mean, in double, and that another path gives
// the same codes. That path is AVX2 with -DPATH_AVX2, AVX-512 with -DPATH_AVX512, else the GPU's.
// Prints a line for each failure; the exit status tells whether there is one.
#if !defined(PATH_AVX2) && !defined(PATH_AVX512)
#define TORCHAO8_EMULATE
#endif
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/formats/dynamic/scalar.h"
#include "cpu/kernels.h"
#if defined(PATH_AVX2)
#include <immintrin.h>

#include "cpu/vec/avx2.h"

#include "cpu/formats/dynamic/avx2.h"
namespace path = torchao8::avx2;
#elif defined(PATH_AVX512)
#include <immintrin.h>

#include "cpu/vec/avx512.h"

#include "cpu/formats/dynamic/avx512.h"
namespace path = torchao8::avx512;
#else
#include "cuda/codec.cuh"
#endif

using namespace torchao8;

namespace {

int failures = 0;

template <class... Values>
void fail(const char* format, Values... values) {
  if (failures++ < 20) std::printf(format, values...);
}

const scalar::dynamic::StochasticEncoder<true> kEncoder(codec_tables());

int code_of(float x, float inverse, float one_to_two) {
  uint8_t code;
  kEncoder(x, inverse, one_to_two, &code);
  return code;
}

float number(uint32_t r) {  // 1 + (r + 1/2) / 2^14
  return one_to_two(r << 9);
}
constexpr uint32_t kNumbers = 1 << 14;

// The mean over all random numbers is the value itself, to 2^-13 of the distance between the codes
// around it: the numbers are 2^-14 apart, and the position, up to 127 in float32, is off by some
// 2^-17 after three roundings. This does not hold from -1 to -0.993, where there is no code.
void check_mean(double y) {
  const double last = value_of_code(true, 254);
  double sum = 0;
  int low = 255, high = 0, previous = -1;
  for (uint32_t r = 0; r < kNumbers; r++) {
    const int code = code_of(float(y), 1.0f, number(r));
    low = std::min(low, code);
    high = std::max(high, code);
    const int magnitude = code < 127 ? 127 - code : code - 127;
    if (magnitude < previous) fail("%.9g: not monotone in the random number\n", y);
    previous = magnitude;
    sum += value_of_code(true, code);
  }
  if (high > low + 1) fail("%.9g: codes %d to %d\n", y, low, high);
  if (y < -last) {
    if (low != 0 || high != 0) fail("%.9g: %d to %d, not the last negative code\n", y, low, high);
    return;
  }
  int below = 0;
  while (below < 254 && value_of_code(true, below + 1) <= y) below++;
  const double gap = double(value_of_code(true, below + 1)) - value_of_code(true, below);
  const double error = std::fabs(sum / kNumbers - double(float(y)));
  if (error > gap / 8192) fail("%.9g: the mean is off by %.3g of a code\n", y, error / gap);
}

std::vector<float> numbers_to_try() {
  std::vector<float> x = {0.0f, -0.0f, 1e-40f, -1e-40f, 1e-30f, 0x1p-40f, -0x1p-40f, 0x1p-31f};
  const auto around = [&](float v) {
    uint32_t u = float_bits(v) - 4;
    for (int i = 0; i < 9; i++) x.push_back(bits_float(u++));
  };
  for (int code = 0; code < 256; code++) {
    if (code == 127) continue;
    around(value_of_code(true, code));
    around(
        float((double(value_of_code(true, code)) + value_of_code(true, code + (code < 127))) / 2));
  }
  std::mt19937 random(5);
  for (int i = 0; i < 20000; i++) {
    const float magnitude = std::exp2(-36.0f * float(random() % 65536) / 65536);
    x.push_back(random() % 2 ? magnitude : -magnitude);
  }
  while (x.size() % 16) x.push_back(0.0f);
  return x;
}

void compare(float inverse) {
  const std::vector<float> x = numbers_to_try();
  std::mt19937 random(7);
#if !defined(PATH_AVX2) && !defined(PATH_AVX512)
  static const cuda::Tables tables = cuda::make_tables();
#else
  const path::dynamic::StochasticEncoder<true> encoder(codec_tables());
#endif
  for (int round = 0; round < 40; round++) {
    const uint32_t r = round == 0 ? 0 : round == 1 ? kNumbers - 1 : random() % kNumbers;
    const float u = number(r);
#if defined(PATH_AVX2) || defined(PATH_AVX512)
    for (size_t i = 0; i < x.size(); i += path::kWidth) {
      float scaled[16];
      uint8_t codes[64];
      for (int j = 0; j < path::kWidth; j++) scaled[j] = x[i + size_t(j)] / inverse;
      encoder(path::load(scaled), inverse, path::F(u), codes);
      for (int j = 0; j < path::kWidth; j++) {
        const int want = code_of(scaled[j], inverse, u);
        if (codes[j] != want) fail("%.9g: %d in place of %d\n", scaled[j], codes[j], want);
      }
    }
#else
    for (float value : x) {
      const float scaled = value / inverse;
      const int code = int(cuda::encode_stochastic<true>(tables, scaled, inverse, u));
      const int want = code_of(scaled, inverse, u);
      if (code != want) fail("%.9g: %d in place of %d\n", scaled, code, want);
    }
#endif
  }
}

}  // namespace

int main() {
#if !defined(PATH_AVX2) && !defined(PATH_AVX512)
  for (int i = 0; i <= 1500; i++) {
    const double y = std::pow(10.0, -9.0 * i / 1500);
    check_mean(y);
    check_mean(-y);
  }
  for (int code = 0; code < 256; code++) check_mean(value_of_code(true, code));
  for (uint32_t r = 0; r < kNumbers; r++) {
    for (float extreme : {1.0f, bits_float(0x3f7fffff), bits_float(0x3f800001)})
      if (code_of(extreme, 1.0f, number(r)) != 255) fail("the extreme is not 255 with %u\n", r);
    for (float zero : {0.0f, -0.0f})
      if (code_of(zero, 1.0f, number(r)) != kZeroCodeSigned) fail("zero is not zero with %u\n", r);
    if (code_of(-3.0f, -1.0f / 3, number(r)) != 255) fail("a negative extreme with %u\n", r);
  }
#endif
  for (float inverse : {1.0f, -1.0f, 3.0f, -1e10f}) compare(inverse);
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// The dynamic map of "8-Bit Approximations for Parallelism in Deep Learning" (Dettmers, 2016) in
// the form that "8-bit Optimizers via Block-wise Quantization" (2022) uses, as arithmetic.
//
// With kk = |code - 127| (signed) or code + 1 (unsigned), decade i = 0..6 holds kk in [n, 2n),
// n = 2^i (signed) or 2^(i+1) (unsigned), and
//     value = 10^(i-6) * (0.1 + 0.9 * (kk - n + 0.5) / n) = a[i] * kk + b[i].
// The last kk, 2^7 or 2^8, is 1.0. Signed code 127 and unsigned code 0 are 0.0; there is no -1.0.
// The codebook is what fmaf(a, kk, b) gives: within 1e-6 of the published one.
#pragma once

#include "common/macros.h"

namespace torchao8 {

constexpr uint8_t kZeroCodeSigned = 127;
constexpr uint8_t kZeroCodeUnsigned = 0;
constexpr float kMinScale = 1.17549435e-38f;  // smallest normal; a smaller scale counts as zero
constexpr float kOverflow = 8.50705917302346e37f;  // 2^126: above it 1 / scale is subnormal

template <bool kSigned>
constexpr uint8_t zero_code() {
  return kSigned ? kZeroCodeSigned : kZeroCodeUnsigned;
}

struct Line {
  double a, b;
};

// value = a * kk + b in decade i.
inline Line decade_line(bool is_signed, int i) {
  const double n = is_signed ? double(1 << i) : double(2 << i);
  const double unit = std::pow(10.0, i - 6);
  return {unit * 0.9 / n, unit * (0.1 + 0.9 * (0.5 - n) / n)};
}

}  // namespace torchao8

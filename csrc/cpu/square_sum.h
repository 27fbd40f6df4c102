// The sum of squares that one thread has added up of one tensor so far.
#pragma once

#include <cstdint>
#include <cstring>

#include "codec/exact_sum.h"

namespace torchao8 {

struct SquareSum {
  static constexpr int64_t kMostBinned = 1 << 15;  // 48 bits each: below 2^63 in all

  int64_t limbs[kLimbs] = {};

  // value * 2^bit, bit 0 being limb 0's unit.
  TORCHAO8_HD void add(int64_t value, int bit) {
    add_at(value, bit, [this](int k, int64_t x) TORCHAO8_LAMBDA { limbs[k] += x; });
  }

  // Adds the squares of the finite ones of any floats: those of one exponent are integers of one
  // unit, summed in a bin of their own. Neighbours take different bins: they mostly share their
  // exponent, and an addition would have to wait for the one before it.
  TORCHAO8_HD void add_binned(const float* x, int64_t n) {
    while (n > 0) {
      if (binned_ == kMostBinned) fold();
      const int64_t room = kMostBinned - binned_, count = n < room ? n : room;
      const auto add_to = [&](uint64_t* bins, float value) TORCHAO8_LAMBDA {
        const uint32_t magnitude = float_bits(value) & 0x7fffffffu;
        const uint64_t mantissa = mantissa_of(magnitude);
        bins[magnitude >> 23] += mantissa * mantissa;
      };
      int64_t i = 0;
      for (; i + kWays <= count; i += kWays) {
        for (int way = 0; way < kWays; way++) add_to(bins_[way], x[i + way]);
      }
      for (; i < count; i++) add_to(bins_[0], x[i]);
      binned_ += count;
      x += count;
      n -= count;
    }
  }

  // Brings everything into canonical limbs.
  TORCHAO8_HD void finish() {
    fold();
    make_canonical(limbs);
  }

 private:
  static constexpr int kWays = 4;

  TORCHAO8_HD void fold() {
    if (binned_ == 0) return;
    for (int exponent = 0; exponent < 255; exponent++) {  // 255: infinity and NaN
      uint64_t sum = 0;
      for (int way = 0; way < kWays; way++) sum += bins_[way][exponent];
      if (sum != 0) add(int64_t(sum), bit_of_square(exponent));
    }
    std::memset(bins_, 0, sizeof bins_);
    binned_ = 0;
  }

  uint64_t bins_[kWays][256] = {};
  int64_t binned_ = 0;
};

}  // namespace torchao8

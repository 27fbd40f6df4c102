// Logarithm and exponential of what a rule makes of its numbers. By series of IEEE operations:
// libm's may differ between machines.
#pragma once

#include "macros.h"

namespace torchao8 {

// Of a number in (0, 1).
TORCHAO8_HD double series_log(double x) {
  double halvings = 0;
  for (; x < 0.7; x *= 2) halvings++;
  const double z = (x - 1) / (x + 1), square = z * z;
  double sum = 0;
  for (int k = 41; k > 0; k -= 2) sum = sum * square + 1.0 / k;
  return 2 * z * sum - halvings * 0.6931471805599453;
}

// e to the power of a number that is not positive.
TORCHAO8_HD double series_exp(double y) {
  int halvings = 0;
  for (; y < -0.5; y /= 2) halvings++;
  double sum = 1;
  for (int k = 18; k > 0; k--) sum = 1 + y * sum / k;
  for (; halvings > 0; halvings--) sum *= sum;
  return sum;
}

}  // namespace torchao8

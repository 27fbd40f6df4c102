// What an update rule is, and what its family tells of the op that applies it.
//
// A rule sees values, never memory: F is float, or a vector of floats with the same operations.
// Each operation is one IEEE operation in the order written, which is what makes every engine agree
// to the bit. It has
//     Options         the op's own arguments, and the numbers that all ops take; kNumbers names
//                     those that are numbers, in the order of the op's tensor of numbers, kFlags
//                     those that are true or false, in the order of its schema
//     kStates         states that are stored; kSigned[s] whether their numbers may be negative,
//                     kStochastic[s] whether they are rounded stochastically (if the caller says
//                     so)
//     kValues         numbers that moments() leaves for the update: the new states, then any others
//     kMomentsNeedParam   whether moments() reads the parameter
//     at_step(options, t, scaled_state)   the rule of one tensor at its step t, counted from 1
//     unit[s]         what one unit of a value is worth: scaled (8-bit) state may be computed in
//                     units of what a gradient adds, as the unit disappears in the scale
//     with_scales(scale)   the same, with the states stored as multiples of these; decay[s] is then
//                     what a stored number is multiplied by, and where that is not finite no number
//                     is
//     is_bounded()    whether no root or reciprocal that the update takes leaves the range in which
//                     a GPU computes it without a branch (cuda/device.cuh)
//     moments<kScaledState>(p, g, values)   values: the stored states on entry
//     root<kScaledState>(values), step(values, root), apply(p, step)   the new parameter in three
//                     parts, so that a loop can start long operations ahead
// An element whose new states are not all in range (finite, and not negative where unsigned) has a
// bad gradient: it keeps its parameter and states. A rule without states has its first value
// judged.
//
// A family is the set of rules that one op chooses from. It has
//     kOp             the op's name
//     kExtremesOp     that of the op which finds the extreme elements of the new states
//     kStates         the names of the states; the op's lists are <name>s and <name>_scales. Those
//     kOptional[s]    may be empty
//     Options         of its rules
//     choose(options, has, scaled_gradient, visit)   calls visit(Type<Rule>()), has[s] telling
//                     which states there are, scaled_gradient whether the op got a gradient scale
//                     or factors. A number that only the GPU knows is NaN here. A rule may do
//                     without the last states that there are: these stay as they are
#pragma once

#include <iterator>
#include <type_traits>
#include <utility>

#include "common/macros.h"

namespace torchao8 {

constexpr int kMaxStates = 3;  // of any rule

template <class T>
struct Type {
  using type = T;
};

constexpr int kFactors = 2;  // numbers of a parameter, that CommonOptions::multiply takes

// The numbers that every op takes, as tensors.
struct CommonOptions {
  double lr;
  double grad_scale;       // gradients are divided by it
  double clip_factor = 1;  // and multiplied by it

  // Makes them those of one parameter, whose gradient is clipped and whose learning rate is scaled.
  TORCHAO8_HD void multiply(const double* factors) {
    clip_factor = factors[0];
    lr *= factors[1];
  }
  TORCHAO8_HD double gradient_gain(bool maximize) const {
    return (maximize ? -1.0 : 1.0) / grad_scale * clip_factor;
  }
};

enum class Range { kDecayRate, kNotNegative, kFinite };

template <class Options>
struct NumberArgument {
  const char* name;
  double Options::* value;
  Range range;
};

template <class Options>
constexpr int kNumberCount = int(std::size(Options::kNumbers));

// Sets the numbers of a family from the values of the op's tensor of numbers.
template <class Options, size_t... K>
TORCHAO8_HD void set_numbers(Options& options, const double* values, std::index_sequence<K...>) {
  const auto set = [&](auto k) {
    constexpr double Options::* member = Options::kNumbers[k].value;
    options.*member = values[k];
  };
  (set(std::integral_constant<size_t, K>()), ...);
}
template <class Options>
TORCHAO8_HD void set_numbers(Options& options, const double* values) {
  set_numbers(options, values, std::make_index_sequence<kNumberCount<Options>>());
}

// base^t by repeated squaring: libm's pow may differ between machines.
TORCHAO8_HD double integer_power(double base, int64_t t) {
  double r = 1;
  for (; t > 0; t >>= 1, base *= base) {
    if (t & 1) r *= base;
  }
  return r;
}

// Under a root, so that 0 / 0 cannot happen with eps = 0. With 8-bit state v is in units of about
// the squared gradient, and 2^-101 (a gradient of 6e-16) is where a GPU's branch-free root is
// exact.
constexpr float kRootFloor8bit = 3.9443045e-31f;
constexpr float kRootFloor32bit = 1.17549435e-38f;  // smallest normal
template <bool kScaledState>
constexpr float root_floor() {
  return kScaledState ? kRootFloor8bit : kRootFloor32bit;
}

// Whether no denominator root * root_factor + eps_term leaves [2^-126, 2^126), of a root of what is
// from the floor of 8-bit state up to 2^126. So it is but for learning rates that are zero or out
// of all proportion.
TORCHAO8_HD bool denominator_is_bounded(float root_factor, float eps_term) {
  const float factor = std::fabs(root_factor), eps = std::fabs(eps_term);
  return factor >= 0x1p-75f && factor < 0x1p62f && eps < 0x1p124f;
}

}  // namespace torchao8

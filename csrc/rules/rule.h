// What an update rule is, and what its family tells of the ops that apply it.
//
// A rule sees values, never memory: F is float, or a vector of floats, with +, -, *, fma, sqrt,
// reciprocal, max and sign. Each operation is one IEEE operation in the order written, which is
// what makes every engine agree to the bit. It has
//     Options         the op's own arguments, and the numbers that all ops take; kNumbers names
//                     those that are numbers, in the order of the op's tensor of numbers, kFlags
//                     those that are true or false, in the order of its schema
//     kStates         states of the parameter's shape that are stored; kSigned[s] whether their
//                     numbers may be negative, kStochastic[s] whether they are rounded
//                     stochastically (if the caller says so)
//     kValues         numbers that moments() leaves for the update: the new states, then any others
//     kMomentsNeedParam   whether moments() reads the parameter
//     kRootOf[s]      the state whose root a signed state is about as large as, so that their
//                     quotient has few magnitudes; -1: none. A rule that does not say is not kept
//                     in 4 bits
//     at_step(options, t, scaled_state)   the rule of one tensor at its step t, counted from 1. A
//                     rule with scalar states says how many, kScalars, and takes a fourth argument,
//                     `float* scalars`: the stored ones on entry, the new ones when it returns
//     unit[s]         what one unit of a value is worth: scaled (8-bit) state may be computed in
//                     units of what a gradient adds, as the unit disappears in the scale. Adam's m
//                     is beta1 * m + (1 - beta1) * g: in units of 1 - beta1 the g enters as it is.
//                     Above 1, a GPU's fast path takes no block
//     with_scales(scale)   the same, with the states stored as multiples of these; decay[s] is then
//                     what a stored number is multiplied by, and where that is not finite no number
//                     is
//     magnitudes()    the same, with the magnitude of each number that moments() takes: at the
//     largest
//                     magnitudes of a block it gives bounds of all new states, to the bit, as
//                     rounding is monotone. Not of a rule whose moments divide: it says kMonotone,
//                     false, and its bounds are not asked for
//     is_bounded()    whether no root or reciprocal that the update takes leaves the range in which
//                     a GPU computes it without a branch (cuda/device.cuh); true where there is
//                     none
//     moments<kScaledState>(p, g, values)   values: the stored states on entry
//     root<kScaledState>(values), step(values, root), apply(p, step)   the new parameter in three
//                     parts, so that a loop can start long operations ahead; update(), in update.h,
//                     is the three in a row
// An element whose new states are not all in range (finite, and not negative where unsigned) has a
// bad gradient: it keeps its parameter and states. A rule without states has its first value
// judged. A scalar state changes at every step.
//
// A family is the set of rules that one op chooses from (families.h lists them all). It has
//     kName           of which the ops' names are made: <name>_step_, and <name>_extremes, which
//                     finds the extreme elements of the new states
//     kStates         the states, in the order of the op's lists: <name>s, and, but for scalar
//                     ones, <name>_scales
//     Options         of its rules
//     Rules           all of them; the one with the most states has every state that is no scalar
//     choose(options, has, scaled_gradient, visit)   calls visit(Type<Rule>()), has[s] telling
//                     which states there are, scaled_gradient whether the op got a gradient scale
//                     or factors. A number that only the GPU knows is NaN here. A rule may do
//                     without the last states that there are: these stay as they are
#pragma once

#include <iterator>
#include <type_traits>
#include <utility>

#include "macros.h"

namespace torchao8 {

constexpr int kMaxStates = 3;   // of any rule, in tensors of the parameter's shape
constexpr int kMaxScalars = 1;  // states that are one number a parameter

template <class T>
struct Type {
  using type = T;
};
template <class... T>
struct Types {};

enum class Presence {
  kAlways,
  kOptional,  // the list of it may be empty
  kScalar,    // one float32 number a parameter, of shape (), always there
};
struct State {
  const char* name;
  Presence presence = Presence::kAlways;
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
struct FlagArgument {
  const char* name;
  bool Options::* value;
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

// How many of a family's states are scalar ones, and how many are not.
template <class Family>
constexpr int count_scalars() {
  int count = 0;
  for (const State& state : Family::kStates) count += state.presence == Presence::kScalar;
  return count;
}
template <class Family>
constexpr int count_tensors() {
  return int(std::size(Family::kStates)) - count_scalars<Family>();
}

// kScalars of a rule, which those without scalar states leave out.
template <class Rule, class = void>
constexpr int kScalarsOf = 0;
template <class Rule>
constexpr int kScalarsOf<Rule, std::void_t<decltype(Rule::kScalars)>> = Rule::kScalars;

// Whether moments() at the largest magnitudes bounds those of every element.
template <class Rule, class = void>
constexpr bool kMonotoneOf = true;
template <class Rule>
constexpr bool kMonotoneOf<Rule, std::void_t<decltype(Rule::kMonotone)>> = Rule::kMonotone;

// Whether a rule names the states whose roots others are about as large as.
template <class Rule, class = void>
constexpr bool kNamesRoots = false;
template <class Rule>
constexpr bool kNamesRoots<Rule, std::void_t<decltype(Rule::kRootOf)>> = true;

// The rule of a tensor at its step t; its scalar states become the new ones.
template <class Rule>
TORCHAO8_HD Rule rule_at_step(const typename Rule::Options& options, int64_t t, bool scaled_state,
                              float* scalars) {
  if constexpr (kScalarsOf<Rule> > 0) {
    return Rule::at_step(options, t, scaled_state, scalars);
  } else {
    return Rule::at_step(options, t, scaled_state);
  }
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

// The rules that each instruction set is built for; a new rule is two lines here. Their headers are
// included here because a rule's functions must be compiled for the target that they are inlined
// in.
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/lamb.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace torchao8 {

template <class Rule>
const StepKernels<Rule>& TORCHAO8_KERNELS() {
  static constexpr StepKernels<Rule> kernels = TORCHAO8_ISA::make_step_kernels<Rule>();
  return kernels;
}

template <class Rule>
const MeasureKernels<Rule>& TORCHAO8_MEASURES() {
  static constexpr MeasureKernels<Rule> kernels = TORCHAO8_ISA::make_measure_kernels<Rule>();
  return kernels;
}

const CodecKernels& TORCHAO8_CODEC() {
  static constexpr CodecKernels kernels = TORCHAO8_ISA::make_codec_kernels();
  return kernels;
}

void TORCHAO8_ADD_SQUARES(const float* x, int64_t n, SquareSum& sum) {
  TORCHAO8_ISA::add_squares(x, n, sum);
}

#define TORCHAO8_RULE(...) template const StepKernels<__VA_ARGS__>& TORCHAO8_KERNELS<__VA_ARGS__>()
TORCHAO8_RULE(AdamRule<false, false>);
TORCHAO8_RULE(AdamRule<false, true>);
TORCHAO8_RULE(AdamRule<true, false>);
TORCHAO8_RULE(AdamRule<true, true>);
TORCHAO8_RULE(AdagradRule);
TORCHAO8_RULE(AdemamixRule);
TORCHAO8_RULE(LionRule);
TORCHAO8_RULE(RmspropRule<false, false>);
TORCHAO8_RULE(RmspropRule<false, true>);
TORCHAO8_RULE(RmspropRule<true, false>);
TORCHAO8_RULE(RmspropRule<true, true>);
TORCHAO8_RULE(SgdRule<false, false>);
TORCHAO8_RULE(SgdRule<true, false>);
TORCHAO8_RULE(SgdRule<true, true>);
#undef TORCHAO8_RULE
template const MeasureKernels<LambRule>& TORCHAO8_MEASURES<LambRule>();

}  // namespace torchao8

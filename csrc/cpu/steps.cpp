// The step ops on the CPU.
#include "cpu/step_op.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace {

template <class Family, class Library>
void implement(Library& m) {
  m.impl(Family::kOp, TORCH_BOX(&torchao8::StepOp<Family>::run));
  m.impl(Family::kExtremesOp, TORCH_BOX(&torchao8::StepOp<Family>::extremes));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  implement<torchao8::AdagradFamily>(m);
  implement<torchao8::AdamFamily>(m);
  implement<torchao8::AdemamixFamily>(m);
  implement<torchao8::LionFamily>(m);
  implement<torchao8::RmspropFamily>(m);
  implement<torchao8::SgdFamily>(m);
}

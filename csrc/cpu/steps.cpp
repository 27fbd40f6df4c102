// The step ops on the CPU.
#include "cpu/step_op.h"
#include "rules/adam.h"

STABLE_TORCH_LIBRARY_IMPL(torchao8, CPU, m) {
  m.impl("adam_step_", TORCH_BOX(&torchao8::StepOp<torchao8::AdamFamily>::run));
}

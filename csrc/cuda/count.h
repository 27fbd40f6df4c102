// Counting a step, for the op that does only that and for the step of a family.
#pragma once

#include "cuda/launch.h"
#include "op/tensor_list.h"

namespace torchao8::cuda {

// Adds 1 to each of the step counts, on the stream of the launcher, unless found_inf is not 0.
void count_steps(const Launcher& launcher, const TensorList& steps, const Scalar& found_inf);

}  // namespace torchao8::cuda

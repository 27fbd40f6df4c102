// The codec's tables on the device, a part of the program.
#pragma once

#include "cuda/launch.h"

namespace torchao8::cuda {

struct Tables;

// On the launcher's device, which is the current one.
const Tables* tables_on(const Launcher& launcher);

}  // namespace torchao8::cuda

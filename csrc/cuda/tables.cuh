// The codec's tables on the device: part of the program, for each file that includes this.
#pragma once

#include "cuda/codec.cuh"

namespace torchao8::cuda {
namespace {

__device__ const Tables device_tables = make_tables();

}  // namespace
}  // namespace torchao8::cuda

// Compares the kernels of sum_squares and norms on emulated warps with the CPU's plain C++ path,
// bit for bit. Prints a line for each case that differs; the exit status tells whether one does.
// With -DQUICK it leaves out the case that takes seconds.
#define TORCHAO8_EMULATE
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/sums.cuh"

using namespace torchao8;

namespace {

emulation::Failures failures;

struct Case {
  int64_t count;
  int low, high;  // the range of exponents
  int bad = 0;    // elements that are NaN or infinite
  bool zeros = false;
  int shift = 0;  // elements between the start of the memory and the tensor
  FloatType type = FloatType::kFloat32;
};

const FloatType kBf16 = FloatType::kBFloat16, kF16 = FloatType::kFloat16;
const Case kCases[] = {
    {0, 0, 0},
    {1, 0, 0},
    {255, -3, 3},
    {256, -3, 3},
    {257, -3, 3},
    {1024, -20, 0},
    {1025, -20, 0},
    {3000, -20, 0, 0, true},
    {3000, -20, 0, 7},
    {9000, -60, 10},  // beyond a window
    {5000, -150, 127, 3, true},
    {5000, -150, -110, 0, true},  // subnormal ones
    {5000, 90, 127},
    {4000, 127, 127},
    {4000, -149, -149},
    {3000, -12, 0, 0, false, 1},
    {3000, -12, 0, 5, true, 3, kBf16},
    {5000, -140, 127, 5, true, 0, kBf16},
    {3000, -12, 0, 5, true, 1, kF16},
    {5000, -24, 15, 5, true, 0, kF16},
    {40000, -30, 0},
};
constexpr int kTiny = 1100;  // more tensors than a launch takes

struct Input {
  Case how;
  std::vector<unsigned char> memory;
  const void* data() const { return memory.data() + size_t(how.shift) * cuda::bytes_of(how.type); }
};

Input make_input(const Case& how, std::mt19937& random) {
  Input input = {how, {}};
  input.memory.resize(size_t(how.count + how.shift) * cuda::bytes_of(how.type));
  void* data = const_cast<void*>(input.data());
  const float bad[] = {NAN, INFINITY, -INFINITY};
  for (int64_t i = 0; i < how.count; i++) {
    const float mantissa = 1 + float(random() >> 9) * 0x1p-23f;
    const int exponent = how.low + int(random() % unsigned(how.high - how.low + 1));
    float x = std::ldexp(random() % 2 ? mantissa : -mantissa, exponent);
    if (how.zeros && random() % 3 == 0) x = random() % 2 ? 0.0f : -0.0f;
    cuda::store_as(how.type, data, i, x);
  }
  // Smaller numbers at the start: the window of exponents has to move up.
  for (int64_t i = 0; i < how.count / 4; i++)
    cuda::store_as(how.type, data, i, cuda::load_as(how.type, data, i) * 0x1p-40f);
  for (int k = 0; k < how.bad; k++)
    cuda::store_as(how.type, data, int64_t(random() % uint64_t(how.count)), bad[k % 3]);
  return input;
}

void check(const std::string& name, const std::vector<Input>& inputs, unsigned blocks) {
  const size_t rows = inputs.size();
  std::vector<int64_t> got(rows * kLimbs), want;
  std::vector<double> got_norms(rows, -1), want_norms;
  const auto launch = [&](const cuda::SumTable& table) {
    emulation::launch(blocks, cuda::kThreads, [&] { cuda::sum_squares(table); });
  };
  cuda::SumFiller<decltype(launch)> filler(got.data(), launch);
  for (size_t i = 0; i < rows; i++)
    filler.add({inputs[i].data(), inputs[i].how.count, int64_t(i), 0, inputs[i].how.type});
  filler.flush();
  const unsigned row_blocks = unsigned(rows + cuda::kThreads - 1) / cuda::kThreads;
  // Limbs that are not canonical, as after rows were added up.
  for (size_t i = 0; i < rows; i++) got[i * kLimbs + 4] += int64_t(i % 3) << 40;
  emulation::launch(row_blocks, cuda::kThreads,
                    [&] { cuda::round_norms(got.data(), got_norms.data(), int64_t(rows)); });
  emulation::launch(row_blocks, cuda::kThreads,
                    [&] { cuda::canonicalize(got.data(), int64_t(rows)); });
  auto sum = std::make_unique<SquareSum>();
  std::vector<float> floats;
  for (size_t i = 0; i < rows; i++) {
    *sum = {};
    floats.resize(size_t(inputs[i].how.count));
    for (size_t j = 0; j < floats.size(); j++)
      floats[j] = cuda::load_as(inputs[i].how.type, inputs[i].data(), int64_t(j));
    scalar_add_squares(floats.data(), inputs[i].how.count, *sum);
    sum->finish();
    sum->limbs[4] += int64_t(i % 3) << 40;
    make_canonical(sum->limbs);
    want.insert(want.end(), sum->limbs, sum->limbs + kLimbs);
    want_norms.push_back(std::sqrt(round_sum(sum->limbs)));
  }
  for (size_t i = 0; i < rows; i++) {
    const bool same = std::equal(&got[i * kLimbs], &got[i * kLimbs] + kLimbs, &want[i * kLimbs]);
    if (same && got_norms[i] == want_norms[i]) continue;
    failures++;
    std::printf("%s, %u blocks, tensor %zu of %ld elements: %s differs\n", name.c_str(), blocks, i,
                long(inputs[i].how.count), same ? "its norm" : "its sum");
  }
}

}  // namespace

int main() {
  std::mt19937 random(5);
  std::vector<Input> inputs;
  for (const Case& how : kCases) inputs.push_back(make_input(how, random));
  for (unsigned blocks : {1u, 3u, 200u}) check("all", inputs, blocks);
  inputs.clear();
  for (int i = 0; i < kTiny; i++) inputs.push_back(make_input({i % 5, -3, 3}, random));
  check("tiny", inputs, 3);
#ifndef QUICK
  // 1.25 x 2^18 elements a lane, more than its registers can sum up.
  Input large = {{(int64_t(5) << 16) * cuda::kThreads, 127, 127, 0, false, 0, kBf16}, {}};
  large.memory.assign(size_t(large.how.count) * 2, 0x7f);  // 3.4e38
  check("large", {large}, 1);
#endif
  std::printf("%d configurations differ\n", failures.count);
  return failures.count != 0;
}
